from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest

from raysemi.data.joined import JoinedPool, as_one
from raysemi.data.loader import DataConfig, Stream
from raysemi.data.order import Order
from raysemi.data.reader import Reader
from raysemi.errors import DataError


@pytest.fixture
def three(make_pool, tmp_path):
    """13, 7 and 4 samples whose keys are their own; the last one's masks are kept."""
    pools = [
        make_pool(tmp_path / "a", 13, masks=False),
        make_pool(tmp_path / "b", 7, masks=False, shard_samples=3),
        make_pool(tmp_path / "c", 4, masks=True, shard_samples=4),
    ]
    return pools, JoinedPool(pools)


def test_every_sample_of_all_pools_once_a_pass(three):
    _, joined = three
    order = Order(joined.shard_rows, joined.digest, seed=3, batch=4)
    for number in (0, 1):  # 24 samples: 6 steps a pass
        seen = Counter(int(row) for step in range(6 * number, 6 * number + 6) for row in order.step(step)[0])
        assert seen == Counter(range(24))
    first = [int(row) for step in range(6) for row in order.step(step)[0]]
    assert min(first.index(row) for row in range(13, 24)) < max(first.index(row) for row in range(13))  # mixed


def test_samples_are_those_of_the_pools(three):
    pools, joined = three
    reader, readers = Reader(pickle.loads(pickle.dumps(joined))), [Reader(pool) for pool in pools]
    place = [(number, row) for number, pool in enumerate(pools) for row in range(pool.num_samples)]
    assert joined.num_samples == len(place)
    for i, (number, row) in enumerate(place):
        assert joined.key(i) == pools[number].key(row)
        assert np.array_equal(reader.image(i), readers[number].image(row))
    assert np.array_equal(reader.mask(23), readers[2].mask(3))
    with pytest.raises(DataError, match=r"/b, shard p-000000\.tar, key city/000: sample must have a mask"):
        reader.mask(13)
    assert (joined.num_masks, joined.labeled) == (4, False)


def test_the_digest_is_that_of_the_pools_in_their_order(three, make_pool, tmp_path):
    (a, b, c), joined = three
    assert JoinedPool([a, b, c]).digest == joined.digest
    others = {JoinedPool([b, a, c]).digest, JoinedPool([a, b]).digest, a.digest, joined.digest}
    assert len(others) == 4
    assert (
        JoinedPool([a, make_pool(tmp_path / "elsewhere", 7, masks=False, shard_samples=3), c]).digest == joined.digest
    )


def test_ranks_share_the_batches_of_one_rank(three, make_pool, tmp_path):
    _, joined = three
    pools = {"labeled": make_pool(tmp_path / "l", 5), "unlabeled": joined}
    config = DataConfig(crop=33, loader_processes=0)

    def keys(rank: int, world: int) -> list[tuple[str, ...]]:
        stream = Stream(config, pools, 0, 4, 4, rank, world, 1, False, start=0, stop=6)
        return [batch.keys_U for batch in stream]

    one, two = keys(0, 1), [keys(rank, 2) for rank in range(2)]
    assert one == [left + right for left, right in zip(*two, strict=True)]
    expected = Counter(joined.key(i) for i in range(joined.num_samples))
    assert Counter(key for batch in one for key in batch) == expected


def test_processes_read_joined_pools(three, make_pool, tmp_path):
    _, joined = three
    pools = {"labeled": make_pool(tmp_path / "l", 5), "unlabeled": joined}

    def batches(processes: int) -> list[np.ndarray]:
        config = DataConfig(crop=33, loader_processes=processes)
        stream = Stream(config, pools, 0, 2, 4, 0, 1, 1, False, start=0, stop=3)
        return [batch.weak_U3HW.numpy() for batch in stream]

    assert all(np.array_equal(a, b) for a, b in zip(batches(0), batches(1), strict=True))


def test_one_pool_stays_itself_and_wrong_ones_are_told(three, make_pool, tmp_path):
    (a, b, _), _ = three
    assert as_one([a]) is a
    with pytest.raises(DataError, match="must be different ones; got"):
        JoinedPool([a, b, a])
    other = make_pool(tmp_path / "other", 3, classes=("sky", "road"))
    with pytest.raises(DataError, match=r"must have the same classes; got sky, road, car in .*sky, road in"):
        JoinedPool([a, other])
