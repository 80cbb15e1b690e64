"""Label propagation along similarity maps: the parts of a step that CorrMatch and DerProp have in common.

Source: Sun et al. 2024, CorrMatch, CVPR 2024. Differs: partners are neighbouring slots of the batch, segments and
logits are never made for a map that nobody uses, rows are drawn from (seed, step) and so the same on all ranks.
Axes: L labeled, U unlabeled, B any images, K classes, H x W pixels, h x w cells of the encoder's last map, N = h * w,
C channels of a map's factor, S segments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from raysemi.data.types import SemiBatch
from raysemi.methods.base import StepContext, in_eval_mode
from raysemi.methods.passes import View
from raysemi.methods.propagation_config import CutMixConfig, KlTarget, RegionConfig, SpreadingConfig, ThresholdConfig
from raysemi.methods.weighting import UnlabeledPass, Weighting
from raysemi.models.decoders import resize
from raysemi.ops.cells import Size
from raysemi.ops.losses import Criterion, Objective, labeled_loss, supervised
from raysemi.ops.mixing import inside, paste
from raysemi.ops.pseudo_label import confidence_and_label, peaks_by_class, update_threshold
from raysemi.ops.regions import propagate_regions
from raysemi.ops.similarity import at_least_fp32, collect, map_rows, propagate, segments

Pair = tuple[Tensor, Tensor]
"""A sum, and what it is divided by over all ranks."""


@dataclass(frozen=True)
class Targets:
    """What unlabeled images are taught; no gradient."""

    distribution_UKHW: Tensor
    """Probabilities."""
    confidence_UHW: Tensor
    label_UHW: Tensor
    """int64."""
    valid_UHW: Tensor
    """bool, False where padded."""

    @staticmethod
    def of(logits_UKHW: Tensor, valid_UHW: Tensor) -> Targets:
        """From logits."""
        logits_UKHW = at_least_fp32(logits_UKHW.detach())
        return Targets(logits_UKHW.softmax(dim=1), *confidence_and_label(logits_UKHW), valid_UHW)

    def trusted(self, threshold: Tensor) -> Tensor:
        """Valid pixels at least as confident as the threshold."""
        return (self.confidence_UHW >= threshold) & self.valid_UHW


def mix(config: CutMixConfig, batch: SemiBatch, targets: Targets, context: StepContext) -> tuple[Tensor, Targets]:
    """CutMix of the first strong view and of everything it is taught: (strong_U3HW, targets)."""
    own = _pixels(batch.strong_VU3HW[0], targets)
    mixed = paste(batch.boxes_VU4[0], *own, source=_source(config, batch, context))
    return mixed[0], Targets(*mixed[1:])


def _pixels(strong_U3HW: Tensor, targets: Targets) -> tuple[Tensor, ...]:
    fields = targets.distribution_UKHW, targets.confidence_UHW, targets.label_UHW, targets.valid_UHW
    return strong_U3HW, *fields


def _source(config: CutMixConfig, batch: SemiBatch, context: StepContext) -> tuple[Tensor, ...] | None:
    if config.pairs:
        return None
    weak, strong, valid = batch.second_weak_U3HW, batch.second_strong_U3HW, batch.second_valid_UHW
    assert weak is not None  # the method asked for a second view
    assert strong is not None
    assert valid is not None
    with torch.no_grad():
        if config.partner == "momentum_view":
            assert context.teacher is not None  # the config refuses it without a momentum network
            return _pixels(strong, Targets.of(context.teacher(weak).logits_BKHW, valid))
        return _pixels(strong, Targets.of(in_eval_mode(context.student, weak), valid))


@dataclass(frozen=True)
class Taught:
    """What a step teaches its unlabeled images."""

    base: Targets
    """Of the weak views, un-mixed."""
    base_trusted_UHW: Tensor
    final: Targets
    """Mixed, with the labels after region propagation."""
    trusted_UHW: Tensor
    """Trusted pixels of the mixed views before region propagation."""
    expanded_UHW: Tensor
    """The same after it."""


def teach(
    config: SpreadingConfig,
    logits_UKHW: Tensor,
    threshold: Tensor,
    factors: tuple[Tensor, Tensor],
    cells: Size,
    batch: SemiBatch,
    context: StepContext,
    training: bool,
) -> tuple[Tensor, Taught]:
    """The mixed strong views and what they are taught: CutMix, then the threshold, then regions.

    Args:
        config: the three parts.
        logits_UKHW: that label the weak views.
        threshold: scalar buffer; moved in place while training, and used as moved.
        factors: of the weak views' map, for regions.
        cells: of that map.
        batch: views, boxes, padding.
        context: the step.
        training: False leaves the threshold as it is.
    """
    base = Targets.of(logits_UKHW, batch.valid_UHW)
    strong_U3HW, mixed = mix(config.cutmix, batch, base, context)
    if training and config.threshold.mode == "dynamic":
        counted_UHW = (base if config.threshold.ignore == "base" else mixed).valid_UHW
        threshold.copy_(next_threshold(config.threshold, threshold, base, counted_UHW, context))
    trusted_UHW = mixed.trusted(threshold)
    detached = factors[0].detach(), factors[1].detach()
    final, expanded_UHW = rectify(config.region, mixed, trusted_UHW, threshold, detached, cells, batch, context)
    return strong_U3HW, Taught(base, base.trusted(threshold), final, trusted_UHW, expanded_UHW)


def observe_taught(
    taught: Taught, pseudo_UHW: Tensor, threshold: Tensor, batch: SemiBatch, context: StepContext
) -> None:
    """Hands out the maps of the un-mixed images: inside a CutMix box, where the partner is taught, without regions."""
    final, trusted_UHW = taught.final, taught.base_trusted_UHW
    box_UHW = inside(batch.boxes_VU4[0], trusted_UHW.shape[1], trusted_UHW.shape[2])
    context.observe("pseudo", pseudo_UHW)
    context.observe("propagated", torch.where(box_UHW, taught.base.label_UHW, final.label_UHW))
    context.observe("confidence", taught.base.confidence_UHW)
    context.observe("trusted_before", trusted_UHW)
    context.observe("trusted", torch.where(box_UHW, trusted_UHW, taught.expanded_UHW))
    context.observe("threshold", threshold)
    context.observe("kept_ratio", taught.expanded_UHW.sum() / final.valid_UHW.sum().clamp(min=1))


def soft_targets(taught: Taught, kl_target: KlTarget, boxes_U4: Tensor) -> tuple[Tensor, Tensor]:
    """Distribution of the soft terms, and the pixels where it may be taught: (distribution_UKHW, allowed_UHW)."""
    allowed_UHW = taught.final.valid_UHW
    if kl_target == "drop_box":
        allowed_UHW = allowed_UHW & ~inside(boxes_U4, allowed_UHW.shape[1], allowed_UHW.shape[2])
    return (taught.final if kl_target == "pasted" else taught.base).distribution_UKHW, allowed_UHW


@dataclass(frozen=True)
class Lesson:
    """Labels of some views' pixels, which of them are taught, and what each weighs."""

    targets: Targets
    kept_UHW: Tensor
    """bool."""
    weight_UHW: Tensor
    weighting: Weighting

    def loss(self, logits_UKHW: Tensor) -> Pair:
        """Cross-entropy to the labels on kept pixels, over the number of all valid ones."""
        targets = self.targets
        return self.weighting.cross_entropy(
            logits_UKHW, targets.label_UHW, targets.valid_UHW, self.kept_UHW, self.weight_UHW
        )

    def over_valid(self, total: Tensor) -> Pair:
        """Another sum over such pixels, over the number of all valid ones."""
        valid = self.targets.valid_UHW.sum(dtype=torch.int64).to(total.dtype)
        return total, self.weighting.normaliser(self.targets.valid_UHW, self.weight_UHW, valid)


def lessons(
    weighting: Weighting,
    config: SpreadingConfig,
    views: tuple[View, View, View],
    taught: Taught,
    batch: SemiBatch,
    context: StepContext,
) -> tuple[Lesson, Lesson]:
    """What weak and what strong views are taught, weighed; takes this step's vectors into the memory before.

    Args:
        weighting: of the run.
        config: whether there are regions, whose label may be another one than the weak view's.
        views: labeled and strong ones as the student sees them, between them the weak ones as the labeler does.
        taught: labels.
        batch: the boxes.
        context: the step.
    """
    labeled, weak, strong = views
    boxes_U4, base, final = batch.boxes_VU4[0], taught.base, taught.final
    if not config.cutmix.pairs:  # nothing is weighted then: the config refuses it
        ones_UHW = weighting.weigh(weak.seen, base.label_UHW, context)
        return (
            Lesson(base, taught.base_trusted_UHW, ones_UHW, weighting),
            Lesson(final, taught.expanded_UHW, ones_UHW, weighting),
        )
    reliable_UHW = weighting.reliable(base.label_UHW, base.confidence_UHW, batch)
    reliable_UHW, label_UHW = paste(boxes_U4, reliable_UHW, base.label_UHW)
    reliable_UHW = reliable_UHW & (label_UHW == final.label_UHW)  # a region may say another class than the pixel
    weighting.remember(labeled.seen, [UnlabeledPass(strong.seen, final.label_UHW, reliable_UHW)], batch, context)
    base_UHW = weighting.weigh(weak.seen, base.label_UHW, context)
    final_UHW = paste(boxes_U4, base_UHW)
    if config.region.enable:  # regions lie outside of the boxes, where the pixels are the image's own
        box_UHW = inside(boxes_U4, final_UHW.shape[1], final_UHW.shape[2])
        silent = replace(context, listener=None)
        final_UHW = torch.where(box_UHW, final_UHW, weighting.weigh(weak.seen, final.label_UHW, silent))
    return (
        Lesson(base, taught.base_trusted_UHW, base_UHW, weighting),
        Lesson(final, taught.expanded_UHW, final_UHW, weighting),
    )


def next_threshold(
    config: ThresholdConfig,
    threshold: Tensor,
    targets: Targets,
    valid_UHW: Tensor,
    context: StepContext,
) -> Tensor:
    """The threshold after this step's predictions, the same on all ranks; a step with non-finite ones changes nothing.

    Args:
        config: momentum.
        threshold: scalar.
        targets: un-mixed predictions.
        valid_UHW: bool, pixels that count.
        context: the maximum over ranks.
    """
    num_classes = targets.distribution_UKHW.shape[1]
    peaks_K = context.across.max(
        peaks_by_class(targets.confidence_UHW, targets.label_UHW, valid_UHW, num_classes).float()
    )
    moved = update_threshold(threshold, peaks_K, config.momentum)
    return torch.where(moved.isfinite(), moved, threshold)


def propagated(
    logits_BKHW: Tensor, left_BCN: Tensor, right_BCN: Tensor, cells: Size, norm: Literal["source", "target"] = "source"
) -> Tensor:
    """Logits spread along the map, zc = up(sg(down(z)) M): [B, K, H, W], gradient into the factors alone.

    `norm` names the cells whose share adds up to 1: a source's, handed out, or a target's, received.
    """
    small_BKhw = resize(logits_BKHW.detach(), cells)
    spread_BKN = (propagate if norm == "source" else collect)(small_BKhw.flatten(2), left_BCN, right_BCN)
    return resize(spread_BKN.unflatten(2, cells), logits_BKHW.shape[-2:])


def rectify(
    config: RegionConfig,
    mixed: Targets,
    trusted_UHW: Tensor,
    threshold: Tensor,
    factors: tuple[Tensor, Tensor],
    cells: Size,
    batch: SemiBatch,
    context: StepContext,
) -> tuple[Targets, Tensor]:
    """Region propagation on the mixed labels: (targets with new labels, trusted pixels, more than before).

    Args:
        config: segments.
        mixed: what the mixed strong views are taught.
        trusted_UHW: bool, its trusted pixels.
        threshold: of the confidence; here also of a segment's trusted share and of its majority.
        factors: of the weak views' map.
        cells: of that map.
        batch: the boxes; a segment is of the image outside the box and does not enter it.
        context: the step.
    """
    if not config.enable:
        return mixed, trusted_UHW
    size = trusted_UHW.shape[1:]
    allowed_UHW = mixed.valid_UHW & ~inside(batch.boxes_VU4[0], size[0], size[1])
    shapes_USHW = region_shapes(config, *factors, cells, allowed_UHW, context)
    label_UHW, expanded_UHW = propagate_regions(mixed.label_UHW, trusted_UHW, shapes_USHW, threshold, config.impl)
    return replace(mixed, label_UHW=label_UHW), expanded_UHW


def rows_of_step(config: RegionConfig, num_cells: int, context: StepContext, device: torch.device) -> Tensor:
    """Rows of the map that become segments in this step, the same on all ranks: int64 [S]."""
    num_rows = config.segments
    if config.rows == "uniform":
        return torch.arange(num_rows, device=device) * num_cells // num_rows
    slot_1 = torch.zeros(1, dtype=torch.int64, device=device)
    reach = num_cells if config.rows == "random" else max(num_cells - 1, 1)
    # at most 1 - 2**-24: times an integer it rounds to less than the integer, in fp32 too
    return (context.uniform(slot_1, "region/rows", num_rows)[0] * reach).long()


def region_shapes(
    config: RegionConfig, left_UCN: Tensor, right_UCN: Tensor, cells: Size, allowed_UHW: Tensor, context: StepContext
) -> Tensor:
    """Segments of the step: rows of the weak view's map as shapes, cut to the allowed pixels; bool [U, S, H, W]."""
    rows_S = rows_of_step(config, cells[0] * cells[1], context, left_UCN.device)
    rows_UShw = map_rows(left_UCN, right_UCN, rows_S).unflatten(2, cells)
    shapes_USHW = segments(rows_UShw, allowed_UHW.shape[1], allowed_UHW.shape[2])
    return shapes_USHW.logical_and_(allowed_UHW[:, None])


def labeled_pair(
    criterion: Criterion,
    logits_LKHW: Tensor,
    propagated_LKHW: Tensor,
    labels_LHW: Tensor,
    weights: tuple[float, float],
    context: StepContext,
) -> dict[str, Objective]:
    """L_x and L_xc: the labeled loss of the logits and of the propagated ones, with their coefficients."""
    logits = {"supervised": logits_LKHW, "supervised_propagated": propagated_LKHW}
    return {
        name: supervised(labeled_loss(criterion, scores, labels_LHW, context.across), weight)
        for (name, scores), weight in zip(logits.items(), weights, strict=True)
    }
