"""How right boxes are against the things in masks, and how right a network is inside and outside them.

Source: "Weighting Pseudo-Labels via High-Activation Feature Index Similarity and Object Detection for Semi-Supervised
Semantic Segmentation", supplement.
Axes: N and M boxes, K classes, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raysemi.ops.boxes import SAME, inside_own_class, overlap
from raysemi.ops.losses import IGNORE


class BoxCounts:
    """How right accepted boxes are, and how right a network is inside and outside those that agree with it.

    A box is right when it overlaps a true box of its class by at least `SAME`; a true box is found when a right box
    says so. Pixels are those that are annotated and of which the network is sure; one is inside where an accepted box
    of its predicted class holds it (the paper's supplement: pseudo-labels are righter there).

    Args:
        num_classes: of the pool.
    """

    def __init__(self, num_classes: int) -> None:
        self.images = 0
        self.true_K, self.accepted_K, self.right_K, self.found_K = torch.zeros(4, num_classes, dtype=torch.int64)
        self.pixels_K, self.correct_K, self.inside_K, self.correct_inside_K = torch.zeros(
            4, num_classes, dtype=torch.int64
        )
        """Of pixels, by predicted class."""

    def add(self, boxes_N4: Tensor, label_N: Tensor, true_M4: Tensor, true_label_M: Tensor) -> None:
        """Counts the accepted boxes of an image against its true ones; labels are class indices."""
        right_NM = (overlap(boxes_N4, true_M4) >= SAME) & (label_N[:, None] == true_label_M)
        num = len(self.true_K)
        self.images += 1
        self.true_K += torch.bincount(true_label_M, minlength=num)
        self.accepted_K += torch.bincount(label_N, minlength=num)
        self.right_K += torch.bincount(label_N[right_NM.any(dim=1)], minlength=num)
        self.found_K += torch.bincount(true_label_M[right_NM.any(dim=0)], minlength=num)

    def add_pixels(self, predicted_HW: Tensor, sure_HW: Tensor, label_HW: Tensor, boxes_N5: Tensor) -> None:
        """Counts the pixels of an image; `boxes_N5` are the accepted boxes with their class."""
        num = len(self.true_K)
        counted_HW = sure_HW & (label_HW != IGNORE)
        correct_HW = counted_HW & (predicted_HW == label_HW)
        inside_HW = inside_own_class(predicted_HW[None], boxes_N5[None])[0]
        for total_K, chosen_HW in (
            (self.pixels_K, counted_HW),
            (self.correct_K, correct_HW),
            (self.inside_K, counted_HW & inside_HW),
            (self.correct_inside_K, correct_HW & inside_HW),
        ):
            total_K += torch.bincount(predicted_HW[chosen_HW], minlength=num)

    def result(self, classes: Sequence[str], things: Sequence[int]) -> dict[str, Any]:
        """Plain data: of all things together and by class; percent, None where nothing was counted."""

        def numbers(chosen: Sequence[int]) -> dict[str, Any]:
            of = list(chosen)
            true, accepted, right, found = (
                int(count_K[of].sum()) for count_K in (self.true_K, self.accepted_K, self.right_K, self.found_K)
            )
            result: dict[str, Any] = {
                "true_boxes": true,
                "accepted_boxes": accepted,
                "precision": _percent(right, accepted),
                "recall": _percent(found, true),
            }
            if self.pixels_K.sum():
                pixels, correct, inside, both = (
                    int(count_K[of].sum())
                    for count_K in (self.pixels_K, self.correct_K, self.inside_K, self.correct_inside_K)
                )
                result["pixel_accuracy"] = _percent(correct, pixels)
                result["pixel_accuracy_inside"] = _percent(both, inside)
                result["pixel_accuracy_outside"] = _percent(correct - both, pixels - inside)
            return result

        total = numbers(things)
        return {
            "images": self.images,
            "boxes_per_image": total["accepted_boxes"] / max(self.images, 1),
            **total,
            "classes": {classes[k]: numbers([k]) for k in things},
        }


def _percent(part: int, whole: int) -> float | None:
    return 100.0 * part / whole if whole else None
