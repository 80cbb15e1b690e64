"""What tells weak classes from strong ones, and gives the weak ones more: confidences of classes, chances, rates.

Source: Hu et al. 2021, AEL, arXiv:2110.05474, and its code.
Axes: B images, K classes, n draws, H x W pixels. No host wait, no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raysemi.ops.losses import IGNORE, true_probability


@torch.no_grad()
def class_pixels(labels_BHW: Tensor, num_classes: int) -> Tensor:
    """Pixels of each class in each image.

    Args:
        labels_BHW: class index, or `IGNORE`.
        num_classes: K.

    Returns:
        int64 [B, K].
    """
    return _by_class(labels_BHW, torch.ones_like(labels_BHW), num_classes).sum(dim=1)


@torch.no_grad()
def true_class_sums(logits_BKHW: Tensor, labels_BHW: Tensor) -> Tensor:
    """Per class, the sum over its labeled pixels of the probability that they get, and their number: [2, K].

    Both may be added up over ranks; at least fp32.
    """
    probability_BHW = true_probability(logits_BKHW, labels_BHW)
    num_classes = logits_BKHW.shape[1]
    # by rows first: a single fp32 sum over millions of pixels would lose them
    sums_K = _by_class(labels_BHW, probability_BHW, num_classes).sum(dim=(0, 1))
    return torch.stack((sums_K, class_pixels(labels_BHW, num_classes).sum(dim=0).to(sums_K.dtype)))


@torch.no_grad()
def moved_bank(bank_K: Tensor, sums_2K: Tensor, momentum: float, absent_zero: bool = False) -> Tensor:
    """momentum * bank + (1 - momentum) * mean of the present classes' confidence.

    Args:
        bank_K: confidences of the classes.
        sums_2K: of `true_class_sums`, of all ranks together.
        momentum: share of the old confidence.
        absent_zero: a class without a pixel counts as one of confidence 0 (code); else it stays as it is.
    """
    sum_K, count_K = sums_2K.to(bank_K.dtype)
    moved_K = momentum * bank_K + (1.0 - momentum) * sum_K / count_K.clamp(min=1.0)
    return moved_K if absent_zero else torch.where(count_K > 0, moved_K, bank_K)


def keep_rates(bank_K: Tensor, power: float) -> Tensor:
    """((1 - k) / max (1 - k)) ** power: 1 for the weakest class, less the surer a class is."""
    weak_K = (1.0 - bank_K).clamp(min=1e-6)  # never 0 / 0
    return (weak_K / weak_K.amax()) ** power


def _by_class(labels_BHW: Tensor, values_BHW: Tensor, num_classes: int) -> Tensor:
    """Sums of the values of each class in each row of pixels: [B, H, K]."""
    images, height, _ = labels_BHW.shape
    slot_BHW = torch.where(labels_BHW == IGNORE, num_classes, labels_BHW)
    sums_BHK = values_BHW.new_zeros(images, height, num_classes + 1)
    return sums_BHK.scatter_add_(2, slot_BHW, values_BHW)[..., :num_classes]
