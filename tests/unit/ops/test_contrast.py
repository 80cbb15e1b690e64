"""Draws from sets of cells, against Python's own sets, and the contrastive loss by hand."""

from __future__ import annotations

import math

import pytest
import torch

from raysemi.ops.contrast import (
    at_cells,
    class_ranks,
    contrastive_loss,
    draw_members,
    spread_members,
    sums_of_members,
)


def sets(images=2, classes=3, cells=41, seed=0):
    """bool [B, K, N]: one set empty, one of a single cell."""
    members_BKN = torch.rand(images, classes, cells, generator=torch.Generator().manual_seed(seed)) < 0.4
    members_BKN[0, 1] = False
    members_BKN[1, 0] = False
    members_BKN[1, 0, -1] = True
    return members_BKN


def test_ranks_count_the_larger_scores():
    scores_BKN = torch.tensor([[[0.1, 0.25], [0.6, 0.25], [0.3, 0.5]]])
    assert class_ranks(scores_BKN).tolist() == [[[2, 1], [0, 2], [1, 0]]]


def test_draws_with_replacement_are_members_alike_often():
    members_BKN = sets()
    uniform_BKA = torch.rand(2, 3, 8000, generator=torch.Generator().manual_seed(1))
    uniform_BKA[:, :, 0], uniform_BKA[:, :, 1] = 0.0, 1.0 - 2.0**-24
    cells_BKA = draw_members(members_BKN, uniform_BKA)
    for b in range(2):
        for k in range(3):
            inside = members_BKN[b, k].nonzero().flatten()
            if len(inside) == 0:
                assert cells_BKA[b, k].max() < 41  # any, but one that is there
                continue
            assert cells_BKA[b, k, 0] == inside[0]
            assert cells_BKA[b, k, 1] == inside[-1]
            counts = torch.bincount(cells_BKA[b, k], minlength=41)
            assert set(counts.nonzero().flatten().tolist()) == set(inside.tolist())
            assert (counts[inside] / 8000 - 1 / len(inside)).abs().max() < 0.015


@pytest.mark.parametrize("most", [1, 4, 16, 50])
def test_spread_members_are_different_ones(most):
    members_BKN = sets()
    for offset in (0.0, 0.37, 1.0 - 2.0**-24):
        cells_BKm, count_BK = spread_members(members_BKN, torch.full((2, 3), offset), most)
        assert cells_BKm.shape == (2, 3, most)
        for b in range(2):
            for k in range(3):
                inside = members_BKN[b, k].nonzero().flatten().tolist()
                chosen = cells_BKm[b, k, : count_BK[b, k]].tolist()
                assert len(set(chosen)) == len(chosen) == min(most, len(inside))
                assert set(chosen) <= set(inside)


def test_spread_members_are_alike_often():
    members_BKN = sets(cells=29)[:1, :1]
    counts = torch.zeros(29)
    for number in range(2000):
        cells_BKm, _ = spread_members(members_BKN, torch.full((1, 1), number / 2000), 4)
        counts[cells_BKm[0, 0]] += 1
    inside = members_BKN[0, 0]
    assert counts[~inside].sum() == 0
    assert (counts[inside] / 2000 - 4 / inside.sum()).abs().max() < 0.01


def test_vectors_of_cells():
    features_BDhw = torch.randn(2, 5, 3, 4)
    cells_BKA = torch.tensor([[[0, 11], [5, 5], [7, 1]], [[3, 2], [1, 0], [9, 10]]])
    found = at_cells(features_BDhw, cells_BKA)
    assert found.shape == (2, 3, 2, 5)
    assert torch.equal(found[1, 2, 0], features_BDhw[1, :, 9 // 4, 9 % 4])
    sums_KD = sums_of_members(members_BKN := sets(2, 3, 12), features_BDhw)
    for k in range(3):
        expected = sum(features_BDhw[b].flatten(1)[:, members_BKN[b, k]].sum(dim=1) for b in range(2))
        assert torch.allclose(sums_KD[k], expected, atol=1e-5)


def test_worked_loss():
    """u2pl.md section 9: anchor = positive, 50 orthogonal negatives, temperature 0.5 -> ln(1 + 50 e^-2) = 2.04985."""
    basis = torch.eye(51)
    anchors_BKAD = (3.0 * basis[0]).view(1, 1, 1, 51)
    found = contrastive_loss(anchors_BKAD, 0.2 * basis[:1], basis[1:].view(1, 1, 1, 50, 51), 0.5)
    assert found.item() == pytest.approx(2.04985, abs=1e-5)
    assert found.item() == pytest.approx(math.log(1 + 50 * math.exp(-2)), abs=1e-6)


def test_the_loss_is_a_cross_entropy_of_cosines():
    generator = torch.Generator().manual_seed(0)
    anchors, centres, negatives = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 3, 4, 7), (3, 7), (2, 3, 4, 5, 7))
    )
    negatives = negatives / negatives.norm(dim=-1, keepdim=True)
    found = contrastive_loss(anchors, centres, negatives, 0.3)
    cosine = torch.nn.functional.cosine_similarity
    for b, k, a in ((0, 0, 0), (1, 2, 3), (0, 1, 2)):
        others = torch.cat((centres[k][None], negatives[b, k, a]))
        logits = cosine(anchors[b, k, a][None], others) / 0.3
        expected = torch.nn.functional.cross_entropy(logits[None], torch.tensor([0]))
        assert found[b, k, a].item() == pytest.approx(expected.item(), rel=1e-9)


def test_gradient_reaches_the_anchors_alone():
    anchors, centres = torch.randn(2, 3, 4, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    negatives = torch.randn(2, 3, 4, 5, 7, requires_grad=True)
    contrastive_loss(anchors, centres, negatives, 0.5).sum().backward()
    assert anchors.grad.abs().amax(dim=-1).min() > 0
    assert centres.grad is None
    assert negatives.grad is None


def test_half_precision_is_computed_in_fp32():
    anchors, centres, negatives = torch.randn(1, 2, 3, 8), torch.randn(2, 8), torch.randn(1, 2, 3, 4, 8)
    expected = contrastive_loss(anchors, centres, negatives, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        found = contrastive_loss(anchors, centres, negatives, 0.5)
        members = torch.ones(1, 2, 6, dtype=torch.bool)
        assert sums_of_members(members, torch.randn(1, 8, 2, 3)).dtype == torch.float32
    assert torch.equal(found, expected)
