"""AEL: classes of which the network is unsure are pasted, mixed in and taught more often.

A bank keeps the confidence k of each class, of labeled pixels. A weak class is likelier to be pasted from one labeled
image into another, and to choose what a CutMix box shows: an image with that class, in a box around it. Images with
given classes come from a cache of recent crops, since a stream cannot be asked for them. Of pixels that the student
gives to a sure class a part is left out; the others weigh by the teacher's confidence.

Observed, of the un-mixed weak views: "pseudo", "confidence", "trusted" (at least `threshold`), and the scalars
"kept_ratio", "bank_least" (the weakest class's confidence) and "object_boxes" (boxes around a component, a share).
Needs no setting of `data.views` for strong views or CutMix.

Source: Hu et al. 2021, "Semi-Supervised Semantic Segmentation via Adaptive Equalization Learning", arXiv:2110.05474,
and its code. Differs: one bank for all ranks, over present classes; every unlabeled image of a step is mixed, with a
crop of the cache; student and teacher make one pass each; padding and labeled pixels without label are not taught by
the teacher.
Axes: L labeled, U unlabeled, B any images, G groups of slots, K classes, S x S or H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from raysemi.base import Config, PresetConfig, choices, search
from raysemi.data.types import SemiBatch
from raysemi.errors import ConfigError
from raysemi.methods.auxiliary import auxiliary_head, labeled_terms
from raysemi.methods.base import Average, Method, StepContext, group_size, in_train_mode
from raysemi.methods.crop_cache import CropCache
from raysemi.methods.perturbation import drawn_dropout
from raysemi.methods.weighting import UnlabeledPass
from raysemi.models.segmentor import Channels, Prediction
from raysemi.ops import draws
from raysemi.ops.components import drawn_box
from raysemi.ops.equalize import class_pixels, keep_rates, moved_bank, true_class_sums
from raysemi.ops.losses import IGNORE, Criterion, Objective, pixel_cross_entropy, unsupervised
from raysemi.ops.mixing import log_half_boxes, next_in_group, paste_all
from raysemi.ops.pseudo_label import confidence_and_label

_DROP = 0.1  # of the channels in the auxiliary head, and in the decoder where it is the published one

PRESETS: dict[str, dict[str, Any]] = {
    "pascal": {},
    "cityscapes": {
        "threshold": 0.0,
        "paste": {"classes": 3, "exclude": (0, 1, 2, 8, 10)},
        "cutmix": {"object_area": 0.005, "presence_area": 0.01},
    },
}
"""Preset -> the defaults that it changes."""


class PasteConfig(Config):
    """`method.paste.*`: classes that are copied from one labeled image into another."""

    p: float = Field(0.5, ge=0.0, le=1.0, json_schema_extra=choices([0.0, 0.3, 0.5, 0.7]))
    """Probability that a labeled image comes with another one; 0: nothing is pasted."""
    classes: int = Field(1, ge=1, json_schema_extra=choices([1, 3, 5], unit="classes"))
    """Classes that are drawn, with replacement, for each image."""
    exclude: tuple[int, ...] = (0,)
    """Classes, by index, that are never pasted: background; on Cityscapes road, sidewalk, building, vegetation, sky."""


class CutMixConfig(Config):
    """`method.cutmix.*`: what is mixed into unlabeled images."""

    box: Literal["adaptive", "random"] = Field("adaptive", json_schema_extra=choices(["adaptive", "random"]))
    """adaptive: around a region of a drawn class, in an image that has that class. random: half of the area, in any."""
    object_area: float = Field(0.03, ge=0.0, lt=1.0, json_schema_extra=choices([0.003, 0.005, 0.01, 0.03]))
    """area1: a connected region larger than this share of the image may decide the box."""
    presence_area: float = Field(0.03, ge=0.0, lt=1.0, json_schema_extra=choices([0.005, 0.01, 0.03]))
    """area2: an image has a class when the teacher gives it at least this share of the pixels."""
    per_class: int = Field(8, ge=0, json_schema_extra={"unit": "crops"})
    """Recent crops that are kept for each class, 4 bytes a pixel; 0: what is mixed in is another image of the step."""


class CompatConfig(Config):
    """`method.compat.*`: what the released code does otherwise."""

    absent_zero: bool = False
    """The bank takes a class that no label of the step has for one of confidence 0."""


class AELConfig(PresetConfig):
    """`method.*` of `ael`."""

    presets = PRESETS
    name: Literal["ael"] = "ael"
    preset: Literal["pascal", "cityscapes"] = "pascal"
    """Set of defaults, the published ones of a data set; a key that is given wins."""
    threshold: float = Field(0.7, ge=0.0, lt=1.0, json_schema_extra=choices([0.0, 0.5, 0.7, 0.9]))
    """tau: least teacher probability at which a pixel is taught; 0 on Cityscapes."""
    confidence_power: float = Field(2.0, ge=0.0, json_schema_extra=choices([0, 1, 2, 4]))
    """g: a pixel weighs (teacher's probability) ** g; 0: all alike."""
    sampling_power: float = Field(1.0, ge=0.0, json_schema_extra=choices([0, 0.5, 1, 2]))
    """g2: a pixel is kept with probability ((1 - k) / max (1 - k)) ** g2, k of the class that the student gives it; 0:
    all are."""
    unsupervised_weight: float = Field(1.0, ge=0.0, json_schema_extra=search(0.5, 2.0, log=True))
    """lambda: coefficient of both consistency terms."""
    normaliser: Literal["all", "valid"] = Field("all", json_schema_extra=choices(["all", "valid"]))
    """What a consistency is divided by: the weights of all pixels (code), or of those at `threshold` and above."""
    momentum: float = Field(0.999, ge=0.0, lt=1.0, json_schema_extra=choices([0.99, 0.999, 0.9999]))
    """Share of its value that the bank keeps in a step."""
    group: int | None = Field(None, ge=2, json_schema_extra={"unit": "images"})
    """Unlabeled images of neighbouring slots, which leave one crop a step in the cache; divides each rank's share.
    null: 4, or all where they are fewer."""
    paste: PasteConfig = PasteConfig()
    cutmix: CutMixConfig = CutMixConfig()
    criterion: Criterion = Criterion(name="ohem")
    """Loss of the labeled images."""
    auxiliary_weight: float = Field(0.4, ge=0.0, json_schema_extra=choices([0.0, 0.4]))
    """Coefficient of the same loss on a second classifier, of the encoder's last map but one."""
    average: Average = Average(kind="ema", decay=0.99, buffers="own")
    """The teacher: an average of the student's weights, with BatchNorm statistics of its own."""
    compat: CompatConfig = CompatConfig()

    @field_validator("average")
    @classmethod
    def _is_aels_teacher(cls, average: Average) -> Average:
        if (average.kind, average.buffers) != ("ema", "own"):
            raise ValueError(
                "must be of kind ema with buffers own, ael's teacher makes its passes in train mode; got "
                f"{average.kind} with {average.buffers}. Remove them"
            )
        return average


@dataclass(frozen=True)
class _Lesson:
    """What the teacher says of some images, or of their mix."""

    pseudo_BHW: Tensor
    """`IGNORE` where nothing is known: padding, and labeled pixels without label."""
    confidence_BHW: Tensor

    @property
    def valid_BHW(self) -> Tensor:
        """Pixels of which something is known."""
        return self.pseudo_BHW != IGNORE


@dataclass(frozen=True)
class _Source:
    """What is mixed into the unlabeled images."""

    class_U: Tensor
    """The class that was drawn for each."""
    row_U: Tensor | None
    """Of the cache; None without one."""
    image_U3HW: Tensor
    valid_UHW: Tensor


class AEL(Method):
    """Adaptive equalization learning."""

    bank_K: Tensor
    cache: CropCache | None
    _pasted_K: Tensor
    strong_views = 0
    weighted = True
    trains_teacher_statistics = True

    def __init__(self, config: AELConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        wrong = [index for index in config.paste.exclude if not 0 <= index < num_classes]
        if wrong or set(range(num_classes)) <= set(config.paste.exclude):
            raise ConfigError(
                f"method.paste.exclude must name some, not all, of the classes 0 to {num_classes - 1}; got "
                f"{list(config.paste.exclude)}. Set method.paste.exclude=[0], or [] where there is no background."
            )
        self.config = config
        self.num_classes = num_classes
        self.average = config.average
        self.given = config.paste.p
        self.register_buffer("bank_K", torch.full((num_classes,), 0.5))
        self.register_buffer("_pasted_K", torch.ones(num_classes), persistent=False)
        self._pasted_K[list(config.paste.exclude)] = 0.0
        self.register_module("cache", None)

    def heads(self, channels: Channels) -> dict[str, nn.Module]:
        """The auxiliary classifier where it has a weight."""
        return auxiliary_head(channels, self.config.auxiliary_weight, self.num_classes)

    def reserve(self, crop: int) -> None:
        """The cache of crops."""
        if self.config.cutmix.per_class > 0:
            self.cache = CropCache(self.num_classes, self.config.cutmix.per_class, crop)

    def objectives(self, batch: SemiBatch, context: StepContext) -> dict[str, Objective]:
        """The labeled loss, and the consistency on labeled and on mixed images."""
        config, teacher = self.config, context.teacher
        assert teacher is not None  # the config refuses another average
        batch = self._pasted(batch, context)
        source = self._source(batch, context)
        sizes = [len(batch.slots_L), len(batch.slots_U), len(batch.slots_U)]
        slots = {"labeled": batch.slots_L, "unlabeled": batch.slots_U, "source": batch.slots_U}
        images_B3HW = torch.cat((batch.image_L3HW, batch.weak_U3HW, source.image_U3HW))
        with torch.no_grad(), in_train_mode(teacher):
            keep = drawn_dropout(teacher, slots, "teacher", _DROP, context)
            taught = teacher.decode(teacher.encode(images_B3HW), images_B3HW.shape[-2:], keep)
        known_BHW = torch.cat((batch.label_LHW != IGNORE, batch.valid_UHW, source.valid_UHW))
        confidence_BHW, argmax_BHW = confidence_and_label(taught.logits_BKHW)
        pseudo_BHW = torch.where(known_BHW, argmax_BHW, IGNORE)
        labeled, own, other = (
            _Lesson(*pair) for pair in zip(pseudo_BHW.split(sizes), confidence_BHW.split(sizes), strict=True)
        )
        trusted_UHW = (own.confidence_BHW >= config.threshold) & own.valid_BHW
        context.observe_labels(argmax_BHW.split(sizes)[1], own.confidence_BHW, trusted_UHW, batch.valid_UHW)

        boxes_U4 = self._boxes(source.class_U, other, batch, context)
        factor_UHW, other_factor_UHW = self._factors(taught.split(sizes)[1:], own, other, context)
        reliable_UHW, other_reliable_UHW = self._reliable(own, other, batch)
        mixed_U3HW, pseudo_UHW, confidence_UHW, factor_UHW, reliable_UHW = paste_all(
            boxes_U4,
            (batch.weak_U3HW, own.pseudo_BHW, own.confidence_BHW, factor_UHW, reliable_UHW),
            (source.image_U3HW, other.pseudo_BHW, other.confidence_BHW, other_factor_UHW, other_reliable_UHW),
        )
        mixed = _Lesson(pseudo_UHW, confidence_UHW)

        images_B3HW = torch.cat((batch.image_L3HW, mixed_U3HW))  # one pass: all share BatchNorm's statistics
        slots = {"labeled": batch.slots_L, "unlabeled": batch.slots_U}
        keep = drawn_dropout(context.student, slots, "student", _DROP, context)
        student = context.student.decode(context.student.encode(images_B3HW), images_B3HW.shape[-2:], keep)
        seen, strong = student.split(sizes[:2])
        self.weighting.remember(seen, [UnlabeledPass(strong, pseudo_UHW, reliable_UHW)], batch, context)

        on_labeled = self._consistency(seen, labeled, None, batch.slots_L, "labeled", context)
        on_mixed = self._consistency(strong, mixed, factor_UHW, batch.slots_U, "mixed", context)
        self._remember(seen, own, other, source, batch, context)
        return {
            **labeled_terms(student, keep, config.criterion, config.auxiliary_weight, batch, context),
            "consistency_labeled": unsupervised(on_labeled, config.unsupervised_weight),
            "consistency": unsupervised(on_mixed, config.unsupervised_weight),
        }

    def _pasted(self, batch: SemiBatch, context: StepContext) -> SemiBatch:
        """Adaptive copy-paste: labeled images with pixels of drawn classes of those that they come with."""
        if batch.given_L3HW is None or batch.given_label_LHW is None:
            return batch
        chance_K = (1.0 - self.bank_K).sqrt().softmax(dim=0) * self._pasted_K
        drawn_Ln = draws.choice(context.uniform(batch.slots_L, "paste", self.config.paste.classes), chance_K)
        pasted_LHW = (batch.given_label_LHW[:, None] == drawn_Ln[:, :, None, None]).any(dim=1)
        return replace(
            batch,
            image_L3HW=torch.where(pasted_LHW[:, None], batch.given_L3HW, batch.image_L3HW),
            label_LHW=torch.where(pasted_LHW, batch.given_label_LHW, batch.label_LHW),
        )

    def _source(self, batch: SemiBatch, context: StepContext) -> _Source:
        """For each unlabeled image a class, weak ones likelier, and a crop that shows it; at first its neighbour."""
        uniform_U2 = context.uniform(batch.slots_U, "cutmix/source", 2)
        class_U = draws.choice(uniform_U2[:, 0], (1.0 - self.bank_K).softmax(dim=0))
        group = group_size(self.config.group, len(batch.slots_U) * context.across.world)
        image_U3HW, valid_UHW = (next_in_group(own, group) for own in (batch.weak_U3HW, batch.valid_UHW))
        if self.cache is None:
            return _Source(class_U, None, image_U3HW, valid_UHW)
        row_U = self.cache.draw(class_U if self.config.cutmix.box == "adaptive" else None, uniform_U2[:, 1])
        crop_U3HW, crop_valid_UHW, there_U = self.cache.read(row_U)
        there_U11 = there_U[:, None, None]
        crop_U3HW = torch.empty_like(image_U3HW).copy_(crop_U3HW)  # in the layout of the images
        image_U3HW = torch.where(there_U11[:, None], crop_U3HW, image_U3HW)
        return _Source(class_U, row_U, image_U3HW, torch.where(there_U11, crop_valid_UHW, valid_UHW))

    def _boxes(self, class_U: Tensor, other: _Lesson, batch: SemiBatch, context: StepContext) -> Tensor:
        """Around a region of the drawn class in what is mixed in; half of the area where there is none."""
        config = self.config.cutmix
        height, width = batch.valid_UHW.shape[1:]
        boxes_U4 = log_half_boxes(context.uniform(batch.slots_U, "cutmix/box", 3), height, width)
        found_U = torch.zeros_like(class_U, dtype=torch.bool)
        if config.box == "adaptive":
            shown_UHW = other.pseudo_BHW == class_U[:, None, None]
            region_U = context.uniform(batch.slots_U, "cutmix/region", 1)[:, 0]
            around_U4, found_U = drawn_box(shown_UHW, config.object_area * height * width, region_U)
            boxes_U4 = torch.where(found_U[:, None], around_U4, boxes_U4)
        context.observe("object_boxes", found_U.float().mean())
        return boxes_U4

    def _factors(
        self, taught: list[Prediction], own: _Lesson, other: _Lesson, context: StepContext
    ) -> tuple[Tensor, Tensor]:
        """Of the run's weighting, for the unlabeled images and for what is mixed into them."""
        unheard = replace(context, listener=None)  # what is shown belongs to the images of the step
        own_UHW = self.weighting.weigh(taught[0], own.pseudo_BHW.clamp(max=self.num_classes - 1), context)
        return own_UHW, self.weighting.weigh(taught[1], other.pseudo_BHW.clamp(max=self.num_classes - 1), unheard)

    def _reliable(self, own: _Lesson, other: _Lesson, batch: SemiBatch) -> tuple[Tensor, Tensor]:
        """Pixels that the run's weighting may remember, of the unlabeled images and of what is mixed into them.

        A detector's boxes come with the images of the step: of those of the cache none is known, so none confirms.
        """
        found_UN5 = None if batch.found_UN5 is None else torch.full_like(batch.found_UN5, -1.0)
        elsewhere = replace(batch, valid_UHW=other.valid_BHW, found_UN5=found_UN5)
        own_UHW = self.weighting.reliable(own.pseudo_BHW, own.confidence_BHW, batch)
        return own_UHW, self.weighting.reliable(other.pseudo_BHW, other.confidence_BHW, elsewhere)

    def _consistency(
        self,
        seen: Prediction,
        taught: _Lesson,
        factor_BHW: Tensor | None,
        slots_B: Tensor,
        name: str,
        context: StepContext,
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of a part of the pixels, sure classes' less often, weighed by the teacher's confidence.

        L_c = sum_i w_i CE_i / sum_i w_i with w_i = c_i ** g * s_i, s_i ~ Bernoulli(r of the student's class). Pixels
        below the threshold have no CE and, unless `normaliser: valid`, stay in the denominator.
        """
        config, logits_BKHW = self.config, seen.logits_BKHW
        images, height, width = taught.pseudo_BHW.shape
        trusted_BHW = (taught.confidence_BHW >= config.threshold) & taught.valid_BHW
        counted_BHW = taught.valid_BHW if config.normaliser == "all" else trusted_BHW
        rate_BHW = keep_rates(self.bank_K, config.sampling_power)[logits_BKHW.detach().argmax(dim=1)]
        uniform_BHW = context.uniform(slots_B, f"sampling/{name}", height * width).view(images, height, width)
        weight_BHW = taught.confidence_BHW**config.confidence_power * ((uniform_BHW < rate_BHW) & counted_BHW)
        label_BHW = torch.where(trusted_BHW, taught.pseudo_BHW, IGNORE)
        if factor_BHW is None:
            total, _ = pixel_cross_entropy(logits_BKHW, label_BHW, weight_BHW=weight_BHW)
            return total, weight_BHW.sum()
        total, _ = pixel_cross_entropy(logits_BKHW, label_BHW, weight_BHW=weight_BHW * factor_BHW)
        return total, self.weighting.normaliser(weight_BHW, factor_BHW, weight_BHW.sum())

    @torch.no_grad()
    def _remember(
        self, seen: Prediction, own: _Lesson, other: _Lesson, source: _Source, batch: SemiBatch, context: StepContext
    ) -> None:
        """Bank, and crops with the classes in them, of all ranks."""
        config, across = self.config, context.across
        if self.cache is not None and source.row_U is not None:
            own_UK, other_UK = (self._presence(lesson.pseudo_BHW) for lesson in (own, other))
            self.cache.renew(source.row_U, other_UK, across)
            members = group_size(config.group, len(batch.slots_U) * across.world)
            turn = slice(context.step % members, None, members)  # of each group one
            self.cache.insert(batch.weak_U3HW[turn], batch.valid_UHW[turn], own_UK[turn], self.bank_K, across)
        sums_2K = across.sum(true_class_sums(seen.logits_BKHW[: len(batch.slots_L)], batch.label_LHW))
        self.bank_K.copy_(moved_bank(self.bank_K, sums_2K, config.momentum, config.compat.absent_zero))
        context.observe("bank_least", self.bank_K.min())

    def _presence(self, pseudo_BHW: Tensor) -> Tensor:
        least = self.config.cutmix.presence_area * pseudo_BHW[0].numel()
        return class_pixels(pseudo_BHW, self.num_classes) >= max(least, 1.0)
