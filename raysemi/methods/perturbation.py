"""Dropout of whole channels of the maps that a decoder reads: the perturbations that UniMatch taught the field.

Source: Yang et al. 2023, UniMatch, arXiv:2208.09910, section 3.2, and 2025, UniMatch V2, arXiv:2410.10777, section 3.3.
Differs: factors are drawn from (seed, step, slot), so that they do not depend on the rank.
Axes: B images of a pass, U unlabeled ones, C channels.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from raysemi.methods.base import StepContext
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
