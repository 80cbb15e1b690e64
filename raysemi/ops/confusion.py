"""Confusion matrix of pixels, and what is read off it. All ratios are fractions; a report makes percent of them.

Axes: K classes; rows are labels, columns predictions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raysemi.errors import DataError
from raysemi.ops.losses import IGNORE


@torch.no_grad()
def confusion_matrix(predicted: Tensor, label: Tensor, num_classes: int, ignore_index: int = IGNORE) -> Tensor:
    """Counts pixels by (label, prediction); ignored pixels are left out of both.

    Args:
        predicted: integer class of each pixel, any shape.
        label: integer class of each pixel or `ignore_index`, same shape.
        num_classes: K.
        ignore_index: label of pixels that are not scored.

    Returns:
        int64 [K, K] on the device of the inputs; matrices of several images are added.

    Raises:
        DataError: shapes differ, or a scored pixel has a class outside 0..K-1. Reads one flag from the device.
    """
    if predicted.shape != label.shape:
        raise DataError(
            f"prediction must have the label's shape {tuple(label.shape)}; got {tuple(predicted.shape)}. "
            "Resize the logits to the label's size before taking the argmax."
        )
    predicted, label = predicted.long(), label.long()
    scored = label != ignore_index
    fits = (label >= 0) & (label < num_classes) & (predicted >= 0) & (predicted < num_classes)
    if bool((scored & ~fits).any()):
        raise DataError(
            f"classes of scored pixels must lie in 0..{num_classes - 1}; got labels {_range(label[scored])} and "
            f"predictions {_range(predicted[scored])}. Check the class map, or use {ignore_index} for unlabeled pixels."
        )
    cell = torch.where(scored, label * num_classes + predicted, num_classes**2)
    counts = torch.bincount(cell.flatten(), minlength=num_classes**2 + 1)
    return counts[:-1].reshape(num_classes, num_classes)


def iou(matrix_KK: Tensor) -> Tensor:
    """Intersection over union of each class, I / (U + 1e-10).

    Args:
        matrix_KK: of `confusion_matrix`, summed over the whole validation set.

    Returns:
        float64 [K] on the CPU, in [0, 1); a class that neither label nor prediction has counts 0.
    """
    matrix_KK = matrix_KK.cpu().double()
    intersection_K = matrix_KK.diagonal()
    union_K = matrix_KK.sum(0) + matrix_KK.sum(1) - intersection_K
    return intersection_K / (union_K + 1e-10)


def mean_iou(matrix_KK: Tensor) -> float:
    """Mean of `iou` over all K classes, absent ones included as 0, as the papers' code counts."""
    return float(iou(matrix_KK).mean())


def pixel_accuracy(matrix_KK: Tensor) -> float:
    """Share of scored pixels with the right class; 0 when none is scored."""
    matrix_KK = matrix_KK.cpu()
    return float(matrix_KK.diagonal().sum()) / max(int(matrix_KK.sum()), 1)


def _range(values: Tensor) -> str:
    return f"{int(values.min())}..{int(values.max())}"
