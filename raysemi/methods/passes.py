"""The passes of methods that spread labels along similarity maps: logits and the projections that make the maps.

Axes: L labeled, U unlabeled, B any images, D channels of a projection, N cells, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from raysemi.data.types import SemiBatch
from raysemi.methods.base import StepContext
from raysemi.methods.perturbation import with_perturbed
from raysemi.models.decoders import resize
from raysemi.models.segmentor import Channels, Prediction, Segmentor
from raysemi.ops.cells import Size
from raysemi.ops.similarity import at_least_fp32

Source = Literal["encoder", "aspp", "fusion", "classifier"]
"""Behind what the correlation head stands: the encoder's last map, the decoder's pyramid, its last convolution before
the classifier, or the class scores."""
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


def weak_pass(
    batch: SemiBatch, context: StepContext, perturb: bool, source: Source = "encoder"
) -> tuple[View, Tensor | None]:
    """Labeled and weak views in one pass, so that they share BatchNorm's statistics.

    Returns:
        View of the L + U images; and, when asked for, logits of the unlabeled ones from features of which half of the
        channels are dropped, decoded together with the clean ones: [U, K, H, W].
    """
    num_labeled = len(batch.image_L3HW)
    images_B3HW = torch.cat((batch.image_L3HW, batch.weak_U3HW))
    features = decoded = context.student.encode(images_B3HW)
    if perturb and len(batch.weak_U3HW) > 0:
        decoded = with_perturbed(features, slice(num_labeled, None), batch.slots_U, _FEATURE_DROP, context)
    seen = context.student.decode(decoded, images_B3HW.shape[-2:])
    clean, perturbed_UKHW = seen.images(slice(len(images_B3HW))), seen.logits_BKHW[len(images_B3HW) :]
    keep_BC = torch.cat(
        (
            context.keep(batch.slots_L, "correlation/labeled", HIDDEN, _HEAD_DROP),
            context.keep(batch.slots_U, "correlation/weak", HIDDEN, _HEAD_DROP),
        )
    )
    both = _view(context.student, replace(clean, features=features), keep_BC, source)
    return both, at_least_fp32(perturbed_UKHW) if len(perturbed_UKHW) > 0 else None


def strong_pass(strong_U3HW: Tensor, batch: SemiBatch, context: StepContext, source: Source = "encoder") -> View:
    """The mixed strong views, with BatchNorm statistics of their own."""
    keep_UC = context.keep(batch.slots_U, "correlation/strong", HIDDEN, _HEAD_DROP)
    return _see(context.student, strong_U3HW, keep_UC, source)


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


def _see(network: Segmentor, images_B3HW: Tensor, keep_BC: Tensor | None, source: Source = "encoder") -> View:
    return _view(network, network(images_B3HW), keep_BC, source)


def _view(network: Segmentor, seen: Prediction, keep_BC: Tensor | None, source: Source) -> View:
    read_BChw = _read(seen, source)
    return View.of(seen, Projections.of(*network.heads["correlation"](read_BChw, keep_BC=keep_BC)))


def _read(seen: Prediction, source: Source) -> Tensor:
    """What the correlation head reads, at the cells of the encoder's last map whatever the source."""
    if source == "aspp":
        assert seen.pyramid_BDhw is not None  # the config refuses a decoder without it
        return seen.pyramid_BDhw
    high_BDhw = seen.features.high_BDhw
    maps = {"encoder": high_BDhw, "fusion": seen.penultimate_BDhw, "classifier": seen.logits_BKHW}
    return resize(maps[source], high_BDhw.shape[-2:])


def channels_read(channels: Channels, num_classes: int, source: Source) -> int:
    """Channels of what the correlation head reads."""
    if source == "aspp":
        assert channels.pyramid is not None  # the config refuses a decoder without it
        return channels.pyramid
    return {"encoder": channels.maps[-1], "fusion": channels.penultimate, "classifier": num_classes}[source]
