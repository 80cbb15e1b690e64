"""Between pixels and the cells of a smaller map whose corners lie on the image's corners.

Axes: B images, U unlabeled ones, H x W pixels, h x w cells, N = h * w.
"""

from __future__ import annotations

import torch
from torch import Tensor

Size = tuple[int, int]
"""Height and width."""


def at_nodes(map_BHW: Tensor, cells: Size) -> Tensor:
    """A map of labels or truths read at the cells' centres, corners aligned: [B, h * w].

    For a crop of 8 k + 1 pixels and stride 8 these are the pixels [::8, ::8]; never interpolated, since a class
    between two classes does not exist.
    """
    y_h, x_w = (
        _node_pixels(pixels, nodes, map_BHW.device) for pixels, nodes in zip(map_BHW.shape[1:], cells, strict=True)
    )
    return map_BHW.index_select(1, y_h).index_select(2, x_w).flatten(1)


def _node_pixels(pixels: int, nodes: int, device: torch.device) -> Tensor:
    gaps = max(nodes - 1, 1)
    return (torch.arange(nodes, device=device) * (2 * (pixels - 1)) + gaps) // (2 * gaps)  # rounded half up


def outside_box(boxes_U4: Tensor, size: Size, cells: Size) -> Tensor:
    """Cells of which no part lies in the image's CutMix box: bool [U, h * w].

    A cell reaches half way to the next one's centre. Exact from the corners of the box, so nothing is pooled.
    """
    outside = []
    for low_U, high_U, pixels, nodes in (
        (boxes_U4[:, 1], boxes_U4[:, 3], size[0], cells[0]),
        (boxes_U4[:, 0], boxes_U4[:, 2], size[1], cells[1]),
    ):
        gaps = max(nodes - 1, 1)
        centre_n = torch.arange(nodes, device=boxes_U4.device) * (2 * (pixels - 1))  # in 1 / (2 gaps) pixels
        first_U1, last_U1 = low_U[:, None] * (2 * gaps), (high_U[:, None] - 1) * (2 * gaps)
        touches_Un = (centre_n + (pixels - 1) >= first_U1) & (centre_n - (pixels - 1) <= last_U1)
        outside.append(~(touches_Un & (high_U > low_U)[:, None]))
    return (outside[0][:, :, None] | outside[1][:, None, :]).flatten(1)


def nearest_cell(pixels: int, cells: int, device: torch.device) -> Tensor:
    """The cell nearest to each pixel, corners aligned: int64 [pixels], y (cells - 1) / (pixels - 1) rounded half up."""
    gaps = max(pixels - 1, 1)
    return (torch.arange(pixels, device=device) * (2 * (cells - 1)) + gaps) // (2 * gaps)
