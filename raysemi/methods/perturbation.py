"""Dropout of whole channels, drawn by slot: in networks that have some, and in the maps that a decoder reads.

Source of the latter: Yang et al. 2023, UniMatch, arXiv:2208.09910, section 3.2, and 2025, UniMatch V2,
arXiv:2410.10777, section 3.3. Differs: factors are drawn from (seed, step, slot), so that they do not depend on the
rank.
Axes: B images of a pass, U unlabeled ones, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from raysemi.methods.base import StepContext
from raysemi.models.decoders import Keep, dropouts
from raysemi.models.encoders import Features


def with_perturbed(features: Features, rows: slice, slots_U: Tensor, drop: float, context: StepContext) -> Features:
    """The maps of a pass and, after them, those of some of its images with dropped channels: [B + U, C, h, w] each.

    Args:
        features: maps of B images.
        rows: which of them are perturbed, U.
        slots_U: int64, their global slots.
        drop: probability that a channel is dropped; each map draws its own.
        context: the step.
    """
    names = ["fp/low", *(f"fp/{level}" for level in range(1, len(features.maps) - 1)), "fp/high"]
    maps = []
    for name, map_BChw in zip(names, features.maps, strict=True):
        keep_UC = context.keep(slots_U, name, map_BChw.shape[1], drop).to(map_BChw.dtype)
        maps.append(torch.cat((map_BChw, map_BChw[rows] * keep_UC[:, :, None, None])))
    return replace(features, maps=tuple(maps), middle_BDhw=None)


def with_complementary(
    features: Features, num_labeled: int, slots_U: Tensor, dropped: float, context: StepContext
) -> Features:
    """Maps of labeled images as they are, then of both strong views of U images, each view through half the channels.

    A channel that one view keeps, times 2, the other drops: the factors add up to 2 everywhere, and maps with the same
    number of channels share them. The images that keep all channels are chosen in pairs of slots: with `dropped` 0.5
    exactly one of each pair, whatever the number of ranks.

    Args:
        features: maps of L + 2 U images.
        num_labeled: L.
        slots_U: int64, global slots of the unlabeled images.
        dropped: share of the images whose channels are dropped.
        context: the step.
    """
    # u and u + 1/2 (mod 1) of one draw a pair: below 1/2 exactly one of them
    draw_U = context.uniform(slots_U // 2, "complementary/chosen", 1)[:, 0]
    chosen_U1 = ((draw_U + 0.5 * (slots_U % 2)).fmod(1.0) < dropped)[:, None]
    maps = []
    for map_BChw in features.maps:
        channels = map_BChw.shape[1]
        first_UC = 2.0 * (context.uniform(slots_U, f"complementary/{channels}", channels) < 0.5)
        first_UC = torch.where(chosen_U1, first_UC, 1.0)
        keep_BC = torch.cat((first_UC.new_ones(num_labeled, channels), first_UC, 2.0 - first_UC)).to(map_BChw.dtype)
        maps.append(map_BChw * keep_BC[:, :, None, None])
    return replace(features, maps=tuple(maps))


@dataclass(frozen=True, eq=False)
class DrawnDropout:
    """A `Keep` of factors that were drawn beforehand."""

    drawn: Mapping[str, Tensor]
    """[B, channels] of each dropout, by its name."""

    def __call__(self, place: str, channels: int) -> Tensor:
        """The factors of a dropout."""
        return self.drawn[place]


def drawn_dropout(
    network: nn.Module, slots: Mapping[str, Tensor], name: str, drop: float, context: StepContext
) -> Keep:
    """Factors of every dropout of a network, for one pass over images of several kinds.

    Args:
        network: decoder and heads name their dropouts.
        slots: global slots of the images, by kind, in the order of the pass.
        name: of the pass.
        drop: probability that a channel is dropped.
        context: the step.
    """
    drawn = {
        place: torch.cat([context.keep(of, f"{name}/{place}/{kind}", channels, drop) for kind, of in slots.items()])
        for place, channels in dropouts(network).items()
    }
    return DrawnDropout(drawn)
