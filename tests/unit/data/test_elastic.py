"""Whatever the number of ranks and loader processes, and when it changes on the way, each global step has the same
samples in the same slots, and each pass has every sample once."""

import pytest

from raysemi.data.loader import DataConfig, Stream

BATCHES = {"labeled": 8, "unlabeled": 16}
SAMPLES = {"labeled": 19, "unlabeled": 45}
STEPS = 9
"""Three passes over either pool and a part of the next one; all end amid a batch."""


@pytest.fixture(scope="module")
def make_pools(make_pool):
    def make(folder, shards):
        return {
            name: make_pool(folder / name, count, masks=name == "labeled", shard_samples=-(-count // shards))
            for name, count in SAMPLES.items()
        }

    return make


@pytest.fixture(scope="module")
def pools(tmp_path_factory, make_pools):
    return make_pools(tmp_path_factory.mktemp("elastic"), 3)


def steps_of(pools, seed, world, processes, start=0, stop=STEPS):
    """Keys of each global step, (labeled, unlabeled): those of the ranks one after the other."""
    config = DataConfig(crop=8, loader_processes=processes)
    ranks = [
        [
            (batch.keys_L, batch.keys_U)
            for batch in Stream(config, pools, seed, *BATCHES.values(), rank, world, 1, False, start, stop, cores=8)
        ]
        for rank in range(world)
    ]
    assert all(len(found) == stop - start for found in ranks)
    return [tuple([key for part in step for key in part[side]] for side in (0, 1)) for step in zip(*ranks, strict=True)]


def assert_whole_passes(pool, lists, batch):
    keys = [key for found in lists for key in found]
    assert [len(found) for found in lists] == [batch] * STEPS
    size, every = pool.num_samples, sorted(pool.key(i) for i in range(pool.num_samples))
    assert size % batch  # a remainder
    passes = [keys[first : first + size] for first in range(0, len(keys), size)]
    assert len(passes) > 3
    for whole in passes[:-1]:
        assert sorted(whole) == every
    assert len(set(passes[-1])) == len(passes[-1])
    assert passes[0] != passes[1] != passes[2]


@pytest.fixture(scope="module", params=[0, 1])
def alone(request, pools):
    """Seed, and the steps of one rank without loader processes."""
    return request.param, steps_of(pools, request.param, 1, 0)


def test_a_pass_has_every_sample_once(pools, alone):
    for side, name in enumerate(BATCHES):
        assert_whole_passes(pools[name], [step[side] for step in alone[1]], BATCHES[name])


@pytest.mark.parametrize(("world", "processes"), [(1, 4), (2, 0), (2, 1), (4, 0), (4, 4), (8, 0), (8, 1)])
def test_ranks_and_processes_change_no_step(pools, alone, world, processes):
    seed, expected = alone
    assert steps_of(pools, seed, world, processes) == expected


def test_the_number_of_ranks_may_change_on_the_way(pools, alone):
    seed, expected = alone
    found = steps_of(pools, seed, 4, 1, 0, 4) + steps_of(pools, seed, 2, 0, 4, 5) + steps_of(pools, seed, 8, 4, 5)
    assert found == expected


@pytest.mark.parametrize(("shards", "world"), [(3, 2), (2, 8), (1, 4), (19, 2)])
def test_any_number_of_shards_goes_with_any_number_of_ranks(tmp_path, make_pools, shards, world):
    own = make_pools(tmp_path, shards)
    assert len(own["labeled"].shards) == shards
    expected = steps_of(own, 3, 1, 0)
    assert steps_of(own, 3, world, 1) == expected
    assert_whole_passes(own["unlabeled"], [unlabeled for _, unlabeled in expected], BATCHES["unlabeled"])


def test_seeds_differ(pools):
    assert steps_of(pools, 0, 1, 0) != steps_of(pools, 1, 1, 0)
