from __future__ import annotations

import hashlib
import json
import multiprocessing
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from raysemi.data.order import LARGEST_BLOCK, Order
from raysemi.data.pool import Pool, Shard
from raysemi.data.rows import CACHE_BYTES, INDEX_SCHEMA, ROWS_A_GROUP, ROWS_A_RUN, Rows
from raysemi.data.write_pool import whole_shards, write_index, write_index_groups
from raysemi.errors import DataError

SHARDS = [*[3001] * 60, 7, 0, ROWS_A_GROUP + 900, 1]  # 214 thousand rows; one shard needs two groups


def table(first: int, shards: Sequence[Shard], offset: int = 0) -> pa.Table:
    """Rows of some shards: every third sample has a mask, every value is a function of its number."""
    number = np.arange(first, first + sum(shard.samples for shard in shards))
    masked = number % 3 == 0
    columns = {
        "key": [f"city-{i % 7}/{i:07d}" for i in number],
        "shard": np.repeat([shard.name for shard in shards], [shard.samples for shard in shards]),
        "image_offset": number * 1000 + offset,
        "image_bytes": number % 997 + 1,
        "mask_offset": pa.array(number * 1000 + 900, mask=~masked),
        "mask_bytes": pa.array(number % 89 + 1, mask=~masked),
        "height": (number % 480 + 1).astype(np.int32),
        "width": (number % 640 + 1).astype(np.int32),
        "image_crc32": pa.array(number * 2_654_435_761 % (1 << 32), pa.uint32()),
        "mask_crc32": pa.array(number * 40_503 % (1 << 32), pa.uint32(), mask=~masked),
        "class_pixels": pa.nulls(len(number), pa.list_(pa.int64())),
    }
    return pa.table(columns).cast(INDEX_SCHEMA)


def write(folder: Path, rows: Sequence[int] = SHARDS, offset: int = 0) -> Path:
    shards = [Shard(f"p-{i:06d}.tar", count, 1, hashlib.sha256(b"%d" % i).hexdigest()) for i, count in enumerate(rows)]
    folder.mkdir(parents=True)
    whole = table(0, shards, offset)
    ends = np.cumsum([0, *rows])
    cuts = [0]  # whole shards, and pieces of those that are larger than a group
    for start, end in pairwise(ends.tolist()):
        if end - cuts[-1] > ROWS_A_GROUP:
            cuts += [start, *range(start + ROWS_A_GROUP, end, ROWS_A_GROUP)]
    groups = [whole.slice(a, b - a) for a, b in pairwise([*cuts, int(ends[-1])]) if b > a]
    write_index_groups(
        fs.LocalFileSystem(), str(folder), groups=groups, shards=shards, classes=["a"], palette=[(0, 0, 0)]
    )
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return write(tmp_path_factory.mktemp("rows") / "pool")


class Counting(fs.FileSystemHandler):
    """A local disk that notes (offset, bytes) of each read of a file that is read by offset."""

    def __init__(self) -> None:
        self.local = fs.LocalFileSystem()
        self.reads: list[tuple[int, int]] = []

    def get_type_name(self) -> str:
        return "counting"

    def open_input_stream(self, path: str) -> Any:
        return self.local.open_input_stream(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        handler, opened = self, self.local.open_input_file(path)

        class File:
            closed = False

            def read(self, length: int) -> bytes:
                handler.reads.append((opened.tell(), length))
                return bytes(opened.read(length))

            def seek(self, offset: int, whence: int = 0) -> int:
                return opened.seek(offset, whence)

            def tell(self) -> int:
                return opened.tell()

            def close(self) -> None:
                opened.close()

        return pa.PythonFile(File(), mode="r")

    def _unused(self, *_: Any) -> Any:
        raise AssertionError("an index is opened, and nothing else is asked of its file system")

    get_file_info = get_file_info_selector = create_dir = delete_dir = delete_dir_contents = _unused
    delete_root_dir_contents = delete_file = move = copy_file = open_output_stream = open_append_stream = _unused
    normalize_path = _unused


def cached(path: Path, cache_bytes: int) -> Rows:
    pool = Pool.open(path)
    return Rows(
        lambda: fs.LocalFileSystem().open_input_file(f"{path}/index.parquet"), "index", pool.shards, pool.shard_rows,
        pool.index_sha256, pool._index_footer_sha256, cache_bytes,
    )  # fmt: skip


def test_rows_are_those_of_the_whole_table(large):
    pool = Pool.open(large)
    expected = pq.read_table(large / "index.parquet").to_pydict()
    assert pool.num_samples == len(expected["key"]) == sum(SHARDS)
    assert pool.num_masks == -(-sum(SHARDS) // 3)
    edges = np.cumsum(SHARDS)
    places = {0, 1, *(edges - 1).tolist(), *edges[:-1].tolist(), *range(0, pool.num_samples, 1009)}
    for i in sorted(places, key=lambda i: hashlib.sha256(b"%d" % i).digest()):  # across groups, forth and back
        row = pool.row(i)
        assert row._asdict() == {name: expected[name][i] for name in row._fields}
    assert pool.index.to_pydict() == expected


def test_only_the_footer_and_the_groups_that_are_asked_for_are_read(large):
    counting = Counting()
    pool = Pool.open(str(large), fs.PyFileSystem(counting))
    assert counting.reads == []
    pool.open_index()
    size = (large / "index.parquet").stat().st_size
    (end,) = counting.reads
    assert end == (size - 65536, 65536)
    counting.reads.clear()

    groups = pq.ParquetFile(large / "index.parquet").metadata
    first = [groups.row_group(g).column(0).data_page_offset for g in range(groups.num_row_groups)]
    assert groups.num_row_groups == 8
    pool.row(35_000)
    (read,) = counting.reads  # one request, inside the second group
    assert first[1] <= read[0]
    assert first[1] < sum(read) < first[2] + 5000  # dictionary pages stand before first data pages
    for i in range(33_011, 36_012):  # the rest of its shard
        pool.key(i)
    pool.row(60_000)  # another shard of the group, for which there is room
    assert len(counting.reads) == 1
    pool.row(0)
    assert len(counting.reads) == 2


def test_a_footer_that_is_longer_than_the_first_read(tmp_path):
    shards = [Shard(f"p-{i:06d}.tar", 1, 1, "") for i in range(300)]
    groups = [table(i, [shard]) for i, shard in enumerate(shards)]
    write_index_groups(
        fs.LocalFileSystem(), str(tmp_path), groups=groups, shards=shards, classes=["a"], palette=[(0, 0, 0)]
    )
    assert pq.ParquetFile(tmp_path / "index.parquet").metadata.serialized_size > 1 << 16
    counting = Counting()
    pool = Pool.open(str(tmp_path), fs.PyFileSystem(counting))
    assert [pool.key(i) for i in (299, 0, 150)] == ["city-5/0000299", "city-0/0000000", "city-3/0000150"]
    assert len(counting.reads) == 2 + 3


def test_memory_stays_below_the_limit_of_the_cache(large):
    limit = 750_000  # all rows would take 20 MB
    rows = cached(large, limit)
    before = pa.total_allocated_bytes()
    for i in range(0, sum(SHARDS), 2003):
        assert rows.row(i)[0] == f"city-{i % 7}/{i:07d}"
        held = [*rows._cache.asked.values(), *rows._cache.along.values()]
        assert rows._cache.bytes == sum(run.bytes for run in held) <= limit
        assert all(run.places.base is None and run.keys.get_total_buffer_size() < 1 << 14 for run in held)
    assert pa.total_allocated_bytes() - before < limit
    assert len(held) > 10
    tiny = cached(large, 0)
    assert tiny.row(5)[0] == "city-5/0000005"
    assert (len(tiny._cache.asked), len(tiny._cache.along)) == (1, 0)


@pytest.mark.parametrize(("cache_bytes", "most"), [(1_850_000, 1.1), (CACHE_BYTES, 0.0)])
def test_a_small_cache_reads_a_group_once_a_block(large, cache_bytes, most, monkeypatch):
    """Slots read 32 shards at once, of which 1.85 MB hold a fifth, and all of those runs that are being read."""
    rows, read = cached(large, cache_bytes), []
    whole = rows._group
    monkeypatch.setattr(rows, "_group", lambda group, columns: read.append(group) or whole(group, columns))
    order, steps = Order(SHARDS, "digest", 0, 16), 600
    assert order.block == LARGEST_BLOCK
    for step in range(steps):
        for i in order.step(step)[0]:
            rows.row(int(i))
    assert len(read) <= most * steps * 16 / LARGEST_BLOCK + 32


def test_neither_pickling_nor_a_fork_takes_the_rows_along(large):
    pool = Pool.open(large)
    pool.open_index()
    before = len(pickle.dumps(pool))
    expected = [pool.row(i) for i in (5, 100_000, 213_000)]
    held = pool.rows._cache.bytes
    assert held > 1_000_000
    assert len(pickle.dumps(pool)) == before
    assert pickle.loads(pickle.dumps(pool)).row(100_000) == expected[1]

    def child(pipe):
        pipe.send((pool.row(5), {group for group, _ in [*pool.rows._cache.asked, *pool.rows._cache.along]}))

    here, there = multiprocessing.Pipe()
    with pool.rows._lock:  # held by another thread, at the worst moment
        process = multiprocessing.get_context("fork").Process(target=child, args=(there,))
        process.start()
        assert here.poll(30)
    assert here.recv() == (expected[0], {0})  # rows of the one group that it read itself
    process.join()
    assert pool.rows._cache.bytes == held


def test_threads_share_the_rows(large):
    rows = cached(large, 600_000)

    def read(seed: int) -> bool:
        places = np.random.Generator(np.random.Philox(key=seed)).integers(0, sum(SHARDS), 20).tolist()
        return all(rows.row(i)[0] == f"city-{i % 7}/{i:07d}" for i in places)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read, range(4)))
    held = [*rows._cache.asked.values(), *rows._cache.along.values()]
    assert rows._cache.bytes == sum(run.bytes for run in held)


def test_an_index_with_other_rows_of_the_same_shards_is_refused(large, tmp_path):
    """Each offset is larger by 512, as that of another packer: neither shards nor counts nor the pool's digest tell."""
    moved = write(tmp_path / "moved", offset=512)
    assert Pool.open(moved).digest == Pool.open(large).digest
    (moved / "pool.json").write_bytes((large / "pool.json").read_bytes())
    with pytest.raises(DataError, match=r"must be the one that was written with pool\.json"):
        Pool.open(moved).open_index()


def test_an_index_with_other_counts_a_shard_is_refused(large, tmp_path):
    """As many samples and the same shards, but one sample has moved to the next shard."""
    for name in ("index.parquet", "pool.json"):
        (tmp_path / name).write_bytes((large / name).read_bytes())
    content = json.loads((tmp_path / "pool.json").read_text())
    content["shards"][20]["samples"] -= 1
    content["shards"][21]["samples"] += 1
    (tmp_path / "pool.json").write_text(json.dumps(content))
    pool = Pool.open(tmp_path)
    with pytest.raises(DataError, match=r"must list the shards of pool\.json in order"):
        pool.row(20 * 3001)


def test_a_flipped_bit_is_found_when_its_group_is_read(large, tmp_path):
    data = bytearray((large / "index.parquet").read_bytes())
    data[pq.ParquetFile(large / "index.parquet").metadata.row_group(2).column(3).data_page_offset + 500] ^= 4
    (tmp_path / "index.parquet").write_bytes(data)
    (tmp_path / "pool.json").write_bytes((large / "pool.json").read_bytes())
    pool = Pool.open(tmp_path)
    assert pool.row(0) == Pool.open(large).row(0)
    with pytest.raises(DataError, match=r"index\.parquet must be a readable index; got .*CRC"):
        pool.row(70_000)


def test_an_index_of_before_opens(large, tmp_path):
    """Statistics, no checksums of pages or samples, groups across shards, and no digest of the footer in pool.json."""
    table = pq.read_table(large / "index.parquet").drop_columns(["image_crc32", "mask_crc32"]).replace_schema_metadata()
    pq.write_table(table, tmp_path / "index.parquet", row_group_size=1 << 16)
    content = json.loads((large / "pool.json").read_text())
    del content["index_footer_sha256"]
    content["index_sha256"] = hashlib.sha256((tmp_path / "index.parquet").read_bytes()).hexdigest()
    (tmp_path / "pool.json").write_text(json.dumps(content))
    old, new = Pool.open(tmp_path), Pool.open(large)
    for i in range(0, sum(SHARDS), 2003):
        assert old.row(i) == new.row(i)._replace(image_crc32=None, mask_crc32=None)
    with (tmp_path / "index.parquet").open("r+b") as file:
        file.seek(1000)
        file.write(b"x")
    with pytest.raises(DataError, match=r"must be the one that was written with pool\.json"):
        Pool.open(tmp_path).open_index()


def test_groups_hold_whole_shards(monkeypatch):
    monkeypatch.setattr("raysemi.data.write_pool.ROWS_A_GROUP", 10)
    counts = [4, 6, 1, 23, 3, 8, 8]
    rows = [{"shard": f"{number}.tar", "i": i} for number, count in enumerate(counts) for i in range(count)]
    groups = list(whole_shards(iter(rows)))
    assert [len(group) for group in groups] == [10, 1, 10, 10, 6, 8, 8]
    assert [row for group in groups for row in group] == rows


def test_rows_are_written_as_they_come(tmp_path):
    shards = [Shard("a.tar", ROWS_A_GROUP, 1, ""), Shard("b.tar", ROWS_A_RUN + 1, 1, "")]
    rows = (row for first, shard in ((0, shards[0]), (7, shards[1])) for row in table(first, [shard]).to_pylist())
    write_index(fs.LocalFileSystem(), str(tmp_path), rows=rows, shards=shards, classes=["a"], palette=[(0, 0, 0)])
    pool = Pool.open(tmp_path)
    assert pool.row(ROWS_A_GROUP + ROWS_A_RUN)[:2] == (f"city-4/{ROWS_A_RUN + 7:07d}", "b.tar")
    assert pq.ParquetFile(tmp_path / "index.parquet").metadata.num_row_groups == 2
