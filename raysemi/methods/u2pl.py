"""U2PL: pixels of low entropy take the teacher's label, pixels of high entropy say at least what they are not.

The teacher labels the weak views; half of the batches are CutMixed from them, and no stronger view is made. A second
pass of the teacher, over the very images that the student learns from and in train mode, gives entropies, centres and
keys, and its own BatchNorm statistics. Training begins with `warmup_periods` on the labeled images alone; in the period
that follows, the teacher is still the student itself.

Observed, maps of the un-mixed weak views: "pseudo", "confidence", "trusted" (as large a share as is kept, of the least
entropy in the first pass: with `entropy_source: mixed` not the very pixels that are taught, which are of mixed images).
Scalars: "kept_ratio" of the mixed images, "entropy_limit".

Source: Wang et al. 2022, "Semi-Supervised Semantic Segmentation Using Unreliable Pseudo-Labels", arXiv:2203.03884, and
its code. Differs: percentiles over all ranks from a histogram; padding is never a label; `train.period` stands for an
epoch; see `pixel_contrast` for the contrastive loss. Needs no setting of `data.views` for strong views or CutMix.
Axes: L labeled, U unlabeled, B = L + U images, K classes, H x W pixels, h x w cells of the representation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from raysemi.base import Config, choices, search
from raysemi.data.types import SemiBatch
from raysemi.methods.auxiliary import auxiliary_head, labeled_terms
from raysemi.methods.base import Average, Method, StepContext, group_size, in_train_mode
from raysemi.methods.perturbation import drawn_dropout
from raysemi.methods.pixel_contrast import Cells, ContrastConfig, PixelContrast, QueueConfig
from raysemi.methods.weighting import UnlabeledPass
from raysemi.models.decoders import Keep
from raysemi.models.heads import RepresentationHead
from raysemi.models.segmentor import Channels, Prediction, Segmentor
from raysemi.ops.entropy import entropy, percentiles
from raysemi.ops.losses import Criterion, Objective, unsupervised
from raysemi.ops.mixing import half_boxes, next_in_group, paste_all
from raysemi.ops.pseudo_label import confidence_and_label

_DROP = 0.1  # of the channels in the heads, and in the decoder where it is the published one


class RepresentationConfig(Config):
    """`method.representation.*`: the head whose vectors are contrasted."""

    hidden: int = Field(256, ge=1)
    """Channels of its two inner maps."""
    dim: int = Field(256, ge=1)
    """Channels of a vector."""


class U2PLConfig(Config):
    """`method.*` of `u2pl`."""

    name: Literal["u2pl"] = "u2pl"
    drop_percent: float = Field(80.0, gt=0.0, le=100.0, json_schema_extra=choices([60, 70, 80, 90], unit="percent"))
    """Pixels whose entropy is below this percentile are kept (so 80 keeps 80 %); it grows to 100 over the run."""
    alpha0: float = Field(20.0, ge=0.0, le=50.0, json_schema_extra=choices([10, 20, 30], unit="percent"))
    """Pixels below this percentile of the entropy are reliable, above 100 minus this unreliable to the contrastive
    loss; it shrinks to 0 over the run."""
    entropy_source: Literal["mixed", "clean"] = Field("mixed", json_schema_extra=choices(["mixed", "clean"]))
    """mixed: entropies of the teacher's pass in train mode over the mixed images (code). clean: of the pass that makes
    the labels, mixed like them."""
    entropy_scope: Literal["global", "local"] = "global"
    """Percentiles over all ranks, so that their number changes nothing, or (code) of each rank by itself."""
    warmup_periods: int = Field(1, ge=0, json_schema_extra=choices([0, 1, 3], unit="periods"))
    """Periods (`train.period`) of labeled images alone, before unlabeled ones take part; 0 on Cityscapes."""
    unsupervised_weight: float = Field(1.0, ge=0.0, json_schema_extra=search(0.5, 4.0, log=True))
    """Coefficient of the cross-entropy of kept pixels."""
    cutmix: float = Field(0.5, ge=0.0, le=1.0, json_schema_extra=choices([0.5, 1.0]))
    """Probability that a group's images are mixed with each other."""
    group: int | None = Field(None, ge=2, json_schema_extra={"unit": "images"})
    """Unlabeled images of a step that are mixed with each other, each with the next one; divides each rank's share.
    null: 4, or all where they are fewer."""
    contrast: ContrastConfig = ContrastConfig()
    queue: QueueConfig = QueueConfig()
    representation: RepresentationConfig = RepresentationConfig()
    criterion: Criterion = Criterion()
    """Loss of the labeled images; ohem on Cityscapes."""
    auxiliary_weight: float = Field(0.0, ge=0.0, json_schema_extra=choices([0.0, 0.4]))
    """Coefficient of the same loss on a second classifier, of the encoder's last map but one; 0.4 on Cityscapes."""
    average: Average = Average(kind="ema", decay=0.99, copied=1, buffers="own")
    """The teacher: an average of the student's weights, with BatchNorm statistics of its own; begins after
    `warmup_periods`."""

    @field_validator("average")
    @classmethod
    def _is_u2pls_teacher(cls, average: Average) -> Average:
        if (average.kind, average.buffers) != ("ema", "own"):
            raise ValueError(
                "must be of kind ema with buffers own, u2pl's teacher makes passes in train mode; got "
                f"{average.kind} with {average.buffers}. Remove them"
            )
        if average.start:
            raise ValueError(f"must have start 0, it follows method.warmup_periods; got {average.start}. Remove it")
        return average


@dataclass(frozen=True)
class _View:
    """What a network says of the labeled and the mixed images."""

    prediction: Prediction
    representation_BDhw: Tensor
    keep: Keep
    """The dropout of the pass."""


class U2PL(Method):
    """Using unreliable pseudo-labels."""

    strong_views = 0
    weighted = True
    trains_teacher_statistics = True

    def __init__(self, config: U2PLConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.config = config
        self.num_classes = num_classes
        self.average = config.average.model_copy(update={"start": config.warmup_periods})
        self.contrast = PixelContrast(config.contrast, config.queue, num_classes, config.representation.dim)

    def heads(self, channels: Channels) -> dict[str, nn.Module]:
        """The representation, and the auxiliary classifier where it has a weight."""
        size = self.config.representation
        representation = RepresentationHead(channels.joined, dim=size.dim, hidden=size.hidden)
        heads: dict[str, nn.Module] = {"representation": representation}
        return heads | auxiliary_head(channels, self.config.auxiliary_weight, self.num_classes)

    def percents(self, step: int, steps: int, period: int) -> tuple[float, float]:
        """(p, a) of a step, in percent: p grows from `drop_percent` to 100, a shrinks from `alpha0` to 0, by period."""
        left = max(0.0, 1.0 - (step // period) / max(1, steps // period))
        return 100.0 - (100.0 - self.config.drop_percent) * left, self.config.alpha0 * left

    def objectives(self, batch: SemiBatch, context: StepContext) -> dict[str, Objective]:
        """The labeled loss, the cross-entropy of kept pixels and the contrastive loss; first the labeled one alone."""
        config, teacher = self.config, context.teacher
        assert teacher is not None  # the config refuses another average
        if context.step < config.warmup_periods * context.period:
            return self._labeled_alone(batch, context)

        with torch.no_grad():
            weak = teacher(batch.weak_U3HW)
        confidence_UHW, pseudo_UHW = confidence_and_label(weak.logits_BKHW)
        clean_UHW = entropy(weak.logits_BKHW)
        reliable_UHW = self.weighting.reliable(pseudo_UHW, confidence_UHW, batch)
        mixed_U3HW, label_UHW, valid_UHW, entropy_UHW, reliable_UHW = self._mix(
            batch, context, batch.weak_U3HW, pseudo_UHW, batch.valid_UHW, clean_UHW, reliable_UHW
        )

        images_B3HW, num_labeled = torch.cat((batch.image_L3HW, mixed_U3HW)), len(batch.image_L3HW)
        student = _see(context.student, images_B3HW, batch, context, "student")
        with torch.no_grad(), in_train_mode(teacher):
            taught = _see(teacher, images_B3HW, batch, context, "teacher")
        if config.entropy_source == "mixed":
            entropy_UHW = entropy(taught.prediction.logits_BKHW[num_labeled:])

        p, a = self.percents(context.step, context.steps, context.period)
        over_ranks = context.across.sum if config.entropy_scope == "global" else None
        top = math.log(self.num_classes)
        limit, low, high = percentiles(entropy_UHW, valid_UHW, (p, a, 100.0 - a), top, over_ranks).unbind()
        shown = limit if config.entropy_source == "clean" else percentiles(clean_UHW, batch.valid_UHW, (p,), top)
        kept_UHW = (entropy_UHW < limit) & valid_UHW
        context.observe("pseudo", pseudo_UHW)
        context.observe("confidence", confidence_UHW)
        context.observe("trusted", (clean_UHW < shown) & batch.valid_UHW)
        context.observe("kept_ratio", kept_UHW.sum() / valid_UHW.sum().clamp(min=1))
        context.observe("entropy_limit", limit)

        labeled, unlabeled = student.prediction.split([num_labeled, len(mixed_U3HW)])
        self.weighting.remember(labeled, [UnlabeledPass(unlabeled, label_UHW, reliable_UHW)], batch, context)
        (weight_UHW,) = self._mix(batch, context, self.weighting.weigh(weak, pseudo_UHW, context))

        cells = Cells.of(batch.label_LHW, (label_UHW, valid_UHW, entropy_UHW), (low, high), taught.prediction)
        self.contrast.remember(taught.representation_BDhw, cells, batch, context)
        contrastive = self.contrast.loss(student.representation_BDhw, taught.representation_BDhw, cells, batch, context)
        return {
            **self._labeled_terms(student, batch, context),
            "consistency": self._consistency(unlabeled.logits_BKHW, label_UHW, kept_UHW, weight_UHW, context),
            "contrastive": unsupervised(contrastive, config.contrast.weight),
        }

    def _labeled_alone(self, batch: SemiBatch, context: StepContext) -> dict[str, Objective]:
        """Warm-up: the same terms and scalars, of which one alone teaches; every head has its (zero) gradient."""
        view = _see(context.student, batch.image_L3HW, batch, context, "student")
        zero = view.prediction.logits_BKHW.new_zeros((), dtype=torch.float32)
        context.observe("kept_ratio", zero)
        context.observe("entropy_limit", zero)
        return {
            **self._labeled_terms(view, batch, context),
            "consistency": unsupervised((zero, zero), self.config.unsupervised_weight),
            "contrastive": unsupervised((view.representation_BDhw.sum() * 0.0, zero), self.config.contrast.weight),
        }

    def _mix(self, batch: SemiBatch, context: StepContext, *tensors: Tensor) -> tuple[Tensor, ...]:
        """CutMix of images and all that belongs to their pixels with the next one of the group."""
        group = group_size(self.config.group, len(batch.slots_U) * context.across.world)
        height, width = batch.weak_U3HW.shape[-2:]
        mixed_U1 = context.uniform(batch.slots_U // group, "cutmix/group", 1) < self.config.cutmix
        boxes_U4 = half_boxes(context.uniform(batch.slots_U, "cutmix/box", 3), height, width) * mixed_U1
        return paste_all(boxes_U4, tensors, [next_in_group(tensor, group) for tensor in tensors])

    def _labeled_terms(self, view: _View, batch: SemiBatch, context: StepContext) -> dict[str, Objective]:
        config = self.config
        return labeled_terms(view.prediction, view.keep, config.criterion, config.auxiliary_weight, batch, context)

    def _consistency(
        self, logits_UKHW: Tensor, label_UHW: Tensor, kept_UHW: Tensor, weight_UHW: Tensor, context: StepContext
    ) -> Objective:
        """L_u = (all pixels / kept) * mean over the kept ones: the fewer are kept, the more each weighs."""
        total, normaliser = self.weighting.cross_entropy(logits_UKHW, label_UHW, kept_UHW, kept_UHW, weight_UHW)
        pixels = kept_UHW.numel() * context.across.world
        inverse_share = pixels / context.across.sum(kept_UHW.sum()).clamp(min=1)
        return unsupervised((total * inverse_share, normaliser), self.config.unsupervised_weight)


def _see(network: Segmentor, images_B3HW: Tensor, batch: SemiBatch, context: StepContext, name: str) -> _View:
    """A pass with dropout over the labeled images and, where there are more, the mixed ones."""
    slots = {"labeled": batch.slots_L}
    if len(images_B3HW) > len(batch.slots_L):
        slots["unlabeled"] = batch.slots_U
    keep = drawn_dropout(network, slots, name, _DROP, context)
    prediction = network.decode(network.encode(images_B3HW), images_B3HW.shape[-2:], keep)
    return _View(prediction, network.heads["representation"](prediction.joined_BDhw, keep), keep)
