"""Bytes of remote pools: as few requests as promised, and not one other byte in a batch."""

from __future__ import annotations

import dataclasses
import hashlib
import time

import numpy as np
import pytest
import torch
from object_store import client, upload

from raysemi.data import loader
from raysemi.data.ahead import Ahead, cache_faults
from raysemi.data.joined import JoinedPool
from raysemi.data.loader import DataConfig, Stream
from raysemi.data.order import FEWEST_LANES, Order
from raysemi.data.pool import Pool, Shard
from raysemi.data.reader import Reader
from raysemi.data.store import StoreConfig
from raysemi.data.write_pool import write_index
from raysemi.errors import DataError, DataFailure

SPACE, BYTES, SHARD_ROWS, SHARDS = 512, 200, 4096, 10  # of the large pool: bytes from sample to sample, of an image


@pytest.fixture(scope="session")
def blobs():
    rng = np.random.Generator(np.random.Philox(key=1))
    return [rng.integers(0, 256, SHARD_ROWS * SPACE, dtype=np.uint8).tobytes() for _ in range(SHARDS)]


@pytest.fixture
def large(s3, blobs):
    """URL of a pool of 40,960 samples whose order has blocks of 64; nothing in it is decoded."""
    store = client(s3)
    try:
        store.get_file_info("large/pool/pool.json").size + 0
    except TypeError:
        store.create_dir("large")
        for number, blob in enumerate(blobs):
            with store.open_output_stream(f"large/pool/p-{number:02d}.tar") as out:
                out.write(blob)
        rows = [
            {"key": f"{number:02d}/{i:04d}", "shard": f"p-{number:02d}.tar", "image_offset": i * SPACE + 9,
             "image_bytes": BYTES, "mask_offset": None, "mask_bytes": None, "height": 1, "width": 1,
             "class_pixels": None}
            for number in range(SHARDS)
            for i in range(SHARD_ROWS)
        ]  # fmt: skip
        shards = [
            Shard(f"p-{number:02d}.tar", SHARD_ROWS, len(blob), hashlib.sha256(blob).hexdigest())
            for number, blob in enumerate(blobs)
        ]
        write_index(store, "large/pool", rows=rows, shards=shards, classes=["a"], palette=[(0, 0, 0)])
    return "s3://large/pool"


def image(blobs, row):
    first = row % SHARD_ROWS * SPACE + 9
    return blobs[row // SHARD_ROWS][first : first + BYTES]


def settings(endpoint, **rest):
    return StoreConfig(endpoint=endpoint, region="us-east-1", **{"deadline": 20, **rest})


def read(pool, blobs, steps, budget, taken=None):
    """Takes the steps, compares every byte; returns the reader, the requests after each step, the most bytes held."""
    ahead, held, sent = Ahead(pool, iter(steps), False, budget), 0, []
    for rows in steps[:taken]:
        payloads = ahead.take()
        held = max(held, ahead.held_bytes)
        sent.append(ahead.requests)
        for row in rows:
            place = pool.row(row)
            assert payloads[place.shard, place.image_offset] == image(blobs, row)
    ahead.close()
    return sent, held


def test_the_stream_asks_once_for_64_neighbours(large, blobs, proxy):
    counted = proxy()
    pool = Pool.open(large, store=settings(counted.endpoint))
    order = Order(pool.shard_rows, pool.digest, 7, 16)
    assert order.block == 64
    steps = order.table(100_000, 100_650)[0].tolist()
    budget = 2 * FEWEST_LANES * 64 * SPACE
    sent, held = read(pool, blobs, steps, budget, 450)
    assert sent[-1] - sent[49] <= 400 * 16 / 64 * 1.1  # a block that two sub-lanes share comes in two
    assert sent[49] <= 3 * FEWEST_LANES  # each sub-lane begins amid a block, of which it wants what is left
    assert held <= budget
    requests = counted.reads()
    assert len(requests) <= sent[-1]
    assert len({(one.path, one.first) for one in requests}) == len(requests)  # nothing is read twice
    assert sum(one.length for one in requests) < 1.5 * len(steps) * 16 * SPACE
    opened = [one for one in counted.requests if one.method == "HEAD" and one.path.endswith(".tar")]
    assert len(opened) <= 2 * SHARDS  # once, or by two threads that came at once


def test_reading_in_order_asks_for_large_runs(large, blobs, proxy):
    counted = proxy()
    pool = Pool.open(large, store=settings(counted.endpoint))
    reader = Reader(pool)
    rows = list(range(2 * SHARD_ROWS))
    reader.expect([row] for row in rows)
    for row in rows:
        place = reader._row(row)
        assert reader._payload(place, place.image_offset, place.image_bytes, "image") == image(blobs, row)
    assert len(counted.reads()) == 2  # one a shard: 2 MB


@pytest.mark.parametrize("budget", [SPACE, 40 * SPACE, 1000 * SPACE])
def test_a_small_budget_costs_requests_and_no_byte(large, blobs, proxy, budget):
    pool = Pool.open(large, store=settings(proxy().endpoint))
    steps = Order(pool.shard_rows, pool.digest, 7, 8).table(5, 25)[0].tolist()
    _, held = read(pool, blobs, steps, budget)
    assert held <= budget + 8 * BYTES


def test_a_small_pool_is_read_once_for_all_its_passes(tmp_path, make_pool, s3, proxy):
    local = make_pool(tmp_path / "here")
    upload(tmp_path / "here", s3, "bucket/once")
    counted = proxy()
    pool = Pool.open("s3://bucket/once", store=settings(counted.endpoint))
    order = Order(pool.shard_rows, pool.digest, 7, 4)
    steps = order.table(0, 40)[0].tolist()
    ahead = Ahead(pool, steps, True, 2**24)
    for rows in steps:
        payloads = ahead.take()
        for row in map(local.row, rows):
            with local.open_shard(row.shard) as shard:
                assert payloads[row.shard, row.mask_offset] == shard.read_at(row.mask_bytes, row.mask_offset)
    assert len(counted.reads()) == 3  # one a shard, for twelve passes


def test_pools_with_shards_of_one_name_do_not_collide(tmp_path, make_pool, s3):
    def other(key, files):
        files["jpg"] = files["jpg"] + b"tail"

    locals_ = [make_pool(tmp_path / "a"), make_pool(tmp_path / "b", change=other)]
    for name in "ab":
        upload(tmp_path / name, s3, f"bucket/same/{name}")
    for cache in (None, str(tmp_path / "cache")):
        store = settings(f"http://{s3}", cache=cache)
        pools = [Pool.open(f"s3://bucket/same/{name}", store=store) for name in "ab"]
        assert pools[0].shards == pools[1].shards
        for _ in range(2):  # through the cache the second time
            joined, plain = JoinedPool(pools), JoinedPool(locals_)
            rows = list(range(26))
            ahead = Ahead(joined, [rows[:20], rows[20:]], True, 2**24)
            payloads = ahead.take() | ahead.take()
            for row in map(plain.row, rows):
                with plain.open_shard(row.shard) as shard:
                    expected = shard.read_at(row.image_bytes, row.image_offset)
                assert payloads[row.shard, row.image_offset] == expected


def stream(pools, start=0, stop=30, *, given=0.0, batches=(2, 4), **rest):
    config = DataConfig(crop=24, **rest)
    return Stream(config, pools, 7, *batches, 0, 1, 2, True, start, stop, given=given)


def assert_same(one, other):
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


@pytest.fixture
def both(tmp_path, make_pool, s3):
    """Pools of many small shards, here and in the store."""
    here = {
        "labeled": make_pool(tmp_path / "labeled", 30, shard_samples=2),
        "unlabeled": make_pool(tmp_path / "unlabeled", 50, shard_samples=2, masks=False),
    }
    for name in here:
        upload(tmp_path / name, s3, f"bucket/both/{name}")

    def there(endpoint, **rest):
        store = settings(endpoint, **rest)
        return {name: Pool.open(f"s3://bucket/both/{name}", store=store) for name in here}

    return here, there


@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize(("processes", "given"), [(0, 0.5), (1, 0.0)])
def test_batches_are_the_local_ones_whatever_the_server_does(both, proxy, processes, given):
    here, there = both
    bad = proxy(fails=0.05, slow=0.05, delay=0.2)
    pools = there(bad.endpoint)
    bad.pause_after = len(bad.requests) + 20
    made = list(stream(pools, given=given, loader_processes=processes, store=pools["labeled"].store))
    bad.died.join()
    assert bad.failed
    assert bad.late
    for one, other in zip(made, stream(here, given=given), strict=True):
        assert_same(one, other)
    assert len(bad.reads()) < 3 * 40  # a shard is one request, some failed: two images of a shard never are two


def test_loader_processes_of_remote_pools_hold_no_connection(both, s3, monkeypatch):
    """They get their bytes with their step, and are never forked off a process with connections."""
    _, there = both
    pools = there(f"http://{s3}")
    assert loader._start_method(list(pools.values())) == "forkserver"
    steps = stream(pools)._steps
    (fetched,) = steps.fetched(0, 1)
    monkeypatch.setattr(Pool, "open_shard", lambda *_: pytest.fail("a loader process read for itself"))
    batch, skipped = steps[fetched]
    assert batch.step == 0
    assert skipped == ()


def test_a_dead_store_ends_the_stream_with_shard_and_cause_in_time(both, proxy):
    _, there = both
    one = proxy()
    pools = there(one.endpoint, deadline=1.5, prefetch_bytes=2**20)
    run = iter(stream(pools, store=pools["labeled"].store))
    for pool in pools.values():
        pool.row(0)  # the index has been read
    one.down()
    began = time.monotonic()
    with pytest.raises(DataFailure, match=r"shard p-\d+\.tar, key city/\d+: .*no answer of s3://.*within 1\.5 s"):
        list(run)
    assert time.monotonic() - began < 20  # not the 120 s that are the default


def test_a_corrupt_image_of_a_remote_pool_is_skipped_as_of_a_local_one(tmp_path, make_pool, s3):
    def change(key, files):
        if key in ("city/003", "city/009"):
            files["jpg"] = b"broken"

    local = {"labeled": make_pool(tmp_path / "bad", 13, change=change)}
    upload(tmp_path / "bad", s3, "bucket/bad")
    remote = {"labeled": Pool.open("s3://bucket/bad", store=settings(f"http://{s3}"))}
    runs = [stream(pools, 0, 13, batches=(2, 2), on_corrupt="skip") for pools in (local, remote)]
    for one, other in zip(*runs, strict=True):
        assert_same(one, other)
    assert [run.corrupt for run in runs] == [2, 2]


def test_the_cache_serves_the_second_run(both, proxy, tmp_path):
    here, there = both
    counted = proxy()
    pools = there(counted.endpoint, cache=str(tmp_path / "cache"))
    plain = list(stream(here))
    for number in range(3):
        before = len(counted.reads())
        for one, other in zip(stream(pools, store=pools["labeled"].store), plain, strict=True):
            assert_same(one, other)
            time.sleep(0.02 if number == 0 else 0)
        for _ in range(1200):
            if not list((tmp_path / "cache").glob("*.part")):
                break
            time.sleep(0.05)
    assert len(counted.reads()) == before  # nothing
    total = sum(pool.num_bytes for pool in pools.values())
    assert sum(file.stat().st_size for file in (tmp_path / "cache").glob("*.tar")) == total


def test_a_replaced_shard_under_the_same_name_is_told_by_the_cache(both, s3, tmp_path):
    _, there = both
    name = "bucket/both/labeled/p-000003.tar"
    with client(s3).open_input_file(name) as file:
        content = file.read()
    with client(s3).open_output_stream(name) as out:
        out.write(content[:-1] + b"!")
    pools = there(f"http://{s3}", cache=str(tmp_path / "cache"))

    def go():
        for _ in stream({"labeled": pools["labeled"]}, 0, 4000):
            time.sleep(0.02)  # until the copy is whole

    with pytest.raises(DataError, match=r"shard p-000003\.tar must hold the \d+ bytes that pool\.json promises"):
        go()
    until = time.monotonic() + 60
    while list((tmp_path / "cache").glob("*.part")):  # those that were under way end by themselves
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_cache_too_small_for_the_work_is_refused_before_a_step(large, both, s3, tmp_path):
    _, there = both
    shard = SHARD_ROWS * SPACE

    def faults(limit, batch=16, **pools):
        store = settings(f"http://{s3}", cache=str(tmp_path / "cache"), cache_bytes=limit)
        pool = Pool.open(large, store=store)
        return cache_faults({"unlabeled": (pool, batch)} | pools, store)

    (fault,) = faults(SHARDS * shard, labeled=(there(f"http://{s3}")["labeled"], 2))
    assert fault.startswith("data.store.cache_bytes must hold the shards that the slots of a step read at once")
    assert f"{SHARDS * shard} for unlabeled" in fault
    assert f"got {SHARDS * shard}" in fault
    assert faults(SHARDS * shard) == []
    assert faults(SHARDS * shard - 1) == []  # a pool too large for the cache is read without it
    assert not (tmp_path / "cache").exists()


def test_a_pool_too_large_for_the_cache_is_read_without_it(both, s3, tmp_path):
    here, there = both
    store = {"cache": str(tmp_path / "cache"), "cache_bytes": here["unlabeled"].num_bytes - 1}
    pools = there(f"http://{s3}", **store)
    for one, other in zip(
        stream({"labeled": pools["unlabeled"]} if False else pools, 0, 6), stream(here, 0, 6), strict=True
    ):
        assert_same(one, other)
    kept = {file.stat().st_size for file in (tmp_path / "cache").glob("*.tar")}
    assert kept <= {shard.bytes for shard in here["labeled"].shard_files}
