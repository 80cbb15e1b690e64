"""DerProp's similarity maps: what spreads logits, and what the maps themselves learn.

Source: "Semi-Supervised Semantic Segmentation via Derivative Label Propagation", eqs. 2-4, 8-12, and its released code.
Axes: B images, D channels of a projection, C of a factor, K classes, N cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raysemi.base import Config, choices, search
from raysemi.methods.passes import Projections
from raysemi.ops import similarity
from raysemi.ops.losses import IGNORE


class DerivativeConfig(Config):
    """`method.deriv.*`: the similarity maps and their loss."""

    sim: similarity.Similarity = Field("softmax_dot", json_schema_extra=choices(["softmax_dot", "cosine"]))
    """softmax_dot: differentiate, softmax over channels, dot, / sqrt(D_n) (code). cosine: L1-normalise, differentiate,
    cosine (paper). l1_dot: as cosine, without norms."""
    heads: Literal["two", "shared"] = Field("two", json_schema_extra=choices(["two", "shared"]))
    """two: a projection a side, the map is not symmetric (code). shared: one (paper)."""
    dim: int | Literal["classes"] | None = Field(None, json_schema_extra=choices([None, 64, 128]))
    """D, channels of a projection; null = max(classes, 16), `classes` = as many as classes (code)."""
    abs: bool = Field(False, json_schema_extra=choices([False, True]))
    """Take the absolute value after each application of the kernel."""
    loss: bool = True
    """False: pseudo-labels are rectified, but the maps have no loss of their own, and no momentum network is kept."""
    weight: float = Field(0.5, ge=0.0, json_schema_extra=search(0.05, 1.0, log=True))
    """l3: coefficient of the map losses, labeled and unlabeled."""
    labeled_grad: bool = True
    """False: the labeled map loss trains nothing (code)."""
    sparsity_form: Literal["l1", "constant"] = "l1"
    """l1: mean |Op^(order+1) nu(f)|. constant: 1 / N, which trains nothing (code)."""
    pair_mask: Literal["valid", "none"] = "valid"
    """valid: pairs with an ignored, padded or mixed-in cell do not count. none: all count, ignore is a class (code)."""


class PropagationConfig(Config):
    """`method.prop.*`: the map along which logits spread."""

    input: Literal["raw", "normalised"] = Field("raw", json_schema_extra=choices(["raw", "normalised"]))
    """raw: products of the projections, scaled per order (code). normalised: the similarity maps' sum (paper)."""
    temp: float = Field(1.0, gt=0.0, json_schema_extra=choices([0.05, 0.1, 0.2, 1.0]))
    """Temperature of the row softmax; normalised cosine maps need about 0.1."""


@dataclass(frozen=True)
class DerivativeMaps:
    """The maps of orders 0..order of given projections, and their losses as (total, normaliser)."""

    deriv: DerivativeConfig
    prop: PropagationConfig
    order: int
    kernel: tuple[float, ...]
    num_classes: int

    def propagation_factors(self, projections: Projections) -> tuple[Tensor, Tensor]:
        """Factors (left_BCN, right_BCN) of the map along which logits spread: orders 0 and 1, at most `order`."""
        sides = tuple(
            similarity.propagation_factor(
                side,
                min(self.order, 1),
                similarity=None if self.prop.input == "raw" else self.deriv.sim,
                temperature=self.prop.temp,
                kernel=self.kernel,
                absolute=self.deriv.abs,
            )
            for side in projections.sides
        )
        return sides[0], sides[-1]

    def factors(self, projections: Projections, order: int) -> tuple[Tensor, Tensor]:
        """Factors of the similarity map of an order."""
        sides = tuple(
            similarity.similarity_factor(side, order, self.deriv.sim, self.kernel, self.deriv.abs)
            for side in projections.sides
        )
        return sides[0], sides[-1]

    def label_match(self, projections: Projections, labels_BN: Tensor) -> tuple[Tensor, Tensor]:
        """L_der_l: mean over orders of sum |A^(n) - T^(n)|, T = t where two cells have one label, else 0; and pairs."""
        if self.deriv.pair_mask == "valid":
            counted_BN, num_classes = labels_BN != IGNORE, self.num_classes
        else:  # as in the code, ignored cells are alike
            counted_BN, num_classes = torch.ones_like(labels_BN, dtype=torch.bool), self.num_classes + 1
            labels_BN = labels_BN.where(labels_BN != IGNORE, self.num_classes)
        projections = projections if self.deriv.labeled_grad else projections.detach()
        pairs = []
        for order in range(self.order + 1):
            left_BCN, right_BCN = self.factors(projections, order)
            channels = similarity.remaining_channels(projections.first_BDN.shape[1], order, self.kernel)
            scale = similarity.label_scale(channels, self.deriv.sim)
            target_BKN = similarity.label_factor(labels_BN, num_classes, scale)
            pairs.append(similarity.map_distance(left_BCN, right_BCN, target_BKN, target_BKN, counted_BN))
        return _mean_of_orders(pairs)

    def view_match(self, strong: Projections, weak: Projections, counted_BN: Tensor) -> tuple[Tensor, Tensor]:
        """L_der_u: mean over orders of sum |A_strong^(n) - sg A_weak^(n)| over counted pairs; and pairs."""
        if self.deriv.pair_mask == "none":
            counted_BN = torch.ones_like(counted_BN)
        weak = weak.detach()
        return _mean_of_orders(
            [
                similarity.map_distance(*self.factors(strong, order), *self.factors(weak, order), counted_BN)
                for order in range(self.order + 1)
            ]
        )

    def sparsity(self, projections: Projections) -> tuple[Tensor, Tensor]:
        """L_sp: sum of |Op^(order+1) nu(f)| over images, channels and cells, mean over sides; and their number."""
        first_BDN = projections.first_BDN
        if self.deriv.sparsity_form == "constant":
            count = first_BDN.new_full((), float(len(first_BDN)), dtype=torch.float32)
            return count / first_BDN.shape[2], count
        totals = []
        for side in projections.sides:
            normal_BDN = similarity.normalise(side, self.deriv.sim)
            derived_BDN = similarity.channel_derivative(normal_BDN, self.order + 1, self.kernel, self.deriv.abs)
            totals.append(derived_BDN.abs().sum())
        total = torch.stack(totals).mean()
        return total, total.detach().new_full((), float(derived_BDN.numel()))


def _mean_of_orders(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([total for total, _ in pairs]).mean(), pairs[0][1]  # the same pairs in every order
