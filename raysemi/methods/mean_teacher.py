"""Mean teacher: every pixel of the strong view learns the label that an averaged network gives the weak view.

Source: Tarvainen and Valpola 2017, arXiv:1703.01780, in the form that the ablation of the rank-statistics paper starts
from. Differs: pixels for images, cross-entropy to hard labels for a squared distance, no threshold and no CutMix.
Axes: L labeled, U unlabeled images, K classes, H x W pixels. The views of an image share its geometry.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raysemi.base import Config, choices, search
from raysemi.data.types import SemiBatch
from raysemi.methods.base import Average, Method, StepContext, Teacher, counted_pixels
from raysemi.methods.weighting import UnlabeledPass
from raysemi.ops.losses import Criterion, Objective, labeled_loss, supervised, unsupervised
from raysemi.ops.pseudo_label import confidence_and_label
from raysemi.ops.schedules import linear


class MeanTeacherConfig(Config):
    """`method.*` of `mean_teacher`."""

    name: Literal["mean_teacher"] = "mean_teacher"
    unsupervised_weight: float = Field(1.0, ge=0.0, json_schema_extra=search(0.25, 4.0, log=True))
    """Factor on the consistency term after the ramp; total = (labeled + factor * consistency) / 2."""
    ramp: float = Field(0.25, ge=0.0, le=1.0, json_schema_extra=choices([0.0, 0.25, 0.5]))
    """Share of the run over which the factor rises linearly from 0."""
    criterion: Criterion = Criterion()
    """Loss of the labeled images."""
    average: Teacher = Average(kind="ema")
    """The teacher: an average of the student."""


class MeanTeacher(Method):
    """Consistency with the teacher's labels, all of them."""

    strong_views = 1
    mixes = False
    weighted = True

    def __init__(self, config: MeanTeacherConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.config = config
        self.average = config.average

    def ramp_steps(self, steps: int) -> float:
        """Of `ramp`."""
        return self.config.ramp * steps

    def normalisers(self, batch: SemiBatch, context: StepContext) -> dict[str, Tensor] | None:
        """Annotated pixels, and valid ones."""
        return counted_pixels(self, self.config.criterion, batch, context, {"consistency": batch.valid_UHW})

    def objectives(self, batch: SemiBatch, context: StepContext) -> dict[str, Objective]:
        """The labeled loss and the consistency on strong views."""
        assert context.teacher is not None  # the config refuses average.kind: none
        with torch.no_grad():
            weak = context.teacher(batch.weak_U3HW)
        confidence_UHW, pseudo_UHW = confidence_and_label(weak.logits_BKHW)
        context.observe_labels(pseudo_UHW, confidence_UHW, batch.valid_UHW, batch.valid_UHW)

        images = torch.cat((batch.image_L3HW, batch.strong_VU3HW[0]))  # one pass: both share BatchNorm's statistics
        sizes = [len(batch.image_L3HW), len(batch.weak_U3HW)]
        labeled, strong = context.student(images).split(sizes)
        reliable_UHW = self.weighting.reliable(pseudo_UHW, confidence_UHW, batch)
        self.weighting.remember(labeled, [UnlabeledPass(strong, pseudo_UHW, reliable_UHW)], batch, context)
        weight_UHW = self.weighting.weigh(weak, pseudo_UHW, context)

        labeled_pair = labeled_loss(self.config.criterion, labeled.logits_BKHW, batch.label_LHW, context.across)
        valid_UHW = batch.valid_UHW
        consistency = self.weighting.cross_entropy(strong.logits_BKHW, pseudo_UHW, valid_UHW, valid_UHW, weight_UHW)
        factor = self.config.unsupervised_weight * linear(context.step, self.ramp_steps(context.steps))
        return {
            "supervised": supervised(labeled_pair, weight=0.5),
            "consistency": unsupervised(consistency, weight=0.5 * factor),
        }
