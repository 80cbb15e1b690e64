"""CutMix: everything inside the box is the partner's, everything outside the image's own."""

from __future__ import annotations

import pytest
import torch

from raysemi.errors import ConfigError
from raysemi.ops.mixing import (
    centred_boxes,
    half_boxes,
    inside,
    log_half_boxes,
    next_in_group,
    partner,
    paste,
    permuted,
)

BOXES = torch.tensor([[1, 0, 4, 2], [0, 0, 0, 0], [0, 2, 7, 5], [6, 4, 7, 5], [2, 1, 3, 4]])  # 5 images of 5 x 7


def constant(*shape):
    """Each image filled with its own number."""
    return torch.arange(len(BOXES), dtype=torch.float32).view(-1, *[1] * len(shape)).expand(-1, *shape).clone()


def by_hand(boxes, own, other):
    mixed = own.clone()
    for image, (left, top, right, bottom) in enumerate(boxes.tolist()):
        mixed[image, ..., top:bottom, left:right] = other[image, ..., top:bottom, left:right]
    return mixed


def test_partners():
    assert partner(torch.arange(6)).tolist() == [1, 0, 3, 2, 5, 4]
    assert partner(torch.arange(5)).tolist() == [1, 0, 3, 2, 0]
    assert partner(torch.arange(0)).tolist() == []


def test_a_single_image_is_refused():
    with pytest.raises(ConfigError, match="must give each rank at least 2 images to mix; got 1"):
        paste(BOXES[:1], constant(5, 7)[:1])


def test_inside_is_half_open():
    expected = by_hand(BOXES, torch.zeros(5, 5, 7), torch.ones(5, 5, 7)).bool()
    assert torch.equal(inside(BOXES, 5, 7), expected)
    assert inside(BOXES, 5, 7).flatten(1).sum(1).tolist() == [6, 0, 21, 1, 3]


def test_every_tensor_is_mixed_alike():
    g = torch.Generator().manual_seed(0)
    image = torch.rand(5, 3, 5, 7, generator=g)
    label = torch.randint(0, 9, (5, 5, 7), generator=g)
    valid = torch.rand(5, 5, 7, generator=g) < 0.5
    views = torch.rand(5, 2, 3, 5, 7, generator=g)
    before = image.clone()
    mixed = paste(BOXES, image, label, valid, views)
    assert isinstance(mixed, tuple)
    for own, new in zip((image, label, valid, views), mixed, strict=True):
        assert new.dtype == own.dtype
        # the partner as given: an image that was mixed in place before would show another's pixels
        assert torch.equal(new, by_hand(BOXES, own, own[[1, 0, 3, 2, 0]]))
    assert torch.equal(image, before)


def test_one_tensor_comes_back_as_a_tensor():
    mixed = paste(BOXES, constant(5, 7))
    assert torch.equal(mixed, by_hand(BOXES, constant(5, 7), constant(5, 7)[[1, 0, 3, 2, 0]]))


def test_a_pair_differs_inside_its_box():
    image = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(1))
    changed = (paste(BOXES[[0, 2]], image) != image).all(1)
    assert torch.equal(changed, inside(BOXES[[0, 2]], 5, 7))


def test_source_takes_the_partners_place():
    own, label = constant(3, 5, 7), constant(5, 7)
    mixed, mixed_label = paste(BOXES, own, label, source=(own + 10, label + 20))
    assert torch.equal(mixed, by_hand(BOXES, own, own + 10))
    assert torch.equal(mixed_label, by_hand(BOXES, label, label + 20))
    assert torch.equal(paste(BOXES[:1], own[:1], source=[own[:1] + 1]), by_hand(BOXES[:1], own[:1], own[:1] + 1))
    with pytest.raises(ValueError, match="zip"):
        paste(BOXES, own, label, source=(own,))


def test_channels_last_stays():
    image = torch.rand(4, 3, 5, 7).to(memory_format=torch.channels_last)
    assert paste(BOXES[:4], image).is_contiguous(memory_format=torch.channels_last)


def test_gradient_goes_where_the_pixels_came_from():
    image = constant(5, 7).requires_grad_()
    paste(BOXES, image)[2].sum().backward()
    box = inside(BOXES, 5, 7)[2].float()
    assert torch.equal(image.grad[3], box)
    assert torch.equal(image.grad[2], 1 - box)


def test_no_host_wait():
    boxes = torch.empty(3, 4, device="meta", dtype=torch.int64)  # a meta tensor has nothing to read
    assert paste(boxes, torch.empty(3, 2, 5, 7, device="meta")).shape == (3, 2, 5, 7)


def test_the_next_of_a_group():
    assert next_in_group(torch.arange(6), 3).tolist() == [1, 2, 0, 4, 5, 3]
    assert next_in_group(torch.arange(4), 2).tolist() == [1, 0, 3, 2]
    images = torch.randn(4, 3, 5, 7).to(memory_format=torch.channels_last)
    assert next_in_group(images, 4).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("height", "width"), [(321, 321), (513, 513), (160, 201)])
def test_half_boxes_cover_half(height, width):
    """u2pl.md section 9: the area is within 1 % of half the image over 10^3 draws; every width and place occurs."""
    uniform_U3 = torch.rand(1000, 3, generator=torch.Generator().manual_seed(0))
    uniform_U3[0], uniform_U3[1] = 0.0, 1.0 - 2.0**-24
    left, top, right, bottom = half_boxes(uniform_U3, height, width).unbind(dim=1)
    area = (right - left) * (bottom - top)
    assert (area / (height * width / 2) - 1).abs().max() < 0.01
    assert min(left.min(), top.min()) == 0
    assert right.max() == width
    assert bottom.max() == height
    assert (right - left).min() == width // 2 + 1
    assert (right - left).max() == width - 1
    assert abs((right - left).float().mean() / width - 0.75) < 0.02


def test_half_boxes_fit_into_the_smallest_images():
    for height, width in ((1, 1), (2, 2), (3, 2), (4, 4), (5, 3)):
        boxes_U4 = half_boxes(torch.rand(50, 3), height, width)
        assert (boxes_U4[:, :2] >= 0).all()
        assert (boxes_U4[:, 2] <= width).all()
        assert (boxes_U4[:, 3] <= height).all()


def test_a_permutation_within_each_group():
    uniform_GS = torch.tensor([[0.5, 0.1, 0.9], [0.2, 0.2, 0.1]])  # equal numbers: the earlier image first
    assert permuted(uniform_GS).tolist() == [1, 0, 2, 5, 3, 4]
    assert permuted(torch.empty(2, 3, device="meta")).shape == (6,)


def test_centred_boxes():
    """augseg.md section 7.2: l = 0.75, S = 513 -> side 256; cut off at the border, where the centre stays."""
    area_U = torch.tensor([0.25, 0.25, 0.25, 0.0, 1.0])
    centre_U2 = torch.tensor([[0.5, 0.5], [0.0, 1 - 2**-24], [0.0, 0.0], [0.3, 0.3], [0.0, 0.0]])
    boxes = centred_boxes(area_U, centre_U2, 513, 513)
    low, middle = 513 // 8, 513 // 8 + 224  # centres: 64 + int(0.5 * 449)
    assert boxes[0].tolist() == [middle - 128, middle - 128, middle + 128, middle + 128]
    assert boxes[1].tolist() == [512 - 128, 0, 513, low + 128]  # column 512, row 64
    assert boxes[2].tolist() == [0, 0, low + 128, low + 128]
    assert (boxes[3, 2] - boxes[3, 0], boxes[3, 3] - boxes[3, 1]) == (0, 0)
    assert boxes[4].tolist() == [0, 0, low + 256, low + 256]
    wide = centred_boxes(area_U[:1], torch.tensor([[0.0, 0.5]]), 24, 40)[0]  # height 24: row 3; width 40: column 22
    assert wide.tolist() == [22 - 10, 0, 22 + 10, 3 + 6]
    empty = torch.empty(3, device="meta")
    assert centred_boxes(empty, torch.empty(3, 2, device="meta"), 24, 40).shape == (3, 4)


def test_no_centre_in_the_first_eighth():
    numbers = torch.rand(50_000, 2, generator=torch.Generator().manual_seed(0))
    boxes = centred_boxes(torch.full((50_000,), 4.1 / 513**2), numbers, 513, 513)  # boxes of 2 x 2 around the centre
    for low, high in ((boxes[:, 0], boxes[:, 2]), (boxes[:, 1], boxes[:, 3])):
        assert (low.min() + 1, high.max()) == (513 // 8, 513)
        assert abs((low.float() + 1).mean() - (64 + 512) / 2) < 2


def test_half_boxes_of_any_shape():
    """ael.md section 8: within 1 % of half the area; as often tall as wide."""
    uniform_U3 = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0))
    for height, width in ((321, 321), (129, 257)):
        left, top, right, bottom = log_half_boxes(uniform_U3, height, width).unbind(1)
        area_U = (right - left) * (bottom - top)
        assert (area_U / (height * width) - 0.5).abs().max() < 0.005
        assert min(left.min(), top.min()) == 0
        assert (right.max(), bottom.max()) == (width, height)
        tall_U = (bottom - top) / height > (right - left) / width
        assert abs(tall_U.float().mean().item() - 0.5) < 0.02
