"""Per-pixel losses as sums with their normalisers, so that N ranks give exactly what one rank gives.

All losses run in fp32, or in fp64 where the logits are fp64. None keeps a map of K classes besides the logits: what the
backward pass needs is made again there, the same to the bit. Axes: B images, K classes, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from raysemi.base import Config, choices, search
from raysemi.errors import ConfigError

IGNORE = 255
"""Label of a pixel that is never scored: not annotated, or padding."""

_BINS = 2048


@dataclass(frozen=True)
class Objective:
    """One term of a method's loss: a sum, and what it is divided by over all ranks.

    The uniform rule minimises the sum over terms of `weight * total / normaliser`, both summed over all ranks.
    """

    total: Tensor
    """Scalar with gradient: the sum over this rank's share."""
    normaliser: Tensor
    """Scalar without gradient: what the global sum is divided by (a pixel count, or a sum of weights); at least 1
    after summing over ranks, whatever stands here."""
    weight: float
    """Coefficient in the published total."""
    side: Literal["supervised", "unsupervised"]
    """Which of the two gradients of the Pareto rule it belongs to; a term over both kinds of image is unsupervised."""


def supervised(pair: tuple[Tensor, Tensor], weight: float) -> Objective:
    """A term over labeled images, from a loss's (total, normaliser)."""
    return Objective(pair[0], pair[1], weight, "supervised")


def unsupervised(pair: tuple[Tensor, Tensor], weight: float) -> Objective:
    """A term in which unlabeled images take part, from a loss's (total, normaliser)."""
    return Objective(pair[0], pair[1], weight, "unsupervised")


class SumsOverRanks(Protocol):
    """Whoever can add a tensor up over all ranks."""

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks, same shape and dtype."""
        ...


class Criterion(Config):
    """Loss of labeled pixels: `method.criterion.*`."""

    name: Literal["ce", "ohem", "balanced"] = Field("ce", json_schema_extra=choices(["ce", "ohem", "balanced"]))
    """ce: cross-entropy over all annotated pixels. ohem: over the hard ones alone (the papers', on Cityscapes).
    balanced: over all, a rare class's weighing more; for few labeled images, where plain cross-entropy may never learn
    one."""
    power: float = Field(0.5, ge=0.0, le=1.0, json_schema_extra=search(0.25, 0.75, requires={"name": ["balanced"]}))
    """balanced: a pixel weighs (pixels of its class in the global batch) ** -power. 0: as ce; 1: every class of the
    batch weighs the same."""
    threshold: float = Field(0.7, ge=0.0, lt=1.0, json_schema_extra=search(0.5, 0.9, requires={"name": ["ohem"]}))
    """ohem: a pixel whose true class has at most this probability is always kept."""
    min_kept: int = Field(100_000, ge=0, json_schema_extra={"unit": "pixels"})
    """ohem: pixels kept at least; fewer annotated ones than this: all of them. Scope `global`: of the global batch
    (the papers state it for each of 4 workers: 4 times their number). Scope `local`: of `min_kept_of` pixels."""
    min_kept_of: int = Field(2 * 769 * 769, ge=1, json_schema_extra={"unit": "pixels"})
    """ohem, scope `local`: the worker batch for which `min_kept` was chosen; a rank of another size keeps the same
    share. 100,000 goes with 2 crops of 769 x 769, 200,000 with 2 of 801 x 801 (1283202)."""
    scope: Literal["global", "local"] = "global"
    """ohem: `global` selects over all ranks, so that their number changes nothing; `local` on each rank by itself, as
    the papers' code does."""


def pixel_cross_entropy(
    logits_BKHW: Tensor, labels_BHW: Tensor, *, counted_BHW: Tensor | None = None, weight_BHW: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy per pixel: sum over counted pixels of weight * -log softmax(logits)[label], and their number.

    Args:
        logits_BKHW: class scores.
        labels_BHW: class index 0..K-1; a pixel with `IGNORE` adds 0 to the sum.
        counted_BHW: bool, pixels that are summed and counted; default: those whose label is not `IGNORE`.
        weight_BHW: factor of each pixel, bool or real, without gradient; default 1. Does not enter the count.

    Returns:
        (sum with gradient, number of counted pixels), two scalars.
    """
    loss_BHW = _cross_entropy_map(logits_BKHW, labels_BHW, IGNORE)
    counted_BHW = labels_BHW != IGNORE if counted_BHW is None else counted_BHW
    factor_BHW = counted_BHW.to(loss_BHW.dtype)
    if weight_BHW is not None:
        factor_BHW = factor_BHW * weight_BHW.detach()
    return (loss_BHW * factor_BHW).sum(), _count(counted_BHW, loss_BHW.dtype)


def soft_cross_entropy(logits_BKHW: Tensor, target_BKHW: Tensor, kept_BHW: Tensor) -> Tensor:
    """Cross-entropy to a distribution: sum over kept pixels of -sum_k target_k log softmax(logits)_k.

    Args:
        logits_BKHW: class scores.
        target_BKHW: probabilities over K, taken without gradient.
        kept_BHW: bool, or a real factor of each pixel.
    """

    def loss(logits_BKHW: Tensor, target_BKHW: Tensor) -> Tensor:
        logits_BKHW = _at_least_fp32(logits_BKHW)
        return F.cross_entropy(logits_BKHW, target_BKHW.to(logits_BKHW.dtype), reduction="none")

    loss_BHW = _remade(loss, logits_BKHW, target_BKHW.detach())
    return (loss_BHW * kept_BHW.to(loss_BHW.dtype)).sum()


def kl_divergence(logits_BKHW: Tensor, target_BKHW: Tensor, kept_BHW: Tensor) -> Tensor:
    """Sum over kept pixels of sum_k target_k (log target_k - log softmax(logits)_k), with 0 log 0 = 0.

    Args:
        logits_BKHW: class scores.
        target_BKHW: probabilities over K, taken without gradient.
        kept_BHW: bool, or a real factor of each pixel.
    """

    def loss(logits_BKHW: Tensor, target_BKHW: Tensor) -> Tensor:
        log_probability_BKHW = _at_least_fp32(logits_BKHW).log_softmax(dim=1)
        return F.kl_div(log_probability_BKHW, target_BKHW.to(log_probability_BKHW.dtype), reduction="none").sum(dim=1)

    loss_BHW = _remade(loss, logits_BKHW, target_BKHW.detach())
    return (loss_BHW * kept_BHW.to(loss_BHW.dtype)).sum()


def class_balance(
    labels_BHW: Tensor, classes: int, power: float, sum_over_ranks: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Weight of each pixel by how rare its class is: proportional to (pixels of its class) ** -power, 1 on average.

    Classes are counted in the batch at hand, over all ranks, so that nothing has to be known of the pool, and 1 rank
    gives what N give.

    Args:
        labels_BHW: class index 0..K-1, or `IGNORE`.
        classes: K.
        power: 0 (all weigh 1) to 1 (every class that occurs weighs the same in sum).
        sum_over_ranks: adds an int64 tensor up over ranks; default: this is the only rank.

    Returns:
        float32 [B, H, W] on the labels' device, 0 where a pixel is ignored, made without a host wait.

    Source: with power 1, the per-image weights of Xie and Tu 2015, arXiv:1504.06375, eq. 2, for K classes.
    """
    slot_BHW = torch.where(labels_BHW == IGNORE, classes, labels_BHW.long())
    counts = torch.zeros(classes + 1, dtype=torch.int64, device=labels_BHW.device)
    counts = counts.scatter_add_(0, slot_BHW.flatten(), torch.ones_like(slot_BHW).flatten())
    counts = (counts if sum_over_ranks is None else sum_over_ranks(counts))[:classes].float()
    weight = torch.where(counts > 0, counts.clamp(min=1) ** -power, 0.0)
    weight = weight * (counts.sum() / (weight * counts).sum().clamp(min=1e-12))
    return F.pad(weight, (0, 1))[slot_BHW]


def ohem_cross_entropy(
    logits_BKHW: Tensor,
    labels_BHW: Tensor,
    threshold: float = 0.7,
    min_kept: int = 100_000,
    ignore_index: int = IGNORE,
) -> Tensor:
    """Mean cross-entropy over the hard pixels of this batch.

    With p the probability of a pixel's true class: kept are the pixels with p <= max(threshold, p_(min_kept)), where
    p_(k) is the k-th smallest p (ignored pixels rank as 1); all annotated ones when they are fewer than `min_kept`.

    Args:
        logits_BKHW: class scores.
        labels_BHW: class index, or `ignore_index`.
        threshold: in [0, 1).
        min_kept: pixels.
        ignore_index: label of pixels that are neither ranked nor kept.

    Returns:
        Scalar with gradient; 0 when no pixel is annotated.

    Raises:
        ConfigError: threshold or min_kept out of range.

    Source: Shrivastava et al. 2016, arXiv:1604.03540, in the form of the segmentation papers' code.
    """
    _check_ohem(threshold, min_kept)
    loss_BHW = _cross_entropy_map(logits_BKHW, labels_BHW, ignore_index)
    annotated_BHW = labels_BHW != ignore_index
    kept_BHW = _keep_exactly(_true_probability(loss_BHW), annotated_BHW, threshold, min_kept)
    return (loss_BHW * kept_BHW).sum() / _count(kept_BHW, loss_BHW.dtype).clamp(min=1)


def ohem_keep(
    logits_BKHW: Tensor,
    labels_BHW: Tensor,
    threshold: float = 0.7,
    min_kept: int = 100_000,
    ignore_index: int = IGNORE,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The hard pixels, chosen with one limit for all ranks.

    As in `ohem_cross_entropy`, but p_(min_kept) is the upper end of its bin in a histogram of 2,048 bins over
    (threshold, 1], summed over ranks: on any number of ranks the same pixels are kept, at most one bin more than the
    exact value would keep.

    Args:
        logits_BKHW: class scores of this rank.
        labels_BHW: class index, or `ignore_index`.
        threshold: in [0, 1).
        min_kept: pixels, over all ranks together.
        ignore_index: label of pixels that are neither ranked nor kept.
        sum_over_ranks: adds an int64 tensor up over ranks; default: this is the only rank.

    Returns:
        bool [B, H, W] on the logits' device, made without a host wait.

    Raises:
        ConfigError: threshold or min_kept out of range.
    """
    _check_ohem(threshold, min_kept)
    with torch.no_grad():
        loss_BHW = _cross_entropy_map(logits_BKHW, labels_BHW, ignore_index)
        annotated_BHW = labels_BHW != ignore_index
        return _keep_by_histogram(_true_probability(loss_BHW), annotated_BHW, threshold, min_kept, sum_over_ranks)


def labeled_loss(
    criterion: Criterion, logits_BKHW: Tensor, labels_BHW: Tensor, across: SumsOverRanks
) -> tuple[Tensor, Tensor]:
    """The loss of labeled images by a criterion: (sum with gradient, number of pixels it is the mean over)."""
    if criterion.name == "ce":
        return pixel_cross_entropy(logits_BKHW, labels_BHW)
    if criterion.name == "balanced":
        weight_BHW = class_balance(labels_BHW, logits_BKHW.shape[1], criterion.power, across.sum)
        return pixel_cross_entropy(logits_BKHW, labels_BHW, weight_BHW=weight_BHW)
    loss_BHW = _cross_entropy_map(logits_BKHW, labels_BHW, IGNORE)
    true_BHW, annotated_BHW = _true_probability(loss_BHW), labels_BHW != IGNORE
    if criterion.scope == "global":
        kept_BHW = _keep_by_histogram(true_BHW, annotated_BHW, criterion.threshold, criterion.min_kept, across.sum)
    else:
        min_kept = round(criterion.min_kept * labels_BHW.numel() / criterion.min_kept_of)
        kept_BHW = _keep_exactly(true_BHW, annotated_BHW, criterion.threshold, min_kept)
    return (loss_BHW * kept_BHW).sum(), _count(kept_BHW, loss_BHW.dtype)


def labeled_normaliser(criterion: Criterion, labels_BHW: Tensor, classes: int, across: SumsOverRanks) -> Tensor:
    """What `labeled_loss` divides by, from the labels alone, with the same sums over ranks; not for ohem, where
    predictions decide it."""
    assert criterion.name != "ohem"
    if criterion.name == "balanced":
        class_balance(labels_BHW, classes, criterion.power, across.sum)
    return num_pixels(labels_BHW != IGNORE)


def num_pixels(chosen_BHW: Tensor) -> Tensor:
    """How many pixels are chosen: int64 scalar, on their device."""
    return chosen_BHW.sum(dtype=torch.int64)


def _check_ohem(threshold: float, min_kept: int) -> None:
    faults = []
    if not 0.0 <= threshold < 1.0:
        faults.append(f"threshold must lie in [0, 1); got {threshold}. The papers use 0.7.")
    if min_kept < 0:
        faults.append(f"min_kept must be 0 or more pixels; got {min_kept}. The papers use 100000 or 200000.")
    if faults:
        raise ConfigError(faults)


def _at_least_fp32(logits_BKHW: Tensor) -> Tensor:
    return logits_BKHW if logits_BKHW.dtype == torch.float64 else logits_BKHW.float()


def _count(chosen_BHW: Tensor, dtype: torch.dtype) -> Tensor:
    return num_pixels(chosen_BHW).to(dtype)  # counted in integers: fp32 loses ones above 2**24


def _cross_entropy_map(logits_BKHW: Tensor, labels_BHW: Tensor, ignore_index: int) -> Tensor:
    def loss(logits_BKHW: Tensor, labels_BHW: Tensor) -> Tensor:
        labels_BHW = labels_BHW.long()
        return F.cross_entropy(_at_least_fp32(logits_BKHW), labels_BHW, ignore_index=ignore_index, reduction="none")

    return _remade(loss, logits_BKHW, labels_BHW)


def _remade(loss: Callable[[Tensor, Tensor], Tensor], logits_BKHW: Tensor, target: Tensor) -> Tensor:
    """A loss per pixel that keeps only what it is given: a method has many, each would keep K numbers a pixel.

    Made, and made again, for one half of the images after the other: what lies between takes half the room.
    """

    def of_all(logits_BKHW: Tensor, target: Tensor) -> Tensor:
        half = max(1, -(-len(logits_BKHW) // 2))
        halves = zip(logits_BKHW.split(half), target.split(half), strict=True)
        return torch.cat([loss(logits, of_them) for logits, of_them in halves])

    remade: Tensor = checkpoint(of_all, logits_BKHW, target, use_reentrant=False, preserve_rng_state=False)
    return remade


def true_probability(logits_BKHW: Tensor, labels_BHW: Tensor) -> Tensor:
    """Probability that each pixel's own class gets, without gradient: at least fp32 [B, H, W], 1 at `IGNORE`."""
    return _true_probability(_cross_entropy_map(logits_BKHW.detach(), labels_BHW, IGNORE))


def _true_probability(loss_BHW: Tensor) -> Tensor:
    return loss_BHW.detach().neg().exp()  # 1 at ignored pixels, and no softmax over K classes to read one of them


def _keep_exactly(true_BHW: Tensor, annotated_BHW: Tensor, threshold: float, min_kept: int) -> Tensor:
    if min_kept == 0 or true_BHW.numel() == 0:
        return annotated_BHW & (true_BHW <= threshold)
    rank = min(true_BHW.numel(), min_kept)
    limit = true_BHW.flatten().kthvalue(rank).values.clamp(min=threshold)
    return annotated_BHW & ((true_BHW <= limit) | (annotated_BHW.sum() < min_kept))


def _keep_by_histogram(
    true_BHW: Tensor,
    annotated_BHW: Tensor,
    threshold: float,
    min_kept: int,
    sum_over_ranks: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    # bin 0: at most the threshold; 1.._BINS: above it; the last one takes what is not annotated
    above_BHW = ((true_BHW - threshold) * (_BINS / (1.0 - threshold))).long().clamp(0, _BINS - 1) + 1
    bin_BHW = torch.where(true_BHW <= threshold, 0, above_BHW)
    slot_BHW = torch.where(annotated_BHW, bin_BHW, _BINS + 1).flatten()
    counts = torch.zeros(_BINS + 2, dtype=torch.int64, device=true_BHW.device)
    counts = counts.scatter_add_(0, slot_BHW, torch.ones_like(slot_BHW))[: _BINS + 1]
    if sum_over_ranks is not None:
        counts = sum_over_ranks(counts)
    last = (counts.cumsum(0) < min_kept).sum()  # the bin of p_(min_kept); past the last one when there are fewer
    return annotated_BHW & (bin_BHW <= last)
