"""`raysemi bench data`: the stream of a pool against its floor, and beside other ways to read the same images.

Floor: the same samples' bytes, decoded, and one uint8 `interpolate` of the region that the view shows; nothing else.
Beside it, each with the same decoding and the same weak views, in an order of its own: plain webdataset over the
shards, a torch dataset over a folder of files, litdata over its own chunks. All take turns in one run, so that whatever
else keeps the machine busy meets them all; each has as many processes.
Colour, blur and greyscale are made on the device in training, and have no part here.
"""

from __future__ import annotations

import functools
import itertools
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from raysemi.data.joined import AnyPool
from raysemi.data.loader import DataConfig, Stream
from raysemi.data.mixture import order_of
from raysemi.data.pool import IMAGE_SUFFIXES, MASK_SUFFIX, Pool
from raysemi.data.views import Geometry, draw_geometry, generator, label_view, valid_view, weak_view
from raysemi.errors import ConfigError

RIVALS = ("webdataset", "folder", "litdata")
_SEED = 0
_SHUFFLED = 1000
"""Samples of webdataset's shuffle buffer, as its documentation has it."""
Sample = tuple[bytes, bytes | None]
"""Bytes of an image, and of its mask."""


@dataclass(frozen=True)
class DataSettings:
    """What is measured."""

    crop: int = 321
    """Side of the views, pixels."""
    batch: int = 16
    """Images a batch."""
    images: int = 256
    """Images that each of them reads in a turn, rounded up to whole batches."""
    turns: int = 5
    """Times that they take turns."""
    rivals: tuple[str, ...] = ()
    """Of `RIVALS`."""

    @property
    def steps(self) -> int:
        """Batches of a turn."""
        return -(-self.images // self.batch)


@dataclass(frozen=True)
class DataResult:
    """What was measured with a number of processes; rates are medians over turns, ratios medians of the turns' own."""

    pool: str
    labeled: bool
    crop: int
    batch: int
    processes: int
    """Loader processes; 0 = all in the process that asks."""
    turns: int
    images_per_s: float
    floor_images_per_s: float
    ratio: float
    """images_per_s / floor_images_per_s."""
    decode_images_per_s: float
    """Reading and decoding alone."""
    ratio_to_decoding: float
    rivals: dict[str, dict[str, float]]
    """Name -> `images_per_s`, and `ratio`: ours to theirs."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def measure_data(
    path: str | Path,
    settings: DataSettings,
    processes: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> list[DataResult]:
    """Times the stream of a pool and what stands beside it.

    Args:
        path: the pool; with masks where all of its samples have them.
        settings: what is measured.
        processes: numbers of loader processes, one result each.
        progress: called with (turns done, turns in all).

    Raises:
        ConfigError: a pool too small for a turn, a rival that is not installed.
        DataError: a pool that cannot be read.
    """
    pool = Pool.open(path)
    most = (settings.steps + _warm_up(max(processes))) * settings.batch
    if settings.rivals and pool.num_samples < most:
        raise ConfigError(
            f"--beside must be left out for a pool smaller than a turn of {most} images, since others pause between "
            f"passes; got {path} with {pool.num_samples}. Lower --images, or take a larger pool."
        )
    unknown = [name for name in settings.rivals if name not in RIVALS]
    if unknown:
        raise ConfigError(f"--beside must name some of {', '.join(RIVALS)}; got {unknown[0]}. Change it.")
    if not pool.local:
        raise ConfigError(f"the pool must lie in a folder, whose files the floor reads itself; got {path}. Copy it.")
    missing = [name for name in settings.rivals if find_spec(name) is None and name != "folder"]
    if missing:
        raise ConfigError(f"--beside must name what is installed; got {missing[0]}. Run: pip install {missing[0]}")
    results = []
    with tempfile.TemporaryDirectory(prefix="raysemi-bench-") as folder:
        made = {name: _PREPARED[name](pool, Path(folder), settings) for name in settings.rivals}
        for number, count in enumerate(processes):
            told = None if progress is None else functools.partial(_shifted, progress, number, len(processes))
            results.append(_measured(pool, settings, count, made, told))
    return results


def _shifted(progress: Callable[[int, int], None], number: int, parts: int, done: int, turns: int) -> None:
    progress(number * turns + done, parts * turns)


def as_table(results: Sequence[DataResult]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows for people: images a second, and the stream's rate divided by each other one."""
    rivals = list(results[0].rivals) if results else []
    heading = ["processes", "stream, images/s", "floor", "ratio", "decoding alone", "ratio"]
    heading += [text for name in rivals for text in (name, "ratio")]
    rows = []
    for one in results:
        pairs = [(one.floor_images_per_s, one.ratio), (one.decode_images_per_s, one.ratio_to_decoding)]
        pairs += [(one.rivals[name]["images_per_s"], one.rivals[name]["ratio"]) for name in rivals]
        cells = [text for rate, ratio in pairs for text in (f"{rate:.0f}", f"{ratio:.2f}")]
        rows.append([str(one.processes), f"{one.images_per_s:.0f}", *cells])
    return heading, rows


Source = Callable[[int, int], AbstractContextManager[Iterator[int]]]
"""(processes, turn) -> images of each batch as it comes, workers already at work."""


def _measured(
    pool: Pool,
    settings: DataSettings,
    processes: int,
    rivals: Mapping[str, Source],
    progress: Callable[[int, int], None] | None,
) -> DataResult:
    sources: dict[str, Source] = {
        "stream": functools.partial(_stream, pool, settings),
        "floor": functools.partial(_floor, pool, settings, True),
        "decode": functools.partial(_floor, pool, settings, False),
        **rivals,
    }
    rates: dict[str, list[float]] = {name: [] for name in sources}
    for turn in range(settings.turns):
        names = list(sources)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # nobody is always first
            with sources[name](processes, turn) as batches:
                rates[name].append(_rate(batches, _warm_up(processes), settings.steps))
        if progress is not None:
            progress(turn + 1, settings.turns)

    def ratio(name: str) -> float:
        return statistics.median(ours / theirs for ours, theirs in zip(rates["stream"], rates[name], strict=True))

    typical = {name: statistics.median(values) for name, values in rates.items()}
    return DataResult(
        pool=str(pool.path), labeled=pool.labeled, crop=settings.crop, batch=settings.batch, processes=processes,
        turns=settings.turns, images_per_s=typical["stream"], floor_images_per_s=typical["floor"],
        ratio=ratio("floor"), decode_images_per_s=typical["decode"], ratio_to_decoding=ratio("decode"),
        rivals={name: {"images_per_s": typical[name], "ratio": ratio(name)} for name in rivals},
    )  # fmt: skip


def _rate(batches: Iterator[int], warm_up: int, steps: int) -> float:
    """Images a second, once the processes are at work and what they had prepared in advance is gone."""
    for _ in itertools.islice(batches, warm_up):
        pass
    start = time.perf_counter()
    images = sum(itertools.islice(batches, steps))
    return images / (time.perf_counter() - start)


def _warm_up(processes: int) -> int:
    """Batches that are read before the clock starts: processes start, and prepare two each in advance."""
    return max(2 * processes, 1)


@contextmanager
def _stream(pool: AnyPool, settings: DataSettings, processes: int, turn: int) -> Iterator[Iterator[int]]:
    name = "labeled" if pool.labeled else "unlabeled"
    steps = settings.steps + _warm_up(processes)
    stream = Stream(
        DataConfig(crop=settings.crop, loader_processes=processes),
        {name: pool},
        seed=_SEED,
        batch_labeled=settings.batch if pool.labeled else 0,
        batch_unlabeled=0 if pool.labeled else settings.batch,
        rank=0,
        world=1,
        strong_views=1,
        second_view=False,
        start=turn * steps,
        stop=(turn + 1) * steps,
    )
    yield (len(batch.keys_L) + len(batch.keys_U) for batch in stream)


@contextmanager
def _floor(pool: Pool, settings: DataSettings, view: bool, processes: int, turn: int) -> Iterator[Iterator[int]]:
    steps = settings.steps + _warm_up(processes)
    order = order_of(pool, _SEED, settings.batch)
    plans = []
    for step in range(turn * steps, (turn + 1) * steps):
        rows, passes = order.slots(step, 0, settings.batch)
        plans.append(
            [_Planned.of(pool, int(row), int(number), settings.crop) for row, number in zip(rows, passes, strict=True)]
        )
    yield _lengths(_Floor(pool, plans, view), processes)


@dataclass(frozen=True)
class _Planned:
    """A sample as the floor needs it: where its bytes are, and what of it is shown at which size."""

    shard: str
    image: tuple[int, int]
    mask: tuple[int, int] | None
    region: tuple[int, int, int, int]
    """Rows and columns of the source, half open."""
    shown: tuple[int, int]

    @staticmethod
    def of(pool: Pool, row_index: int, pass_number: int, crop: int) -> _Planned:
        row = pool.row(row_index)
        views = DataConfig(crop=crop).views
        drawn = draw_geometry(generator(_SEED, pass_number, row.key, "geometry"), views, row.height, row.width, crop)
        mask = (row.mask_offset, row.mask_bytes) if row.mask_offset is not None and row.mask_bytes is not None else None
        image = row.image_offset, row.image_bytes
        return _Planned(row.shard, image, mask if pool.labeled else None, _region(drawn), drawn.shown)


def _region(drawn: Geometry) -> tuple[int, int, int, int]:
    height, width = drawn.shown
    down, across = drawn.height / drawn.resized_height, drawn.width / drawn.resized_width
    top, left = int(drawn.top * down), int(drawn.left * across)
    bottom = min(max(int((drawn.top + height) * down), top + 1), drawn.height)
    right = min(max(int((drawn.left + width) * across), left + 1), drawn.width)
    return top, bottom, left, right


class _Floor(Dataset[int]):
    """Step -> number of images, once they are read, decoded and, with `view`, resized."""

    def __init__(self, pool: Pool, plans: list[list[_Planned]], view: bool) -> None:
        self.folder, self.plans, self.view = pool.folder, plans, view
        self.files: dict[tuple[int, str], int] = {}

    def __len__(self) -> int:
        return len(self.plans)

    def __getitem__(self, step: int) -> int:
        for planned in self.plans[step]:
            image = np.asarray(_decoded(self._bytes(planned.shard, *planned.image)))
            mask = (
                None
                if planned.mask is None
                else np.asarray(Image.open(BytesIO(self._bytes(planned.shard, *planned.mask))))
            )
            if self.view:
                top, bottom, left, right = planned.region
                region_1CHW = torch.from_numpy(image[top:bottom, left:right]).permute(2, 0, 1)[None]
                functional.interpolate(region_1CHW, size=planned.shown, mode="bilinear", antialias=True)
                if mask is not None:
                    region_11HW = torch.from_numpy(mask[top:bottom, left:right])[None, None]
                    functional.interpolate(region_11HW, size=planned.shown, mode="nearest")
        return len(self.plans[step])

    def _bytes(self, shard: str, offset: int, length: int) -> bytes:
        place = (os.getpid(), shard)
        if place not in self.files:
            self.files[place] = os.open(f"{self.folder}/{shard}", os.O_RDONLY)
        return os.pread(self.files[place], length, offset)


def _decoded(content: bytes) -> Image.Image:
    picture = Image.open(BytesIO(content))
    return picture.convert("RGB") if picture.mode != "RGB" else picture


def _lengths(dataset: Any, processes: int, **settings: Any) -> Iterator[int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = DataLoader(
            dataset,
            num_workers=processes,
            worker_init_fn=_one_thread,
            **({"batch_size": None, "collate_fn": _unchanged} | settings),
        )
        yield from map(_length, loader)


def _length(batch: Any) -> int:
    return batch if isinstance(batch, int) else len(batch[0])


class _Views:
    """Bytes -> weak view, its valid pixels and its label, drawn by a generator of this process's own."""

    def __init__(self, crop: int) -> None:
        self.config = DataConfig(crop=crop)
        self._process, self._rng = -1, np.random.default_rng()

    def __call__(self, image: bytes, mask: bytes | None) -> tuple[NDArray[Any], ...]:
        if self._process != os.getpid():
            self._process, self._rng = os.getpid(), np.random.default_rng()
        picture = _decoded(image)
        drawn = draw_geometry(self._rng, self.config.views, picture.height, picture.width, self.config.crop)
        view = weak_view(picture, drawn), valid_view(drawn)
        return view if mask is None else (*view, label_view(np.asarray(Image.open(BytesIO(mask))), drawn))


def _stacked(samples: Sequence[tuple[NDArray[Any], ...]]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(np.stack(parts)) for parts in zip(*samples, strict=True))


def _samples(pool: Pool) -> Iterator[tuple[str, Sample]]:
    """Keys, and the bytes of image and mask, in the order of the index."""
    for i in range(pool.num_samples):
        row = pool.row(i)
        with pool.open_shard(row.shard) as shard:
            image = shard.read_at(row.image_bytes, row.image_offset)
            mask = shard.read_at(row.mask_bytes, row.mask_offset) if pool.labeled else None
        yield row.key, (image, mask)


def _webdataset(pool: Pool, folder: Path, settings: DataSettings) -> Source:
    import webdataset

    urls = [f"{pool.folder}/{shard.name}" for shard in pool.shard_files]
    views = _Views(settings.crop)

    def view(sample: Mapping[str, bytes]) -> tuple[NDArray[Any], ...]:
        image = next(sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample)
        return views(image, sample[MASK_SUFFIX] if pool.labeled else None)

    def batches(processes: int, turn: int) -> AbstractContextManager[Iterator[int]]:
        dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=turn, empty_check=False)
        dataset = dataset.shuffle(_SHUFFLED).map(view).batched(settings.batch, collation_fn=_stacked)
        return nullcontext(_lengths(dataset, processes))

    return batches


class _Files(Dataset[Any]):
    """Image files of a folder, and their masks."""

    def __init__(self, folder: Path, views: _Views) -> None:
        self.images = sorted(folder.glob("*.image"))
        self.views = views

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[NDArray[Any], ...]:
        mask = self.images[i].with_suffix(".mask")
        return self.views(self.images[i].read_bytes(), mask.read_bytes() if mask.exists() else None)


def _folder(pool: Pool, folder: Path, settings: DataSettings) -> Source:
    files = folder / "files"
    files.mkdir()
    for number, (_, (image, mask)) in enumerate(_samples(pool)):
        (files / f"{number:09d}.image").write_bytes(image)
        if mask is not None:
            (files / f"{number:09d}.mask").write_bytes(mask)
    dataset = _Files(files, _Views(settings.crop))

    def batches(processes: int, turn: int) -> AbstractContextManager[Iterator[int]]:
        rng = torch.Generator().manual_seed(turn)
        return nullcontext(
            _lengths(dataset, processes, batch_size=settings.batch, shuffle=True, generator=rng, collate_fn=_stacked)
        )

    return batches


def _litdata(pool: Pool, folder: Path, settings: DataSettings) -> Source:
    import litdata

    chunks, views = folder / "chunks", _Views(settings.crop)
    writer = litdata.streaming.cache.Cache(str(chunks), chunk_bytes="64MB")
    for number, (_, (image, mask)) in enumerate(_samples(pool)):
        writer[number] = {"image": image, "mask": mask or b""}
    writer.done()
    writer.merge()

    class Chunks(litdata.StreamingDataset):
        def __getitem__(self, index: Any) -> tuple[NDArray[Any], ...]:
            sample = super().__getitem__(index)
            return views(sample["image"], sample["mask"] or None)

    @contextmanager
    def batches(processes: int, turn: int) -> Iterator[Iterator[int]]:
        dataset = Chunks(str(chunks), shuffle=True, seed=turn)
        loader = litdata.StreamingDataLoader(
            dataset, batch_size=settings.batch, num_workers=processes, collate_fn=_stacked
        )
        yield map(_length, loader)

    return batches


_PREPARED: dict[str, Callable[[Pool, Path, DataSettings], Source]] = {
    "webdataset": _webdataset,
    "folder": _folder,
    "litdata": _litdata,
}


def _unchanged(batch: Any) -> Any:
    return batch


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
