"""CutMix: inside a box, an image and all that belongs to its pixels come from a partner slot.

Axes: U images of this rank, H x W pixels; the dots of `[U, ..., H, W]` are channels or nothing. No host wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from raysemi.errors import ConfigError


def partner(x: Tensor) -> Tensor:
    """Row i of the result belongs to the partner of row i: rows 2j and 2j + 1 change places.

    Global slots 2j and 2j + 1 stay on one rank, so the partner does not depend on the number of ranks. The last row of
    an odd number takes row 0.

    Args:
        x: [U, ...], U of at least 2 (or 0).

    Raises:
        ConfigError: a single row, which would be its own partner: CutMix would silently do nothing.
    """
    rows = len(x)
    if rows == 1:
        raise ConfigError(
            "train.batch.unlabeled must give each rank at least 2 images to mix; got 1. Raise it, or use fewer workers."
        )
    row = torch.arange(rows, device=x.device) ^ 1
    return x[torch.where(row < rows, row, 0)]  # index_select would lose channels-last


def next_in_group(x: Tensor, group: int) -> Tensor:
    """Row i of the result is the row after i within its group of neighbouring rows; after the last comes the first.

    Args:
        x: [U, ...], U a multiple of `group`.
        group: rows of a group; a group of global slots stays on one rank.
    """
    row = torch.arange(len(x), device=x.device)
    return x[row // group * group + (row + 1) % group]


def half_boxes(uniform_U3: Tensor, height: int, width: int) -> Tensor:
    """Boxes of half the image's area: width a whole number in [W/2 + 1, W), height and position follow.

    Args:
        uniform_U3: numbers in [0, 1): of the width, left and top of each box.
        height, width: of the images.

    Returns:
        int64 (left, top, right, bottom) in pixels, half open: [U, 4].

    Source: the code of U2PL (Wang et al. 2022, arXiv:2203.03884).
    """
    # a number below 1, times a whole number, rounds to less than it in fp32 too
    narrowest = width // 2 + 1
    box_width = narrowest + (uniform_U3[:, 0] * max(width - narrowest, 1)).long()
    box_height = (height * width + box_width) // (2 * box_width)  # rounded half up
    return _placed(uniform_U3[:, 1:], box_height, box_width, height, width)


def log_half_boxes(uniform_U3: Tensor, height: int, width: int) -> Tensor:
    """Boxes of half the image's area: height H * 0.5 ** u, so that tall and wide ones are alike; the width follows.

    Args:
        uniform_U3: numbers in [0, 1): of the height, left and top of each box.
        height, width: of the images.

    Returns:
        int64 (left, top, right, bottom) in pixels, half open: [U, 4].

    Source: the code of AEL (Hu et al. 2021, arXiv:2110.05474).
    """
    box_height = (height * 0.5 ** uniform_U3[:, 0] + 0.5).long().clamp(min=1)
    box_width = ((height * width + box_height) // (2 * box_height)).clamp(max=width)
    return _placed(uniform_U3[:, 1:], box_height, box_width, height, width)


def _placed(uniform_U2: Tensor, box_height_U: Tensor, box_width_U: Tensor, height: int, width: int) -> Tensor:
    left_U = (uniform_U2[:, 0] * (width - box_width_U + 1)).long()
    top_U = (uniform_U2[:, 1] * (height - box_height_U + 1)).long()
    return torch.stack((left_U, top_U, left_U + box_width_U, top_U + box_height_U), dim=1)


def permuted(uniform_GS: Tensor) -> Tensor:
    """Partner row of each image, a random permutation within each group of S neighbouring rows.

    Args:
        uniform_GS: uniform numbers, one row a group.

    Returns:
        int64 [G * S]: row i of the images is mixed with that row; it may be i itself.
    """
    groups, size = uniform_GS.shape
    first_G1 = size * torch.arange(groups, device=uniform_GS.device)[:, None]
    return (first_G1 + uniform_GS.argsort(dim=1, stable=True)).flatten()


def centred_boxes(area_U: Tensor, centre_U2: Tensor, height: int, width: int) -> Tensor:
    """Boxes with a share of the image's area around drawn centres, cut off at the image's border.

    sides = int(side * sqrt(area)); centre uniform in [side // 8, side) along each axis; box = centre -+ sides // 2.

    Args:
        area_U: share of the area before it is cut off, in [0, 1].
        centre_U2: uniform numbers in [0, 1) for row and column of the centre.
        height, width: of the images.

    Returns:
        int64 [U, 4] (left, top, right, bottom), half open.

    Source: the box of CutMix, arXiv:1905.04899, as AugSeg's code draws it: no centre in the first eighths.
    """
    edges = []
    for side, uniform_U in zip((width, height), centre_U2.flip(1).unbind(1), strict=True):
        half_U = (side * area_U.sqrt()).long() // 2
        centre_U = side // 8 + (uniform_U * (side - side // 8)).long()
        edges.append(((centre_U - half_U).clamp(min=0), (centre_U + half_U).clamp(max=side)))
    (left_U, right_U), (top_U, bottom_U) = edges
    return torch.stack((left_U, top_U, right_U, bottom_U), dim=1)


def inside(boxes_U4: Tensor, height: int, width: int) -> Tensor:
    """Pixels of each image's box.

    Args:
        boxes_U4: integer (left, top, right, bottom) in pixels, half open; all 0 = no box.
        height, width: of the images.

    Returns:
        bool [U, H, W] on the boxes' device.
    """
    left, top, right, bottom = boxes_U4[:, :, None].unbind(1)  # each [U, 1]
    x_W = torch.arange(width, device=boxes_U4.device)
    y_H = torch.arange(height, device=boxes_U4.device)
    columns_UW = (x_W >= left) & (x_W < right)
    rows_UH = (y_H >= top) & (y_H < bottom)
    return rows_UH[:, :, None] & columns_UW[:, None, :]


@overload
def paste(boxes_U4: Tensor, tensor: Tensor, /, *, source: Sequence[Tensor] | None = None) -> Tensor: ...
@overload
def paste(
    boxes_U4: Tensor, tensor: Tensor, /, *tensors: Tensor, source: Sequence[Tensor] | None = None
) -> tuple[Tensor, ...]: ...


def paste(boxes_U4: Tensor, /, *tensors: Tensor, source: Sequence[Tensor] | None = None) -> Tensor | tuple[Tensor, ...]:
    """Replaces, in each tensor and inside each image's box, the pixels by those of the image's partner.

    What is pasted from is always the tensor as given, never an image that was already mixed. One call mixes image,
    pseudo-label, confidence, valid and weight alike, so that no target is left belonging to another image.

    Args:
        boxes_U4: integer (left, top, right, bottom) in pixels, half open; all 0 = no box.
        tensors: each [U, ..., H, W], same U, H and W.
        source: what to paste from, as many tensors of the same shapes; default: each tensor's own partner rows.

    Returns:
        The mixed tensor, or a tuple of them when several were given.

    Raises:
        ConfigError: a single image without `source` (see `partner`).

    Source: Yun et al. 2019, CutMix, arXiv:1905.04899; partners as in UniMatch V2, by pairs of slots.
    """
    mixed = paste_all(boxes_U4, tensors, [partner(tensor) for tensor in tensors] if source is None else source)
    return mixed[0] if len(mixed) == 1 else mixed


def paste_all(boxes_U4: Tensor, tensors: Sequence[Tensor], source: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`paste` of any number of tensors, from given ones."""
    height, width = tensors[0].shape[-2:]
    inside_UHW = inside(boxes_U4, height, width)
    return tuple(
        torch.where(inside_UHW.view(len(tensor), *[1] * (tensor.dim() - 3), height, width), other, tensor)
        for tensor, other in zip(tensors, source, strict=True)
    )
