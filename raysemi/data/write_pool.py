"""Writing what makes a folder of shards a pool: `index.parquet`, a row group at a time, then `pool.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from raysemi.data.pool import FORMAT_VERSION, INDEX_FILE, POOL_FILE, Shard
from raysemi.data.rows import GROUP_ENDS, INDEX_SCHEMA, ROWS_A_GROUP
from raysemi.errors import DataError

_SORTED = ("image_offset", "image_bytes", "mask_offset", "mask_bytes")
_FORMAT = {
    "compression": "zstd",
    "write_statistics": False,  # of no use in sorted offsets and random sizes, and a third of the footer
    "write_page_checksum": True,
    "use_dictionary": ["shard", "height", "width"],
    "column_encoding": dict.fromkeys(_SORTED, "DELTA_BINARY_PACKED"),
}


def write_index(
    filesystem: fs.FileSystem,
    folder: str,
    *,
    rows: Iterable[Mapping[str, Any]],
    shards: Sequence[Shard],
    classes: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
    made: Mapping[str, Any] | None = None,
) -> None:
    """Write `index.parquet`, then `pool.json`; a folder without the latter is not a pool yet.

    Args:
        filesystem, folder: where the shards lie already.
        rows: one mapping a sample with the fields of `INDEX_SCHEMA`, in the order of the shards; a row group of them is
            held at a time.
        shards: all shards in order; looked at after the rows.
        classes: class names, position = value in the masks.
        palette: RGB of each class.
        made: how the pool was made, for people.

    Raises:
        DataError: no room or no permission; the cause is the system's error.
    """
    write_index_groups(
        filesystem,
        folder,
        groups=(pa.Table.from_pylist(group, schema=INDEX_SCHEMA) for group in whole_shards(rows)),
        shards=shards,
        classes=classes,
        palette=palette,
        made=made,
    )


def write_index_groups(
    filesystem: fs.FileSystem,
    folder: str,
    *,
    groups: Iterable[pa.Table],
    shards: Sequence[Shard],
    classes: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
    made: Mapping[str, Any] | None = None,
) -> None:
    """As `write_index`, from tables of `INDEX_SCHEMA`, a row group each (`whole_shards`)."""
    with whole_file(filesystem, f"{folder}/{INDEX_FILE}") as stream:
        index = write_rows(stream, groups)
    content = {
        "format": FORMAT_VERSION,
        "classes": list(classes),
        "palette": [list(colour) for colour in palette],
        "samples": index.samples,
        "masks": index.masks,
        "shards": [shard._asdict() for shard in shards],
        "index_sha256": index.sha256,
        "index_footer_sha256": index.footer_sha256,
        "made": dict(made or {}),
    }
    write_whole(filesystem, f"{folder}/{POOL_FILE}", json.dumps(content, indent=1, ensure_ascii=False).encode())


def write_whole(filesystem: fs.FileSystem, name: str, content: bytes | pa.Buffer) -> None:
    """A file that is whole or not there.

    Raises:
        DataError: no room or no permission; the cause is the system's error.
    """
    with whole_file(filesystem, name) as stream:
        stream.write(content)


@contextmanager
def whole_file(filesystem: fs.FileSystem, name: str) -> Iterator[pa.NativeFile]:
    """A stream into a file that is whole or not there. Raises as `write_whole`."""
    # object stores show a file only when it is complete; elsewhere a rename does that
    beside = f"{name}.part" if isinstance(filesystem, fs.LocalFileSystem) else name
    try:
        with filesystem.open_output_stream(beside) as stream:
            yield stream
        if beside != name:
            filesystem.move(beside, name)
    except BaseException as error:
        if beside != name:
            with suppress(OSError):
                Path(beside).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise DataError(
            f"{name} must be writable; got {error}. Free space or get leave to write, run it again."
        ) from error


class Written(NamedTuple):
    """What `pool.json` says of an index."""

    samples: int
    masks: int
    sha256: str
    """Of the whole file."""
    footer_sha256: str
    """Of what follows the last row group."""


def whole_shards(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Rows in the order of their shards, a list a row group."""
    group: list[Mapping[str, Any]] = []
    for _, of_shard in groupby(rows, key=itemgetter("shard")):
        while part := list(islice(of_shard, ROWS_A_GROUP)):
            if group and len(group) + len(part) > ROWS_A_GROUP:
                yield group
                group = []
            group += part
    if group:
        yield group


def write_rows(stream: IO[bytes], groups: Iterable[pa.Table]) -> Written:
    """Write an index.

    Args:
        stream: where to; it stays open.
        groups: tables of `INDEX_SCHEMA`, each of whole shards (`whole_shards`), in order.
    """
    sink = _Sink(stream)
    samples = masks = 0
    with pq.ParquetWriter(sink, INDEX_SCHEMA, **_FORMAT) as writer:
        ends = [sink.tell()]
        for group in groups:
            writer.write_table(group, row_group_size=max(group.num_rows, 1))
            ends.append(sink.tell())
            samples += group.num_rows
            masks += group.num_rows - group.column("mask_offset").null_count
        writer.add_key_value_metadata({"rows_sha256": sink.whole.hexdigest(), GROUP_ENDS: json.dumps(ends)})
        sink.footer = hashlib.sha256()
    return Written(samples, masks, sink.whole.hexdigest(), sink.footer.hexdigest())


class _Sink:
    """A stream that names what goes through it."""

    closed = False

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._at = 0
        self.whole = hashlib.sha256()
        self.footer: Any = None

    def write(self, data: bytes) -> int:
        self._stream.write(data)
        self.whole.update(data)
        if self.footer is not None:
            self.footer.update(data)
        self._at += len(data)
        return len(data)

    def tell(self) -> int:
        return self._at

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True
