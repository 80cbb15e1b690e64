import hashlib
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysemi.data.order import LARGEST_BLOCK, SHUFFLED_WHOLE, Order
from raysemi.errors import ConfigError, DataError

shards = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda rows: sum(rows) > 0)
batches = st.integers(1, 70)
seeds = st.integers(0, 2**31)


def line(order: Order, positions: int) -> np.ndarray:
    return order.table(0, -(-positions // order.batch))[0].ravel()[:positions]


@settings(max_examples=60, deadline=None)
@given(shards, batches, seeds)
def test_every_pass_holds_every_sample_once_also_when_the_batch_is_larger_than_the_pool(rows, batch, seed):
    order, num = Order(rows, "digest", seed, batch), sum(rows)
    for one in line(order, 3 * num).reshape(3, num):
        assert sorted(one) == list(range(num))


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(1, 900), min_size=12, max_size=40), batches, seeds)
def test_every_pass_holds_every_sample_once_in_pools_with_blocks(rows, batch, seed):
    rows = [*rows, SHUFFLED_WHOLE]
    order, num = Order(rows, "digest", seed, batch), sum(rows)
    for one in line(order, 2 * num).reshape(2, num):
        assert np.array_equal(np.sort(one), np.arange(num))


@settings(max_examples=40, deadline=None)
@given(shards, st.integers(1, 5), seeds, st.integers(0, 500), st.sampled_from([1, 2, 4]))
def test_ranks_share_the_global_step_from_any_start(rows, share, seed, start, world):
    batch = 4 * share
    whole, passes = Order(rows, "digest", seed, batch).table(0, 1 + start)
    later = Order(rows, "digest", seed, batch)  # a fresh one, as after a restart
    parts = [later.slots(start, rank * batch // world, (rank + 1) * batch // world) for rank in range(world)]
    assert np.array_equal(np.concatenate([part[0] for part in parts]), whole[start])
    assert np.array_equal(np.concatenate([part[1] for part in parts]), passes[start])
    assert np.array_equal(passes[start], (start * batch + np.arange(batch)) // sum(rows))


def test_a_later_start_of_a_large_pool_gives_the_same_steps():
    rows = np.full(25, 431)
    whole = Order(rows, "digest", 3, 6).table(0, 3000)[0]
    assert np.array_equal(Order(rows, "digest", 3, 6).table(2345, 2360, 2, 5)[0], whole[2345:2360, 2:5])


@pytest.mark.parametrize("batch", [1, 2, 8, 16])
@pytest.mark.parametrize("rows", [[625] * 16, [500] * 20, [417] * 24, [313] * 32, [1000] * 11, [100] * 130, [10_007]])
def test_a_pass_is_well_mixed(rows, batch):
    num = sum(rows)
    for seed in range(2):
        stream = line(Order(rows, "digest", seed, batch), 2 * num + 100)
        assert np.mean(np.abs(np.diff(stream)) == 1) <= 0.01
        shard = np.repeat(np.arange(len(rows)), rows)[stream]
        seen = np.zeros((len(stream) + 1, len(rows)), dtype=np.int32)
        seen[np.arange(1, len(stream) + 1), shard] = 1
        seen = seen.cumsum(axis=0)
        shards_in_window = ((seen[64:] - seen[:-64]) > 0).sum(axis=1)  # every window of 64 positions, across passes too
        assert shards_in_window.min() >= min(16, len(rows))


def test_passes_seeds_and_pools_differ():
    rows, num = np.full(20, 600), 12_000
    stream = line(Order(rows, "digest", 0, 8), 2 * num)
    others = [stream[num:], line(Order(rows, "digest", 1, 8), num), line(Order(rows, "other", 0, 8), num)]
    for other in others:
        assert np.mean(other == stream[:num]) < 0.01
    partners = {tuple(sorted(pair)) for pair in stream[:num].reshape(-1, 2).tolist()}
    again = {tuple(sorted(pair)) for pair in stream[num:].reshape(-1, 2).tolist()}
    assert len(partners & again) < 20  # nor do the same images meet in CutMix


def test_a_rank_reads_few_shards_block_by_block():
    rows, world, batch = np.full(200, 500), 4, 16
    order = Order(rows, "digest", 0, batch)
    mine = order.table(0, 400, 4, 8)[0]  # rank 1 of 4: 1600 samples
    assert len(np.unique(mine // 500)) <= 2 * 32 // world  # 8 sub-lanes, each at most at its second shard
    lane = mine[::2, 0]  # two sub-lanes a slot: every second step of a slot is one of them
    assert np.mean(np.abs(np.diff(lane)) < LARGEST_BLOCK) > 0.95
    visited = lane // order.block  # 500 is no multiple of the block, hence up to two of these cells a block
    assert np.count_nonzero(np.diff(np.sort(visited))) + 1 <= 2 * (len(lane) // order.block + 2)


def test_the_order_of_a_hundred_million_samples_is_ready_at_once():
    rows = np.full(100_000, 1000)
    started = time.process_time()
    order = Order(rows, "digest", 0, 256)
    taken, passes = order.step(1_000_000)
    assert time.process_time() - started < 2.0
    assert passes.tolist() == [2] * 256
    assert len(set(taken.tolist())) == 256

    tracemalloc.start()
    Order(rows, "digest", 0, 256).step(1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


def test_the_order_is_pinned():
    # a change of these numbers breaks the continuation of every run
    assert Order([3, 4], "digest", 5, 3).table(0, 3)[0].tolist() == [[1, 4, 3], [2, 0, 6], [5, 4, 6]]
    assert Order([3000, 3000], "digest", 5, 4).step(1)[0].tolist() == [4057, 2615, 1678, 4259]


@pytest.mark.parametrize(
    ("rows", "batch", "start", "expected"),
    [
        ([700, 0, 1, 64, 65, 5000] * 3, 7, 2400, "763d0fb3ab726f2b"),  # both across the end of a pass
        ([417] * 24, 16, 580, "5ff8c3d791555778"),
        ([3000] * 33_334, 64, 1_000_000, "ff85d1543abc59ba"),
    ],
)
def test_the_order_of_pools_with_blocks_is_pinned(rows, batch, start, expected):
    table = Order(rows, "digest", 5, batch).table(start, start + 100)[0]
    assert hashlib.sha256(table.astype("<i8").tobytes()).hexdigest()[:16] == expected


def test_refusals():
    with pytest.raises(DataError, match="at least one sample"):
        Order([0, 0], "digest", 0, 1)
    with pytest.raises(DataError, match="none negative"):
        Order([3, -1], "digest", 0, 1)
    with pytest.raises(ConfigError, match=r"train\.batch"):
        Order([3], "digest", 0, 0)
    with pytest.raises(ConfigError, match="slots 0 to 3"):
        Order([3], "digest", 0, 2).slots(0, 0, 3)


def test_few_labels_are_met_equally_often():
    """data-and-eval.md section 9.11: in as many draws as there are unlabeled images, 10,490, each of 92 is met 114 or
    115 times."""
    met = np.bincount(line(Order([92], "digest", 3, 8), 10_490), minlength=92)
    assert set(met.tolist()) == {114, 115}
