"""One shard: a fixed run of samples, checked one by one and written as a tar file that is the same on every machine.

A shard appears under its name only when it is complete; beside it a part file keeps its rows until the pool is done, so
that an interrupted `pack` goes on where it stopped.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raysemi.data.encoded import FORMATS, ends_early
from raysemi.data.limits import LARGEST_PIXELS
from raysemi.data.paths import AnyPath, StorePath, draft, remove_folder, store_config
from raysemi.data.pool import IMAGE_SUFFIXES, MASK_SUFFIX, NOT_ANNOTATED, Shard, file_sha256, locate
from raysemi.data.sources import Item, Palette, Samples
from raysemi.data.store import unreadable
from raysemi.data.workers import read_ahead
from raysemi.data.write_pool import write_index
from raysemi.errors import DataError, DataFailure

PARTS = ".parts"
_EXIF_ORIENTATION = 0x0112

Stat = tuple[int, int]
"""Size in bytes and time of change in nanoseconds of a file."""


@dataclass(frozen=True)
class Entry:
    """A sample that is planned: its key in the pool, where it comes from, and whether its mask is stored."""

    key: str
    item: Item
    with_mask: bool

    @property
    def files(self) -> list[AnyPath]:
        """Those of its image and mask that it is made of."""
        files = (self.item.image, self.item.mask if self.with_mask else None)
        return [path for path in files if path is not None]


@dataclass(frozen=True)
class ShardPlan:
    """What goes into one shard. `fingerprint` changes when the entries, their files or the source's settings do."""

    path: AnyPath
    entries: tuple[Entry, ...]
    fingerprint: str

    @property
    def part(self) -> AnyPath:
        """Where the rows of the finished shard are kept until the pool is complete."""
        return self.path.parent / PARTS / f"{self.path.stem}.json"

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class ShardDone:
    """A finished shard, or the faults that kept it from being written."""

    samples: int
    faults: tuple[str, ...] = field(default=())


def write_shard(
    source: Samples, plan: ShardPlan, sides: Callable[[Item], Mapping[str, bytes]] | None = None
) -> ShardDone:
    """Write a shard and its part file, unless both are there already.

    Args:
        source: reads images and masks: of each entry in order the image, then, where it is sound, the mask.
        plan: what to write and where.
        sides: further files of a sample, by suffix; asked for after its mask.

    Returns:
        The shard's samples; with faults, each naming its key, nothing is written.

    Raises:
        DataError: the shard cannot be stored; a DataFailure because the disk is full or a store does not answer, or as
            the source raises it.
    """
    if _finished(plan):
        return ShardDone(len(plan.entries))
    import webdataset as wds  # imports torch: seconds that only a process that writes should pay

    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    remote = any(isinstance(path, StorePath) for entry in plan.entries[:1] for path in entry.files)
    try:
        with draft(plan.path) as (file, put):
            # fixed owner, mode and time: the same samples give the same bytes
            with wds.TarWriter(file, encoder=False, user="", group="", mtime=0, format="PAX_FORMAT") as tar:
                for entry, made in read_ahead(partial(_sample, source), plan.entries, remote=remote):
                    try:
                        sample, row = made()
                    except DataFailure:
                        raise  # no fault of the sample
                    except DataError as error:
                        faults.append(str(error))
                        continue
                    if not faults:
                        tar.write({**sample, **sides(entry.item)} if sides is not None else sample)
                        rows.append(row)
            if faults:
                return ShardDone(len(plan.entries), tuple(faults))
            file.seek(0)
            size, sha256 = file_sha256(file)
            file.seek(0)
            _add_offsets(rows, file)
            put()
        for row in rows:
            row["shard"] = plan.path.name
        part = {"fingerprint": plan.fingerprint, "bytes": size, "sha256": sha256, "rows": rows}
        with draft(plan.part) as (file, put):
            file.write(json.dumps(part).encode())
            put()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            disk = tempfile.gettempdir() if isinstance(plan.path, StorePath) else plan.path.parent
            raise DataFailure(  # a kind of its own: the cause stays behind when an error leaves a worker process
                f"the disk of {disk} must have room for {plan.path.name}; got {error.strerror}. Free some "
                f"space and run the same command again: finished shards stay."
            ) from error
        kind = DataFailure if isinstance(error, TimeoutError) else DataError
        raise kind(f"{plan.path} must be writable; got {error}. Check --out.") from error
    return ShardDone(len(plan.entries))


def read_part(plan: ShardPlan) -> tuple[Shard, list[dict[str, Any]]] | str:
    """The shard and its rows when it was written before and is still what the plan says; otherwise what was found.

    Raises:
        DataError: the disk or the store does not tell.
    """
    try:
        part = json.loads(plan.part.read_bytes())
        if part["fingerprint"] != plan.fingerprint:
            return f"{plan.part} of other samples or settings"
        size = plan.path.stat().st_size
        if size != part["bytes"]:
            return f"{size} bytes instead of {part['bytes']}"
        return Shard(plan.path.name, len(part["rows"]), part["bytes"], part["sha256"]), part["rows"]
    except FileNotFoundError as error:
        return f"nothing there ({error})"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        return f"{plan.part} with other content than was written ({error!r})"
    except OSError as error:
        raise unreadable(str(plan.part), error) from error


def finish_pool(
    folder: AnyPath,
    plans: Sequence[ShardPlan],
    classes: Sequence[str],
    palette: Palette,
    made: Mapping[str, Any],
    patience: float = 0.0,
) -> None:
    """Index and `pool.json` from the part files, which then go.

    Args:
        folder: where the shards lie.
        plans: all shards, in order.
        classes: class names, position = value in the masks.
        palette: RGB of each class.
        made: how the pool was made.
        patience: seconds in which what other machines have written must be seen here.

    Raises:
        DataError: a shard is not finished, or the folder cannot be written.
    """
    shards: list[Shard] = []

    def rows() -> Iterator[dict[str, Any]]:
        for plan, read in read_ahead(read_part, plans, remote=isinstance(folder, StorePath)):
            part = _seen(plan, read(), patience)
            if isinstance(part, str):
                everywhere = " and --out be one folder for all machines" if patience else ""
                raise DataError(
                    f"{plan} must stay until its pool is done{everywhere}; got {part}. Run the command again."
                )
            shards.append(part[0])
            yield from part[1]

    write_index(
        *locate(str(folder), store=store_config(folder)),
        rows=rows(),
        shards=shards,
        classes=classes,
        palette=palette,
        made=made,
    )
    remove_folder(folder / PARTS)


def _seen(
    plan: ShardPlan, part: tuple[Shard, list[dict[str, Any]]] | str, patience: float
) -> tuple[Shard, list[dict[str, Any]]] | str:
    until = time.monotonic() + patience
    while isinstance(part, str) and time.monotonic() < until:
        time.sleep(1.0)
        part = read_part(plan)
    return part


def _finished(plan: ShardPlan) -> bool:
    part = read_part(plan)
    if isinstance(part, str) or isinstance(plan.path, StorePath):
        return not isinstance(part, str)
    with plan.path.open("rb") as file:  # after a power cut a file may have its length but not its bytes
        return file_sha256(file)[1] == part[0].sha256


def fingerprint(settings: str, entries: Sequence[Entry], stats: Mapping[AnyPath, Stat]) -> str:
    """Name of what goes into a shard: settings, keys, notes, and the stat of each file."""
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
    for entry in entries:
        marks = [stats[path] for path in entry.files]
        digest.update(repr((entry.key, entry.with_mask, marks, entry.item.note)).encode())
    return digest.hexdigest()


def _sample(source: Samples, entry: Entry) -> tuple[dict[str, Any], dict[str, Any]]:
    """A WebDataset sample and its row; faults name the key and, where there is one, the file."""
    name = f"{entry.key} ({entry.item.image})" if entry.item.image is not None else entry.key
    try:
        suffix, image = source.image_bytes(entry.item)
    except TimeoutError as error:
        raise unreadable(f"image of {name}", error) from error  # nothing is wrong with it: the others would fail too
    except OSError as error:
        raise DataError(f"image of {name} must be readable; got {error}. Replace or remove it.") from error
    if suffix not in IMAGE_SUFFIXES:
        raise DataError(f"image of {name} must be one of {', '.join(IMAGE_SUFFIXES)}; got {suffix}. Convert it.")
    height, width = check_image(image, name)
    row: dict[str, Any] = {"key": entry.key, "height": height, "width": width, "class_pixels": None}
    row["image_crc32"], row["mask_crc32"] = zlib.crc32(image), None
    sample: dict[str, Any] = {"__key__": entry.key, suffix: image}
    if entry.with_mask:
        try:
            mask = source.mask(entry.item)
        except DataError as error:
            raise DataError(f"mask of {entry.key}: {error}") from error
        if mask is None:
            raise DataError(f"labeled image {name} must have a mask; got none. Add it or take it from the split.")
        row["class_pixels"] = check_mask(mask, (height, width), len(source.classes), name)
        sample[MASK_SUFFIX] = png(mask)
        row["mask_crc32"] = zlib.crc32(sample[MASK_SUFFIX])
    return sample, row


def check_image(image: bytes, name: str) -> tuple[int, int]:
    """Height and width of an encoded image that can be decoded to its end and stands upright.

    Raises:
        DataError: unreadable, cut short, too large, more than 8 bits a channel, or with an EXIF rotation.
    """
    try:
        with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
            width, height = opened.size
            mode = opened.mode
            if width * height > LARGEST_PIXELS:
                raise ValueError(f"{width} x {height} pixels, more than {LARGEST_PIXELS} in all")
            opened.draft(None, (max(width // 8, 1), max(height // 8, 1)))  # JPEG: every byte is read, few are painted
            opened.load()
            if ends_early(image, opened, thorough=True):
                raise ValueError("a JPEG whose pixels end before its end mark")
            turn = opened.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception as error:  # a broken file can raise anything
        raise DataError(f"image of {name} must be readable to its end; got {error}. Replace or remove it.") from error
    if mode.startswith(("I", "F")):
        raise DataError(f"image of {name} must have 8 bits a channel; got mode {mode}. Convert it to RGB.")
    if turn not in (0, 1):
        raise DataError(
            f"image of {name} must stand upright; got EXIF orientation {turn}. Rotate image and mask for good and "
            f"remove the tag, for example with `mogrify -auto-orient`."
        )
    return height, width


def check_mask(mask: NDArray[np.uint8], size: tuple[int, int], num_classes: int, name: str) -> list[int]:
    """Pixels of each class in a mask.

    Raises:
        DataError: another size than the image's, or a value that is neither a class nor 255.
    """
    if mask.shape != size:
        own = " x ".join(str(side) for side in mask.shape[::-1])
        raise DataError(
            f"mask of {name} must have the image's size {size[1]} x {size[0]}; got {own}. Make it again or remove it."
        )
    pixels = np.bincount(mask.ravel(), minlength=NOT_ANNOTATED + 1)
    unknown = [int(value) for value in np.flatnonzero(pixels[:NOT_ANNOTATED]) if value >= num_classes]
    if unknown:
        raise DataError(
            f"mask of {name} must hold classes 0 to {num_classes - 1} or {NOT_ANNOTATED}; got class id "
            f"{', '.join(map(str, unknown[:5]))} of {num_classes}. Correct the mask or the class list."
        )
    return [int(count) for count in pixels[:num_classes]]


def png(values: NDArray[np.uint8], effort: int = 6) -> bytes:
    """An 8-bit map as PNG; `effort` from 0 (large, fast) to 9."""
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG", compress_level=effort)
    return stream.getvalue()


def members(file: IO[bytes], name: str) -> Iterator[tarfile.TarInfo]:
    """Members of a tar file that is whole: `offset_data` and `size` say where each payload lies.

    Raises:
        DataError: not a plain tar file, or cut short, even where the cut falls between two members; names the member
            before.
    """
    end, after = 0, ""
    try:
        length = file.seek(0, os.SEEK_END)
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                # a size below 0 would lead back to where it came from
                if member.size < 0 or member.issparse() or not end <= member.offset_data <= length - member.size:
                    raise tarfile.ReadError(f"{member.size} bytes of {member.name!r}, which are not there in one piece")
                yield member
                end = member.offset_data + (member.size + 511) // 512 * 512
                after = f" after {member.name!r}"
    except Exception as error:  # a broken header can raise anything
        raise DataError(
            f"shard {name} must be a whole, uncompressed tar file; got {error}{after}. Copy it again."
        ) from error
    file.seek(end)
    if file.read(512) != bytes(512):
        raise DataError(
            f"shard {name} must end with an end-of-archive block; it is cut short, or a header is broken{after}. Copy "
            "it again."
        )


def _add_offsets(rows: list[dict[str, Any]], file: IO[bytes]) -> None:
    found = {member.name: (member.offset_data, member.size) for member in members(file, "just written")}
    for row in rows:
        key = row["key"]
        images = (found.get(f"{key}.{suffix}") for suffix in IMAGE_SUFFIXES)
        row["image_offset"], row["image_bytes"] = next(place for place in images if place is not None)
        row["mask_offset"], row["mask_bytes"] = found.get(f"{key}.{MASK_SUFFIX}", (None, None))
