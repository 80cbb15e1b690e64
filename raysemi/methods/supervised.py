"""Supervised: cross-entropy on the labeled images alone; the baseline that every method has to beat.

Axes: L labeled images, K classes, H x W pixels.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from raysemi.base import Config
from raysemi.data.types import SemiBatch
from raysemi.methods.base import Average, StepContext
from raysemi.ops.losses import Criterion, Objective, labeled_loss, supervised


class SupervisedConfig(Config):
    """`method.*` of `supervised`."""

    name: Literal["supervised"] = "supervised"
    criterion: Criterion = Criterion()
    """Loss of the labeled images."""
    average: Average = Average()
    """Averaged copy that is evaluated; none by default, as in the papers."""


class Supervised(nn.Module):
    """Mean cross-entropy over the labeled pixels."""

    strong_views = 0
    second_view = False

    def __init__(self, config: SupervisedConfig, num_classes: int) -> None:
        super().__init__()
        self.criterion = config.criterion
        self.average = config.average

    def heads(self, low_channels: int, high_channels: int) -> dict[str, nn.Module]:
        """None."""
        return {}

    def objectives(self, batch: SemiBatch, context: StepContext) -> dict[str, Objective]:
        """One term: the labeled loss."""
        logits_LKHW = context.student(batch.image_L3HW).logits_BKHW
        loss = labeled_loss(self.criterion, logits_LKHW, batch.label_LHW, context.across)
        return {"supervised": supervised(loss, weight=1.0)}
