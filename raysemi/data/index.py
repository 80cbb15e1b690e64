"""Make a pool of WebDataset shards that someone else wrote: they stay as they are, an index is put beside them.

Every shard is one task. Its rows wait in a temporary file until all are known to be good, then go into the index in the
order of the shards' names: in memory are one row group, and 8 bytes a key to tell a key that is there twice.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
from numpy.typing import NDArray
from PIL import Image
from pyarrow import fs

from raysemi.data.choose import raise_faults
from raysemi.data.limits import LARGEST_PAYLOAD, LARGEST_PIXELS, LONGEST_KEY
from raysemi.data.pool import (
    CONFIDENCE_SUFFIX,
    IMAGE_SUFFIXES,
    MASK_SUFFIX,
    Pool,
    Shard,
    check_shard_name,
    file_sha256,
    is_plain,
    locate,
)
from raysemi.data.rows import INDEX_SCHEMA, ROWS_A_GROUP
from raysemi.data.shard import check_image, check_mask, members
from raysemi.data.sources import default_palette
from raysemi.data.workers import Runner, run_tasks
from raysemi.data.write_pool import write_index_groups
from raysemi.errors import DataError

_SIDE_SUFFIXES = ("json", "txt", "cls", CONFIDENCE_SUFFIX)
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # as WebDataset splits a name: at the first dot after the folders
_MADE = "index"


@dataclass(frozen=True)
class Scan:
    """What was found in one shard."""

    shard: Shard
    rows: pa.Table
    """As `INDEX_SCHEMA` has them."""
    keys: bytes
    """A hash of each key, uint64."""
    faults: list[str]


def index_shards(
    path: str | Path,
    *,
    classes: Sequence[str] = (),
    palette: Sequence[tuple[int, int, int]] | None = None,
    mask_suffix: str = MASK_SUFFIX,
    processes: int | None = None,
    filesystem: fs.FileSystem | None = None,
    progress: Callable[[int, int], None] | None = None,
    run: Runner | None = None,
) -> Pool:
    """Write `index.parquet` and `pool.json` beside existing shards. Every image and mask is decoded once.

    Args:
        path: folder or URL with `.tar` files, also in folders below it.
        classes: class names; needed when there are masks.
        palette: RGB of each class; default: distinct colours.
        mask_suffix: what follows the key in the name of a mask, `mask.png` or for example `png` or `seg.png`.
        processes: default: one a CPU core.
        filesystem: where `path` lies, instead of reading it as a local path or URL.
        progress: called with (shards done, shards in all).
        run: does the work in place of processes of this machine; all of its machines must reach `path` under that name.

    Raises:
        DataError: no shards, or faults in them; the text names shard and key, up to 20 of them.
    """
    filesystem, folder = locate(path, filesystem)
    names = _shard_names(filesystem, folder, path)
    if filesystem.get_file_info(f"{folder}/pool.json").type == fs.FileType.File:
        made = Pool.open(folder, filesystem).made
        if made.get("source") != _MADE:
            raise DataError(f"{path} must not be a pool yet; got one that raysemi wrote. Use it as it is.")
    do = run or partial(run_tasks, processes=processes, preload=(__name__,))
    work = partial(scan_shard, filesystem, folder, num_classes=len(classes), mask_suffix=mask_suffix.lstrip("."))
    with tempfile.TemporaryDirectory(prefix="raysemi-index-") as beside:
        files = {name: Path(beside) / f"{number}.arrow" for number, name in enumerate(names)}
        shards: dict[str, Shard] = {}
        keys: dict[str, bytes] = {}
        faults: dict[str, list[str]] = {}
        with closing(do(work, names)) as results:
            for name, scan in results:
                shards[name], keys[name], faults[name] = scan.shard, scan.keys, scan.faults
                feather.write_feather(scan.rows, files[name], compression="zstd")
                if progress is not None:
                    progress(len(shards), len(names))
        raise_faults([fault for name in names for fault in faults[name]] + _keys_again(files, keys))
        if not any(shard.samples for shard in shards.values()):
            raise DataError(f"pool must hold images; got none in the {len(names)} shards of {path}. Check the path.")
        write_index_groups(
            filesystem,
            folder,
            groups=_groups(feather.read_table(file, memory_map=False) for file in files.values()),
            shards=[shards[name] for name in names],
            classes=classes,
            palette=palette or default_palette(classes),
            made={"source": _MADE, "mask_suffix": mask_suffix},
        )
    return Pool.open(folder, filesystem)


def _keys_again(files: Mapping[str, Path], keys: Mapping[str, bytes]) -> list[str]:
    """What to say of keys that are in two shards."""
    hashes = np.frombuffer(b"".join(keys[name] for name in files), np.uint64)
    values, counts = np.unique(hashes, return_counts=True)
    alike = values[counts > 1]
    faults = []
    first: dict[str, str] = {}
    for name in files if len(alike) else ():
        found = np.isin(np.frombuffer(keys[name], np.uint64), alike)
        if not found.any():
            continue
        for key in feather.read_table(files[name], columns=["key"]).column("key").filter(found).to_pylist():
            other = first.setdefault(key, name)
            if other != name:
                faults.append(f"key must be unique in a pool; got {key} in {other} and {name}. Rename one.")
    return faults


def _groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Row groups of whole shards as `rows.whole_shards` makes them, from a table a shard."""
    group: list[pa.Table] = []
    rows = 0
    for table in tables:
        for start in range(0, table.num_rows, ROWS_A_GROUP):
            part = table.slice(start, ROWS_A_GROUP)
            if group and rows + part.num_rows > ROWS_A_GROUP:
                yield pa.concat_tables(group).unify_dictionaries().combine_chunks()
                group, rows = [], 0
            group.append(part)
            rows += part.num_rows
    if group:
        yield pa.concat_tables(group).unify_dictionaries().combine_chunks()


def _shard_names(filesystem: fs.FileSystem, folder: str, path: str | Path) -> list[str]:
    try:
        infos = filesystem.get_file_info(fs.FileSelector(folder, recursive=True))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} must be a folder with .tar shards; got {error}. Check the path.") from error
    files = [info.path[len(folder) :].lstrip("/") for info in infos if info.type == fs.FileType.File]
    packed = [name for name in files if name.endswith((".tgz", ".tar.gz", ".tar.zst", ".tar.bz2", ".tar.xz"))]
    if packed:
        raise DataError(f"shards must be uncompressed, to be read by offset; got {packed[0]}. Unpack it to .tar.")
    names = sorted(name for name in files if name.endswith(".tar"))
    if not names:
        raise DataError(f"{path} must hold .tar shards; got none. Check the path.")
    for name in names:
        check_shard_name(name, str(path))
    return names


def scan_shard(filesystem: fs.FileSystem, folder: str, name: str, *, num_classes: int, mask_suffix: str) -> Scan:
    """Rows and digest of one shard, and everything that is wrong with it."""
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    size, sha256 = 0, ""
    try:
        with filesystem.open_input_file(f"{folder}/{name}") as file:
            named = list(_named(members(file, name), faults, name))  # the whole list first: payload reads move the file
            for key, group in groupby(named, key=lambda member: member[0]):
                parts = [(suffix, info) for _, suffix, info in group]
                row = _row(file, key, parts, mask_suffix, num_classes, faults, name)
                if row is not None:
                    rows.append({**row, "shard": name})
            runs = Counter(key for key, _ in groupby(named, key=lambda member: member[0]))
            if not named and not faults:
                faults.append(f"shard {name} must hold images; got none. Remove it.")
            again = [key for key, count in runs.items() if count > 1]
            faults += [f"files of key {key} of shard {name} must lie together, once. Write it again." for key in again]
            file.seek(0)
            size, sha256 = file_sha256(file)
    except DataError as error:
        faults.append(str(error))
    except OSError as error:
        faults.append(f"shard {name} must be readable; got {error}. Copy it again.")
    keys = b"".join(hashlib.blake2b(row["key"].encode(), digest_size=8).digest() for row in rows)
    return Scan(Shard(name, len(rows), size, sha256), pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), keys, faults)


def _named(
    infos: Iterator[tarfile.TarInfo], faults: list[str], shard: str
) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    for info in infos:
        name = info.name.removeprefix("./")
        if info.isdir() or (name.startswith("__") and name.endswith("__")):
            continue  # folders, and WebDataset's own notes
        match = _MEMBER.fullmatch(name)
        if not info.isreg() or match is None or not is_plain(match[1]) or len(match[1]) > LONGEST_KEY:
            faults.append(
                f"member of shard {shard} must be a file KEY.SUFFIX; got {info.name!r}. Write the shard again."
            )
        else:
            yield match[1], match[2].lower(), info


def _row(
    file: pa.NativeFile,
    key: str,
    parts: list[tuple[str, tarfile.TarInfo]],
    mask_suffix: str,
    num_classes: int,
    faults: list[str],
    shard: str,
) -> dict[str, Any] | None:
    name = f"{key} of shard {shard}"
    masks = [info for suffix, info in parts if suffix == mask_suffix]
    images = [info for suffix, info in parts if suffix in IMAGE_SUFFIXES and suffix != mask_suffix]
    allowed = (*IMAGE_SUFFIXES, *_SIDE_SUFFIXES, mask_suffix)
    unknown = [suffix for suffix, _ in parts if suffix not in allowed]
    if unknown:
        faults.append(f"files of key {name} must end in {', '.join(allowed)}; got {unknown[0]}. Write it without them.")
    if len(images) != 1 or len(masks) > 1:
        faults.append(
            f"key {name} must have one image and at most one mask; got {len(images)} and {len(masks)}. Repack "
            f"the shard, or name the masks with --mask-suffix."
        )
        return None
    try:
        image = _payload(file, images[0], name)
        height, width = check_image(image, name)
        row = {
            "key": key,
            "height": height,
            "width": width,
            "class_pixels": None,
            "mask_offset": None,
            "mask_bytes": None,
            "image_crc32": zlib.crc32(image),
            "mask_crc32": None,
        }
        row |= {"image_offset": images[0].offset_data, "image_bytes": images[0].size}
        if masks:
            if num_classes == 0:
                raise DataError(f"key {name} has a mask, so the classes must be named; got none. Pass --classes.")
            encoded = _payload(file, masks[0], name)
            mask = decode_mask(encoded, name)
            row["class_pixels"] = check_mask(mask, (height, width), num_classes, name)
            row |= {"mask_offset": masks[0].offset_data, "mask_bytes": masks[0].size, "mask_crc32": zlib.crc32(encoded)}
    except DataError as error:
        faults.append(str(error))
        return None
    return row


def _payload(file: pa.NativeFile, info: tarfile.TarInfo, name: str) -> bytes:
    if info.size > LARGEST_PAYLOAD:
        raise DataError(f"a file of key {name} must have at most {LARGEST_PAYLOAD} bytes; got {info.size}. Replace it.")
    file.seek(info.offset_data)
    return bytes(file.read(info.size))


def decode_mask(data: bytes, name: str) -> NDArray[np.uint8]:
    """Class indices of an encoded mask.

    Raises:
        DataError: no PNG, damaged, too large, or not 8 bits of one channel.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.width * image.height > LARGEST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {LARGEST_PIXELS} in all")
            image.load()
            if image.mode in ("L", "P"):
                return np.asarray(image)
            mode = image.mode
    except Exception as error:  # a broken file can raise anything
        raise DataError(f"mask of {name} must be a readable PNG; got {error}. Replace it.") from error
    raise DataError(f"mask of {name} must be 8-bit with one channel; got mode {mode}. Write class indices.")
