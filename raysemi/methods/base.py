"""What a method is, and what it may ask for. A method sees tensors and networks; no rank, no file, no Ray.

Axes: B images of this rank, K classes, H x W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from raysemi.base import Config, choices, search
from raysemi.data.types import SemiBatch, StrongViews
from raysemi.methods.weighting import NoWeighting, Weighting
from raysemi.models.segmentor import Channels, Segmentor
from raysemi.ops import draws
from raysemi.ops.losses import Criterion, Objective, labeled_normaliser, num_pixels


class AcrossRanks(Protocol):
    """Sums, maxima and parts of all ranks; the same on every rank, without gradient."""

    rank: int
    world: int

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks, same shape and dtype."""
        ...

    def max(self, value: Tensor) -> Tensor:
        """Maximum over ranks, same shape and dtype."""
        ...

    def gather(self, value: Tensor) -> Tensor:
        """The values of all ranks, one after another: [world, ...]."""
        ...


class SingleRank:
    """One process: the identity."""

    rank = 0
    world = 1

    def sum(self, value: Tensor) -> Tensor:
        """The value itself."""
        return value

    def max(self, value: Tensor) -> Tensor:
        """The value itself."""
        return value

    def gather(self, value: Tensor) -> Tensor:
        """The value itself, [1, ...]."""
        return value[None]


class Average(Config):
    """How the averaged copy of the student is made: the teacher, or the network that is evaluated."""

    kind: Literal["none", "ema", "period"] = Field("none", json_schema_extra=choices(["none", "ema", "period"]))
    """none: the student itself. ema: t <- d t + (1-d) s each step, d = min(1 - 1/(i+1), decay), i from 0.
    period: t <- ratio t + (1-ratio) s once every `train.period` steps (DerProp's momentum network)."""
    decay: float = Field(
        0.996, ge=0.0, lt=1.0, json_schema_extra=choices([0.99, 0.996, 0.999, 0.9996], requires={"kind": ["ema"]})
    )
    """Largest decay of `ema`, per step."""
    start: int = Field(0, ge=0)
    """ema: period (`train.period`) from whose first step on i counts; before it the copy is the student itself."""
    copied: int = Field(0, ge=0, json_schema_extra=choices([0, 1], requires={"kind": ["ema"]}))
    """ema: periods, after `start`, in which the copy still has the student's own weights."""
    buffers: Literal["averaged", "own"] = "averaged"
    """ema: BatchNorm's running statistics. averaged: as the weights are. own: from `start` on, those of the passes that
    the method makes with the copy in train mode."""
    ratio: float = Field(0.5, gt=0.0, lt=1.0, json_schema_extra=search(0.3, 0.9, requires={"kind": ["period"]}))
    """Share that the averaged copy keeps at each update of `period`."""
    at: Literal["end", "start"] = "end"
    """When `period` updates: at the end of each period, or (the reference) at the start of the next: copied at the
    first step, averaged from the second period on."""


def _not_none(average: Average) -> Average:
    if average.kind == "none":
        raise ValueError("must be ema or period, the method learns from the averaged copy; got none")
    return average


Teacher = Annotated[Average, AfterValidator(_not_none)]
"""An averaged copy that a method cannot do without."""


@dataclass(frozen=True)
class StepContext:
    """What a method may use in one step."""

    student: Segmentor
    teacher: Segmentor | None
    """The averaged copy, in eval mode; None when the method has none. Before its first update it equals the
    student's first weights. A method may set it to train mode for a pass if it keeps `buffers: own`."""
    step: int
    """Global step, from 0."""
    steps: int
    """Steps of the whole run (`train.steps`)."""
    period: int
    """What stands for the papers' epoch, in steps (`train.period`)."""
    seed: int
    across: AcrossRanks
    """The ranks; where a share is passed in micro-batches, each of these is a rank."""
    parts: int = 1
    """Micro-batches of a rank's share (`train.micro_batch`)."""
    listener: Callable[[str, Tensor], None] | None = None

    def observe(self, name: str, value: Tensor) -> None:
        """Hands a per-pixel map or a scalar to whoever records; free when nobody listens."""
        if self.listener is not None:
            self.listener(name, value.detach())

    def observe_labels(self, pseudo_UHW: Tensor, confidence_UHW: Tensor, kept_UHW: Tensor, valid_UHW: Tensor) -> None:
        """Hands out what unlabeled images are taught: maps of the un-mixed weak views, and the share that is kept.

        Args:
            pseudo_UHW: int64 labels.
            confidence_UHW: of the labels.
            kept_UHW: bool, pixels that are trusted.
            valid_UHW: bool, False where padded.
        """
        if self.listener is not None:
            maps = {"pseudo": pseudo_UHW, "confidence": confidence_UHW, "trusted": kept_UHW}
            for name, map_UHW in maps.items():
                self.observe(name, map_UHW)
            self.observe("kept_ratio", kept_UHW.sum() / valid_UHW.sum().clamp(min=1))

    def uniform(self, slots_B: Tensor, name: str, count: int) -> Tensor:
        """Numbers in [0, 1) of (seed, step, slot, name): float32 [B, count] on the device of `slots_B`."""
        return draws.uniform(self.seed, self.step, slots_B, name, count)

    def keep(self, slots_B: Tensor, name: str, channels: int, drop: float) -> Tensor:
        """Dropout factors of whole channels, [B, channels]: 0 with probability `drop`, else 1 / (1 - drop)."""
        return (self.uniform(slots_B, name, channels) >= drop).to(torch.float32) / (1.0 - drop)


def group_size(group: int | None, unlabeled: int) -> int:
    """Unlabeled images of neighbouring global slots that are mixed with each other.

    Args:
        group: `method.group`; None = 4, or all where they are fewer.
        unlabeled: images of a step over all ranks.
    """
    return min(unlabeled, 4) if group is None else group


class Method(nn.Module, ABC):
    """A semi-supervised method; a module, so that its buffers (thresholds, memories) are saved like any other.

    Args:
        config: the method's own config.
        num_classes: K.
    """

    average: Average
    """How the averaged copy of the student is kept."""
    strong_views: int
    """Strong views of each unlabeled image; 0 = its weak view alone."""
    mixes: bool = True
    """False when no image is mixed with another one, so that the share of a rank may be odd."""
    uses_unlabeled: bool = True
    """False when the method reads no unlabeled image."""
    strong: StrongViews = "jitter"
    """Family of its strong views, unless `data.views.strong` names one."""
    second_view: bool = False
    """True when the method needs a second random geometry of each unlabeled image."""
    given: float = 0.0
    """Probability that a labeled image comes with another labeled one to paste from; 0 = it pastes nothing."""
    weighted: bool = False
    """True when its pseudo-labeled pixels may be weighted: it asks `self.weighting`."""
    trains_teacher_statistics: bool = False
    """True when it makes passes with the averaged copy in train mode, as `average.buffers: own` needs."""
    unlabeled_optional: bool = False
    """True when the method also trains without an unlabeled pool; its batches then have U = 0."""

    @abstractmethod
    def __init__(self, config: Any, num_classes: int) -> None:
        super().__init__()
        self.weighting: Weighting = NoWeighting()

    def heads(self, channels: Channels) -> dict[str, nn.Module]:
        """Extra heads that the student needs, by name; `context.student.heads[name]` in a step. None by default.

        Args:
            channels: of the maps that a head may read.
        """
        return {}

    def reserve(self, crop: int) -> None:
        """Makes the buffers whose size depends on the images'. None by default.

        Args:
            crop: side of the images, pixels.
        """

    def ramp_steps(self, steps: int) -> float:
        """Steps in which the weights of its unsupervised terms rise by themselves, at the start of a run of `steps`.

        Pareto weights wait until then: they would undo a small weight by a large one.
        """
        return 0.0

    def normalisers(self, batch: SemiBatch, context: StepContext) -> dict[str, Tensor] | None:
        """What `objectives` divides each term by on this share, where the data alone says it: no network is asked.

        With it, micro-batches (`train.micro_batch`) need no pass before the one that trains. The same names in the same
        order, the same sums over ranks in the same order; None, before any sum, where predictions decide.
        """
        return None

    @abstractmethod
    def objectives(self, batch: SemiBatch, context: StepContext) -> dict[str, Objective]:
        """The terms of the loss, by name, on this rank's share; the same names on all ranks. Never calls backward."""


def counted_pixels(
    method: Method, criterion: Criterion, batch: SemiBatch, context: StepContext, unlabeled: dict[str, Tensor]
) -> dict[str, Tensor] | None:
    """`Method.normalisers` of a term `supervised` and of terms that divide by the number of some unlabeled pixels.

    Args:
        method: its weights, if there are some, come from predictions.
        criterion: of the labeled images.
        batch: this share.
        context: the step.
        unlabeled: the pixels of each further term, bool.
    """
    if method.weighting.predicts or criterion.name == "ohem":
        return None
    labeled = labeled_normaliser(criterion, batch.label_LHW, context.student.num_classes, context.across)
    return {"supervised": labeled, **{name: num_pixels(chosen_UHW) for name, chosen_UHW in unlabeled.items()}}


@contextmanager
def in_train_mode(network: nn.Module) -> Iterator[None]:
    """For a pass that moves the BatchNorm statistics of a network which is else in eval mode."""
    network.train()
    try:
        yield
    finally:
        network.eval()


@torch.no_grad()
def in_eval_mode(student: Segmentor, images_B3HW: Tensor) -> Tensor:
    """Logits by BatchNorm's running statistics, in which the images leave no trace: [B, K, H, W]."""
    mode = student.training
    student.eval()
    try:
        return student(images_B3HW).logits_BKHW
    finally:
        student.train(mode)
