"""Weights of pseudo-labeled pixels, for any method that has some: `weighting: none | rank`.

`rank`: a pixel weighs as many of its k strongest feature channels as are also the k strongest of its pseudo-class's
prototype, the mean of vectors that two memories hold: of labeled pixels that the student has right, and of unlabeled
ones that are reliable: confident, and inside a box that a detector found and calls the same. The boxes come with the
batch; they decide what is remembered and never weigh a loss by themselves. A method asks in this order:

    reliable = self.weighting.reliable(...)        # of the weak views; mixed like the confidence
    self.weighting.remember(...)                   # after the student's passes
    weight = self.weighting.weigh(...)             # of the weak views; mixed like the confidence
    self.weighting.cross_entropy(..., weight)      # in place of `pixel_cross_entropy`

Source: "Weighting Pseudo-Labels via High-Activation Feature Index Similarity and Object Detection for Semi-Supervised
Semantic Segmentation", PPW and RPPI, and its code. Differs: vectors are chosen by slot (`per_image` of an image, pass
and class) and the memories are the same on all ranks, so that nothing depends on their number.
Axes: L labeled, U unlabeled images, K classes, D channels, h x w cells, N = h * w, m vectors of an image and class,
H x W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from raysemi.base import Config, PresetConfig, choices
from raysemi.data.boxes import boxes_file
from raysemi.errors import ConfigError
from raysemi.methods.queues import ClassQueues
from raysemi.models.decoders import resize
from raysemi.models.segmentor import Prediction
from raysemi.ops.boxes import inside_own_class
from raysemi.ops.cells import at_nodes
from raysemi.ops.contrast import at_cells, spread_members
from raysemi.ops.losses import IGNORE, pixel_cross_entropy
from raysemi.ops.pseudo_label import confidence_and_label
from raysemi.ops.rank_weight import Similarity, similarity_weights

if TYPE_CHECKING:
    from raysemi.data.types import SemiBatch
    from raysemi.methods.base import StepContext


@dataclass(frozen=True)
class UnlabeledPass:
    """What the student says of one of the strong views, and what is known of its pixels, mixed as it is."""

    seen: Prediction
    label_UHW: Tensor
    reliable_UHW: Tensor
    """bool."""


class Weighting(nn.Module, ABC):
    """Factors on pseudo-labeled pixels; a module, so that its memory is saved with the run."""

    predicts: bool = True
    """Whether predictions decide factors or normalisers."""

    @abstractmethod
    def reliable(self, label_UHW: Tensor, confidence_UHW: Tensor, batch: SemiBatch) -> Tensor:
        """Pixels of the weak views whose vectors may be remembered: bool [U, H, W]."""

    @abstractmethod
    def remember(
        self, labeled: Prediction, unlabeled: Sequence[UnlabeledPass], batch: SemiBatch, context: StepContext
    ) -> None:
        """Takes vectors of this step, of all ranks, into the memory."""

    @abstractmethod
    def weigh(self, weak: Prediction, label_UHW: Tensor, context: StepContext) -> Tensor:
        """Factors of the weak views' pixels, float32 [U, H, W], from the features of whoever labels them."""

    @abstractmethod
    def normaliser(self, counted_BHW: Tensor, weight_BHW: Tensor, host: Tensor) -> Tensor:
        """What a weighted sum is divided by, where the method alone would divide by `host`."""

    def cross_entropy(
        self, logits_BKHW: Tensor, labels_BHW: Tensor, counted_BHW: Tensor, kept_BHW: Tensor, weight_BHW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of kept pixels times their factors: (sum with gradient, what it is divided by).

        Args:
            logits_BKHW: class scores.
            labels_BHW: class index.
            counted_BHW: bool, pixels that a method without weights divides by.
            kept_BHW: bool, or a real factor: pixels that are taught.
            weight_BHW: of `weigh`.
        """
        total, host = pixel_cross_entropy(
            logits_BKHW, labels_BHW, counted_BHW=counted_BHW, weight_BHW=kept_BHW * weight_BHW
        )
        return total, self.normaliser(counted_BHW, weight_BHW, host)


class NoWeightingConfig(Config):
    """`weighting.*` of `none`."""

    name: Literal["none"] = "none"
    """none: every trusted pixel counts as its method says."""


class NoWeighting(Weighting):
    """Every pixel weighs 1."""

    predicts = False

    def reliable(self, label_UHW: Tensor, confidence_UHW: Tensor, batch: SemiBatch) -> Tensor:
        """Whatever is not padding; nobody reads it."""
        return batch.valid_UHW

    def remember(
        self, labeled: Prediction, unlabeled: Sequence[UnlabeledPass], batch: SemiBatch, context: StepContext
    ) -> None:
        """Nothing."""

    def weigh(self, weak: Prediction, label_UHW: Tensor, context: StepContext) -> Tensor:
        """Ones that take no memory."""
        return weak.penultimate_BDhw.new_ones((), dtype=torch.float32).expand(label_UHW.shape)

    def normaliser(self, counted_BHW: Tensor, weight_BHW: Tensor, host: Tensor) -> Tensor:
        """The method's own."""
        return host


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {"offset": 1.0, "normaliser": "weighted"},
}
"""Preset -> the defaults that it changes."""


class RankWeightingConfig(PresetConfig):
    """`weighting.*` of `rank`."""

    presets = PRESETS
    name: Literal["rank"] = "rank"
    """rank: shared strongest channels."""
    preset: Literal["paper", "released"] = Field("paper", json_schema_extra=choices(["paper", "released"]))
    """Set of defaults; a key that is given wins. paper: weight s / k. released (code): 1 + s / k, weighted mean."""
    k: int = Field(5, ge=1, json_schema_extra=choices([3, 5, 7, 9], unit="channels", requires={"similarity": ["rank"]}))
    """Strongest channels that are compared; at most the channels of the penultimate map."""
    offset: float = Field(0.0, ge=0.0, le=1.0, json_schema_extra=choices([0.0, 0.5, 1.0]))
    """a in the weight a + s / k."""
    normaliser: Literal["host", "weighted"] = Field("host", json_schema_extra=choices(["host", "weighted"]))
    """host: the method's own. weighted: the sum of the weights over the pixels that the method counts."""
    memory: int = Field(256, ge=1, json_schema_extra=choices([64, 128, 256, 512], unit="vectors"))
    """Vectors that each of the two memories holds of a class, first in, first out."""
    per_image: int = Field(2, ge=1, json_schema_extra=choices([1, 2, 4], unit="vectors"))
    """Vectors at most that an image brings of a class, and of each pass over it."""
    per_step: int = Field(32, ge=1, json_schema_extra=choices([16, 32, 64], unit="vectors"))
    """Vectors at most that a step brings to a class of a memory."""
    confidence: float = Field(0.95, ge=0.0, lt=1.0, json_schema_extra=choices([0.9, 0.95, 0.98]))
    """Probability from which on a pixel may be remembered; a labeled one must exceed it and be right."""
    detector: str | None = None
    """NAME of the file `boxes-NAME.parquet` beside `data.unlabeled`, as `raysemi detect run` writes it: unlabeled
    pixels of that probability are remembered where a box of their class confirms them (the paper's RPPI). null, or off:
    no detector."""
    score: float = Field(0.85, ge=0.0, lt=1.0, json_schema_extra=choices([0.8, 0.85, 0.9, 0.95]))
    """Score from which on a box is accepted (paper: 0.85 on Pascal, 0.95 on Cityscapes)."""
    unlabeled: bool | None = None
    """Whether unlabeled pixels are remembered; null: with a detector. true without one: all of that probability, with
    nothing to confirm them. Without: the labeled ones alone (the paper's PPW)."""
    similarity: Similarity = Field("rank", json_schema_extra=choices(["rank", "cosine", "euclidean"]))
    """What is compared: shared channels (PPW), or in its place max(0, cosine) or exp(-squared distance / channels)."""
    by: Literal["magnitude", "value"] = "magnitude"
    """Strongest channels by magnitude (paper) or by value (code); the same after a ReLU."""
    resolution: Literal["native", "full"] = "native"
    """native: of the features, each pixel reading its nearest cell. full: of the image, features resized to it."""
    start_step: int = Field(0, ge=0, json_schema_extra={"unit": "steps"})
    """Until this step every pixel weighs as one without a prototype; the memories fill already."""
    min_count: int = Field(1, ge=1, json_schema_extra={"unit": "vectors"})
    """Labeled vectors that a class needs to have a prototype."""

    @field_validator("detector")
    @classmethod
    def _off_is_none(cls, value: str | None) -> str | None:
        if value is not None:
            boxes_file(value)
        return None if value == "off" else value

    @property
    def remembers_unlabeled(self) -> bool:
        """Whether unlabeled pixels are remembered."""
        return self.detector is not None if self.unlabeled is None else self.unlabeled

    @model_validator(mode="after")
    def _detector_is_asked(self) -> RankWeightingConfig:
        if self.detector is not None and self.unlabeled is False:
            raise ValueError(
                f"unlabeled must be null or true with a detector, which confirms unlabeled pixels; got false with "
                f"{self.detector}. Remove it, or weighting.detector."
            )
        if self.detector is None and self.score != type(self).model_fields["score"].default:
            raise ValueError(
                f"score must be left out without a detector, whose boxes it accepts; got {self.score}. Remove it, or "
                "set weighting.detector."
            )
        return self

    @model_validator(mode="after")
    def _memory_holds_a_step(self) -> RankWeightingConfig:
        if self.per_step < self.per_image:
            raise ValueError(f"per_step must be at least per_image, {self.per_image}; got {self.per_step}. Raise it")
        return self


class RankWeighting(Weighting):
    """PPW: the share of a pixel's strongest channels that its pseudo-class's prototype has too.

    Args:
        config: `weighting.*`.
        num_classes: K.
        channels: D, of the penultimate map.

    Raises:
        ConfigError: more channels to compare than the map has.
    """

    step: Tensor

    def __init__(self, config: RankWeightingConfig, num_classes: int, channels: int) -> None:
        super().__init__()
        if config.k > channels:
            raise ConfigError(
                f"weighting.k must be at most the channels of the decoder's last map, {channels}; got {config.k}. "
                "Lower it, or raise model.channels."
            )
        self.config = config
        self.num_classes = num_classes
        self.labeled = ClassQueues([config.memory] * num_classes, channels)
        self.unlabeled = ClassQueues([config.memory] * num_classes, channels)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def reliable(self, label_UHW: Tensor, confidence_UHW: Tensor, batch: SemiBatch) -> Tensor:
        """Confident pixels that a box of their class confirms; without a detector all confident ones, or none."""
        confident_UHW = (confidence_UHW >= self.config.confidence) & batch.valid_UHW & self.config.remembers_unlabeled
        if self.config.detector is None:
            return confident_UHW
        if batch.found_UN5 is None:
            raise ConfigError(
                f"weighting.detector must be null for a stream without boxes; got {self.config.detector}. Remove it."
            )
        return confident_UHW & inside_own_class(label_UHW, batch.found_UN5)

    @torch.no_grad()
    def remember(
        self, labeled: Prediction, unlabeled: Sequence[UnlabeledPass], batch: SemiBatch, context: StepContext
    ) -> None:
        """Right and confident labeled pixels, reliable unlabeled ones, `per_image` of an image, pass and class."""
        confidence_LHW, predicted_LHW = confidence_and_label(labeled.logits_BKHW)
        right_LHW = (predicted_LHW == batch.label_LHW) & (confidence_LHW > self.config.confidence)
        chosen = [self._choose(labeled, batch.label_LHW, right_LHW, batch.slots_L, "labeled", context)]
        for number, one in enumerate(unlabeled):
            name = f"pass/{number}"
            chosen.append(self._choose(one.seen, one.label_UHW, one.reliable_UHW, batch.slots_U, name, context))
        # one collective of fixed size: a class that one rank alone has seen, or none, changes no shape
        rows = [len(part) for part in chosen]
        with torch.autocast(batch.slots_L.device.type, enabled=False):  # which refuses to join half-precision tensors
            joined_WBKX = context.across.gather(torch.cat(chosen))
            labeled_GKX, *others = [part_WBKX.flatten(0, 1) for part_WBKX in joined_WBKX.split(rows, dim=1)]
            self._insert(self.labeled, labeled_GKX)
            if others:
                self._insert(self.unlabeled, torch.cat(others))
        if self.config.remembers_unlabeled:
            context.observe("remembered_unlabeled", self.unlabeled.filled_K.sum())
        self.step.fill_(context.step)

    def _choose(
        self,
        seen: Prediction,
        label_BHW: Tensor,
        wanted_BHW: Tensor,
        slots_B: Tensor,
        name: str,
        context: StepContext,
    ) -> Tensor:
        """Vectors of wanted cells, drawn by slot, packed: float16 [B, K, m * D + 2], the last two count and draw."""
        penultimate_BDhw = seen.penultimate_BDhw
        cells = penultimate_BDhw.shape[2], penultimate_BDhw.shape[3]
        label_BN, wanted_BN = at_nodes(label_BHW, cells), at_nodes(wanted_BHW, cells)
        class_K1 = torch.arange(self.num_classes, device=label_BN.device)[:, None]
        members_BKN = (label_BN[:, None] == class_K1) & wanted_BN[:, None] & (label_BN != IGNORE)[:, None]
        offset_BK = context.uniform(slots_B, f"weighting/{name}", self.num_classes)
        chosen_BKm, count_BK = spread_members(members_BKN, offset_BK, self.config.per_image)
        vectors_BKmD = at_cells(penultimate_BDhw.detach(), chosen_BKm)
        draw_BK = context.uniform(slots_B, f"weighting/{name}/cut", self.num_classes)
        extra_BK2 = torch.stack((count_BK.to(draw_BK.dtype), draw_BK), dim=2)
        return torch.cat((vectors_BKmD.flatten(2).float(), extra_BK2), dim=2).half()

    def _insert(self, memory: ClassQueues, packed_GKX: Tensor) -> None:
        """Into one memory; of more than `per_step` vectors of a class, those of the slots with the smallest draws."""
        count_GK, draw_GK = packed_GKX[:, :, -2].long(), packed_GKX[:, :, -1].float()
        # only slots that bring something take a place
        first_GK = draw_GK.masked_fill(count_GK == 0, 2.0).argsort(dim=0, stable=True).argsort(dim=0)
        count_GK = count_GK * (first_GK < self.config.per_step // self.config.per_image)
        memory.insert(packed_GKX[:, :, :-2].unflatten(2, (self.config.per_image, -1)), count_GK)

    def prototypes(self) -> tuple[Tensor, Tensor]:
        """Means of both memories' vectors [K, D], and which classes have one, by their labeled vectors [K]."""
        sums_KD = _sums(self.labeled, self.num_classes) + _sums(self.unlabeled, self.num_classes)
        count_K = self.labeled.filled_K + self.unlabeled.filled_K
        return sums_KD / count_K.clamp(min=1)[:, None], self.labeled.filled_K >= self.config.min_count

    @torch.no_grad()
    def weigh(self, weak: Prediction, label_UHW: Tensor, context: StepContext) -> Tensor:
        """offset + s / k; a class without a prototype weighs 1. Observed as "weight"."""
        config, penultimate_UDhw = self.config, weak.penultimate_BDhw
        prototypes_KD, has_K = self.prototypes()
        has_K = has_K & (self.step >= config.start_step)
        if config.resolution == "full":
            penultimate_UDhw = resize(penultimate_UDhw.float(), label_UHW.shape[1:])
        share_UHW = similarity_weights(
            penultimate_UDhw, label_UHW, prototypes_KD, config.similarity, config.k, config.by == "magnitude"
        )
        weight_UHW = torch.where(has_K[label_UHW], config.offset + share_UHW, 1.0)
        context.observe("weight", weight_UHW)
        return weight_UHW

    def normaliser(self, counted_BHW: Tensor, weight_BHW: Tensor, host: Tensor) -> Tensor:
        """The method's own, or the sum of the weights."""
        if self.config.normaliser == "host":
            return host
        return (counted_BHW * weight_BHW).sum().to(host.dtype)


def _sums(memory: ClassQueues, num_classes: int) -> Tensor:
    # of the vectors themselves every time, so that nothing drifts; rows that are not filled yet are 0
    return memory.keys_TD[:-1].unflatten(0, (num_classes, -1)).float().sum(dim=1)


WeightingConfig = Annotated[NoWeightingConfig | RankWeightingConfig, Field(discriminator="name")]
"""`weighting.*`."""


def build_weighting(config: NoWeightingConfig | RankWeightingConfig, num_classes: int, channels: int) -> Weighting:
    """The weighting of a run.

    Args:
        config: `weighting.*`.
        num_classes: K.
        channels: D, of the network's penultimate map.

    Raises:
        ConfigError: more channels to compare than the map has.
    """
    return NoWeighting() if config.name == "none" else RankWeighting(config, num_classes, channels)
