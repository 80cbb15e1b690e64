"""Objectives of all ranks -> one update direction.

The uniform rule: one backward of the sum of weight * total / normaliser, both summed over all ranks. Data-parallel
training averages gradients over ranks, so each rank's share is multiplied by the number of ranks: N ranks give the
gradient of one rank with the same global batch, whatever pixels each of them ignores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raysemi.methods.base import AcrossRanks
from raysemi.ops.losses import Objective


def join_ranks(objectives: dict[str, Objective], across: AcrossRanks) -> dict[str, Tensor]:
    """Each objective as a loss whose mean over ranks is its global value.

    Args:
        objectives: this rank's sums and normalisers; the same names in the same order on every rank.
        across: sums over ranks; one collective for all normalisers.

    Returns:
        name -> total * world / max(sum over ranks of normaliser, 1), with gradient, without the objective's weight.
    """
    device = next(iter(objectives.values())).normaliser.device
    wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no fp64
    normalisers = across.sum(torch.stack([o.normaliser.detach().to(wide) for o in objectives.values()]))
    normalisers = normalisers.clamp(min=1.0).to(torch.float32)
    return {
        name: objective.total.float() * across.world / normaliser
        for (name, objective), normaliser in zip(objectives.items(), normalisers.unbind(), strict=True)
    }


def uniform_loss(objectives: dict[str, Objective], losses: dict[str, Tensor], unsupervised: float = 1.0) -> Tensor:
    """The published total, the sum of weight * loss; `unsupervised` is a factor on the terms of that side."""
    factor = {"supervised": 1.0, "unsupervised": unsupervised}
    terms = [objectives[name].weight * factor[objectives[name].side] * loss for name, loss in losses.items()]
    return torch.stack(terms).sum()
