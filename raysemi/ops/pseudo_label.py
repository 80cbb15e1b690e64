"""What a network's logits say of an unlabeled image: label and confidence, and the threshold that follows the model.

Axes: B images, K classes, H x W pixels. Nothing here carries a gradient or waits for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def confidence_and_label(logits_BKHW: Tensor) -> tuple[Tensor, Tensor]:
    """The largest softmax probability of each pixel and its class.

    Args:
        logits_BKHW: class scores, any float dtype.

    Returns:
        (confidence_BHW, label_BHW): float32 in [1/K, 1] (float64 for float64 logits), int64 in 0..K-1.
    """
    logits_BKHW = logits_BKHW if logits_BKHW.dtype == torch.float64 else logits_BKHW.float()
    peak_B1HW, label_B1HW = logits_BKHW.max(dim=1, keepdim=True)
    # softmax at its largest entry is 1 / sum exp(z - max z): the division over all classes is never made
    confidence_BHW = (logits_BKHW - peak_B1HW).exp_().sum(dim=1).reciprocal_()
    return confidence_BHW, label_B1HW.squeeze(1)


@torch.no_grad()
def image_confidence(logits_BKHW: Tensor, valid_BHW: Tensor) -> Tensor:
    """How sure a network is of each image: mean over its valid pixels of (1 - entropy / log K) * largest probability.

    Args:
        logits_BKHW: class scores, K of at least 2.
        valid_BHW: bool, False at padding.

    Returns:
        float32 [B] in [0, 1] (float64 for float64 logits); 0 for an image without a valid pixel.

    Source: Zhao et al. 2023, AugSeg, arXiv:2212.04976, section 3.3, as its code weighs the entropy by the probability.
    """
    logits_BKHW = logits_BKHW if logits_BKHW.dtype == torch.float64 else logits_BKHW.float()
    log_probability_BKHW = logits_BKHW.log_softmax(dim=1)
    probability_BKHW = log_probability_BKHW.exp()
    entropy_BHW = -(probability_BKHW * log_probability_BKHW).sum(dim=1) / math.log(logits_BKHW.shape[1])
    sure_BHW = (1.0 - entropy_BHW) * probability_BKHW.amax(dim=1)
    pixels_B = valid_BHW.sum(dim=(1, 2)).clamp(min=1)
    return ((sure_BHW * valid_BHW).sum(dim=(1, 2)) / pixels_B).clamp(0.0, 1.0)


def class_peaks(logits_BKHW: Tensor, valid_BHW: Tensor) -> Tensor:
    """Per class, the largest confidence among valid pixels that have it as argmax.

    Args:
        logits_BKHW: class scores.
        valid_BHW: bool, False at padding.

    Returns:
        float32 [K] (float64 for float64 logits); 0 for a class that no valid pixel has. Ranks join theirs by the
        maximum: K numbers instead of all logits, and exactly the same result.
    """
    confidence_BHW, label_BHW = confidence_and_label(logits_BKHW)
    return peaks_by_class(confidence_BHW, label_BHW, valid_BHW, logits_BKHW.shape[1])


@torch.no_grad()
def peaks_by_class(confidence_BHW: Tensor, label_BHW: Tensor, valid_BHW: Tensor, num_classes: int) -> Tensor:
    """`class_peaks` from what `confidence_and_label` gave.

    Args:
        confidence_BHW: largest probability of each pixel.
        label_BHW: int64 class of each pixel.
        valid_BHW: bool, False at padding.
        num_classes: K.
    """
    images, height, width = label_BHW.shape
    if images * height * width == 0:
        return confidence_BHW.new_zeros(num_classes)
    # one row of peaks a pixel row first: on a GPU a single row would be K addresses that all pixels fight for
    peaks_BHK = confidence_BHW.new_zeros(images, height, num_classes)
    peaks_BHK.scatter_reduce_(2, label_BHW, confidence_BHW * valid_BHW, "amax")
    return peaks_BHK.amax(dim=(0, 1))


@torch.no_grad()
def update_threshold(threshold: Tensor | float, peaks_K: Tensor, momentum: float = 0.999) -> Tensor:
    """Threshold after a step: momentum * threshold + (1 - momentum) * mean of the present classes' peaks.

    Args:
        threshold: scalar in (0, 1], on the device of `peaks_K`.
        peaks_K: of `class_peaks`, joined over ranks by the maximum; 0 = class not present.
        momentum: share of the old threshold, in [0, 1].

    Returns:
        Scalar on the device, float32 (or the dtype of a tensor `threshold`); unchanged when no class is present.

    Source: Sun et al. 2024, CorrMatch, the dynamic threshold; one scalar for all classes, the mean taken before the
    average over time.
    """
    if not isinstance(threshold, Tensor):
        threshold = torch.full((), threshold, dtype=torch.float32, device=peaks_K.device)
    # summed in fp64: the order of classes then cannot show in the fp32 result. MPS has no fp64
    wide = torch.float32 if peaks_K.device.type == "mps" else torch.float64
    present = (peaks_K > 0).sum()
    mean = peaks_K.sum(dtype=wide) / present.clamp(min=1)
    moved = (momentum * threshold.to(wide) + (1.0 - momentum) * mean).to(threshold.dtype)
    return torch.where(present > 0, moved, threshold)
