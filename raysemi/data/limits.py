"""How large a pool's parts may be, asked before anything of that size is made: a small file may claim to be huge."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

LARGEST_PIXELS = 89_478_485
"""Pixels of the largest image that is decoded, Pillow's own bound."""
LARGEST_PAYLOAD = 1 << 30
"""Bytes of one encoded image or mask."""
LARGEST_POOL_FILE = 1 << 27
"""Bytes of `pool.json`: twice what 100 million samples in shards of 256 take."""
LONGEST_KEY = 1024
"""Characters of a key."""
_ROWS_AT_ONCE = 1 << 14
_SPARE_BYTES = 1 << 24
_ROW_BYTES = 1 << 13
"""Bytes of a row of a table before compression, at most, on average; the longest key and 255 counts of pixels fit."""


def read_table(source: pa.NativeFile | pa.Buffer, most_rows: int) -> pa.Table:
    """A Parquet file, its columns of texts as dictionaries: a text that is repeated takes no room each time.

    The columns of `pq.FileMetaData` are not looked at: pyarrow aborts the process over some broken ones.

    Args:
        source: the file.
        most_rows: rows that make sense.

    Raises:
        ValueError: more rows, or more bytes than so many rows can have.
        ArrowException, OSError: no Parquet file.
    """
    metadata = pq.read_metadata(source)
    if not 0 <= metadata.num_rows <= most_rows:
        raise ValueError(f"{metadata.num_rows} rows where there can be at most {most_rows}")
    fields = metadata.schema.to_arrow_schema()
    texts = [field.name for field in fields if pa.types.is_string(field.type) or pa.types.is_dictionary(field.type)]
    if isinstance(source, pa.NativeFile):
        source.seek(0)
    return read_batches(pq.ParquetFile(source, read_dictionary=texts))


def read_batches(file: pq.ParquetFile, columns: Sequence[str] | None = None, row_group: int | None = None) -> pa.Table:
    """Columns of a Parquet file or of one of its row groups, which may not unpack to more than so many rows have.

    Raises:
        ValueError: more bytes.
        ArrowException, OSError: the file is broken, or lacks a column.
    """
    groups = None if row_group is None else [row_group]
    names = None if columns is None else list(columns)
    batches: list[pa.RecordBatch] = []
    rows = unpacked = 0
    for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=names, use_threads=False):
        batch.validate(full=True)  # also that texts are texts
        batches.append(batch)
        rows, unpacked = rows + batch.num_rows, unpacked + batch.nbytes
        room = _SPARE_BYTES + rows * _ROW_BYTES
        if unpacked > room:
            raise ValueError(f"{unpacked} bytes once unpacked where {rows} rows have at most {room}")
    if batches:
        return pa.Table.from_batches(batches)
    empty = file.schema_arrow.empty_table()
    return empty if names is None else empty.select(names)


def plain_keys(table: pa.Table) -> pa.Table:
    """The column `key`, where there is one, as texts, none of them longer than `LONGEST_KEY`.

    Raises:
        ValueError: a longer one.
    """
    position = table.schema.get_field_index("key")
    if position < 0:
        return table
    column = table.column(position)
    if pa.types.is_dictionary(column.type):
        longest = max((pc.max(pc.utf8_length(part.dictionary)).as_py() or 0 for part in column.chunks), default=0)
        if longest > LONGEST_KEY:
            raise ValueError(f"a key of {longest} characters, more than {LONGEST_KEY}")
        column = column.cast(pa.string())
    return table.set_column(position, "key", column)
