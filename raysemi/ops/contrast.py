"""Pixel-wise contrast: draws from sets of cells whose sizes only the device knows, and the loss. No host wait.

Axes: B images, K classes, N cells, A anchors, M negatives of an anchor, D channels of a vector.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from raysemi.ops.similarity import at_least_fp32

_GRID = 2**24  # uniform numbers are its multiples


def class_ranks(scores_BKN: Tensor) -> Tensor:
    """Place of each class at each cell, 0 = largest score; among equals the lower class first. int64 [B, K, N]."""
    order_BKN = scores_BKN.argsort(dim=1, descending=True, stable=True)
    place_BKN = torch.arange(scores_BKN.shape[1], device=scores_BKN.device)[None, :, None].expand_as(order_BKN)
    return torch.empty_like(order_BKN).scatter_(1, order_BKN, place_BKN)


def draw_members(members_BKN: Tensor, uniform_BKA: Tensor) -> Tensor:
    """Members of each set, drawn with replacement.

    Args:
        members_BKN: bool, the sets.
        uniform_BKA: numbers in [0, 1), one for each draw.

    Returns:
        int64 [B, K, A], indices of cells; any cell where the set is empty.
    """
    reached_BKN = members_BKN.cumsum(dim=2, dtype=torch.int32)
    # a number below 1, times a whole number, rounds to less than it in fp32 too
    wanted_BKA = (uniform_BKA * reached_BKN[:, :, -1:]).to(torch.int32)
    return _cells(reached_BKN, wanted_BKA)


def spread_members(members_BKN: Tensor, offset_BK: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Members of each set, each at most once, evenly spaced among them from a drawn offset on.

    Args:
        members_BKN: bool, the sets; a cell's chance to be drawn is the same as any other member's.
        offset_BK: numbers in [0, 1).
        most: how many at most; of a smaller set all.

    Returns:
        (int64 [B, K, most], indices of cells; int64 [B, K], how many of them count, the first ones).
    """
    reached_BKN = members_BKN.cumsum(dim=2, dtype=torch.int32)
    size_BK = reached_BKN[:, :, -1].long()
    taken_BK = size_BK.clamp(max=most)
    place_BKm = torch.arange(most, device=members_BKN.device) * _GRID + (offset_BK * _GRID).long()[:, :, None]
    wanted_BKm = place_BKm * size_BK[:, :, None] // (taken_BK.clamp(min=1)[:, :, None] * _GRID)  # whole: no rounding
    return _cells(reached_BKN, wanted_BKm.to(torch.int32)), taken_BK


def _cells(reached_BKN: Tensor, wanted_BKA: Tensor) -> Tensor:
    """The cell at which the set's wanted-th member (from 0) stands."""
    return torch.searchsorted(reached_BKN, wanted_BKA, right=True).clamp(max=reached_BKN.shape[2] - 1)


def at_cells(features_BDhw: Tensor, cells_BKA: Tensor) -> Tensor:
    """The vectors of given cells: [B, K, A, D], with gradient."""
    image_B11 = torch.arange(len(cells_BKA), device=cells_BKA.device)[:, None, None]
    return features_BDhw.flatten(2).transpose(1, 2)[image_B11, cells_BKA]


def sums_of_members(members_BKN: Tensor, features_BDhw: Tensor) -> Tensor:
    """Sum of the vectors of each class's members over all images: [K, D], at least fp32, under autocast too."""
    features_BDN = at_least_fp32(features_BDhw).flatten(2)
    with torch.autocast(features_BDhw.device.type, enabled=False):
        return torch.einsum("bkn,bdn->kd", members_BKN.to(features_BDN.dtype), features_BDN)


def contrastive_loss(anchors_BKAD: Tensor, positives_KD: Tensor, negatives_BKAMD: Tensor, temperature: float) -> Tensor:
    """-ln of the positive's share of exp(cos / temperature) among positive and negatives, of each anchor.

    Args:
        anchors_BKAD: vectors of any length, above 0.
        positives_KD: of each class one; without gradient.
        negatives_BKAMD: of each anchor its own, of length 1; without gradient.
        temperature: above 0.

    Returns:
        [B, K, A], at least fp32, under autocast too. Gradient into the anchors alone.

    Source: Wang et al. 2022 (U2PL), arXiv:2203.03884, eq. 8.
    """
    anchors_BKAD = functional.normalize(at_least_fp32(anchors_BKAD), dim=-1)
    positives_KD = functional.normalize(positives_KD.detach().to(anchors_BKAD.dtype), dim=-1)
    negatives_BKAMD = negatives_BKAMD.detach().to(anchors_BKAD.dtype)
    near_BKA = (anchors_BKAD * positives_KD[:, None]).sum(dim=-1)
    with torch.autocast(anchors_BKAD.device.type, enabled=False):
        far_BKAM = (negatives_BKAMD @ anchors_BKAD[..., None]).squeeze(-1)
    logits_BKAM = torch.cat((near_BKA[..., None], far_BKAM), dim=-1) / temperature
    return logits_BKAM.logsumexp(dim=-1) - logits_BKAM[..., 0]
