"""A pool: a folder of tar shards with an index of where each image and mask lies, on a disk or in an object store.

labeled-000000.tar ...   KEY.jpg|jpeg|png|webp and, where there is one, KEY.mask.png (predicted: KEY.confidence.png too)
index.parquet            one row a sample, in the order of the shards (`rows.py`); offsets point at the payload
pool.json                format version, class names, palette, counts, a digest per shard
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs

from raysemi.bounded import parse_json
from raysemi.data.kept import open_kept
from raysemi.data.limits import LARGEST_POOL_FILE
from raysemi.data.rows import Rows
from raysemi.data.store import NOT_THERE, StoreConfig, open_store, unreadable
from raysemi.errors import DataError

FORMAT_VERSION = 1
INDEX_FILE = "index.parquet"
POOL_FILE = "pool.json"
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MASK_SUFFIX = "mask.png"
CONFIDENCE_SUFFIX = "confidence.png"
"""Beside a predicted mask: 8 bits a pixel, 255 times the probability of its class. The index does not list it."""
NOT_ANNOTATED = 255
"""Value of a mask where nothing is annotated."""

_CHUNK_BYTES = 1 << 22
_PLAIN_SHARD = re.compile(r"(?!/)(?!(?:.*/)?\.\./)[^:\\\0]+\.tar", re.DOTALL)


class Shard(NamedTuple):
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

    def __init__(
        self,
        path: str,
        filesystem: fs.FileSystem,
        folder: str,
        content: Mapping[str, Any],
        store: StoreConfig | None = None,
    ) -> None:
        self.path = path
        self.filesystem = filesystem
        self.folder = folder
        self.store = store or StoreConfig()
        self.classes: tuple[str, ...] = tuple(content["classes"])
        self.palette: tuple[tuple[int, int, int], ...] = tuple((r, g, b) for r, g, b in content["palette"])
        self.shard_files = tuple(Shard(**shard) for shard in content["shards"])
        self.num_samples = sum(shard.samples for shard in self.shard_files)
        self.num_masks = int(content["masks"])
        self.made: dict[str, Any] = dict(content.get("made", {}))
        """How the pool was made: source, split, recipe."""
        self.index_sha256 = str(content["index_sha256"])
        footer = content.get("index_footer_sha256")  # absent in pools of before
        self._index_footer_sha256 = None if footer is None else str(footer)

    @classmethod
    def open(cls, path: str | Path, filesystem: fs.FileSystem | None = None, store: StoreConfig | None = None) -> Pool:
        """Open a pool.

        Args:
            path: folder, or a URL that `pyarrow.fs` understands (`s3://`, `gs://`, `file://`).
            filesystem: where `path` is to be looked up, instead of reading it as a local path or URL.
            store: `data.store.*`: how an object store is reached and read.

        Raises:
            DataError: there is no pool, or its `pool.json` is broken or of another format version; a DataFailure when
                the store does not answer.
        """
        filesystem, folder = locate(path, filesystem, store)
        name = f"{folder}/{POOL_FILE}"
        try:
            with filesystem.open_input_stream(name) as stream:
                text = stream.read(LARGEST_POOL_FILE + 1)
            if len(text) > LARGEST_POOL_FILE:
                raise ValueError(f"more than {LARGEST_POOL_FILE} bytes")
            content = parse_json(text)
        except (FileNotFoundError, NotADirectoryError) as error:
            why = "" if isinstance(filesystem, fs.LocalFileSystem) else f": {error}"
            raise DataError(
                f"pool must be a folder with a {POOL_FILE}; got {path}{why}. Make one with `raysemi pack`, or with "
                f"`raysemi index` from shards that someone else made."
            ) from error
        except OSError as error:
            raise unreadable(f"{path}/{POOL_FILE}", error) from error
        except ValueError as error:
            raise DataError(f"{path}/{POOL_FILE} must be readable JSON; got {error}. Pack the pool again.") from error
        version = content.get("format") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path}/{POOL_FILE} must have format {FORMAT_VERSION}; got {version}. Pack the pool again with this "
                f"version of raysemi."
            )
        try:
            pool = cls(str(path), filesystem, folder, content, store)
            _check_fields(pool)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            text = f"{error!r:.200}"
            raise DataError(f"{path}/{POOL_FILE} must hold all fields; got {text}. Pack the pool again.") from error
        for shard in pool.shard_files:
            check_shard_name(shard.name, str(path))
        if pool.num_samples == 0:
            raise DataError(f"pool must hold samples; got an empty one at {path}. Pack it again.")
        return pool

    @cached_property
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
    def rows(self) -> Rows:
        """The index, of which no row is read yet.

        Raises:
            DataError: it is missing, broken, or not the one that was written with this `pool.json`.
        """
        return Rows(
            lambda: open_kept(self._open_index_file, self.index_sha256),
            f"{self.path}/{INDEX_FILE}",
            self.shards,
            self.shard_rows,
            self.index_sha256,
            self._index_footer_sha256,
        )

    def _open_index_file(self) -> pa.NativeFile:
        return self.filesystem.open_input_file(f"{self.folder}/{INDEX_FILE}")

    def open_index(self) -> None:
        """Open the index now, so that what is wrong with it shows. Raises as `rows`."""
        _ = self.rows

    @property
    def index(self) -> pa.Table:
        """The whole index, one row a sample, read at each call: for small pools. Raises as `rows`."""
        return pa.concat_tables(self.rows.groups()).unify_dictionaries().combine_chunks()

    @cached_property
    def _shard_ends(self) -> NDArray[np.int64]:
        return np.cumsum(self.shard_rows)

    def key(self, i: int) -> str:
        """Key of sample i."""
        return self.rows.row(i)[0]

    def row(self, i: int) -> Row:
        """Where sample i lies, i from 0 to num_samples - 1."""
        key, places = self.rows.row(i)
        image_offset, image_bytes, mask_offset, mask_bytes, height, width, image_crc32, mask_crc32 = places
        return Row(
            key,
            self.shard_files[int(np.searchsorted(self._shard_ends, i, side="right"))].name,
            image_offset,
            image_bytes,
            None if mask_offset < 0 else mask_offset,
            None if mask_offset < 0 else mask_bytes,
            height,
            width,
            None if image_crc32 < 0 else image_crc32,
            None if mask_crc32 < 0 else mask_crc32,
        )

    def shard_bytes(self, name: str) -> int:
        """Length of a shard as `pool.json` says."""
        return self._by_name[name].bytes

    def origin(self, name: str) -> tuple[str, str]:
        """Path of the pool, and of a shard in it, as people know them."""
        return self.path, name

    def open_shard(self, name: str) -> pa.NativeFile:
        """A shard, open for reads at any offset.

        Raises:
            DataError: it cannot be opened; a DataFailure when the store does not answer.
        """
        try:
            return self.filesystem.open_input_file(f"{self.folder}/{name}")
        except NOT_THERE as error:
            raise DataError(f"shard {name} of {self.path} must be readable; got {error}. {_AGAIN}") from error
        except OSError as error:
            raise unreadable(f"shard {name} of {self.path}", error) from error

    def entry(self, name: str) -> tuple[str, Shard] | None:
        """URL and entry in `pool.json` of a shard that is worth a copy on this machine; None when it lies here."""
        return None if self.local else (f"{self.path.partition('?')[0]}/{name}", self._by_name[name])

    @cached_property
    def _by_name(self) -> dict[str, Shard]:
        return {shard.name: shard for shard in self.shard_files}

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.bytes for shard in self.shard_files)

    def __getstate__(self) -> dict[str, Any]:
        cached = ("rows", "shards", "shard_rows", "_shard_ends", "_by_name")
        return {name: value for name, value in self.__dict__.items() if name not in cached}


_AGAIN = "Run `raysemi verify`, then copy or pack the pool again."


def locate(
    path: str | Path, filesystem: fs.FileSystem | None = None, store: StoreConfig | None = None
) -> tuple[fs.FileSystem, str]:
    """Filesystem and path inside it for a local path or a URL, as `open_store` takes it.

    Raises:
        DataError: the URL cannot be used.
    """
    if filesystem is not None:
        return filesystem, str(path).rstrip("/")
    if str(path).startswith("pipe:"):
        raise DataError(
            f"pool must be a folder or a URL such as s3://bucket/pool; got a command, {path}. Commands are never run."
        )
    if "://" not in str(path):
        return fs.LocalFileSystem(), str(Path(path).expanduser().absolute())
    return open_store(str(path), store)


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
    if not 0 <= pool.num_masks <= pool.num_samples < 1 << 62:
        raise ValueError(f"masks must be 0 to {pool.num_samples}, not {pool.num_masks}")


def is_plain(key: str) -> bool:
    """Whether a key is a relative path that stays below any folder it is joined to, and prints on one line."""
    return key.isprintable() and "\\" not in key and not {"", ".", ".."}.intersection(key.split("/"))


def check_shard_name(name: str, where: str) -> None:
    """Refuse a shard name that could lead out of the pool's folder or start a command.

    Raises:
        DataError: the name is not a plain relative path of a tar file.
    """
    if not _PLAIN_SHARD.fullmatch(name):
        raise DataError(f"shard must be a .tar file inside the pool {where}; got {name!r}. Do not use this pool.")


def file_sha256(file: pa.NativeFile) -> tuple[int, str]:
    """Length in bytes and hex SHA-256 of an open file."""
    digest, length = hashlib.sha256(), 0
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
        length += len(chunk)
    return length, digest.hexdigest()
