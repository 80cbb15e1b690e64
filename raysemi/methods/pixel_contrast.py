"""U2PL's contrastive loss: a class's pixels gather around their mean, away from pixels that are surely not of it.

Source: Wang et al. 2022, "Semi-Supervised Semantic Segmentation Using Unreliable Pseudo-Labels", arXiv:2203.03884,
eqs. 8-15. Differs from the released code, which takes the queue of another class when one is absent, and leaves the
queues without labeled pixels: classes and queues go together, and a pixel's own (pseudo-)label does not decide which
unlabeled ones enter a queue. Keys and anchors are drawn by slot, so that nothing depends on the number of ranks.
Axes: L labeled, U unlabeled, B = L + U images of this rank, K classes, N cells of the representation, A anchors, M
negatives of an anchor, m keys, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from raysemi.base import Config, choices, search
from raysemi.data.types import SemiBatch
from raysemi.errors import ConfigError
from raysemi.methods.base import AcrossRanks, StepContext
from raysemi.methods.queues import ClassQueues
from raysemi.models.decoders import resize
from raysemi.models.segmentor import Prediction
from raysemi.ops.cells import at_nodes
from raysemi.ops.contrast import (
    at_cells,
    class_ranks,
    contrastive_loss,
    draw_members,
    spread_members,
    sums_of_members,
)
from raysemi.ops.losses import IGNORE
from raysemi.ops.similarity import at_least_fp32


class QueueConfig(Config):
    """`method.queue.*`: what each class remembers of pixels that are surely not of it."""

    size: int = Field(30_000, ge=1, json_schema_extra={"unit": "vectors"})
    """Vectors of each class but the first; 512 bytes each at the published width, on the device and in checkpoints."""
    first_size: int = Field(50_000, ge=1, json_schema_extra={"unit": "vectors"})
    """Vectors of class 0 (the background of VOC)."""
    max_new: int = Field(64, ge=1, le=4096, json_schema_extra={"unit": "vectors"})
    """Vectors that an image may bring to a class in a step: how fast a queue turns over, and what ranks exchange."""


class ContrastConfig(Config):
    """`method.contrast.*`."""

    weight: float = Field(0.1, ge=0.0, json_schema_extra=choices([0.0, 0.05, 0.1, 0.25, 0.5, 1.0]))
    """lambda_c: coefficient of the contrastive loss."""
    temperature: float = Field(0.5, gt=0.0, json_schema_extra=choices([0.1, 0.3, 0.5, 0.7]))
    """Divides the cosines."""
    queries: int = Field(256, ge=1, json_schema_extra=choices([128, 256, 512]))
    """Anchors of a class in a step over all ranks; each image of the step draws an equal share, at least 1."""
    negatives: int = Field(50, ge=1, json_schema_extra=choices([25, 50, 100]))
    """Vectors that each anchor is compared with."""
    delta_p: float = Field(0.3, ge=0.0, lt=1.0, json_schema_extra=search(0.1, 0.5))
    """An anchor's class has more than this probability."""
    low_rank: int = Field(3, ge=1, json_schema_extra=choices([1, 3, 5]))
    """r_l: a class at this place or lower in a pixel's order of probabilities, from 0, is surely not the pixel's;
    a wrong class above it confuses a labeled pixel. Below the number of classes: 1 for two."""
    high_rank: int = Field(20, ge=2, json_schema_extra=choices([10, 20]))
    """r_h: classes at this place or lower are so unlikely that they teach nothing."""

    @model_validator(mode="after")
    def _some_ranks_teach(self) -> ContrastConfig:
        if self.low_rank >= self.high_rank:
            raise ValueError(
                f"low_rank must be less than high_rank, {self.high_rank}; got {self.low_rank}. Lower it, or raise "
                "high_rank"
            )
        return self


@dataclass(frozen=True)
class Cells:
    """What is known of each cell of a step's images, labeled first; without gradient."""

    label_BN: Tensor
    """int64: ground truth, or the mixed pseudo-label; `IGNORE` where not annotated."""
    reliable_BN: Tensor
    """bool: annotated, or of low entropy."""
    unreliable_UN: Tensor
    """bool: of high entropy."""
    probability_BKN: Tensor
    """The teacher's."""

    @staticmethod
    def of(
        label_LHW: Tensor, unlabeled: tuple[Tensor, ...], limits: tuple[Tensor, Tensor], taught: Prediction
    ) -> Cells:
        """Read from pixels at the cells' centres.

        Args:
            label_LHW: ground truth.
            unlabeled: pseudo-labels, valid pixels and entropies of the unlabeled images, [U, H, W] each.
            limits: largest entropy of a reliable pixel, least one of an unreliable pixel.
            taught: the teacher's prediction for all the images.
        """
        size = taught.joined_BDhw.shape[2], taught.joined_BDhw.shape[3]
        label_LN, label_UN, valid_UN, entropy_UN = (at_nodes(map_BHW, size) for map_BHW in (label_LHW, *unlabeled))
        # corners aligned: at a cell's centre the score is the cell's own
        logits_BKhw = resize(at_least_fp32(taught.logits_BKHW), size)
        return Cells(
            label_BN=torch.cat((label_LN, label_UN)),
            reliable_BN=torch.cat((label_LN != IGNORE, valid_UN & (entropy_UN <= limits[0]))),
            unreliable_UN=valid_UN & (entropy_UN >= limits[1]),
            probability_BKN=logits_BKhw.softmax(dim=1).flatten(2),
        )


class PixelContrast(nn.Module):
    """The loss with its queues, the same on all ranks.

    Args:
        config: `method.contrast.*`.
        queue: `method.queue.*`.
        num_classes: K.
        dim: D, channels of the representation.

    Raises:
        ConfigError: no class could be unlikely enough.
    """

    def __init__(self, config: ContrastConfig, queue: QueueConfig, num_classes: int, dim: int) -> None:
        super().__init__()
        if config.low_rank >= num_classes:
            raise ConfigError(
                f"method.contrast.low_rank must be less than the number of classes, {num_classes}; got "
                f"{config.low_rank}. Set it to 1 for two classes."
            )
        self.config = config
        self.num_classes = num_classes
        self.max_new = queue.max_new
        self.queues = ClassQueues([queue.first_size, *[queue.size] * (num_classes - 1)], dim)

    @torch.no_grad()
    def remember(self, teacher_BDhw: Tensor, cells: Cells, batch: SemiBatch, context: StepContext) -> None:
        """Queues the vectors of cells that are surely not of a class, of all ranks in the order of their slots."""
        config, num_labeled = self.config, len(batch.image_L3HW)
        rank_BKN = class_ranks(cells.probability_BKN)
        class_K1 = torch.arange(self.num_classes, device=rank_BKN.device)[:, None]
        labeled_L1N, label_L1N = cells.reliable_BN[:num_labeled, None], cells.label_BN[:num_labeled, None]
        confused_LKN = labeled_L1N & (label_L1N != class_K1) & (rank_BKN[:num_labeled] < config.low_rank)
        rank_UKN = rank_BKN[num_labeled:]
        unlikely_UKN = cells.unreliable_UN[:, None] & (rank_UKN >= config.low_rank) & (rank_UKN < config.high_rank)

        offset_BK = self._uniform(batch, context, "contrast/keys", 1).squeeze(2)
        members_BKN = torch.cat((confused_LKN, unlikely_UKN))
        chosen_BKm, count_BK = spread_members(members_BKN, offset_BK, self.max_new)
        keys_BKmD = functional.normalize(at_cells(teacher_BDhw, chosen_BKm).float(), dim=-1).half()
        self.queues.insert(
            _of_all_ranks(keys_BKmD, num_labeled, context.across), _of_all_ranks(count_BK, num_labeled, context.across)
        )

    def loss(
        self, student_BDhw: Tensor, teacher_BDhw: Tensor, cells: Cells, batch: SemiBatch, context: StepContext
    ) -> tuple[Tensor, Tensor]:
        """(sum with gradient over the classes, this rank's share of how many classes there are in the batch).

        Args:
            student_BDhw: representations that learn, as anchors alone.
            teacher_BDhw: those of the averaged network, of which the centres are means.
            cells: labels, which cells are reliable, the teacher's probabilities.
            batch: the slots.
            context: the step.
        """
        config, across = self.config, context.across
        class_K1 = torch.arange(self.num_classes, device=cells.label_BN.device)[:, None]
        members_BKN = (cells.label_BN[:, None] == class_K1) & cells.reliable_BN[:, None]
        eligible_BKN = members_BKN & (cells.probability_BKN > config.delta_p)
        per_slot = max(1, config.queries // (len(student_BDhw) * across.world))
        uniform_BKA = self._uniform(batch, context, "contrast/anchors", per_slot)
        anchors_BKAD = at_cells(student_BDhw, draw_members(eligible_BKN, uniform_BKA))
        negatives_BKAM = self._uniform(batch, context, "contrast/negatives", per_slot * config.negatives)
        negatives_BKAMD = self.queues.draw(negatives_BKAM).unflatten(2, (per_slot, config.negatives))

        # one collective: of each class the sum of its members' vectors, how many they are, and its anchors
        with torch.no_grad():
            sums_KD = sums_of_members(members_BKN, teacher_BDhw)
            has_BK = eligible_BKN.any(dim=2)
            counts_K2 = torch.stack((members_BKN.sum(dim=(0, 2)), has_BK.sum(dim=0) * per_slot), dim=1)
            sums_KX = across.sum(torch.cat((sums_KD, counts_K2.to(sums_KD.dtype)), dim=1))
            members_K, anchors_K = sums_KX[:, -2], sums_KX[:, -1]
            centres_KD = sums_KX[:, :-2] / members_K.clamp(min=1)[:, None]
            present = (members_K > 0).sum()
            active_K = (anchors_K > 0) & (self.queues.filled_K > 0) & (present >= 2)
            factor_BK = (has_BK & active_K) / anchors_K.clamp(min=1)

        loss_BKA = contrastive_loss(anchors_BKAD, centres_KD, negatives_BKAMD, config.temperature)
        return (loss_BKA.sum(dim=2) * factor_BK).sum(), present / across.world

    def _uniform(self, batch: SemiBatch, context: StepContext, name: str, count: int) -> Tensor:
        """Numbers in [0, 1) of each image and class: [B, K, count]."""
        rows = [
            context.uniform(slots, f"{name}/{kind}", self.num_classes * count)
            for slots, kind in ((batch.slots_L, "labeled"), (batch.slots_U, "unlabeled"))
        ]
        return torch.cat(rows).unflatten(1, (self.num_classes, count))


def _of_all_ranks(value_BX: Tensor, num_labeled: int, across: AcrossRanks) -> Tensor:
    """This rank's rows -> those of all ranks: all labeled slots in order, then all unlabeled ones."""
    value_WBX = across.gather(value_BX)
    world, images = value_WBX.shape[:2]
    row_WB = torch.arange(world * images, device=value_BX.device).view(world, images)
    row_G = torch.cat((row_WB[:, :num_labeled].flatten(), row_WB[:, num_labeled:].flatten()))
    return value_WBX.flatten(0, 1)[row_G]  # autocast to bfloat16 refuses a cat of half-precision keys
