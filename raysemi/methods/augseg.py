"""AugSeg: strong views of random intensity, and CutMix that gives labels to images of which the teacher is unsure.

A strong view is the weak one after a few random 8-bit operations (`ops.intensity`). Images are then mixed in two steps:
a copy of each image receives, the likelier the less sure the teacher is of it, a box of a labeled image; and each image
receives a box of its partner's copy. So labels reach an image through its partner, in whose pixels they are certain.

Observed, of the un-mixed weak views: "pseudo", "confidence", "trusted" (kept pixels), and the scalars "kept_ratio" and
"image_confidence". The loader's CutMix boxes (`data.views.cutmix*`) are not used.

Source: Zhao et al. 2023, AugSeg, arXiv:2212.04976, and its code. Differs: partners and box sizes are drawn in groups of
neighbouring slots instead of a worker's batch, so that the number of ranks changes nothing; padding gets no
pseudo-label and does not count in an image's confidence.
Axes: L labeled, U unlabeled images, G groups of neighbouring ones, K classes, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from raysemi.base import Config, choices, search
from raysemi.data.types import SemiBatch
from raysemi.errors import ConfigError
from raysemi.methods.base import Average, Method, StepContext, Teacher, counted_pixels, group_size
from raysemi.methods.weighting import UnlabeledPass
from raysemi.ops.draws import beta
from raysemi.ops.losses import IGNORE, Criterion, Objective, labeled_loss, supervised, unsupervised
from raysemi.ops.mixing import centred_boxes, paste_all, permuted
from raysemi.ops.pseudo_label import confidence_and_label, image_confidence

Shape = Annotated[int, Field(ge=1, le=20)]
"""Whole parameter of a beta distribution, which is then an order statistic of uniform numbers."""


class AugSegConfig(Config):
    """`method.*` of `augseg`."""

    name: Literal["augseg"] = "augseg"
    threshold: float = Field(0.95, ge=0.0, lt=1.0, json_schema_extra=search(0.7, 0.95))
    """tau: least teacher probability at which a pixel is trusted; 0 = every pixel, as on Cityscapes."""
    unsupervised_weight: float = Field(1.0, ge=0.0, json_schema_extra=search(0.7, 4.0, log=True))
    """w: factor on the consistency term; total = labeled + w * consistency."""
    injection: Literal["adaptive", "never", "always"] = Field(
        "adaptive", json_schema_extra=choices(["adaptive", "never", "always"])
    )
    """Whether a box of a labeled image enters an image's copy. adaptive: with probability 1 - (confidence of the
    teacher in the image)."""
    labeled_beta: tuple[Shape, Shape] = Field(
        (8, 2), json_schema_extra=choices([[8, 2], [4, 4]], requires={"injection": ["adaptive", "always"]})
    )
    """Beta distribution of the share of a copy that the labeled box leaves: (8, 2) = boxes of 20 % on average."""
    unlabeled_beta: tuple[Shape, Shape] = Field((4, 4), json_schema_extra=choices([[4, 4], [1, 1]]))
    """Beta distribution of the share of an image that its partner's box leaves: (4, 4) = boxes of 50 % on average."""
    group: int | None = Field(None, ge=2)
    """Neighbouring unlabeled images that are mixed among themselves and share the size of their boxes; divides the
    unlabeled images of each rank. null: min(train.batch.unlabeled, 4)."""
    extra_weak: bool = Field(False, json_schema_extra=choices([False, True]))
    """The student's pass also has the unlabeled weak views, which then count in BatchNorm's statistics alone."""
    normaliser: Literal["all", "valid"] = Field("all", json_schema_extra=choices(["all", "valid"]))
    """What the consistency is the mean over: all pixels, padding included (the paper's); or those with a label."""
    criterion: Criterion = Criterion()
    """Loss of the labeled images."""
    average: Teacher = Average(kind="ema", decay=0.999, copied=1)
    """The teacher: an average of the student, and the student itself during the first `train.period`."""


class Mix(NamedTuple):
    """Who is mixed with whom, and where."""

    partner_U: Tensor
    """int64 row of each image's partner; may be its own."""
    labeled_boxes_U4: Tensor
    """int64 (left, top, right, bottom), half open: where the copy of an image shows a labeled one; all 0 = nowhere."""
    boxes_U4: Tensor
    """Where an image shows its partner's copy."""

    def apply(self, own: Sequence[Tensor], labeled: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Adaptive CutMix of all that belongs to a pixel.

        Args:
            own: maps of the unlabeled images, [U, ..., H, W] each.
            labeled: the same maps of the labeled images, [L, ..., H, W] each. Row u of U goes with row u * L // U,
                the same image on any number of ranks.
        """
        row_U = self.partner_U * len(labeled[0]) // len(self.partner_U)
        copies = paste_all(self.labeled_boxes_U4, own, [given[row_U] for given in labeled])
        # into the images as they were, not into their copies
        return paste_all(self.boxes_U4, own, [copy[self.partner_U] for copy in copies])


def draw_mix(config: AugSegConfig, sure_U: Tensor, slots_U: Tensor, size: tuple[int, int], context: StepContext) -> Mix:
    """Draws partners and boxes of one step, of (seed, step, group) and (seed, step, slot).

    Args:
        config: of the method.
        sure_U: the teacher's confidence in each unlabeled image, in [0, 1].
        slots_U: their global slots.
        size: height and width of the images.
        context: the step.

    Raises:
        ConfigError: groups that do not divide the images of this rank.
    """
    members = group_size(config.group, len(slots_U) * context.across.world)
    if len(slots_U) % members:
        raise ConfigError(
            f"method.group must divide the unlabeled images of each rank; got {members} for {len(slots_U)} images. "
            "Change it, or train.batch.unlabeled."
        )
    group_G = slots_U[::members] // members

    def boxes(name: str, alpha: int, other: int) -> Tensor:
        left_G = beta(context.uniform(group_G, f"{name} area", alpha + other - 1), alpha)
        area_U = (1.0 - left_G)[:, None].expand(-1, members).flatten()
        return centred_boxes(area_U, context.uniform(slots_U, f"{name} centre", 2), *size)

    labeled_boxes_U4 = boxes("labeled", *config.labeled_beta)
    if config.injection == "adaptive":
        injects_U = context.uniform(slots_U, "injection", 1)[:, 0] > sure_U
        labeled_boxes_U4 = labeled_boxes_U4 * injects_U[:, None]
    elif config.injection == "never":
        labeled_boxes_U4 = torch.zeros_like(labeled_boxes_U4)
    partner_U = permuted(context.uniform(group_G, "partners", members))
    return Mix(partner_U, labeled_boxes_U4, boxes("unlabeled", *config.unlabeled_beta))


class AugSeg(Method):
    """Consistency between the teacher on weak and the student on mixed strong views."""

    strong_views = 1
    weighted = True
    strong = "intensity"

    def __init__(self, config: AugSegConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.config = config
        self.average = config.average

    def normalisers(self, batch: SemiBatch, context: StepContext) -> dict[str, Tensor] | None:
        """Annotated pixels, and all of the unlabeled images; where labels are pasted is up to the teacher."""
        if self.config.normaliser == "valid":
            return None
        every_UHW = torch.ones_like(batch.valid_UHW)
        return counted_pixels(self, self.config.criterion, batch, context, {"consistency": every_UHW})

    def objectives(self, batch: SemiBatch, context: StepContext) -> dict[str, Objective]:
        """The labeled loss and the consistency on strong views after adaptive CutMix."""
        assert context.teacher is not None  # the config refuses average.kind: none
        config = self.config
        with torch.no_grad():
            weak = context.teacher(batch.weak_U3HW)
        confidence_UHW, pseudo_UHW = confidence_and_label(weak.logits_BKHW)
        sure_U = image_confidence(weak.logits_BKHW, batch.valid_UHW)
        trusted_UHW = (confidence_UHW >= config.threshold) & batch.valid_UHW
        context.observe_labels(pseudo_UHW, confidence_UHW, trusted_UHW, batch.valid_UHW)
        context.observe("image_confidence", sure_U.mean())

        # padding has no label, wherever it is pasted; labels are certain, and weigh 1
        label_UHW = torch.where(batch.valid_UHW, pseudo_UHW, IGNORE)
        reliable_UHW = self.weighting.reliable(pseudo_UHW, confidence_UHW, batch)
        own = batch.strong_VU3HW[0], label_UHW, confidence_UHW, reliable_UHW
        certain_LHW = torch.ones_like(batch.label_LHW, dtype=confidence_UHW.dtype)
        given = batch.image_L3HW, batch.label_LHW, certain_LHW, torch.zeros_like(batch.label_LHW, dtype=torch.bool)
        size = label_UHW.shape[1], label_UHW.shape[2]
        mix = draw_mix(config, sure_U, batch.slots_U, size, context)
        strong_U3HW, label_UHW, confidence_UHW, reliable_UHW = mix.apply(own, given)

        extra = (batch.weak_U3HW,) if config.extra_weak else ()
        images = batch.image_L3HW, *extra, strong_U3HW
        seen = context.student(torch.cat(images))  # one pass: all share BatchNorm's statistics
        labeled, strong = seen.images(slice(len(batch.slots_L))), seen.images(slice(-len(batch.slots_U), None))
        self.weighting.remember(labeled, [UnlabeledPass(strong, label_UHW, reliable_UHW)], batch, context)
        weight_UHW = self.weighting.weigh(weak, pseudo_UHW, context)
        (weight_UHW,) = mix.apply([weight_UHW], [certain_LHW.to(weight_UHW.dtype)])

        loss = labeled_loss(config.criterion, labeled.logits_BKHW, batch.label_LHW, context.across)
        counted_UHW = torch.ones_like(batch.valid_UHW) if config.normaliser == "all" else label_UHW != IGNORE
        trusted_UHW = confidence_UHW >= config.threshold
        consistency = self.weighting.cross_entropy(strong.logits_BKHW, label_UHW, counted_UHW, trusted_UHW, weight_UHW)
        return {
            "supervised": supervised(loss, weight=1.0),
            "consistency": unsupervised(consistency, weight=config.unsupervised_weight),
        }
