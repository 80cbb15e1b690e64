"""Entropies by the formula, percentiles against NumPy, and one answer whatever the number of ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from raysemi.ops.entropy import entropy, percentiles

TOP = math.log(7)
BIN = TOP / 2048


def test_worked_entropies():
    probability_K4 = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.7, 0.2, 0.1]])
    logits_BKHW = probability_K4.clamp(min=1e-30).log().T[None, :, None]
    expected = [0.0, math.log(2), math.log(3), -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))]
    assert entropy(logits_BKHW)[0, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert entropy(logits_BKHW.bfloat16()).dtype == torch.float32
    assert entropy(logits_BKHW.double()).dtype == torch.float64
    assert not entropy(logits_BKHW.requires_grad_()).requires_grad


def draw(count, seed=0):
    """Mostly sure pixels, as a trained network's."""
    return TOP * torch.rand(count, generator=torch.Generator().manual_seed(seed)) ** 3


@pytest.mark.parametrize("count", [1, 2, 5, 999, 40_000])
def test_they_are_numpys_to_a_bin(count):
    values, counted = draw(count + 3), torch.arange(count + 3) < count
    percents = (0.0, 0.25, 20.0, 80.0, 99.75, 100.0)
    found = percentiles(values[None, None], counted[None, None], percents, TOP)
    expected = np.percentile(values[:count].numpy(), percents)
    assert np.abs(found.numpy() - expected).max() < BIN


def test_the_worked_limit():
    """u2pl.md section 2: the 80th percentile of .1, .2, .3, .4, .9 is .5."""
    values = torch.tensor([[[0.1, 0.2, 0.3, 0.4, 0.9]]])
    counted = torch.ones_like(values, dtype=torch.bool)
    assert percentiles(values, counted, (80.0,), math.log(3)).item() == pytest.approx(0.5, abs=math.log(3) / 2048)


def test_values_of_one_bin_are_told_apart_by_their_rank():
    """An untrained network's entropies are nearly one number: the limit must still keep about the share asked for."""
    values = (
        TOP - 0.9 * BIN + 0.8 * BIN * torch.rand(1, 100, 100, generator=torch.Generator().manual_seed(0))
    ).double()
    limit = percentiles(values, torch.ones_like(values, dtype=torch.bool), (80.0,), TOP)
    assert 0.6 < (values < limit).float().mean() < 1.0


def sure(count, seed=0):
    """A trained network's: nine pixels of ten nearly sure, from 1e-7 to 1e-4 nats, the rest anywhere."""
    generator = torch.Generator().manual_seed(seed)
    nearly = 1e-7 * 1000.0 ** torch.rand(count, generator=generator)
    return torch.where(
        torch.rand(count, generator=generator) < 0.9, nearly, TOP * torch.rand(count, generator=generator)
    )


@pytest.mark.parametrize("count", [3, 700, 30_000])
def test_sure_pixels_are_told_apart(count):
    """All of them lie in the first of the even bins; a limit within it must still keep the share asked for."""
    values = sure(count)
    assert (values < BIN).float().mean() > 0.6
    percents = (0.0, 10.0, 20.0, 50.0, 80.0)
    found = percentiles(values[None, None], torch.ones(1, 1, count, dtype=torch.bool), percents, TOP)
    expected = np.percentile(values.double().numpy(), percents)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0.023)
    if count > 10_000:
        kept = [(values < limit).float().mean().item() for limit in found[1:]]
        assert kept == pytest.approx([0.1, 0.2, 0.5, 0.8], abs=0.005)


@pytest.mark.parametrize("drawn", [draw, sure])
def test_ranks_agree_with_one(drawn):
    values, counted = drawn(600).view(3, 10, 20), torch.rand(3, 10, 20) < 0.7
    seen = []

    def record(counts):
        seen.append(counts)
        return counts

    one = percentiles(values, counted, (20.0, 80.0), TOP)
    for rows in (slice(0, 1), slice(1, 3)):
        percentiles(values[rows], counted[rows], (20.0, 80.0), TOP, record)
    assert max(each.numel() for each in seen) < 3000
    for rows in (slice(0, 1), slice(1, 3)):
        assert torch.equal(percentiles(values[rows], counted[rows], (20.0, 80.0), TOP, lambda _: sum(seen)), one)


def test_nothing_counted_and_non_finite_values_do_no_harm():
    values = torch.full((1, 2, 3), float("nan"))
    for counted in (torch.zeros(1, 2, 3, dtype=torch.bool), torch.ones(1, 2, 3, dtype=torch.bool)):
        assert percentiles(values, counted, (5.0, 50.0), TOP).isfinite().all()
