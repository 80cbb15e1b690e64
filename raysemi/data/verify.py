"""Check a whole pool: every byte against its digests, what stands where, and, when asked, every image and mask."""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial

import numpy as np
import pyarrow as pa
from pyarrow import fs

from raysemi.data.index import decode_mask
from raysemi.data.limits import LARGEST_PAYLOAD
from raysemi.data.pool import INDEX_FILE, POOL_FILE, Pool, Row, file_sha256, is_plain
from raysemi.data.shard import check_image, check_mask, members
from raysemi.data.workers import run_tasks
from raysemi.errors import DataError


def verify(
    pool: Pool,
    progress: Callable[[int, int], None] | None = None,
    *,
    decode: bool = False,
    processes: int | None = 1,
) -> None:
    """Read every byte of a pool again and compare it with what `pool.json` and the index promise.

    Of a shard with other bytes, every sample is looked at, so that the text names the keys that are damaged.

    Args:
        pool: the pool, local or remote.
        progress: called with (shards done, shards in all).
        decode: also decode every image and mask of sound shards: sizes, classes and counts of pixels are those of the
            index, nothing is cut short.
        processes: None: one a core; 1: this one.

    Raises:
        DataError: a line for each fault, the last with how many; shards in the order of the pool.
    """
    faults = list(_index_faults(pool))
    readable = not faults
    if readable:
        try:
            faults += list(_key_faults(pool))
        except DataError as error:
            readable = False
            faults.append(str(error))
    found: dict[int, list[str]] = {}
    work = partial(_shard_faults, pool.path, pool.filesystem, pool.folder, pool.digest, decode, readable)
    _opened.clear()
    with closing(run_tasks(work, range(len(pool.shard_files)), processes, preload=(__name__,))) as results:
        for number, of_shard in results:
            found[number] = of_shard
            if progress is not None:
                progress(len(found), len(pool.shard_files))
    faults += [fault for number in sorted(found) for fault in found[number]]
    if faults:
        broken = sum(bool(of_shard) for of_shard in found.values())
        raise DataError(
            "\n".join(faults) + f"\npool {pool.path} must hold the bytes that {POOL_FILE} promises; got {len(faults)} "
            f"faults, {broken} of {len(found)} shards damaged. Copy these files again or pack the pool again."
        )


def _index_faults(pool: Pool) -> Iterator[str]:
    """A changed or broken index; keys cannot be named with it."""
    try:
        with pool.filesystem.open_input_stream(f"{pool.folder}/{INDEX_FILE}") as stream:
            if file_sha256(stream)[1] != pool.index_sha256:
                yield f"{INDEX_FILE} of {pool.path} is not the one that was written with {POOL_FILE}"
                return
        pool.row(0)
    except OSError as error:
        yield f"{INDEX_FILE} of {pool.path} cannot be read: {error}"
    except DataError as error:
        yield str(error)


def _key_faults(pool: Pool) -> Iterator[str]:
    """Keys that no pool should have; a hash of each is kept, not the key."""
    hashes = []
    masks = 0
    for keys, offsets in _keys_and_masks(pool):
        masks += len(offsets) - offsets.null_count
        hashes.append(np.array([_hash(key) for key in keys], dtype=np.uint64))
        for key in keys:
            if not is_plain(key):
                yield f"pool {pool.path}, key {key!r}: must be a plain path below a folder"
            elif "." in key.rpartition("/")[2]:
                yield f"pool {pool.path}, key {key}: must hold no dot, where WebDataset ends a key"
    values, counts = np.unique(np.concatenate(hashes), return_counts=True)
    twice = set(values[counts > 1].tolist())
    if twice:
        again = Counter(key for keys, _ in _keys_and_masks(pool) for key in keys if _hash(key) in twice)
        yield from (
            f"pool {pool.path}, key {key}: must be there once; got it {count} times"
            for key, count in again.items()
            if count > 1
        )
    if masks != pool.num_masks:
        yield f"{INDEX_FILE} of {pool.path} has {masks} masks instead of {pool.num_masks}"


def _keys_and_masks(pool: Pool) -> Iterator[tuple[list[str], pa.ChunkedArray]]:
    for group in pool.rows.groups(("key", "mask_offset")):
        yield group.column("key").to_pylist(), group.column("mask_offset")


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


_opened: dict[str, Pool] = {}
"""The pool that this process checks: opened once, for it may list very many shards."""


def _shard_faults(
    path: str, filesystem: fs.FileSystem, folder: str, digest: str, decode: bool, with_rows: bool, number: int
) -> list[str]:
    """What is wrong with one shard."""
    if digest not in _opened:
        _opened.clear()
        _opened[digest] = Pool.open(folder, filesystem)
    pool = _opened[digest]
    shard = pool.shard_files[number]
    name = f"pool {path}, shard {shard.name}"
    try:
        with filesystem.open_input_file(f"{folder}/{shard.name}") as file:
            length, sha256 = file_sha256(file)
            faults = []
            if length != shard.bytes:
                faults.append(f"{name} has {length} bytes instead of {shard.bytes}")
            elif sha256 != shard.sha256:
                faults.append(f"{name} has other bytes than those that were written")
            if (faults or decode) and with_rows:
                first = int(pool.shard_rows[:number].sum())
                rows = [pool.row(i) for i in range(first, first + shard.samples)]
                counts = pool.rows.table(first, first + shard.samples, ("class_pixels",)).column(0).to_pylist()
                faults += list(_place_faults(file, shard.name, rows, name))
                faults += list(_payload_faults(file, rows, counts, name, len(pool.classes), length))
            return faults
    except OSError as error:
        return [f"{name} cannot be read: {error}"]


def _place_faults(file: pa.NativeFile, shard: str, rows: list[Row], name: str) -> Iterator[str]:
    """Members that do not stand where the index says, and those that it does not know."""
    found: dict[int, str] = {}
    broken = ""
    try:
        for info in members(file, shard):
            if info.isreg():
                found[info.offset_data] = info.name.removeprefix("./")
    except DataError as error:
        broken = str(error)
        yield broken
    again = [member for member, count in Counter(found.values()).items() if count > 1]
    yield from (f"{name}: member {member} must be there once" for member in again)
    last = max(found, default=-1)
    for row in rows:
        for what, offset in (("image", row.image_offset), ("mask", row.mask_offset)):
            if offset is None or (broken and offset > last):  # behind a broken header nothing is known
                continue
            member = found.get(offset)
            if member is None or not member.startswith(f"{row.key}."):
                yield f"{name}, key {row.key}: {what} must begin at byte {offset}; got {member or 'no member'} there"


def _payload_faults(
    file: pa.NativeFile, rows: list[Row], counts: list[list[int] | None], name: str, num_classes: int, length: int
) -> Iterator[str]:
    """Images and masks that are not those that were packed."""
    for row, class_pixels in zip(rows, counts, strict=True):
        own = f"{name}, key {row.key}"
        try:
            image = _payload(file, row.image_offset, row.image_bytes, row.image_crc32, length, f"{own}: image")
            size = check_image(image, own)
            if size != (row.height, row.width):
                yield f"{own}: image must be {row.width} x {row.height} pixels; got {size[1]} x {size[0]}"
            if row.mask_offset is not None and row.mask_bytes is not None:
                mask = _payload(file, row.mask_offset, row.mask_bytes, row.mask_crc32, length, f"{own}: mask")
                pixels = check_mask(decode_mask(mask, own), (row.height, row.width), num_classes, own)
                if class_pixels is not None and pixels != class_pixels:
                    yield f"{own}: mask must have {class_pixels} pixels of each class; got {pixels}"
        except DataError as error:
            yield str(error)


def _payload(file: pa.NativeFile, offset: int, size: int, crc32: int | None, length: int, what: str) -> bytes:
    if offset < 0 or size < 0 or size > LARGEST_PAYLOAD or offset + size > length:
        raise DataError(f"{what} must lie in the shard; got bytes {offset} to {offset + size} of {length}")
    data: bytes = file.read_at(size, offset)
    if crc32 is not None and zlib.crc32(data) != crc32:
        raise DataError(f"{what} must have the bytes that were packed; got others")
    return data
