"""A pool: a folder of tar shards with an index of where each image and mask lies, on a disk or in an object store.

labeled-000000.tar ...   KEY.jpg|jpeg|png|webp and, where there is one, KEY.mask.png
index.parquet            one row a sample, in the order of the shards; offsets point at the payload
pool.json                format version, class names, palette, counts, a digest per shard
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from raysemi.bounded import parse_json
from raysemi.data.limits import LARGEST_POOL_FILE, LEAST_SAMPLE_BYTES, plain_keys, read_table
from raysemi.errors import DataError

FORMAT_VERSION = 1
INDEX_FILE = "index.parquet"
POOL_FILE = "pool.json"
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MASK_SUFFIX = "mask.png"
NOT_ANNOTATED = 255
"""Value of a mask where nothing is annotated."""

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.dictionary(pa.int32(), pa.string())),
        ("image_offset", pa.int64()),
        ("image_bytes", pa.int64()),
        ("mask_offset", pa.int64()),
        ("mask_bytes", pa.int64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("class_pixels", pa.list_(pa.int64())),
        ("image_crc32", pa.uint32()),
        ("mask_crc32", pa.uint32()),
    ]
)
_CHECKSUMS = ("image_crc32", "mask_crc32")
"""Columns that indexes of earlier versions lack."""

_CHUNK_BYTES = 1 << 22
_ROWS_A_GROUP = 1 << 16


@dataclass(frozen=True)
class Shard:
    """A tar file of a pool: its name below the pool's folder, its samples, its length and its SHA-256."""

    name: str
    samples: int
    bytes: int
    sha256: str


class Row(NamedTuple):
    """Where one sample lies. Offsets count from the start of the shard; mask fields are None without a mask.

    A checksum is the CRC-32 of the encoded bytes, which were sound when it was taken; None in an index without them.
    """

    key: str
    shard: str
    image_offset: int
    image_bytes: int
    mask_offset: int | None
    mask_bytes: int | None
    height: int
    width: int
    image_crc32: int | None = None
    mask_crc32: int | None = None


class Pool:
    """A pool that is open for reading; `pool.json` is read at once, the index when it is first needed.

    May be pickled: the index is then read again where it arrives.
    """

    def __init__(self, path: str, filesystem: fs.FileSystem, folder: str, content: Mapping[str, Any]) -> None:
        self.path = path
        self.filesystem = filesystem
        self.folder = folder
        self.classes: tuple[str, ...] = tuple(content["classes"])
        self.palette: tuple[tuple[int, int, int], ...] = tuple((r, g, b) for r, g, b in content["palette"])
        self.shard_files = tuple(Shard(**shard) for shard in content["shards"])
        self.num_samples = sum(shard.samples for shard in self.shard_files)
        self.num_masks = int(content["masks"])
        self.made: dict[str, Any] = dict(content.get("made", {}))
        """How the pool was made: source, split, recipe."""
        self.index_sha256 = str(content["index_sha256"])

    @classmethod
    def open(cls, path: str | Path, filesystem: fs.FileSystem | None = None) -> Pool:
        """Open a pool.

        Args:
            path: folder, or a URL that `pyarrow.fs` understands (`s3://`, `gs://`, `file://`).
            filesystem: where `path` is to be looked up, instead of reading it as a local path or URL.

        Raises:
            DataError: there is no pool, or its `pool.json` is broken or of another format version.
        """
        filesystem, folder = locate(path, filesystem)
        name = f"{folder}/{POOL_FILE}"
        try:
            with filesystem.open_input_stream(name) as stream:
                text = stream.read(LARGEST_POOL_FILE + 1)
            if len(text) > LARGEST_POOL_FILE:
                raise ValueError(f"more than {LARGEST_POOL_FILE} bytes")
            content = parse_json(text)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(
                f"pool must be a folder with a {POOL_FILE}; got {path}. Make one with `raysemi pack`, or with "
                f"`raysemi index` from shards that someone else made."
            ) from error
        except (OSError, ValueError) as error:
            raise DataError(f"{path}/{POOL_FILE} must be readable JSON; got {error}. Pack the pool again.") from error
        version = content.get("format") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path}/{POOL_FILE} must have format {FORMAT_VERSION}; got {version}. Pack the pool again with this "
                f"version of raysemi."
            )
        try:
            pool = cls(str(path), filesystem, folder, content)
            _check_fields(pool)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            text = f"{error!r:.200}"
            raise DataError(f"{path}/{POOL_FILE} must hold all fields; got {text}. Pack the pool again.") from error
        for shard in pool.shard_files:
            check_shard_name(shard.name, str(path))
        if pool.num_samples == 0:
            raise DataError(f"pool must hold samples; got an empty one at {path}. Pack it again.")
        return pool

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of the shards, in the order of the index."""
        return tuple(shard.name for shard in self.shard_files)

    @cached_property
    def shard_rows(self) -> NDArray[np.int64]:
        """int64 [shards], samples per shard in the order of the index."""
        return np.array([shard.samples for shard in self.shard_files], dtype=np.int64)

    @cached_property
    def digest(self) -> str:
        """Hex name of what the pool holds: class names and the bytes of all shards, in order."""
        content = {"classes": self.classes, "shards": [shard.sha256 for shard in self.shard_files]}
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def local(self) -> bool:
        """Whether it lies on this machine's disks."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    @property
    def has_masks(self) -> bool:
        """Whether any sample has a mask."""
        return self.num_masks > 0

    @property
    def labeled(self) -> bool:
        """Whether every sample has a mask."""
        return self.num_masks == self.num_samples

    @cached_property
    def index(self) -> pa.Table:
        """The whole index, one row a sample.

        Raises:
            DataError: it is missing, broken, or not the one that was written with this `pool.json`.
        """
        name = f"{self.folder}/{INDEX_FILE}"
        try:
            with self.filesystem.open_input_file(name) as file:
                content = file.read_buffer()  # whole: every column is needed, and its digest
            # A stale index may list the same shards, and its offsets would point into other bytes.
            if hashlib.sha256(content).hexdigest() != self.index_sha256:
                raise DataError(
                    f"{self.path}/{INDEX_FILE} must be the one that was written with {POOL_FILE}; got another. Copy "
                    f"both from one place, or pack the pool again (shards of others: `raysemi index`)."
                )
            room = sum(shard.bytes for shard in self.shard_files) // LEAST_SAMPLE_BYTES
            table = plain_keys(read_table(content, room))
            for name in _CHECKSUMS:
                if name not in table.column_names:
                    table = table.append_column(name, pa.nulls(table.num_rows, pa.uint32()))
            table = table.select(INDEX_SCHEMA.names).cast(INDEX_SCHEMA).unify_dictionaries().combine_chunks()
            if any(table.column(column).null_count for column in _NEVER_EMPTY):
                raise ValueError("an empty place")
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            raise DataError(f"{self.path}/{INDEX_FILE} must be a readable index; got {error}. {_AGAIN}") from error
        expected = np.repeat(np.arange(len(self.shards)), self.shard_rows)
        if table.num_rows != self.num_samples:
            raise DataError(
                f"{self.path}/{INDEX_FILE} must have {self.num_samples} rows; got {table.num_rows}. {_AGAIN}"
            )
        shard_column = table.column("shard").chunk(0)
        place = {shard: position for position, shard in enumerate(self.shards)}
        names = np.array([place.get(shard, -1) for shard in shard_column.dictionary.to_pylist()], dtype=np.int64)
        if not np.array_equal(names[shard_column.indices.to_numpy()], expected):
            raise DataError(f"{self.path}/{INDEX_FILE} must list the shards of {POOL_FILE} in order. {_AGAIN}")
        return table

    @cached_property
    def _places(self) -> NDArray[np.int64]:
        columns = ("image_offset", "image_bytes", "mask_offset", "mask_bytes", "height", "width", *_CHECKSUMS)
        found = [self.index.column(name).cast(pa.int64()).fill_null(-1).to_numpy() for name in columns]
        return np.stack(found, axis=1)

    @cached_property
    def _shard_ends(self) -> NDArray[np.int64]:
        return np.cumsum(self.shard_rows)

    def key(self, i: int) -> str:
        """Key of sample i."""
        return cast(str, self.index.column("key").chunk(0)[i].as_py())

    def row(self, i: int) -> Row:
        """Where sample i lies, i from 0 to num_samples - 1."""
        image_offset, image_bytes, mask_offset, mask_bytes, height, width, image, mask = self._places[i].tolist()
        image, mask = (None if crc32 < 0 else crc32 for crc32 in (image, mask))
        shard = self.shard_files[int(np.searchsorted(self._shard_ends, i, side="right"))].name
        if mask_offset < 0:
            return Row(self.key(i), shard, image_offset, image_bytes, None, None, height, width, image)
        return Row(self.key(i), shard, image_offset, image_bytes, mask_offset, mask_bytes, height, width, image, mask)

    @cached_property
    def _shard_bytes(self) -> dict[str, int]:
        return {shard.name: shard.bytes for shard in self.shard_files}

    def shard_bytes(self, name: str) -> int:
        """Length of a shard as `pool.json` says."""
        return self._shard_bytes[name]

    def origin(self, name: str) -> tuple[str, str]:
        """Path of the pool, and of a shard in it, as people know them."""
        return self.path, name

    def open_shard(self, name: str) -> pa.NativeFile:
        """A shard, open for reads at any offset.

        Raises:
            DataError: it cannot be opened.
        """
        try:
            return self.filesystem.open_input_file(f"{self.folder}/{name}")
        except OSError as error:
            raise DataError(f"shard {name} of {self.path} must be readable; got {error}. {_AGAIN}") from error

    def __getstate__(self) -> dict[str, Any]:
        cached = ("index", "_places", "_shard_ends", "_shard_bytes")
        return {name: value for name, value in self.__dict__.items() if name not in cached}


_NEVER_EMPTY = ("key", "shard", "image_offset", "image_bytes", "height", "width")
_AGAIN = "Run `raysemi verify`, then copy or pack the pool again."


def locate(path: str | Path, filesystem: fs.FileSystem | None = None) -> tuple[fs.FileSystem, str]:
    """Filesystem and path inside it for a local path or a URL of `pyarrow.fs`.

    Raises:
        DataError: the URL cannot be used.
    """
    if filesystem is not None:
        return filesystem, str(path).rstrip("/")
    if "://" not in str(path):
        return fs.LocalFileSystem(), str(Path(path).expanduser().absolute())
    try:
        filesystem, folder = fs.FileSystem.from_uri(str(path))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"pool must be a folder or a URL such as s3://bucket/pool; got {path}: {error}.") from error
    return filesystem, folder.rstrip("/")


def _check_fields(pool: Pool) -> None:
    """Refuses what JSON can hold in the fields of `pool.json` and no pool has.

    Raises:
        ValueError, TypeError: names the field.
    """
    if not all(isinstance(name, str) for name in pool.classes) or len(pool.classes) > NOT_ANNOTATED:
        raise ValueError(f"classes must be at most {NOT_ANNOTATED} names")
    if len(pool.palette) != len(pool.classes) or not all(v in range(256) for colour in pool.palette for v in colour):
        raise ValueError("palette must have three values from 0 to 255 for each class")
    for shard in pool.shard_files:
        counts = (shard.samples, shard.bytes)
        if not all(type(count) is int and 0 <= count < 1 << 62 for count in counts):
            raise ValueError(f"samples and bytes of a shard must be whole numbers, not {counts}")
        if not isinstance(shard.name, str) or not isinstance(shard.sha256, str):
            raise TypeError("name and sha256 of a shard must be texts")
    if not 0 <= pool.num_masks <= pool.num_samples:
        raise ValueError(f"masks must be 0 to {pool.num_samples}, not {pool.num_masks}")


def is_plain(key: str) -> bool:
    """Whether a key is a relative path that stays below any folder it is joined to, and prints on one line."""
    return key.isprintable() and "\\" not in key and not {"", ".", ".."}.intersection(key.split("/"))


def check_shard_name(name: str, where: str) -> None:
    """Refuse a shard name that could lead out of the pool's folder or start a command.

    Raises:
        DataError: the name is not a plain relative path of a tar file.
    """
    parts = PurePosixPath(name).parts
    plain = bool(parts) and ".." not in parts and not name.startswith("/") and not {":", "\\", "\0"} & set(name)
    if not plain or not name.endswith(".tar"):
        raise DataError(f"shard must be a .tar file inside the pool {where}; got {name!r}. Do not use this pool.")


def write_index(
    filesystem: fs.FileSystem,
    folder: str,
    *,
    rows: Sequence[Mapping[str, Any]],
    shards: Sequence[Shard],
    classes: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
    made: Mapping[str, Any] | None = None,
) -> None:
    """Write `index.parquet`, then `pool.json`; a folder without the latter is not a pool yet.

    Args:
        filesystem, folder: where the shards lie already.
        rows: one mapping a sample with the fields of `INDEX_SCHEMA`, in the order of the shards.
        shards: all shards in order.
        classes: class names, position = value in the masks.
        palette: RGB of each class.
        made: how the pool was made, for people.

    Raises:
        DataError: no room or no permission; the cause is the system's error.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_pylist(list(rows), schema=INDEX_SCHEMA), sink, row_group_size=_ROWS_A_GROUP, compression="zstd"
    )
    index = sink.getvalue().to_pybytes()
    content = {
        "format": FORMAT_VERSION,
        "classes": list(classes),
        "palette": [list(colour) for colour in palette],
        "samples": len(rows),
        "masks": sum(row["mask_offset"] is not None for row in rows),
        "shards": [asdict(shard) for shard in shards],
        "index_sha256": hashlib.sha256(index).hexdigest(),
        "made": dict(made or {}),
    }
    write_whole(filesystem, f"{folder}/{INDEX_FILE}", index)
    write_whole(filesystem, f"{folder}/{POOL_FILE}", json.dumps(content, indent=1, ensure_ascii=False).encode())


def write_whole(filesystem: fs.FileSystem, name: str, content: bytes | pa.Buffer) -> None:
    """A file that is whole or not there.

    Raises:
        DataError: no room or no permission; the cause is the system's error.
    """
    # object stores show a file only when it is complete; elsewhere a rename does that
    beside = f"{name}.part" if isinstance(filesystem, fs.LocalFileSystem) else name
    try:
        with filesystem.open_output_stream(beside) as stream:
            stream.write(content)
        if beside != name:
            filesystem.move(beside, name)
    except OSError as error:
        if beside != name:
            with suppress(OSError):
                Path(beside).unlink(missing_ok=True)
        raise DataError(
            f"{name} must be writable; got {error}. Free space or get leave to write, run it again."
        ) from error


def file_sha256(file: pa.NativeFile) -> tuple[int, str]:
    """Length in bytes and hex SHA-256 of an open file."""
    digest, length = hashlib.sha256(), 0
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
        length += len(chunk)
    return length, digest.hexdigest()
