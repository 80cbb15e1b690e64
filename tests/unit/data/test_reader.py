import io
import os
import pickle

import numpy as np
import pytest
from PIL import Image
from pyarrow import fs

from raysemi.data import reader as module
from raysemi.data.reader import CorruptSample, Reader
from raysemi.errors import DataError, DataFailure


def damage(key, suffix, payload):
    def change(name, files):
        if name == key:
            files[suffix] = payload(files[suffix]) if callable(payload) else payload

    return change


def encoded(array, kind="PNG"):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind)
    return stream.getvalue()


def payload_of(pool, i, what="image"):
    row = pool.row(i)
    with pool.open_shard(row.shard) as shard:
        return shard.read_at(getattr(row, f"{what}_bytes"), getattr(row, f"{what}_offset"))


def test_reads_every_image_and_mask(tmp_path, make_pool):
    pool = make_pool(tmp_path)
    reader = Reader(pool)
    for i in (12, 0, 7, 4, 5):
        assert np.array_equal(reader.image(i), np.asarray(Image.open(io.BytesIO(payload_of(pool, i))).convert("RGB")))
        assert np.array_equal(reader.mask(i), np.asarray(Image.open(io.BytesIO(payload_of(pool, i, "mask")))))
        assert reader.image(i).shape == (40 + i, 60 - i, 3)
        assert set(np.unique(reader.mask(i))) <= {0, 1, 255}


@pytest.mark.parametrize("kind", ["sub tree", "memory"])
def test_reads_through_any_filesystem(tmp_path, make_pool, kind):
    local = make_pool(tmp_path / "here")
    if kind == "sub tree":
        from raysemi.data.pool import Pool

        remote = Pool.open("here", fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()))
    else:
        remote = make_pool("bucket/pool", filesystem=fs._MockFileSystem())
    for i in range(13):
        assert np.array_equal(Reader(remote).image(i), Reader(local).image(i))
        assert np.array_equal(Reader(remote).mask(i), Reader(local).mask(i))


def test_grey_and_transparent_images_become_rgb(tmp_path, make_pool):
    grey = np.arange(40 * 60, dtype=np.uint8).reshape(40, 60)
    pool = make_pool(tmp_path, 1, change=damage("city/000", "jpg", encoded(grey)))
    assert np.array_equal(Reader(pool).image(0), np.repeat(grey[..., None], 3, axis=2))
    clear = np.dstack([grey, grey, grey, 255 - grey])
    pool = make_pool(tmp_path / "b", 1, change=damage("city/000", "jpg", encoded(clear)))
    assert np.array_equal(Reader(pool).image(0), clear[..., :3])


def test_a_palette_mask_is_read_as_its_indices(tmp_path, make_pool):
    mask = Image.fromarray(np.arange(2400, dtype=np.uint8).reshape(40, 60) % 3, "P")
    mask.putpalette([9, 8, 7, 6, 5, 4, 3, 2, 1])
    stream = io.BytesIO()
    mask.save(stream, "PNG")
    pool = make_pool(tmp_path, 1, change=damage("city/000", "mask.png", stream.getvalue()))
    assert np.array_equal(Reader(pool).mask(0), np.arange(2400, dtype=np.uint8).reshape(40, 60) % 3)


@pytest.mark.parametrize(
    ("suffix", "payload", "text"),
    [
        ("jpg", lambda b: b[: len(b) // 2], "image must be a readable"),
        ("jpg", b"no image at all", "image must be a readable"),
        ("jpg", encoded(np.zeros((41, 60, 3), np.uint8), "JPEG"), "image must be 53x47 pixels.*got 60x41"),
        ("jpg", encoded(np.zeros((47, 53), np.uint16)), "image must have 8 bits"),
        ("jpg", encoded(np.zeros((47, 53), np.uint8), "GIF"), "image must be a readable"),
        ("mask.png", encoded(np.zeros((20, 30), np.uint8)), "mask must be 53x47 pixels.*got 30x20"),
        ("mask.png", encoded(np.full((47, 53), 37, np.uint8)), "classes below 3 or 255; got 37"),
        ("mask.png", encoded(np.zeros((47, 53, 3), np.uint8)), "one channel; got RGB"),
        ("mask.png", lambda b: b[:-30], "mask must be a readable PNG"),
        ("mask.png", encoded(np.zeros((47, 53), np.uint8), "JPEG"), "mask must be a readable PNG"),
    ],
)
def test_a_broken_sample_is_named(tmp_path, make_pool, suffix, payload, text):
    reader = Reader(make_pool(tmp_path, change=damage("city/007", suffix, payload)))
    with pytest.raises(CorruptSample, match=text) as caught:
        reader.sample(7, with_mask=True)
    assert "shard p-000001.tar, key city/007" in str(caught.value)
    assert reader.sample(8, with_mask=True).row == 8


def test_a_truncated_shard_is_named(tmp_path, make_pool):
    pool = make_pool(tmp_path)
    os.truncate(tmp_path / "p-000001.tar", pool.row(8).image_offset + 100)
    promised = pool.shard_bytes("p-000001.tar")
    for i in range(5, 10):  # also what lies before the cut: it is another file than the one that was packed
        with pytest.raises(CorruptSample, match=rf"p-000001\.tar, key city/00{i}: shard must have {promised} bytes"):
            Reader(pool).image(i)
    assert Reader(pool).image(4).shape == (44, 56, 3)


def test_a_missing_shard_is_never_skipped(tmp_path, make_pool):
    pool = make_pool(tmp_path)
    os.remove(tmp_path / "p-000001.tar")
    with pytest.raises(DataError, match=r"p-000001\.tar") as caught:
        Reader(pool, "skip").sample(7)
    assert type(caught.value) is DataError  # neither a corrupt sample nor a failure around it


def test_a_store_that_does_not_answer_is_no_mistake(tmp_path, make_pool, monkeypatch):
    def silent(self, name):
        raise ConnectionResetError(104, "Connection reset by peer")

    pool = make_pool(tmp_path)
    monkeypatch.setattr(type(pool), "open_shard", silent)
    with pytest.raises(DataFailure, match=r"shard must be readable; got .*Connection reset"):
        Reader(pool).image(0)


def test_a_sample_without_a_mask(tmp_path, make_pool):
    pool = make_pool(tmp_path, masks=False)
    assert Reader(pool).sample(3).mask is None
    with pytest.raises(DataError, match="key city/003: sample must have a mask"):
        Reader(pool).mask(3)


def test_huge_images_are_refused_before_they_are_decoded(tmp_path, make_pool, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_PIXELS", 47 * 53 - 1)
    reader = Reader(make_pool(tmp_path))
    with pytest.raises(DataError, match="at most 2490 pixels; got 2491"):
        reader.image(7)
    small = make_pool(tmp_path / "small", 1)  # 40 x 60 pixels
    assert Reader(small).image(0).shape == (40, 60, 3)


def test_skipping_takes_the_same_other_sample_everywhere(tmp_path, make_pool):
    def change(key, files):
        if key in ("city/007", "city/002"):
            files["jpg"] = b"broken"

    pool = make_pool(tmp_path, change=change)
    taken = Reader(pool, "skip").sample(7, with_mask=True)
    again = pickle.loads(pickle.dumps(Reader(pool, "skip"))).sample(7, with_mask=True)
    assert taken.row == again.row not in (7, 2)
    assert taken.key == f"city/{taken.row:03d}"
    assert np.array_equal(taken.mask, Reader(pool).mask(taken.row))
    assert "key city/007: image must" in taken.skipped[0].text
    assert taken.skipped[0].place == (str(tmp_path), "p-000001.tar", "city/007")
    assert Reader(pool, "skip").sample(3).skipped == ()
    with pytest.raises(CorruptSample):
        Reader(pool).sample(7)


def test_skipping_gives_up_when_all_is_broken(tmp_path, make_pool):
    pool = make_pool(tmp_path, change=lambda key, files: files.update(jpg=b"broken"))
    with pytest.raises(DataError, match="at most 16 samples in a row may be corrupt"):
        Reader(pool, "skip").sample(7)


def test_few_shards_stay_open(tmp_path, make_pool, monkeypatch):
    monkeypatch.setattr(module, "MOST_OPEN_SHARDS", 2)
    reader = Reader(make_pool(tmp_path, shard_samples=2))
    first = reader._shard("p-000000.tar")
    for i in (0, 2, 0, 4):  # shard 1 is the least recently used when shard 2 comes
        reader.image(i)
    assert list(reader._open) == ["p-000000.tar", "p-000002.tar"]
    assert not first.closed
    assert reader.image(2).shape == (42, 58, 3)
    assert len(reader._open) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_opens_its_own_shards(tmp_path, make_pool):
    reader = Reader(make_pool(tmp_path))
    reader.image(0)
    mine = reader._open["p-000000.tar"]
    child = os.fork()
    if child == 0:
        same = reader._shard("p-000000.tar") is mine
        right = reader.image(1).shape == (41, 59, 3)
        os._exit(1 if same or not right else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert reader._shard("p-000000.tar") is mine
