"""Other ways to read the images of a pool, for `bench data`: each with the same decoding and views as the stream."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from raysemi.data.loader import DataConfig
from raysemi.data.pool import IMAGE_SUFFIXES, MASK_SUFFIX, Pool
from raysemi.data.views import draw_geometry, label_view, valid_view, weak_view

_SHUFFLED = 1000
"""Samples of webdataset's shuffle buffer, as its documentation has it."""
Sample = tuple[bytes, bytes | None]
"""Bytes of an image, and of its mask."""
Source = Callable[[int, int], AbstractContextManager[Iterator[int]]]
"""(processes, turn) -> images of each batch as it comes, workers already at work."""


def decoded(content: bytes) -> Image.Image:
    """RGB image, with nothing of what the stream checks."""
    picture = Image.open(BytesIO(content))
    return picture.convert("RGB") if picture.mode != "RGB" else picture


def lengths(dataset: Any, processes: int, **settings: Any) -> Iterator[int]:
    """Images of each batch that a torch loader makes of a dataset, of whole batches unless `settings` say otherwise."""
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
        picture = decoded(image)
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


def _webdataset(pool: Pool, folder: Path, crop: int, batch: int) -> Source:
    import webdataset

    urls = [f"{pool.folder}/{shard.name}" for shard in pool.shard_files]
    views = _Views(crop)

    def view(sample: Mapping[str, bytes]) -> tuple[NDArray[Any], ...]:
        image = next(sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample)
        return views(image, sample[MASK_SUFFIX] if pool.labeled else None)

    def batches(processes: int, turn: int) -> AbstractContextManager[Iterator[int]]:
        dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=turn, empty_check=False)
        dataset = dataset.shuffle(_SHUFFLED).map(view).batched(batch, collation_fn=_stacked)
        return nullcontext(lengths(dataset, processes))

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


def _folder(pool: Pool, folder: Path, crop: int, batch: int) -> Source:
    files = folder / "files"
    files.mkdir()
    for number, (_, (image, mask)) in enumerate(_samples(pool)):
        (files / f"{number:09d}.image").write_bytes(image)
        if mask is not None:
            (files / f"{number:09d}.mask").write_bytes(mask)
    dataset = _Files(files, _Views(crop))

    def batches(processes: int, turn: int) -> AbstractContextManager[Iterator[int]]:
        rng = torch.Generator().manual_seed(turn)
        return nullcontext(
            lengths(dataset, processes, batch_size=batch, shuffle=True, generator=rng, collate_fn=_stacked)
        )

    return batches


def _litdata(pool: Pool, folder: Path, crop: int, batch: int) -> Source:
    import litdata

    chunks, views = folder / "chunks", _Views(crop)
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
        loader = litdata.StreamingDataLoader(dataset, batch_size=batch, num_workers=processes, collate_fn=_stacked)
        yield map(_length, loader)

    return batches


def _unchanged(batch: Any) -> Any:
    return batch


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


PREPARED: dict[str, Callable[[Pool, Path, int, int], Source]] = {
    "webdataset": _webdataset,
    "folder": _folder,
    "litdata": _litdata,
}
"""Name -> makes what it needs of a pool in a folder: (pool, folder, crop, batch)."""
