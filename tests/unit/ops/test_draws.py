"""Draws: the published generator bit for bit, and numbers that depend on the key alone."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from scipy import stats

from raysemi.ops.draws import beta, choice, uniform


def splitmix(x):
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def oracle(seed, step, slots, name, count):
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    key = np.frombuffer(digest, dtype="<u8")[0]
    with np.errstate(over="ignore"):
        rows = splitmix(np.asarray(slots, np.uint64) + key)
    bits = splitmix(rows[:, None] ^ splitmix(np.arange(count, dtype=np.uint64))[None])
    return (bits >> np.uint64(40)).astype(np.float64) / 2**24


def test_oracle_is_splitmix64():
    assert int(splitmix(np.uint64(0))) == 0xE220A8397B1DCDAF  # first output of the published generator, seed 0


@pytest.mark.parametrize(("seed", "step", "name"), [(0, 0, "dropout"), (7, 123_456_789, "rows"), (-3, 1, "é")])
def test_equals_the_unsigned_arithmetic(seed, step, name):
    slots = [0, 1, 5, 2**40]
    numbers = uniform(seed, step, torch.tensor(slots), name, 37)
    assert numbers.dtype == torch.float32
    np.testing.assert_array_equal(numbers.numpy(), oracle(seed, step, slots, name, 37))


def test_a_slot_has_its_numbers_wherever_it_stands():
    whole = uniform(3, 9, torch.arange(6), "x", 11)
    assert torch.equal(uniform(3, 9, torch.tensor([4, 2]), "x", 11), whole[[4, 2]])
    assert torch.equal(uniform(3, 9, torch.arange(6), "x", 5), whole[:, :5])


def test_the_global_generator_takes_no_part():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = uniform(3, 9, torch.arange(2), "x", 4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(uniform(3, 9, torch.arange(2), "x", 4), first)


def test_each_part_of_the_key_counts():
    keys = [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (0, 11, ""), (0, 1, "1")]
    rows = torch.cat([uniform(seed, step, torch.arange(3), name, 64) for seed, step, name in keys])
    assert len(torch.unique(rows, dim=0)) == len(rows)
    correlation = torch.corrcoef(rows)
    assert (correlation - torch.eye(len(rows))).abs().max() < 0.5  # 64 numbers: standard deviation 0.125


def test_numbers_are_uniform():
    numbers = uniform(0, 0, torch.arange(200), "x", 500)
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    counts = torch.histc(numbers, bins=50, min=0.0, max=1.0)
    assert ((counts - 2000) ** 2 / 2000).sum() < 100  # chi square, 49 degrees: mean 49, deviation 10
    assert abs(float(torch.corrcoef(torch.stack((numbers[:-1].flatten(), numbers[1:].flatten())))[0, 1])) < 0.015
    assert abs(float(torch.corrcoef(torch.stack((numbers[:, :-1].flatten(), numbers[:, 1:].flatten())))[0, 1])) < 0.015


def test_no_host_wait():
    assert uniform(0, 0, torch.arange(3, device="meta"), "x", 5).shape == (3, 5)  # a meta tensor has nothing to read


@pytest.mark.parametrize(("alpha", "other"), [(8, 2), (4, 4), (1, 1), (1, 3)])
def test_an_order_statistic_is_beta_distributed(alpha, other):
    numbers = beta(uniform(0, 0, torch.arange(20_000), "x", alpha + other - 1), alpha)
    assert stats.kstest(numbers.numpy(), stats.beta(alpha, other).cdf).pvalue > 0.01
    assert stats.kstest(numbers.numpy(), stats.beta(alpha, other + 1).cdf).pvalue < 1e-6


def test_classes_are_chosen_as_often_as_they_weigh():
    """ael.md section 3: CutMix's chances of k = (.9, .5, .7), and those of copy-paste without the first class."""
    bank_K = torch.tensor([0.9, 0.5, 0.7])
    mixed_K, pasted_K = (1 - bank_K).softmax(dim=0), (1 - bank_K).sqrt().softmax(dim=0)
    torch.testing.assert_close(mixed_K, torch.tensor([0.26931, 0.40176, 0.32893]), rtol=0, atol=1e-5)
    torch.testing.assert_close(pasted_K, torch.tensor([0.26747, 0.39539, 0.33714]), rtol=0, atol=1e-5)
    numbers_BN = uniform(0, 3, torch.arange(100), "class", 1000)
    for weight_K in (mixed_K, pasted_K * torch.tensor([0.0, 1.0, 1.0]), torch.tensor([2.0, 0.0, 0.0])):
        found_BN = choice(numbers_BN, weight_K)
        assert found_BN.shape == numbers_BN.shape
        share_K = torch.bincount(found_BN.flatten(), minlength=3) / found_BN.numel()
        torch.testing.assert_close(share_K, weight_K / weight_K.sum(), rtol=0, atol=0.005)
        assert (share_K[weight_K == 0] == 0).all()
    ends = torch.tensor([[0.0, 1 - 2**-24]])
    assert choice(ends, torch.tensor([0.0, 1.0, 3.0, 0.0])).tolist() == [[1, 2]]
    for size in range(1, 200):
        weight_K = torch.rand(size, generator=torch.Generator().manual_seed(size))
        assert choice(ends, torch.cat((weight_K, torch.zeros(2))))[0, 1] == size - 1
