"""Supervised: cross-entropy on the labeled images alone; the baseline that every method has to beat.

Axes: L labeled images, K classes, H x W pixels.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from raysemi.base import Config
from raysemi.data.types import SemiBatch
from raysemi.methods.base import Average, Method, StepContext, counted_pixels
from raysemi.ops.losses import Criterion, Objective, labeled_loss, supervised


class SupervisedConfig(Config):
    """`method.*` of `supervised`."""

    name: Literal["supervised"] = "supervised"
    criterion: Criterion = Criterion()
    """Loss of the labeled images."""
    average: Average = Average()
    """Averaged copy that is evaluated; none by default, as in the papers."""


class Supervised(Method):
    """Mean cross-entropy over the labeled pixels."""

    strong_views = 0
    uses_unlabeled = False

    def __init__(self, config: SupervisedConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.criterion = config.criterion
        self.average = config.average

    def normalisers(self, batch: SemiBatch, context: StepContext) -> dict[str, Tensor] | None:
        """Annotated pixels."""
        return counted_pixels(self, self.criterion, batch, context, {})

    def objectives(self, batch: SemiBatch, context: StepContext) -> dict[str, Objective]:
        """One term: the labeled loss."""
        logits_LKHW = context.student(batch.image_L3HW).logits_BKHW
        loss = labeled_loss(self.criterion, logits_LKHW, batch.label_LHW, context.across)
        return {"supervised": supervised(loss, weight=1.0)}
