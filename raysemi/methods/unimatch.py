"""UniMatch: two strong views of an image, and its weak view with channels dropped, all learn the weak view's labels.

Source: Yang et al. 2023, arXiv:2208.09910, eqs. 2-6, and its code. Differs: partners of CutMix are neighbouring slots
of the batch, whose labels are at hand, so nothing is computed twice; the perturbed half of the labeled images, which
the code computes and throws away, is not made; `cutmix` and `compat` restore both.
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
from raysemi.methods.base import Average, Method, StepContext, counted_pixels, in_eval_mode
from raysemi.methods.perturbation import with_perturbed
from raysemi.methods.weighting import UnlabeledPass
from raysemi.models.segmentor import Prediction
from raysemi.ops.losses import Criterion, Objective, labeled_loss, supervised, unsupervised
from raysemi.ops.mixing import partner, paste
from raysemi.ops.pseudo_label import confidence_and_label

_Taught = tuple[Tensor, Tensor, Tensor, Tensor]
"""Pseudo-labels, trusted, valid and reliable pixels."""
_HALF = 0.5  # the published total is the half-sum of the labeled loss and the unlabeled terms


class FeaturePerturbationConfig(Config):
    """`method.fp.*`: the weak view with dropped channels."""

    weight: float = Field(0.5, ge=0.0, json_schema_extra=search(0.25, 0.75))
    """Coefficient of its term; 0 spares its decoder pass."""
    drop: float = Field(0.5, ge=0.0, lt=1.0, json_schema_extra=search(0.3, 0.7))
    """Probability that a channel of an encoder map is dropped."""


class CutMixConfig(Config):
    """`method.cutmix.*`."""

    partner: Literal["pair", "second_view"] = "pair"
    """Whose pixels fill the box. pair: of the neighbouring slot, nothing is computed twice. second_view (the released
    code's): of another view of the same image, labeled by the student in eval mode; one for both strong views."""


class CompatConfig(Config):
    """`method.compat.*`: what the released code does and we do not."""

    partner_eval: bool = False
    """True: what a pair pastes is labeled by the student in eval mode, by a forward pass more."""
    fp_labeled: bool = False
    """True: labeled images are perturbed and decoded too; their logits are thrown away, but BatchNorm sees them."""


class UniMatchConfig(Config):
    """`method.*` of `unimatch`."""

    name: Literal["unimatch"] = "unimatch"
    threshold: float = Field(0.95, ge=0.0, lt=1.0, json_schema_extra=choices([0.0, 0.7, 0.9, 0.95, 0.98]))
    """Least probability at which a pixel of the weak view is trusted; 0 trusts all (the paper's on Cityscapes)."""
    strong_weight: float = Field(0.25, ge=0.0, json_schema_extra=search(0.1, 0.5))
    """Coefficient of each strong view's term."""
    fp: FeaturePerturbationConfig = FeaturePerturbationConfig()
    cutmix: CutMixConfig = CutMixConfig()
    criterion: Criterion = Criterion()
    """Loss of the labeled images."""
    average: Average = Average()
    """Averaged copy that is evaluated; none by default, as in the paper."""
    compat: CompatConfig = CompatConfig()


class UniMatch(Method):
    """Two strong streams and one perturbed stream, taught by the student's own weak pass."""

    strong_views = 2
    weighted = True

    def __init__(self, config: UniMatchConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.config = config
        self.average = config.average
        self.second_view = config.cutmix.partner == "second_view"

    def normalisers(self, batch: SemiBatch, context: StepContext) -> dict[str, Tensor] | None:
        """Annotated pixels, valid ones after the CutMix of each view, and valid ones."""
        theirs_UHW = partner(batch.valid_UHW) if batch.second_valid_UHW is None else batch.second_valid_UHW
        valid = {
            f"strong_{number + 1}": paste(boxes_U4, batch.valid_UHW, source=[theirs_UHW])
            for number, boxes_U4 in enumerate(batch.boxes_VU4)
        }
        if self.config.fp.weight > 0.0:
            valid["perturbed"] = batch.valid_UHW
        return counted_pixels(self, self.config.criterion, batch, context, valid)

    def objectives(self, batch: SemiBatch, context: StepContext) -> dict[str, Objective]:
        """The labeled loss and three consistency terms."""
        config = self.config
        labeled, weak, perturbed = self._weak_pass(batch, context)
        confidence_UHW, pseudo_UHW = confidence_and_label(weak.logits_BKHW)
        trusted_UHW = (confidence_UHW >= config.threshold) & batch.valid_UHW
        context.observe_labels(pseudo_UHW, confidence_UHW, trusted_UHW, batch.valid_UHW)

        own = self._taught(pseudo_UHW, confidence_UHW, batch.valid_UHW, batch)
        sources = self._sources(batch, context, own)
        mixed = [
            paste(boxes_U4, strong_U3HW, *own, source=source)
            for boxes_U4, strong_U3HW, source in zip(batch.boxes_VU4, batch.strong_VU3HW, sources, strict=True)
        ]
        # both strong views in one pass of their own, with BatchNorm statistics of their own
        strong = context.student(torch.cat([views[0] for views in mixed])).split([len(pseudo_UHW)] * len(mixed))
        seen = [UnlabeledPass(view, views[1], views[4]) for view, views in zip(strong, mixed, strict=True)]
        self.weighting.remember(labeled, seen, batch, context)
        weight_UHW = self.weighting.weigh(weak, pseudo_UHW, context)

        loss = labeled_loss(config.criterion, labeled.logits_BKHW, batch.label_LHW, context.across)
        terms = {"supervised": supervised(loss, _HALF)}
        for number, (view, (_, label_UHW, kept_UHW, valid_UHW, _)) in enumerate(zip(strong, mixed, strict=True)):
            mixed_UHW = paste(batch.boxes_VU4[number], weight_UHW)
            loss = self.weighting.cross_entropy(view.logits_BKHW, label_UHW, valid_UHW, kept_UHW, mixed_UHW)
            terms[f"strong_{number + 1}"] = unsupervised(loss, _HALF * config.strong_weight)
        if perturbed is not None:
            targets = pseudo_UHW, batch.valid_UHW, trusted_UHW, weight_UHW
            loss = self.weighting.cross_entropy(perturbed.logits_BKHW, *targets)
            terms["perturbed"] = unsupervised(loss, _HALF * config.fp.weight)
        return terms

    def _weak_pass(self, batch: SemiBatch, context: StepContext) -> tuple[Prediction, Prediction, Prediction | None]:
        """Of labeled and of weak images, in one pass, and of the latter with dropped channels."""
        student, config = context.student, self.config
        images_B3HW = torch.cat((batch.image_L3HW, batch.weak_U3HW))
        num_labeled, num_clean = len(batch.image_L3HW), len(images_B3HW)
        features = student.encode(images_B3HW)
        if config.fp.weight > 0.0:
            rows, slots_B = slice(num_labeled, None), batch.slots_U
            if config.compat.fp_labeled:
                rows, slots_B = slice(None), torch.cat((~batch.slots_L, batch.slots_U))  # ~: no slot of the other kind
            features = with_perturbed(features, rows, slots_B, config.fp.drop, context)
        seen = student.decode(features, images_B3HW.shape[-2:])
        labeled, weak = seen.split([num_labeled, num_clean - num_labeled])
        return labeled, weak, seen.images(slice(-len(batch.weak_U3HW), None)) if config.fp.weight > 0.0 else None

    def _taught(self, pseudo_UHW: Tensor, confidence_UHW: Tensor, valid_UHW: Tensor, batch: SemiBatch) -> _Taught:
        trusted_UHW = (confidence_UHW >= self.config.threshold) & valid_UHW
        return pseudo_UHW, trusted_UHW, valid_UHW, self.weighting.reliable(pseudo_UHW, confidence_UHW, batch)

    def _sources(self, batch: SemiBatch, context: StepContext, own: _Taught) -> list[tuple[Tensor, ...]]:
        """What fills the box of each strong view: image, and what its pixels are taught."""
        if self.second_view:
            weak_U3HW, strong_U3HW, valid_UHW = batch.second_weak_U3HW, batch.second_strong_U3HW, batch.second_valid_UHW
            assert weak_U3HW is not None  # the method asked for a second view
            assert strong_U3HW is not None
            assert valid_UHW is not None
            return [
                (strong_U3HW, *self._labeled_in_eval_mode(weak_U3HW, valid_UHW, batch, context))
            ] * self.strong_views
        if self.config.compat.partner_eval:
            own = self._labeled_in_eval_mode(batch.weak_U3HW, batch.valid_UHW, batch, context)
        theirs = [partner(pixels_UHW) for pixels_UHW in own]
        return [(partner(strong_U3HW), *theirs) for strong_U3HW in batch.strong_VU3HW]

    def _labeled_in_eval_mode(
        self, weak_U3HW: Tensor, valid_UHW: Tensor, batch: SemiBatch, context: StepContext
    ) -> _Taught:
        confidence_UHW, pseudo_UHW = confidence_and_label(in_eval_mode(context.student, weak_U3HW))
        return self._taught(pseudo_UHW, confidence_UHW, valid_UHW, batch)
