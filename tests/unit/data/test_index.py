from __future__ import annotations

import hashlib
import io
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image

from raysemi.data import index
from raysemi.data.index import index_shards
from raysemi.data.pool import Pool
from raysemi.data.rows import INDEX_SCHEMA
from raysemi.data.verify import verify
from raysemi.data.write_pool import whole_shards
from raysemi.errors import DataError


def encoded(array, kind="PNG"):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind)
    return stream.getvalue()


IMAGE = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
MASK = np.array([[0, 1, 1, 255, 0, 0]] * 4, np.uint8)


def put_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.usefixtures("fork_server")
def test_foreign_shards_become_a_pool(tmp_path):
    long = "x" * 150  # an extra header lies before such a name
    put_tar(
        tmp_path / "b/two.tar",
        [("c.webp", encoded(IMAGE, "WEBP")), ("c.txt", b"side"), (f"{long}.JPG", encoded(IMAGE, "JPEG"))],
    )
    files = [
        ("./dir.d/a.png", encoded(IMAGE)),
        ("./dir.d/a.seg.png", encoded(MASK)),
        ("b.jpeg", encoded(IMAGE, "JPEG")),
    ]
    put_tar(tmp_path / "one.tar", files)
    seen = []
    pool = index_shards(
        tmp_path,
        classes=("sky", "tree"),
        mask_suffix="seg.png",
        processes=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 2), (2, 2)]
    assert pool.shards == ("b/two.tar", "one.tar")
    assert pool.index.column("key").to_pylist() == ["c", long, "dir.d/a", "b"]
    row = pool.row(2)
    with pool.open_shard(row.shard) as file:
        file.seek(row.image_offset)
        assert (np.asarray(Image.open(io.BytesIO(file.read(row.image_bytes)))) == IMAGE).all()
        file.seek(row.mask_offset)
        assert (np.asarray(Image.open(io.BytesIO(file.read(row.mask_bytes)))) == MASK).all()
    assert pool.index.column("class_pixels").to_pylist() == [None, None, [12, 8], None]
    assert pool.has_masks
    assert not pool.labeled
    verify(Pool.open(tmp_path))
    assert index_shards(tmp_path, classes=("sky", "tree"), mask_suffix="seg.png", processes=2).digest == pool.digest


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ([("a.mask.png", encoded(MASK))], "key a of shard x.tar must have one image"),
        ([("a.png", encoded(IMAGE)), ("a.jpg", encoded(IMAGE, "JPEG"))], "must have one image"),
        ([("a.png", encoded(IMAGE)), ("a.mask.png", encoded(np.full((4, 6), 37, np.uint8)))], "class id 37 of 2"),
        ([("a.png", encoded(IMAGE)), ("a.mask.png", encoded(MASK[:3]))], "must have the image's size 6 x 4; got 6 x 3"),
        ([("a.png", encoded(IMAGE)), ("a.mask.png", encoded(IMAGE))], "one channel; got mode RGB"),
        ([("a.png", encoded(IMAGE)[:60])], "a of shard x.tar must be readable"),
        ([("a.png", encoded(IMAGE)), ("a.pyd", b"import os")], "got pyd"),
        ([("../a.png", encoded(IMAGE))], "'../a.png'"),
        ([("a.png", encoded(IMAGE)), ("b.png", encoded(IMAGE)), ("a.txt", b"")], "files of key a"),
        ([("noext", b"")], "KEY.SUFFIX"),
        ([], "got none"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(tmp_path, files, text):
    put_tar(tmp_path / "x.tar", files)
    with pytest.raises(DataError, match=text.replace(".", r"\.")):
        index_shards(tmp_path, classes=("sky", "tree"), processes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_masks_need_class_names_and_keys_are_unique_over_shards(tmp_path):
    put_tar(tmp_path / "x.tar", [("a.png", encoded(IMAGE)), ("a.mask.png", encoded(MASK))])
    with pytest.raises(DataError, match="--classes"):
        index_shards(tmp_path, processes=1)
    put_tar(tmp_path / "y.tar", [("a.png", encoded(IMAGE))])
    with pytest.raises(DataError, match=r"a in x\.tar and y\.tar"):
        index_shards(tmp_path, classes=("sky", "tree"), processes=1)


@pytest.mark.parametrize("cut", [700, 1024, 2048])
def test_truncated_shards_are_refused_wherever_the_cut_falls(tmp_path, cut):
    put_tar(tmp_path / "x.tar", [("a.png", encoded(IMAGE)), ("b.png", encoded(IMAGE))])
    data = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(data[:cut])
    with pytest.raises(DataError, match=r"shard x\.tar must"):
        index_shards(tmp_path, processes=1)


def test_no_shards_compressed_shards_and_packed_pools_are_refused(tmp_path):
    with pytest.raises(DataError, match="got none"):
        index_shards(tmp_path)
    with pytest.raises(DataError, match="Check the path"):
        index_shards(tmp_path / "nowhere")
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match="uncompressed"):
        index_shards(tmp_path)


def test_row_groups_and_bytes_are_those_of_rows_that_are_all_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("raysemi.data.index.ROWS_A_GROUP", 5)
    monkeypatch.setattr("raysemi.data.write_pool.ROWS_A_GROUP", 5)
    for shard, count in (("a", 2), ("b", 3), ("c", 1), ("d", 12), ("e", 2)):
        put_tar(tmp_path / f"{shard}.tar", [(f"{shard}{number}.png", encoded(IMAGE)) for number in range(count)])
    pool = index_shards(tmp_path, processes=1)
    rows = pool.index.to_pylist()
    groups = list(whole_shards(rows))
    assert [len(group) for group in groups] == [5, 1, 5, 5, 4]
    assert [table.to_pylist() for table in pool.rows.groups()] == groups
    before = hashlib.sha256((tmp_path / "index.parquet").read_bytes()).digest()
    index.write_index_groups(
        pool.filesystem, str(tmp_path), shards=pool.shard_files, classes=(), palette=(),
        groups=(pyarrow.Table.from_pylist(group, schema=INDEX_SCHEMA) for group in groups),
    )  # fmt: skip
    assert hashlib.sha256((tmp_path / "index.parquet").read_bytes()).digest() == before


def test_rows_wait_in_temporary_files_that_go(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    for shard in "abc":
        put_tar(tmp_path / f"pool/{shard}.tar", [(f"{shard}.png", encoded(IMAGE))])
    waiting = []

    def look(done: int, total: int) -> None:
        waiting.append(len(list(Path(tempfile.gettempdir()).rglob("*.arrow"))))

    index_shards(tmp_path / "pool", processes=1, progress=look)
    assert waiting == [1, 2, 3]
    assert not list((tmp_path / "tmp").iterdir())
