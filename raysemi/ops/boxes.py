"""Which pixels lie inside a box of their own class, and how much boxes overlap.

Axes: B images, N and M boxes, H x W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

SAME = 0.8
"""Overlap from which on two boxes say the same."""
_AT_ONCE = 8  # boxes, so that no tensor holds all of an image's boxes times its pixels


def inside_own_class(label_BHW: Tensor, boxes_BN5: Tensor) -> Tensor:
    """Pixels whose centre lies inside, or on the edge of, at least one box of their class.

    Args:
        label_BHW: class index.
        boxes_BN5: float32 (x1, y1, x2, y2, class), edges of pixels; class -1 = no box.

    Returns:
        bool [B, H, W].
    """
    height, width = label_BHW.shape[1:]
    y_H = torch.arange(height, device=label_BHW.device) + 0.5
    x_W = torch.arange(width, device=label_BHW.device) + 0.5
    inside_BHW = torch.zeros_like(label_BHW, dtype=torch.bool)
    for part_BN5 in boxes_BN5.split(_AT_ONCE, dim=1):
        x1_BN1, y1_BN1, x2_BN1, y2_BN1, class_BN1 = part_BN5[..., None].unbind(dim=2)
        beside_BNW = (x1_BN1 <= x_W) & (x_W <= x2_BN1)
        below_BNH = (y1_BN1 <= y_H) & (y_H <= y2_BN1)
        own_BNHW = label_BHW[:, None] == class_BN1[..., None]
        inside_BHW |= (own_BNHW & below_BNH[..., None] & beside_BNW[:, :, None]).any(dim=1)
    return inside_BHW


def overlap(a_N4: Tensor, b_M4: Tensor) -> Tensor:
    """Intersection over union of each box with each other one: float [N, M]."""
    low_NM2 = torch.maximum(a_N4[:, None, :2], b_M4[None, :, :2])
    high_NM2 = torch.minimum(a_N4[:, None, 2:], b_M4[None, :, 2:])
    both_NM = (high_NM2 - low_NM2).clamp(min=0).prod(dim=2)
    area_N, area_M = ((boxes[:, 2:] - boxes[:, :2]).prod(dim=1) for boxes in (a_N4, b_M4))
    return both_NM / (area_N[:, None] + area_M - both_NM)
