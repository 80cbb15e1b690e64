"""The passes of methods that spread labels along similarity maps: logits and the projections that make the maps.

Axes: L labeled, U unlabeled, B any images, D channels of a projection, N cells, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raysemi.data.types import SemiBatch
from raysemi.methods.base import StepContext
from raysemi.methods.perturbation import with_perturbed
from raysemi.models.segmentor import Prediction, Segmentor
from raysemi.ops.cells import Size
from raysemi.ops.similarity import at_least_fp32

HIDDEN = 256
"""Channels of the correlation head before its projections."""
_HEAD_DROP, _FEATURE_DROP = 0.1, 0.5


@dataclass(frozen=True)
class Projections:
    """Both sides' features of some images; one and the same tensor when the projection is shared."""

    first_BDN: Tensor
    second_BDN: Tensor

    @staticmethod
    def of(first_BDhw: Tensor, second_BDhw: Tensor) -> Projections:
        """From the head's maps."""
        first_BDN = first_BDhw.flatten(2)
        return Projections(first_BDN, first_BDN if second_BDhw is first_BDhw else second_BDhw.flatten(2))

    @property
    def sides(self) -> tuple[Tensor, ...]:
        """The distinct ones."""
        return (self.first_BDN,) if self.second_BDN is self.first_BDN else (self.first_BDN, self.second_BDN)

    def detach(self) -> Projections:
        """Without gradient."""
        return Projections.from_sides(tuple(side.detach() for side in self.sides))

    def images(self, rows: slice) -> Projections:
        """Those of some of the images."""
        return Projections.from_sides(tuple(side[rows] for side in self.sides))

    @staticmethod
    def from_sides(sides: tuple[Tensor, ...]) -> Projections:
        """The inverse of `sides`."""
        return Projections(sides[0], sides[-1])


@dataclass(frozen=True)
class View:
    """What the student says of some images."""

    seen: Prediction
    """With logits of at least fp32."""
    projections: Projections

    @staticmethod
    def of(seen: Prediction, projections: Projections) -> View:
        """From what the network gives, in the type of the pass."""
        return View(replace(seen, logits_BKHW=at_least_fp32(seen.logits_BKHW)), projections)

    @property
    def logits_BKHW(self) -> Tensor:
        """Class scores at the size of the images."""
        return self.seen.logits_BKHW

    @property
    def cells(self) -> Size:
        """Of the encoder's last map."""
        return self.seen.features.high_BDhw.shape[2], self.seen.features.high_BDhw.shape[3]

    def images(self, rows: slice) -> View:
        """What it says of some of them."""
        return View(self.seen.images(rows), self.projections.images(rows))


def weak_pass(batch: SemiBatch, context: StepContext, perturb: bool) -> tuple[View, Tensor | None]:
    """Labeled and weak views in one pass, so that they share BatchNorm's statistics.

    Returns:
        View of the L + U images; and, when asked for, logits of the unlabeled ones from features of which half of the
        channels are dropped, decoded together with the clean ones: [U, K, H, W].
    """
    num_labeled = len(batch.image_L3HW)
    images_B3HW = torch.cat((batch.image_L3HW, batch.weak_U3HW))
    features = context.student.encode(images_B3HW)
    keep_BC = torch.cat(
        (
            context.keep(batch.slots_L, "correlation/labeled", HIDDEN, _HEAD_DROP),
            context.keep(batch.slots_U, "correlation/weak", HIDDEN, _HEAD_DROP),
        )
    )
    projections = Projections.of(*context.student.heads["correlation"](features.high_BDhw, keep_BC=keep_BC))
    if perturb and len(batch.weak_U3HW) > 0:
        features = with_perturbed(features, slice(num_labeled, None), batch.slots_U, _FEATURE_DROP, context)
    both = View.of(context.student.decode(features, images_B3HW.shape[-2:]), projections)
    clean, perturbed_UKHW = both.images(slice(len(images_B3HW))), both.logits_BKHW[len(images_B3HW) :]
    return clean, perturbed_UKHW if len(perturbed_UKHW) > 0 else None


def strong_pass(strong_U3HW: Tensor, batch: SemiBatch, context: StepContext) -> View:
    """The mixed strong views, with BatchNorm statistics of their own."""
    keep_UC = context.keep(batch.slots_U, "correlation/strong", HIDDEN, _HEAD_DROP)
    return _see(context.student, strong_U3HW, keep_UC)


def labeled_and_strong_pass(strong_U3HW: Tensor, batch: SemiBatch, context: StepContext) -> tuple[View, View]:
    """Labeled images and mixed strong views in one pass, so that they share BatchNorm's statistics."""
    labeled, strong = "correlation/labeled", "correlation/strong"
    keeps = (
        context.keep(slots_B, name, HIDDEN, _HEAD_DROP)
        for slots_B, name in ((batch.slots_L, labeled), (batch.slots_U, strong))
    )
    both = _see(context.student, torch.cat((batch.image_L3HW, strong_U3HW)), torch.cat(tuple(keeps)))
    num_labeled = len(batch.image_L3HW)
    return both.images(slice(num_labeled)), both.images(slice(num_labeled, None))


@torch.no_grad()
def momentum_pass(batch: SemiBatch, context: StepContext) -> View:
    """The weak views as the averaged network sees them, in eval mode."""
    assert context.teacher is not None  # the config refuses it without an averaged network
    return _see(context.teacher, batch.weak_U3HW, None)


def _see(network: Segmentor, images_B3HW: Tensor, keep_BC: Tensor | None) -> View:
    features = network.encode(images_B3HW)
    projections = Projections.of(*network.heads["correlation"](features.high_BDhw, keep_BC=keep_BC))
    return View.of(network.decode(features, images_B3HW.shape[-2:]), projections)
