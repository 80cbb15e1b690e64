"""How much a pixel's strongest feature channels are those of its pseudo-class: the weight of a pseudo-label.

Source: "Weighting Pseudo-Labels via High-Activation Feature Index Similarity and Object Detection for Semi-Supervised
Semantic Segmentation", PPW. Differs: channels are compared at the features' own resolution, and each pixel of the
labels reads the nearest cell, corners aligned as where logits are resized; where cells and pixels coincide the value is
the same. Axes: B images, K classes, D channels, h x w cells, H x W pixels. No gradient, no host wait.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from raysemi.errors import ConfigError
from raysemi.ops.cells import nearest_cell
from raysemi.ops.losses import IGNORE

Similarity = Literal["rank", "cosine", "euclidean"]


def rank_weights(features_BDhw: Tensor, labels_BHW: Tensor, prototypes_KD: Tensor, k: int = 5) -> Tensor:
    """Share of the k channels of largest magnitude that a pixel has in common with its class's prototype.

    Args:
        features_BDhw: any float dtype, as large as the labels or smaller; ties go to the lower channel.
        labels_BHW: class index 0..K-1, or 255.
        prototypes_KD: of each class.
        k: channels that are compared, 1..D.

    Returns:
        float32 [B, H, W] in {0, 1/k, ..., 1}; 0 at label 255. Classes without a prototype are the caller's.

    Raises:
        ConfigError: k out of range.
    """
    return similarity_weights(features_BDhw, labels_BHW, prototypes_KD, "rank", k)


@torch.no_grad()
def similarity_weights(
    features_BDhw: Tensor,
    labels_BHW: Tensor,
    prototypes_KD: Tensor,
    similarity: Similarity = "rank",
    k: int = 5,
    by_magnitude: bool = True,
) -> Tensor:
    """`rank_weights`, or the comparisons of the paper's analysis in its place.

    Args:
        features_BDhw: see `rank_weights`.
        labels_BHW: see `rank_weights`.
        prototypes_KD: see `rank_weights`.
        similarity: rank; cosine: max(0, cos); euclidean: exp(-|z - P|^2 / D).
        k: channels that `rank` compares.
        by_magnitude: the strongest channels by |value| (paper), else by value (code); the same after a ReLU.

    Returns:
        float32 [B, H, W] in [0, 1]; 0 at label 255.
    """
    channels = features_BDhw.shape[1]
    if not 1 <= k <= channels:
        raise ConfigError(f"k must lie in 1..{channels}, the number of channels; got {k}. The paper uses 5.")
    features_BDhw, prototypes_KD = features_BDhw.float(), prototypes_KD.float()
    with torch.autocast(features_BDhw.device.type, enabled=False):
        if similarity == "rank":
            own_BDhw = _strongest(features_BDhw, 1, k, by_magnitude)
            class_KD = _strongest(prototypes_KD, 1, k, by_magnitude)
            # products of zeros and ones add up exactly
            scores_BKhw = torch.einsum("bdhw,kd->bkhw", own_BDhw, class_KD) / k
        elif similarity == "cosine":
            own_BDhw = torch.nn.functional.normalize(features_BDhw, dim=1)
            class_KD = torch.nn.functional.normalize(prototypes_KD, dim=1)
            scores_BKhw = torch.einsum("bdhw,kd->bkhw", own_BDhw, class_KD).clamp(min=0.0)
        else:
            product_BKhw = torch.einsum("bdhw,kd->bkhw", features_BDhw, prototypes_KD)
            squares_K = prototypes_KD.square().sum(dim=1)[:, None, None]
            distance_BKhw = features_BDhw.square().sum(dim=1, keepdim=True) + squares_K - 2.0 * product_BKhw
            scores_BKhw = (-distance_BKhw.clamp(min=0.0) / channels).exp()
    return _of_labels(scores_BKhw, labels_BHW)


def _strongest(x: Tensor, dim: int, k: int, by_magnitude: bool) -> Tensor:
    """1 at the k largest entries along a dimension, 0 elsewhere, lower indices first among equals."""
    x = x.abs() if by_magnitude else x
    lowest = x.topk(k, dim=dim).values.amin(dim=dim, keepdim=True)
    above, equal = x > lowest, x == lowest
    room = k - above.sum(dim=dim, keepdim=True)
    return (above | (equal & (equal.cumsum(dim=dim) <= room))).to(torch.float32)


def _of_labels(scores_BKhw: Tensor, labels_BHW: Tensor) -> Tensor:
    """The score of each pixel's class at its nearest cell."""
    height, width = labels_BHW.shape[1:]
    rows, columns = scores_BKhw.shape[2:]
    y_H = nearest_cell(height, rows, labels_BHW.device)
    x_W = nearest_cell(width, columns, labels_BHW.device)
    ignored_BHW = labels_BHW == IGNORE
    place_BHW = labels_BHW.masked_fill(ignored_BHW, 0) * (rows * columns) + y_H[:, None] * columns + x_W
    weight_BHW = scores_BKhw.flatten(1).gather(1, place_BHW.flatten(1)).view(labels_BHW.shape)
    return weight_BHW.masked_fill(ignored_BHW, 0.0)
