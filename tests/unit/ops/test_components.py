"""Components against scipy's, on noise, spirals and what is worst for hooking; boxes against theirs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from raysemi.ops import components as module
from raysemi.ops.components import components, drawn_box


@pytest.fixture(params=["early", "fixed"])
def rounds(request, monkeypatch):
    """fixed: as on a GPU, where nobody looks whether a round has changed something."""
    if request.param == "fixed":
        monkeypatch.setattr(module, "_the_same", lambda one, other: False)


def assert_like_scipy(mask_BHW):
    found_BHW = components(mask_BHW)
    for mask_HW, found_HW in zip(mask_BHW, found_BHW, strict=True):
        label_HW, count = ndimage.label(mask_HW.numpy(), np.ones((3, 3)))
        pairs = set(zip(label_HW.ravel().tolist(), found_HW.flatten().tolist(), strict=True))
        assert len(pairs) == count + int((label_HW == 0).any())  # one number a component ...
        assert len({number for _, number in pairs}) == len(pairs)  # ... of its own
        assert all((number == -1) == (label == 0) for label, number in pairs)


@pytest.mark.parametrize("size", [(1, 1), (1, 8), (7, 1), (6, 11), (53, 40)])
@pytest.mark.parametrize("share", [0.1, 0.35, 0.45, 0.6, 1.0])
def test_noise(size, share, rounds):
    assert_like_scipy(torch.rand(3, *size, generator=torch.Generator().manual_seed(1)) < share)


def spiral(side):
    """One line of a pixel's width, two pixels between its turns."""
    mask_HW = torch.zeros(side, side, dtype=torch.bool)
    row, column = 0, 0
    mask_HW[0, 0] = True
    lengths = [side - 1] + [length for turn in range(side - 1, 0, -3) for length in (turn, turn)]
    for way, length in enumerate(lengths):
        down, across = ((0, 1), (1, 0), (0, -1), (-1, 0))[way % 4]
        for _ in range(length):
            row, column = row + down, column + across
            if not (0 <= row < side and 0 <= column < side):
                return mask_HW
            mask_HW[row, column] = True
    return mask_HW


def test_a_spiral_and_its_gaps(rounds):
    line_HW = spiral(94)
    assert ndimage.label(line_HW.numpy(), np.ones((3, 3)))[1] == 1
    assert line_HW.sum() > 2500
    assert_like_scipy(torch.stack((line_HW, ~line_HW, line_HW.flip(1), line_HW.T)))


def test_combs_and_steps(rounds):
    """Teeth that meet at the last row alone; diagonals that touch by corners; a chess board, which is one component."""
    comb_HW = torch.zeros(31, 45, dtype=torch.bool)
    comb_HW[:, ::3] = True
    comb_HW[-1] = True
    steps_HW = torch.eye(31, 45).bool() | torch.eye(45).flip(0)[:31].bool()
    chess_HW = (torch.arange(31)[:, None] + torch.arange(45)) % 2 == 0
    assert_like_scipy(torch.stack((comb_HW, comb_HW.flip(0), steps_HW, chess_HW, ~chess_HW)))


def test_there_are_as_many_rounds_as_a_line_in_the_worst_order_needs(monkeypatch, rounds):
    """Blocks in a row, their numbers shuffled: any connected graph of as many nodes is done in the same rounds."""
    original = module._neighbours
    for seed in range(5):
        order_M = torch.randperm(64, generator=torch.Generator().manual_seed(seed))

        def shuffled(mask_BHW, order_M=order_M):
            of_place_8M = original(mask_BHW)
            found_8M = torch.empty_like(of_place_8M)
            found_8M[:, order_M] = order_M[of_place_8M]  # the block at place m gets the number order[m]
            return found_8M

        monkeypatch.setattr(module, "_neighbours", shuffled)
        assert components(torch.ones(1, 2, 128, dtype=torch.bool)).unique().numel() == 1


def test_a_box_is_its_components(rounds):
    """Components of 8, 15 and 28 pixels and a single one; more than 10: either of two, each half of the time."""
    mask_HW = torch.zeros(23, 31, dtype=torch.bool)
    mask_HW[0, 23:31] = True
    mask_HW[3:6, 4:9] = True
    mask_HW[10:14, 20:27] = True
    mask_HW[18, 2] = True
    uniform_B = (torch.arange(100) + 0.5) / 100
    boxes_B4, found_B = drawn_box(mask_HW.expand(100, -1, -1), 10, uniform_B)
    assert found_B.all()
    assert boxes_B4[:50].unique(dim=0).tolist() == [[4, 3, 9, 6]]
    assert boxes_B4[50:].unique(dim=0).tolist() == [[20, 10, 27, 14]]
    one_B4, _ = drawn_box(mask_HW.expand(3, -1, -1), 15, torch.tensor([0.0, 0.5, 0.999]))  # more than, not as many as
    assert one_B4.unique(dim=0).tolist() == [[20, 10, 27, 14]]
    assert not drawn_box(mask_HW[None], 28, torch.zeros(1))[1].any()
    assert drawn_box(torch.ones(1, 5, 7, dtype=torch.bool), 0, torch.zeros(1))[0].tolist() == [[0, 0, 7, 5]]


def test_no_host_wait():
    boxes_B4, found_B = drawn_box(torch.empty(2, 9, 12, device="meta").bool(), 3.5, torch.empty(2, device="meta"))
    assert (boxes_B4.shape, found_B.shape) == ((2, 4), (2,))
