"""Several pools, each with its share of a batch and passes of its own."""

from __future__ import annotations

from collections import Counter

import pytest

from raysemi.data.joined import JoinedPool, as_one
from raysemi.data.loader import DataConfig, Stream
from raysemi.data.mixture import Mixture, order_of, passes, shares
from raysemi.data.order import Order
from raysemi.errors import ConfigError


@pytest.fixture
def two(make_pool, tmp_path):
    """12 and 5 samples."""
    return [
        make_pool(tmp_path / "a", 12, masks=False, shard_samples=5),
        make_pool(tmp_path / "b", 5, masks=False, shard_samples=2),
    ]


@pytest.mark.parametrize(
    ("weights", "batch", "expected"),
    [
        ((3, 1), 8, (6, 2)),
        ((0.7, 0.3), 8, (6, 2)),  # 5.6 and 2.4
        ((1, 1, 1), 8, (3, 3, 2)),
        ((118_287, 123_403), 16, (8, 8)),
        ((1e-3, 1e-3), 2, (1, 1)),
    ],
)
def test_shares_are_whole_images(weights, batch, expected):
    assert shares(weights, batch) == expected


def test_a_pool_without_a_place_is_refused():
    with pytest.raises(ConfigError, match=r"at least one image a step by its weight; got 4, shared 4, 0\. Raise it"):
        shares((99, 1), 4)


def test_each_pool_keeps_passes_of_its_own(two):
    """Batches of 4, three of them from the first pool: 4 steps are a pass of it, 5 steps one of the other."""
    order = Mixture(JoinedPool(two, (3, 1)), (3, 1), seed=2, batch=4)
    seen = [tuple(zip(*order.slots(t, 0, 4), strict=True)) for t in range(20)]
    for step in seen:
        assert sorted(int(row) // 12 for row, _ in step) == [0, 0, 0, 1]
    first = [(int(row), int(number)) for step in seen for row, number in step if row < 12]
    other = [(int(row) - 12, int(number)) for step in seen for row, number in step if row >= 12]
    for listed, size in ((first, 12), (other, 5)):
        for number in range(len(listed) // size):
            assert Counter(listed[number * size : (number + 1) * size]) == Counter((i, number) for i in range(size))
    alone = Order(two[1].shard_rows, two[1].digest, 2, 1)
    assert [row for row, _ in other] == [int(alone.slots(t, 0, 1)[0][0]) for t in range(20)]
    assert passes(JoinedPool(two, (3, 1)), 4, 20) == [(two[0].path, 5.0), (two[1].path, 4.0)]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batches_of_one_rank_and_each_meets_both_pools(two, world):
    order = order_of(as_one(two, (1, 1)), 0, 8)
    size = 8 // world
    for t in range(7):
        rows, numbers = order.slots(t, 0, 8)
        parts = [order.slots(t, rank * size, (rank + 1) * size) for rank in range(world)]
        assert [int(row) for part, _ in parts for row in part] == rows.tolist()
        assert [int(number) for _, part in parts for number in part] == numbers.tolist()
        assert all({int(row) < 12 for row in part} == {True, False} for part, _ in parts)


def test_a_stream_reads_a_mixture_from_any_step_on(two, make_pool, tmp_path):
    listed = tuple({"path": pool.path, "weight": weight} for pool, weight in zip(two, (1.0, 3.0), strict=True))
    config = DataConfig(crop=33, loader_processes=0, unlabeled=listed)
    assert config.unlabeled_pools == (two[0].path, two[1].path)
    mixed = as_one(two, config.unlabeled_weights)
    pools = {"labeled": make_pool(tmp_path / "l", 3), "unlabeled": mixed}

    def keys(start, stop):
        return [batch.keys_U for batch in Stream(config, pools, 0, 2, 4, 0, 1, 1, False, start=start, stop=stop)]

    whole = keys(0, 9)
    assert whole[4:] == keys(4, 9)
    order = order_of(mixed, 0, 4)
    assert whole == [tuple(mixed.key(int(row)) for row in order.slots(t, 0, 4)[0]) for t in range(9)]
    assert [sum(int(row) >= 12 for row in order.slots(t, 0, 4)[0]) for t in range(9)] == [3] * 9


def test_one_pool_or_pools_without_weights_are_read_in_one_order(two):
    assert isinstance(order_of(two[0], 0, 4), Order)
    assert isinstance(order_of(as_one(two[:1], (5.0,)), 0, 4), Order)
    assert isinstance(order_of(as_one(two), 0, 4), Order)
    assert passes(as_one(two), 4, 17) == [(as_one(two).path, 4.0)]
