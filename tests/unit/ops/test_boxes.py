"""Membership against a loop over pixels and boxes, overlaps by hand."""

from __future__ import annotations

import pytest
import torch

from raysemi.ops.boxes import inside_own_class, overlap


def by_loop(label, boxes):
    inside = torch.zeros_like(label, dtype=torch.bool)
    for b, y, x in torch.cartesian_prod(*map(torch.arange, label.shape)).tolist():
        for x1, y1, x2, y2, kind in boxes[b].tolist():
            if kind == label[b, y, x] and x1 <= x + 0.5 <= x2 and y1 <= y + 0.5 <= y2:
                inside[b, y, x] = True
    return inside


def test_a_box_of_whole_pixels_holds_these_and_no_other():
    label = torch.full((1, 5, 7), 2)
    inside = inside_own_class(label, torch.tensor([[[1.0, 2.0, 4.0, 3.0, 2.0]]]))
    assert inside.nonzero().tolist() == [[0, 2, 1], [0, 2, 2], [0, 2, 3]]


def test_membership_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 3, (2, 9, 13), generator=generator)
    corners = torch.rand(2, 11, 2, 2, generator=generator) * torch.tensor([13.0, 9.0])
    boxes = torch.cat((corners.amin(2), corners.amax(2), torch.randint(0, 3, (2, 11, 1), generator=generator)), dim=2)
    boxes[:, 3] = -1.0  # no box
    found = inside_own_class(label, boxes)
    assert torch.equal(found, by_loop(label, boxes))
    assert 0 < found.sum() < found.numel()


def test_boxes_of_other_classes_do_not_matter():
    label = torch.zeros(1, 4, 4, dtype=torch.int64)
    label[0, :, 2:] = 1
    own = torch.tensor([[[0.0, 0.0, 4.0, 4.0, 1.0]]])
    other = torch.tensor([[[0.0, 0.0, 4.0, 4.0, 2.0]]])
    assert torch.equal(inside_own_class(label, own), label == 1)
    assert torch.equal(inside_own_class(label, torch.cat((own, other), dim=1)), label == 1)


def test_what_is_not_labeled_lies_in_no_box():
    nothing = torch.full((1, 6, 5), -1.0)
    assert not inside_own_class(torch.full((1, 3, 3), 255), nothing).any()
    assert not inside_own_class(torch.zeros(1, 3, 3, dtype=torch.int64), nothing).any()


def test_overlap():
    a = torch.tensor([[0.0, 0.0, 4.0, 2.0], [10.0, 10.0, 12.0, 12.0]])
    b = torch.tensor([[0.0, 0.0, 4.0, 2.0], [2.0, 0.0, 6.0, 2.0], [4.0, 0.0, 6.0, 2.0]])
    assert overlap(a, b).tolist() == [[1.0, pytest.approx(4 / 12), 0.0], [0.0, 0.0, 0.0]]
    assert overlap(a, torch.zeros(0, 4)).shape == (2, 0)
