"""FixMatch per pixel: what the teacher is sure of on the weak view, the student must say of the strong view.

Source: Sohn et al. 2020, arXiv:2001.07685, eqs. 3-4. Differs: pixels for images, an averaged teacher, CutMix between
neighbouring slots; the mean runs over all valid pixels, trusted or not, as in the segmentation papers.
Axes: L labeled, U unlabeled images, K classes, H x W pixels. The views of an image share its geometry.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raysemi.base import Config, search
from raysemi.data.types import SemiBatch
from raysemi.methods.base import Average, Method, StepContext, Teacher, counted_pixels
from raysemi.methods.weighting import UnlabeledPass
from raysemi.ops.losses import Criterion, Objective, labeled_loss, supervised, unsupervised
from raysemi.ops.mixing import paste
from raysemi.ops.pseudo_label import confidence_and_label


class FixMatchConfig(Config):
    """`method.*` of `fixmatch`."""

    name: Literal["fixmatch"] = "fixmatch"
    threshold: float = Field(0.95, ge=0.0, lt=1.0, json_schema_extra=search(0.7, 0.99))
    """Least teacher probability at which a pixel is trusted."""
    unsupervised_weight: float = Field(1.0, ge=0.0, json_schema_extra=search(0.5, 4.0, log=True))
    """Factor on the consistency term; total = (labeled + factor * consistency) / 2."""
    criterion: Criterion = Criterion()
    """Loss of the labeled images."""
    average: Teacher = Average(kind="ema")
    """The teacher: an average of the student."""


class FixMatch(Method):
    """Consistency between the teacher on weak and the student on strong views."""

    strong_views = 1
    weighted = True

    def __init__(self, config: FixMatchConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.threshold = config.threshold
        self.factor = config.unsupervised_weight
        self.criterion = config.criterion
        self.average = config.average

    def normalisers(self, batch: SemiBatch, context: StepContext) -> dict[str, Tensor] | None:
        """Annotated pixels, and valid ones after CutMix."""
        valid_UHW = paste(batch.boxes_VU4[0], batch.valid_UHW)
        return counted_pixels(self, self.criterion, batch, context, {"consistency": valid_UHW})

    def objectives(self, batch: SemiBatch, context: StepContext) -> dict[str, Objective]:
        """The labeled loss and the consistency on CutMixed strong views."""
        assert context.teacher is not None  # the config refuses average.kind: none
        with torch.no_grad():
            weak = context.teacher(batch.weak_U3HW)
        confidence_UHW, pseudo_UHW = confidence_and_label(weak.logits_BKHW)
        trusted_UHW = (confidence_UHW >= self.threshold) & batch.valid_UHW
        context.observe_labels(pseudo_UHW, confidence_UHW, trusted_UHW, batch.valid_UHW)

        # CutMix: what is pasted from the partner slot is pasted everywhere, or the target belongs to another image
        reliable_UHW = self.weighting.reliable(pseudo_UHW, confidence_UHW, batch)
        strong_U3HW, label_UHW, trusted_UHW, valid_UHW, reliable_UHW = paste(
            batch.boxes_VU4[0], batch.strong_VU3HW[0], pseudo_UHW, trusted_UHW, batch.valid_UHW, reliable_UHW
        )

        images = torch.cat((batch.image_L3HW, strong_U3HW))  # one student pass: both share BatchNorm's statistics
        sizes = [len(batch.image_L3HW), len(strong_U3HW)]
        labeled, strong = context.student(images).split(sizes)
        self.weighting.remember(labeled, [UnlabeledPass(strong, label_UHW, reliable_UHW)], batch, context)
        weight_UHW = paste(batch.boxes_VU4[0], self.weighting.weigh(weak, pseudo_UHW, context))

        labeled_pair = labeled_loss(self.criterion, labeled.logits_BKHW, batch.label_LHW, context.across)
        consistency = self.weighting.cross_entropy(strong.logits_BKHW, label_UHW, valid_UHW, trusted_UHW, weight_UHW)
        return {
            "supervised": supervised(labeled_pair, weight=0.5),
            "consistency": unsupervised(consistency, weight=0.5 * self.factor),
        }
