"""The rows of a pool, `index.parquet`, read by row groups: no process has to hold all of them. `write_pool` writes it.

A row group holds whole shards, up to `ROWS_A_GROUP` rows; a larger shard takes several. To look a row up, its group is
read in one request; of it the rows of the same shard stay in a cache of a fixed size, in runs of `ROWS_A_RUN`. An order
reads a shard block by block: a cache too small for all the shards that are being read still saves all but one request a
block. The footer holds the SHA-256 of all groups, and `pool.json` that of the footer: an index that is not of
the pool, or has other rows, is told without reading them. Each page has a checksum.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raysemi.bounded import parse_json
from raysemi.data.limits import plain_keys, read_batches
from raysemi.data.store import NOT_THERE, unreadable
from raysemi.errors import DataError

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
        ("image_crc32", pa.uint32()),
        ("mask_crc32", pa.uint32()),
        ("class_pixels", pa.list_(pa.int64())),
    ]
)
ROWS_A_GROUP = 1 << 15
"""Rows of a group at most. Fewer make a footer that is slow to read, more make each group so: see docs/data.md."""
ROWS_A_RUN = 256
GROUP_ENDS = "group_ends"
"""In the footer: where the first group begins and each one ends. Asked for it, pyarrow aborts over some footers."""
CACHE_BYTES = 40 << 20
"""Rows that a pool keeps in a process."""

_CHECKSUMS = ("image_crc32", "mask_crc32")
"""Columns that indexes of earlier versions lack."""
_PLACES = ("image_offset", "image_bytes", "mask_offset", "mask_bytes", "height", "width", *_CHECKSUMS)
_NEVER_EMPTY = ("key", "shard", "image_offset", "image_bytes", "height", "width")
_LARGEST_GROUP = 1 << 16  # rows; of earlier versions too
_FOOTER_GUESS = 1 << 16  # bytes at the end that are read at once: the whole footer of a small pool
_MAGIC = b"PAR1"
_BROKEN = (OSError, pa.ArrowException, KeyError, ValueError, OverflowError)


class _Window:
    """A file of which one stretch was read, for a reader that wants no other."""

    closed = False

    def __init__(self, start: int, data: bytes, size: int) -> None:
        self._start, self._data, self._size, self._at = start, memoryview(data), size, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, length: int) -> bytes:
        first = self._at - self._start
        if first < 0:
            raise OSError(f"columns must lie together; got one at {self._at}, before {self._start}")
        data = self._data[first : first + length].tobytes()
        self._at += len(data)
        return data

    def close(self) -> None:
        self.closed = True


class _Run(NamedTuple):
    """Some consecutive rows."""

    keys: pa.StringArray
    places: NDArray[np.int64]
    """int64 [rows, 8], `_PLACES`; -1 for none."""

    @property
    def bytes(self) -> int:
        """What it takes in memory, about."""
        return self.keys.nbytes + self.places.nbytes + 512


class _Cache:
    """Runs by name, at most `limit` bytes. Half is for those that were asked for last: what is read along with a run
    that is missing never pushes them out, and what they push out stays as if read along."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes, self._asked_bytes = limit, 0, 0
        self.asked: OrderedDict[tuple[int, int], _Run] = OrderedDict()
        self.along: OrderedDict[tuple[int, int], _Run] = OrderedDict()

    def get(self, name: tuple[int, int]) -> _Run | None:
        run = self.asked.get(name)
        if run is not None:
            self.asked.move_to_end(name)
            return run
        run = self.along.pop(name, None)
        if run is not None:
            self.asked[name] = run
            self._asked_bytes += run.bytes
            while self._asked_bytes > self.limit // 2 and len(self.asked) > 1:
                other, moved = self.asked.popitem(last=False)
                self.along[other] = moved
                self._asked_bytes -= moved.bytes
            while self.bytes > self.limit and self.along:
                self.bytes -= self.along.popitem(last=False)[1].bytes
        return run

    def add(self, name: tuple[int, int], run: _Run, *, wanted: bool) -> None:
        """Keep a run until the next `get`, and longer where there is room, first those that are `wanted`."""
        if name not in self.asked and name not in self.along:
            self.along[name] = run
            self.along.move_to_end(name, last=wanted)
            self.bytes += run.bytes


class Rows:
    """The rows of an index, read as they are asked for. Threads may share it; a process that is forked reads anew.

    Args:
        open_file: opens the file, for reads at any offset.
        name: the file, for errors.
        shards, shard_rows: names and samples of the shards, in order.
        sha256: of the whole file.
        footer_sha256: of what follows the last row group; None where `pool.json` does not say, then all is read once.
        cache_bytes: what it keeps in memory at most, besides the footer.

    Raises:
        DataError: the file is missing, broken, or not the one that was written with the pool's `pool.json`.
    """

    def __init__(
        self,
        open_file: Callable[[], pa.NativeFile],
        name: str,
        shards: Sequence[str],
        shard_rows: NDArray[np.int64],
        sha256: str,
        footer_sha256: str | None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._open_file, self._name, self._shards = open_file, name, shards
        self._shard_ends = np.cumsum(shard_rows)
        self._cache_bytes = cache_bytes
        try:
            self._begin()
            self._size = self._file.size()
            footer = _footer(self._file, self._size)
            if footer_sha256 is None:
                self._file.seek(0)
                same = hashlib.file_digest(self._file, "sha256").hexdigest() == sha256
            else:
                same = hashlib.sha256(footer).hexdigest() == footer_sha256
        except NOT_THERE as error:
            raise self._broken(f"be a readable index; got {error}") from error
        except OSError as error:
            raise unreadable(name, error) from error
        try:
            if not same:  # it may list the same shards, and its offsets would point into other bytes
                raise DataError(
                    f"{name} must be the one that was written with pool.json; got another. Copy both from one place, "
                    f"or pack the pool again (shards of others: `raysemi index`)."
                )
            self._metadata = pq.read_metadata(pa.BufferReader(_MAGIC + footer))
            self._names = frozenset(self._metadata.schema.to_arrow_schema().names)
            groups = [self._metadata.row_group(group).num_rows for group in range(self._metadata.num_row_groups)]
            if min(groups, default=1) < 0 or max(groups, default=1) > _LARGEST_GROUP:
                raise ValueError(f"row groups of {min(groups)} to {max(groups)} rows")
            self._ends = _group_ends(self._metadata, self._size)
        except DataError:
            raise
        except _BROKEN as error:
            raise self._broken(f"be a readable index; got {error}") from error
        self._starts = [0, *np.cumsum(groups).tolist()]
        """First row of each group, and the number of rows at the end."""
        if self._starts[-1] != self._shard_ends[-1]:
            raise self._broken(f"have {self._shard_ends[-1]} rows; got {self._starts[-1]}")

    def row(self, i: int) -> tuple[str, list[int]]:
        """Key of row i, and its offsets, sizes and checksums in the order of `Row`; -1 for none.

        Raises:
            DataError: its group is broken.
        """
        group = bisect_right(self._starts, i) - 1
        number, at = divmod(i - self._starts[group], ROWS_A_RUN)
        if self._process != os.getpid():
            self._begin()
        with self._lock:
            run = self._cache.get((group, number))
            if run is None:
                self._read_shard(group, i)
                run = self._cache.get((group, number))
                assert run is not None
        return cast(str, run.keys[at].as_py()), run.places[at].tolist()

    def groups(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """All rows, a table a row group; nothing of it is kept.

        Args:
            columns: of `INDEX_SCHEMA`; None = all.

        Raises:
            DataError: a group is broken.
        """
        for group in range(len(self._starts) - 1):
            yield self._group(group, INDEX_SCHEMA.names if columns is None else columns)

    def table(self, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        """Rows from `start` to `stop`, at least one; nothing of it is kept. Raises as `groups`."""
        first, last = (bisect_right(self._starts, i) - 1 for i in (start, stop - 1))
        groups = [self._group(group, columns) for group in range(first, last + 1)]
        return pa.concat_tables(groups).slice(start - self._starts[first], stop - start)

    def _begin(self) -> None:
        """Handles, locks and rows of a parent process are not used: their state is shared, or that of a moment."""
        self._file = self._open_file()
        self._cache = _Cache(self._cache_bytes)
        self._lock = Lock()
        self._process = os.getpid()

    def _read_shard(self, group: int, i: int) -> None:
        """Into the cache, the part of row i's shard that is in a group; the whole group where there is room."""
        table = self._group(group, ("key", "shard", *_PLACES))
        start, stop = self._starts[group], self._starts[group + 1]
        shard = int(np.searchsorted(self._shard_ends, i, side="right"))
        first = max(int(self._shard_ends[shard - 1]) if shard else 0, start) - start
        last = min(int(self._shard_ends[shard]), stop) - start - 1
        own = range(first // ROWS_A_RUN, last // ROWS_A_RUN + 1)
        room = self._cache.bytes + 2 * table.nbytes < self._cache.limit
        kept = range(-(-(stop - start) // ROWS_A_RUN)) if room else own
        table = table.slice(kept.start * ROWS_A_RUN, len(kept) * ROWS_A_RUN)
        keys = table.column("key").combine_chunks()
        places = np.stack([_numbers(table.column(name)) for name in _PLACES], axis=1)
        for number in kept:
            at = (number - kept.start) * ROWS_A_RUN
            # copies, or each would hold the whole group
            run = _Run(pa.concat_arrays([keys.slice(at, ROWS_A_RUN)]), places[at : at + ROWS_A_RUN].copy())
            self._cache.add((group, number), run, wanted=number in own)

    def _group(self, group: int, columns: Sequence[str]) -> pa.Table:
        """Some columns of a group, all of which is read; `_CHECKSUMS` that it lacks are empty."""
        if self._process != os.getpid():
            self._begin()
        start, stop = self._ends[group : group + 2] if self._ends else (0, self._size)
        window = _Window(start, self._read(start, stop), self._size)
        try:
            parquet = pq.ParquetFile(
                pa.PythonFile(window, mode="r"),
                metadata=self._metadata,
                read_dictionary=["key", "shard"],
                pre_buffer=False,
                page_checksum_verification=True,
            )
            there = [name for name in columns if name in self._names or name not in _CHECKSUMS]
            table = plain_keys(read_batches(parquet, there, group))
            for name in columns:
                if name not in there:
                    table = table.append_column(name, pa.nulls(table.num_rows, pa.uint32()))
            table = table.select(columns).cast(pa.schema([INDEX_SCHEMA.field(name) for name in columns]))
            if any(table.column(name).null_count for name in _NEVER_EMPTY if name in columns):
                raise ValueError("an empty place")
            table = table.unify_dictionaries().combine_chunks()
        except _BROKEN as error:
            raise self._broken(f"be a readable index; got {error}") from error
        if "shard" in columns:
            self._check_shards(group, table)
        return table

    def _read(self, start: int, stop: int) -> bytes:
        try:
            return bytes(self._file.read_at(stop - start, start))
        except OSError as error:
            raise unreadable(self._name, error) from error

    def _check_shards(self, group: int, table: pa.Table) -> None:
        start, stop = self._starts[group], self._starts[group + 1]
        lo = int(np.searchsorted(self._shard_ends, start, side="right"))
        hi = int(np.searchsorted(self._shard_ends, stop - 1, side="right")) + 1
        counts = np.diff(self._shard_ends[lo:hi].clip(max=stop), prepend=start)
        place = {name: position for position, name in enumerate(self._shards[lo:hi])}
        column = table.column("shard").combine_chunks()
        found = np.array([*(place.get(name, -1) for name in column.dictionary.to_pylist()), -1], dtype=np.int64)
        if not np.array_equal(found[_numbers(column.indices)], np.repeat(np.arange(hi - lo), counts)):
            raise self._broken("list the shards of pool.json in order")

    def _broken(self, rule: str) -> DataError:
        return DataError(f"{self._name} must {rule}. Run `raysemi verify`, then copy or pack the pool again.")


def _numbers(column: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    """Integers, -1 where there is none. Not by `to_numpy`, which imports pandas: seconds, and 60 MB a process."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    there, values = array.buffers()
    own = slice(array.offset, array.offset + len(array))
    if values is None or array.null_count == len(array):
        return np.full(len(array), -1, dtype=np.int64)
    kind = "u" if pa.types.is_unsigned_integer(array.type) else "i"
    numbers = np.frombuffer(values, f"{kind}{array.type.bit_width // 8}")[own].astype(np.int64)
    if array.null_count:
        numbers[np.unpackbits(np.frombuffer(there, np.uint8), bitorder="little")[own] == 0] = -1
    return numbers


def _group_ends(metadata: pq.FileMetaData, size: int) -> list[int] | None:
    """Where the first group begins and each one ends; None in indexes of earlier versions."""
    text = (metadata.metadata or {}).get(GROUP_ENDS.encode())
    if text is None:
        return None
    ends = parse_json(text)
    whole = isinstance(ends, list) and all(type(end) is int for end in ends)
    if not whole or len(ends) != metadata.num_row_groups + 1 or ends != sorted(ends) or not 0 <= ends[0] <= size:
        raise ValueError("row groups that do not lie one after the other")
    if ends[-1] > size:
        raise ValueError("row groups that end behind the file")
    return cast(list[int], ends)


def _footer(file: pa.NativeFile, size: int) -> bytes:
    """The end of a Parquet file: the footer, its length and the magic; less where the file is none."""
    end = bytes(file.read_at(min(size, _FOOTER_GUESS), max(size - _FOOTER_GUESS, 0)))
    length = int.from_bytes(end[-8:-4], "little") + 8
    if length <= len(end) or length > size:
        return end[-length:]
    return bytes(file.read_at(length - len(end), size - length)) + end
