"""Dropped channels: whole ones, drawn by slot, and in UniMatch V2 complementary between two views."""

from __future__ import annotations

import pytest
import torch
from makers import step_context, tiny_segmentor

from raysemi.methods.perturbation import with_complementary, with_perturbed
from raysemi.models.encoders import Features


@pytest.fixture(scope="module")
def context():
    return step_context(tiny_segmentor(3))


def ones(images, *channels):
    return Features(tuple(torch.ones(images, count, 2 + level, 3) for level, count in enumerate(channels)))


def test_perturbed_images_follow_the_clean_ones(context):
    features = ones(5, 6, 10)
    maps = with_perturbed(features, slice(2, None), torch.tensor([4, 5, 6]), 0.5, context).maps
    for clean, both in zip(features.maps, maps, strict=True):
        assert both.shape == (8, *clean.shape[1:])
        assert torch.equal(both[:5], clean)
        assert set(both[5:].unique().tolist()) == {0.0, 2.0}
        assert torch.equal(both[5:], both[5:, :, :1, :1].expand_as(both[5:]))  # whole channels


def test_channels_are_dropped_half_of_the_time_each_map_and_slot_by_itself(context):
    slots = torch.arange(100)
    low, _, high = with_perturbed(ones(100, 100, 7, 100), slice(None), slots, 0.5, context).maps
    low, high = low[100:, :, 0, 0], high[100:, :, 0, 0]
    assert (low == 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert (low == high).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert not torch.equal(low[0], low[1])
    again = with_perturbed(ones(1, 100, 7, 100), slice(None), torch.tensor([41]), 0.5, context).maps
    assert torch.equal(again[0][1:, :, 0, 0], low[41:42])  # of the slot, wherever it stands in its batch


def complementary(context, slots, dropped=0.5, channels=(12, 7, 12), labeled=3):
    images = labeled + 2 * len(slots)
    maps = with_complementary(ones(images, *channels), labeled, slots, dropped, context).maps
    factors = [values[:, :, 0, 0] for values in maps]
    return [(f[:labeled], *f[labeled:].chunk(2)) for f in factors]


def test_what_one_view_keeps_the_other_drops_and_the_sum_is_two(context):
    for clean, first, second in complementary(context, torch.arange(6)):
        assert torch.equal(clean, torch.ones_like(clean))
        assert torch.equal(first + second, torch.full_like(first, 2.0))
        assert set(first.unique().tolist()) == {0.0, 1.0, 2.0}


def test_exactly_half_of_the_images_keep_all_channels_one_of_each_pair(context):
    whole = (complementary(context, torch.arange(200))[0][1] == 1).all(dim=1)
    assert torch.equal(whole.view(100, 2).sum(dim=1), torch.ones(100, dtype=torch.int64))
    assert 20 < whole.view(100, 2)[:, 0].sum() < 80
    for dropped, expected in ((0.0, 1.0), (1.0, 0.0), (0.25, 0.75)):
        whole = (complementary(context, torch.arange(400), dropped)[0][1] == 1).all(dim=1)
        assert whole.float().mean().item() == pytest.approx(expected, abs=0.06 if 0 < dropped < 1 else 0.0)


def test_maps_of_equal_width_share_their_factors(context):
    low, middle, high = complementary(context, torch.arange(4))
    assert torch.equal(low[1], high[1])
    assert middle[1].shape[1] == 7


def test_two_ranks_drop_what_one_drops(context):
    alone = complementary(context, torch.arange(8))[0]
    halves = [complementary(context, torch.arange(start, start + 4))[0] for start in (0, 4)]
    assert torch.equal(alone[1], torch.cat((halves[0][1], halves[1][1])))
    assert torch.equal(alone[2], torch.cat((halves[0][2], halves[1][2])))


def test_a_linear_reader_of_both_views_sees_the_clean_map_on_average(context):
    features = Features((torch.randn(5, 12, 4, 3),))
    features = Features((torch.cat((features.maps[0], features.maps[0][1:])),))
    (mixed,) = with_complementary(features, 1, torch.arange(4), 0.5, context).maps
    torch.testing.assert_close((mixed[1:5] + mixed[5:]) / 2, features.maps[0][1:5])
