"""Connected components of binary images, on their device: no host wait, and as many rounds as any shape can need.

In an 8-neighbourhood all pixels of a 2 x 2 block touch each other, so the nodes of the graph are blocks: a quarter of
the pixels. In a round every component hooks itself to the neighbouring component of the smallest number; two that
choose each other are one tree, any longer cycle would need a smaller number than the smallest. So whatever still has a
neighbour at least doubles: after ceil(log2(nodes)) rounds nothing has one, for any shape. On a CPU, where a look at the
result costs nothing, rounds that would change nothing are left out.

Source: Boruvka 1926, as the parallel connectivity of Shiloach and Vishkin 1982, with full pointer jumping.
Axes: B images, H x W pixels, h x w blocks of 2 x 2, N = h * w of an image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad


@torch.no_grad()
def components(mask_BHW: Tensor) -> Tensor:
    """Components of the pixels that are True, by their 8 neighbours.

    Args:
        mask_BHW: bool.

    Returns:
        int64 [B, H, W]: pixels of one component, and they alone, have one number in [0, h * w) in their image, the
        first of its blocks; -1 where the mask is False.
    """
    images, height, width = mask_BHW.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2
    nodes = rows * columns
    if images * nodes == 0:
        return torch.full_like(mask_BHW, -1, dtype=torch.int64)
    padded_BHW = pad(mask_BHW, (0, 2 * columns - width, 0, 2 * rows - height))
    neighbour_8M = _neighbours(padded_BHW)
    none = images * nodes
    own_M = torch.arange(none, device=mask_BHW.device)
    parent_M = own_M
    for done in range((nodes - 1).bit_length()):
        other_8M = parent_M[neighbour_8M]
        nearest_M = torch.where(other_8M == parent_M, none, other_8M).amin(dim=0)
        hook_M = torch.full_like(parent_M, none).scatter_reduce_(0, parent_M, nearest_M, "amin")
        hook_M = torch.where(hook_M == none, own_M, hook_M)
        if _the_same(hook_M, own_M):
            break
        first_M = (hook_M[hook_M] == own_M) & (own_M < hook_M)  # of two that chose each other
        hook_M = _roots(torch.where(first_M, own_M, hook_M), nodes >> done)
        parent_M = hook_M[parent_M]
    first_B11 = torch.arange(images, device=mask_BHW.device)[:, None, None] * nodes
    root_Bhw = parent_M.view(images, rows, columns) - first_B11
    root_BHW = root_Bhw.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)[:, :height, :width]
    return torch.where(mask_BHW, root_BHW, -1)


def _roots(parent_M: Tensor, deepest: int) -> Tensor:
    """Root of each node of trees with paths of fewer than `deepest` steps."""
    for _ in range(math.ceil(math.log2(max(deepest, 2)))):
        grandparent_M = parent_M[parent_M]
        if _the_same(grandparent_M, parent_M):
            break
        parent_M = grandparent_M
    return parent_M


def _the_same(one: Tensor, other: Tensor) -> bool:
    """Only where that can be seen without waiting."""
    return one.device.type == "cpu" and torch.equal(one, other)


def _neighbours(mask_BHW: Tensor) -> Tensor:
    """int64 [8, M]: of each block of all images the blocks that touch it, itself in place of those that do not."""
    images, height, width = mask_BHW.shape
    rows, columns = height // 2, width // 2
    own_Bhw = torch.arange(images * rows * columns, device=mask_BHW.device).view(images, rows, columns)
    # corners of each block: [B, h, 2, w, 2]
    corner = mask_BHW.view(images, rows, 2, columns, 2)
    upper, lower = corner[:, :, 0], corner[:, :, 1]
    left, right = corner[..., 0].any(dim=2), corner[..., 1].any(dim=2)
    joins = {
        (0, 1): right[:, :, :-1] & left[:, :, 1:],
        (1, 0): lower[:, :-1].any(dim=3) & upper[:, 1:].any(dim=3),
        (1, 1): lower[:, :-1, :-1, 1] & upper[:, 1:, 1:, 0],
        (1, -1): lower[:, :-1, 1:, 0] & upper[:, 1:, :-1, 1],
    }
    found = []
    for (down, across), joined in joins.items():
        here = (slice(None), slice(0, rows - down), slice(max(0, -across), columns - max(0, across)))
        there = (slice(None), slice(down, rows), slice(max(0, across), columns - max(0, -across)))
        for one, other in ((here, there), (there, here)):
            neighbour_Bhw = own_Bhw.clone()
            neighbour_Bhw[one] = torch.where(joined, own_Bhw[other], own_Bhw[one])
            found.append(neighbour_Bhw.flatten())
    return torch.stack(found)


@torch.no_grad()
def drawn_box(mask_BHW: Tensor, least: float, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """Bounding box of a component of more than `least` pixels; each of them is as likely as any other.

    Args:
        mask_BHW: bool.
        least: pixels.
        uniform_B: numbers in [0, 1), one for each image.

    Returns:
        (int64 [B, 4] left, top, right, bottom, half open; bool [B]: there is such a component, else the box means
        nothing).
    """
    images, height, width = mask_BHW.shape
    root_BP = components(mask_BHW).flatten(1)
    area_BP = torch.zeros_like(root_BP).scatter_add_(1, root_BP.clamp(min=0), (root_BP >= 0).long())
    large_BP = area_BP > least
    reached_BP = large_BP.cumsum(dim=1)
    # a number below 1, times a whole number, rounds to less than it in fp32 too
    wanted_B = (uniform_B * reached_BP[:, -1]).long()
    chosen_B1 = torch.searchsorted(reached_BP, wanted_B[:, None], right=True).clamp(max=height * width - 1)
    inside_BHW = (root_BP == chosen_B1).view(images, height, width)
    edges = []
    for covered_BX in (inside_BHW.any(dim=1), inside_BHW.any(dim=2)):
        covered_BX = covered_BX.byte()
        edges.append((covered_BX.argmax(dim=1), covered_BX.shape[1] - covered_BX.flip(1).argmax(dim=1)))
    (left_B, right_B), (top_B, bottom_B) = edges
    return torch.stack((left_B, top_B, right_B, bottom_B), dim=1), large_BP.any(dim=1)
