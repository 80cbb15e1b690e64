from __future__ import annotations

import hashlib
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import fs

from raysemi.data.pack import pack
from raysemi.data.pool import Pool, check_shard_name
from raysemi.data.sources import open_source
from raysemi.data.verify import verify
from raysemi.errors import DataError


def draw(path: Path, seed: int, height=5, width=7) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


@pytest.fixture
def pool_path(tmp_path):
    root = tmp_path / "source"
    for number in range(5):
        draw(root / f"images/train/city/{number}.png", number)
    for number in (1, 3):
        (root / "labels/train/city").mkdir(parents=True, exist_ok=True)
        mask = np.full((5, 7), number - 1, np.uint8)
        mask[0, :2] = 255
        Image.fromarray(mask).save(root / f"labels/train/city/{number}.png")
    (root / "classes.txt").write_text("a\nb\nc\n")
    source = open_source("folder", root)
    pack(
        source,
        tmp_path / "out",
        split=1,
        pools=("unlabeled", "labeled"),
        processes=1,
        shard_samples=3,
        keep_unlabeled_masks=True,
    )
    return tmp_path / "out/unlabeled"


def test_offsets_point_at_the_payload(pool_path, tmp_path):
    pool = Pool.open(pool_path)
    assert pool.num_samples == 4
    assert pool.shard_rows.tolist() == [3, 1]
    assert pool.has_masks
    assert not pool.labeled
    for i in range(4):
        row = pool.row(i)
        with pool.open_shard(row.shard) as file:
            file.seek(row.image_offset)
            assert file.read(row.image_bytes) == (tmp_path / f"source/images/train/{row.key}.png").read_bytes()
            assert (row.height, row.width) == (5, 7)
            if row.mask_offset is None:
                assert row.mask_bytes is None
                assert pool.index.column("class_pixels")[i].as_py() is None
            else:
                file.seek(row.mask_offset)
                mask = np.asarray(Image.open(io.BytesIO(file.read(row.mask_bytes))))
                number = int(row.key[-1]) - 1
                assert (mask[1:] == number).all()
                expected = [0, 0, 0]
                expected[number] = 33
                assert pool.index.column("class_pixels")[i].as_py() == expected
    assert [pool.row(i).mask_offset is None for i in range(4)].count(False) == 1
    assert pool.row(3).shard == "unlabeled-000001.tar"


def test_a_pool_opens_by_url_and_on_a_given_filesystem(pool_path):
    local = Pool.open(pool_path)
    url = Pool.open(f"file://{pool_path}")
    below = Pool.open("unlabeled", fs.SubTreeFileSystem(str(pool_path.parent), fs.LocalFileSystem()))
    assert local.digest == url.digest == below.digest
    assert local.row(2) == url.row(2) == below.row(2)
    with below.open_shard(below.shards[1]) as file:
        assert len(file.read(3)) == 3


def test_a_pickled_pool_leaves_its_index_behind(pool_path):
    pool = Pool.open(pool_path)
    before = len(pickle.dumps(pool))
    row = pool.row(3)
    assert len(pickle.dumps(pool)) < before + 2000
    assert pickle.loads(pickle.dumps(pool)).row(3) == row


def test_the_digest_names_content_and_classes(pool_path):
    digest = Pool.open(pool_path).digest
    content = json.loads((pool_path / "pool.json").read_text())
    content["made"] = {}
    (pool_path / "pool.json").write_text(json.dumps(content))
    assert Pool.open(pool_path).digest == digest
    content["classes"][1] = "other"
    (pool_path / "pool.json").write_text(json.dumps(content))
    assert Pool.open(pool_path).digest != digest


def test_verify_names_every_damaged_file(pool_path):
    pool = Pool.open(pool_path)
    seen = []
    verify(pool, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    shard = pool_path / "unlabeled-000000.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    other = pool_path / "unlabeled-000001.tar"
    other.write_bytes(other.read_bytes()[:-512])
    with pytest.raises(DataError) as caught:
        verify(pool)
    assert "unlabeled-000000.tar has other bytes" in str(caught.value)
    assert "unlabeled-000001.tar has 9728 bytes instead of 10240" in str(caught.value)
    other.unlink()
    with pytest.raises(DataError, match=r"000001\.tar cannot be read"):
        verify(pool)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda path: (path / "pool.json").unlink(), "raysemi pack"),
        (lambda path: (path / "pool.json").write_text("{"), "readable JSON"),
        (lambda path: (path / "pool.json").write_text('{"format": 99}'), "must have format 1; got 99"),
        (lambda path: (path / "pool.json").write_text('{"format": 1}'), "must hold all fields"),
        (lambda path: (path / "index.parquet").unlink(), "readable index"),
        (lambda path: (path / "index.parquet").write_bytes(b"PAR1"), "must be the one that was written with pool.json"),
        (lambda path: rewrite(path, b"PAR1"), "readable index"),
        (lambda path: (path / "pool.json").write_text(EMPTY), "must hold samples; got an empty one"),
        (lambda path: swap(path, "samples", 4), "must have 5 rows; got 4"),
        (lambda path: swap(path, "name", "../secret.tar"), "inside the pool"),
        (lambda path: swap(path, "name", "other.tar"), "list the shards"),
    ],
)
def test_broken_pools_are_told(pool_path, change, text):
    change(pool_path)
    with pytest.raises(DataError, match=text):
        Pool.open(pool_path).row(0)


EMPTY = json.dumps(
    {"format": 1, "classes": ["a"], "palette": [[1, 2, 3]], "masks": 0, "shards": [], "index_sha256": "", "made": {}}
)


def rewrite(path, content):
    """Another index, which `pool.json` promises as it did before it named footers."""
    (path / "index.parquet").write_bytes(content)
    pool = json.loads((path / "pool.json").read_text())
    del pool["index_footer_sha256"]
    pool["index_sha256"] = hashlib.sha256(content).hexdigest()
    (path / "pool.json").write_text(json.dumps(pool))


def swap(path, field, value):
    content = json.loads((path / "pool.json").read_text())
    content["shards"][0][field] = value
    (path / "pool.json").write_text(json.dumps(content))


def test_an_index_of_another_pool_is_refused(pool_path):
    rewrite(pool_path, (pool_path.parent / "labeled/index.parquet").read_bytes())
    with pytest.raises(DataError, match="must have 4 rows; got 1"):
        _ = Pool.open(pool_path).index


def test_a_stale_index_of_the_same_shards_is_refused(pool_path):
    """Same shards, same rows: only an offset differs, and would be read as another image's bytes."""
    table = Pool.open(pool_path).index
    column = table.schema.get_field_index("image_offset")
    moved = table.set_column(column, "image_offset", pc.add(table.column(column), 512))
    pq.write_table(moved, pool_path / "index.parquet")
    with pytest.raises(DataError, match=r"must be the one that was written with pool\.json.*raysemi index"):
        Pool.open(pool_path).row(0)


@pytest.mark.parametrize("name", ["pipe:cat x.tar", "/etc/x.tar", "a/../../x.tar", "x.zip", "", "s3://b/x.tar"])
def test_shard_names_stay_inside_the_pool(name):
    with pytest.raises(DataError):
        check_shard_name(name, "pool")


def test_urls_that_are_no_filesystem_are_refused():
    with pytest.raises(DataError, match="s3://"):
        Pool.open("pipe://cat")
