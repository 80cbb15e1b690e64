"""Per-pixel losses as sums with their normalisers, so that N ranks give exactly what one rank gives.

Axes: B images, K classes, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

IGNORE = 255
"""Label of a pixel that is never scored: not annotated, or padding."""


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
