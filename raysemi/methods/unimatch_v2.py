"""UniMatch V2: two strong views, each seen through one half of the channels, learn the labels of an averaged teacher.

Source: Yang et al. 2025, arXiv:2410.10777, section 3, and its code. Differs: partners of CutMix are neighbouring slots;
labeled and strong images go through the student in one pass, which is the same without BatchNorm (the paper's vision
transformer) and with it lets both share its statistics. On a convolutional network the dropout acts on the maps that
the decoder reads, maps with the same number of channels sharing their factors.
Axes: L labeled, U unlabeled images, V = 2 strong views, K classes, H x W pixels. The views of an image share its
geometry.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raysemi.base import Config, choices, search
from raysemi.data.types import SemiBatch
from raysemi.methods.base import Average, Method, StepContext, Teacher, counted_pixels
from raysemi.methods.perturbation import with_complementary
from raysemi.methods.weighting import UnlabeledPass
from raysemi.ops.losses import Criterion, Objective, labeled_loss, supervised, unsupervised
from raysemi.ops.mixing import paste
from raysemi.ops.pseudo_label import confidence_and_label


class UniMatchV2Config(Config):
    """`method.*` of `unimatch_v2`."""

    name: Literal["unimatch_v2"] = "unimatch_v2"
    threshold: float = Field(0.95, ge=0.0, lt=1.0, json_schema_extra=choices([0.0, 0.7, 0.9, 0.95, 0.98]))
    """Least teacher probability at which a pixel is trusted; 0 trusts all."""
    unsupervised_weight: float = Field(1.0, ge=0.0, json_schema_extra=choices([0.5, 1.0, 2.0, 4.0]))
    """Factor on the mean of both strong terms; total = (labeled + factor * mean) / 2."""
    dropped: float = Field(0.5, ge=0.0, le=1.0, json_schema_extra=search(0.0, 1.0))
    """Share of the unlabeled images whose strong views have complementary channels dropped; the rest keep all. One of
    each pair of slots at 0.5, the published value; other shares are reached on average."""
    criterion: Criterion = Criterion()
    """Loss of the labeled images."""
    average: Teacher = Average(kind="ema")
    """The teacher: an average of the student."""


class UniMatchV2(Method):
    """Two strong streams with complementary channels, taught by the teacher."""

    strong_views = 2
    weighted = True

    def __init__(self, config: UniMatchV2Config, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.config = config
        self.average = config.average

    def normalisers(self, batch: SemiBatch, context: StepContext) -> dict[str, Tensor] | None:
        """Annotated pixels, and valid ones after the CutMix of each view."""
        valid = {
            f"strong_{number + 1}": paste(boxes_U4, batch.valid_UHW) for number, boxes_U4 in enumerate(batch.boxes_VU4)
        }
        return counted_pixels(self, self.config.criterion, batch, context, valid)

    def objectives(self, batch: SemiBatch, context: StepContext) -> dict[str, Objective]:
        """The labeled loss and a consistency term for each strong view."""
        assert context.teacher is not None  # the config refuses average.kind: none
        config, student = self.config, context.student
        with torch.no_grad():
            weak = context.teacher(batch.weak_U3HW)
        confidence_UHW, pseudo_UHW = confidence_and_label(weak.logits_BKHW)
        trusted_UHW = (confidence_UHW >= config.threshold) & batch.valid_UHW
        context.observe_labels(pseudo_UHW, confidence_UHW, trusted_UHW, batch.valid_UHW)

        mixed = [
            paste(boxes_U4, strong_U3HW, pseudo_UHW, trusted_UHW, batch.valid_UHW)
            for boxes_U4, strong_U3HW in zip(batch.boxes_VU4, batch.strong_VU3HW, strict=True)
        ]
        images_B3HW = torch.cat((batch.image_L3HW, *(views[0] for views in mixed)))
        num_labeled, num_unlabeled = len(batch.image_L3HW), len(batch.weak_U3HW)
        features = with_complementary(student.encode(images_B3HW), num_labeled, batch.slots_U, config.dropped, context)
        seen = student.decode(features, images_B3HW.shape[-2:])
        labeled, *strong = seen.split([num_labeled, num_unlabeled, num_unlabeled])
        # half of the student's channels are dropped: the memory takes what the teacher sees of the weak view
        reliable_UHW = self.weighting.reliable(pseudo_UHW, confidence_UHW, batch)
        self.weighting.remember(labeled, [UnlabeledPass(weak, pseudo_UHW, reliable_UHW)], batch, context)
        weight_UHW = self.weighting.weigh(weak, pseudo_UHW, context)

        loss = labeled_loss(config.criterion, labeled.logits_BKHW, batch.label_LHW, context.across)
        terms = {"supervised": supervised(loss, weight=0.5)}
        for number, (view, (_, label_UHW, kept_UHW, valid_UHW)) in enumerate(zip(strong, mixed, strict=True)):
            mixed_UHW = paste(batch.boxes_VU4[number], weight_UHW)
            loss = self.weighting.cross_entropy(view.logits_BKHW, label_UHW, valid_UHW, kept_UHW, mixed_UHW)
            terms[f"strong_{number + 1}"] = unsupervised(loss, weight=0.25 * config.unsupervised_weight)
        return terms
