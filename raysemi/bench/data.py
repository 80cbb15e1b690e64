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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from torch.utils.data import Dataset

from raysemi.bench.rivals import PREPARED, Source, decoded, lengths
from raysemi.data.joined import AnyPool
from raysemi.data.loader import DataConfig, Stream
from raysemi.data.mixture import order_of
from raysemi.data.pool import Pool
from raysemi.data.views import Geometry, draw_geometry, generator
from raysemi.errors import ConfigError

_SEED = 0


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
    """Of `rivals.PREPARED`."""

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
    unknown = [name for name in settings.rivals if name not in PREPARED]
    if unknown:
        raise ConfigError(f"--beside must name some of {', '.join(PREPARED)}; got {unknown[0]}. Change it.")
    if not pool.local:
        raise ConfigError(f"the pool must lie in a folder, whose files the floor reads itself; got {path}. Copy it.")
    missing = [name for name in settings.rivals if find_spec(name) is None and name != "folder"]
    if missing:
        raise ConfigError(f"--beside must name what is installed; got {missing[0]}. Run: pip install {missing[0]}")
    results = []
    with tempfile.TemporaryDirectory(prefix="raysemi-bench-") as folder:
        made = {name: PREPARED[name](pool, Path(folder), settings.crop, settings.batch) for name in settings.rivals}
        for number, count in enumerate(processes):
            told = None if progress is None else functools.partial(_shifted, progress, number, len(processes))
            results.append(_measured(pool, settings, count, made, told))
    return results


def _shifted(progress: Callable[[int, int], None], number: int, parts: int, done: int, turns: int) -> None:
    progress(number * turns + done, parts * turns)


def as_lines(results: Sequence[DataResult]) -> tuple[list[int], dict[str, list[float]]]:
    """Numbers of loader processes, and the rates of each reader with them: ours, the floor, the others."""
    results = sorted(results, key=lambda result: result.processes)
    lines = {
        "raysemi": [result.images_per_s for result in results],
        "floor: the same images decoded and resized": [result.floor_images_per_s for result in results],
    }
    lines |= {name: [result.rivals[name]["images_per_s"] for result in results] for name in results[0].rivals}
    return [result.processes for result in results], lines


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
    yield lengths(_Floor(pool, plans, view), processes)


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
            image = np.asarray(decoded(self._bytes(planned.shard, *planned.image)))
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
