"""CorrMatch: labels spread over the image along a map of feature correlations, pixel by pixel and by whole regions.

The student labels the weak view. A map of the correlation of all pairs of cells spreads its logits, as one more
prediction that labels and pseudo-labels teach; rows of the map, cut to shapes, overwrite pseudo-labels of regions that
are mostly sure and mostly of one class. One threshold follows the confidence of the student. Nothing of it runs at
inference.

Observed: as `derprop`, without what belongs to its blend.

Source: Sun et al. 2024, CorrMatch, CVPR 2024, eqs. 1-12, and its code; where the two differ, `preset` chooses. Differs
from both: CutMix pastes from the neighbouring slot, nothing depends on the number of ranks (see `propagation`).
Axes: L labeled, U unlabeled, B any images, K classes, C channels of a map's factor, N cells, H x W pixels.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from pydantic import Field, create_model, field_validator
from torch import Tensor, nn

from raysemi.base import Config, choices
from raysemi.data.types import SemiBatch
from raysemi.methods.base import Average, Method, StepContext
from raysemi.methods.passes import HIDDEN, Projections, Source, View, channels_read, strong_pass, weak_pass
from raysemi.methods.propagation import (
    labeled_pair,
    lessons,
    observe_taught,
    propagated,
    soft_targets,
    teach,
)
from raysemi.methods.propagation_config import CutMixConfig, SpreadingConfig
from raysemi.models.heads import CorrelationHead
from raysemi.models.segmentor import Channels
from raysemi.ops.losses import Objective, kl_divergence, unsupervised

_HALF = 0.5  # the published total is the half-sum of the supervised and the unsupervised side

PRESETS: dict[str, dict[str, Any]] = {
    "raysemi": {},
    "reference": {
        "threshold": {"ignore": "pasted"},
        "region": {"rows": "reference"},
        "cutmix": {"partner": "second_view"},
        "kl_target": "unpasted",
    },
    "paper": {"strong_weight": 0.5, "fp": {"weight": 0.0}},
}
"""Preset -> the defaults that it changes."""


_SOURCE: dict[str, Any] = {
    "from": (
        Source,
        Field(
            "encoder",
            description="Behind what the projections stand: the encoder, the decoder's pyramid, its last convolution "
            "before the classifier, or the class scores (Table 7), always at the cells of the encoder's last map. "
            "Behind the encoder no loss of propagated logits teaches the decoder.",
            json_schema_extra=choices(list(get_args(Source))),
        ),
    )
}
_From: Any = create_model("_From", __base__=Config, **_SOURCE)  # no class body can declare it: a word of Python


class CorrelationConfig(_From):
    """`method.corr.*`: the correlation map."""

    dim: int | None = Field(None, ge=1, json_schema_extra=choices([None, 64, 128]))
    """D, channels of each of its two projections; null = as many as classes (code)."""
    scale: Literal["inside", "outside"] = "inside"
    """Where 1 / sqrt(D) stands: inside the softmax (code), or outside of it (as the paper writes)."""
    norm: Literal["source", "target"] = "source"
    """Whose shares add up to 1: those that a cell hands out (code), or those that it receives."""

    @property
    def source(self) -> Source:
        """`from`."""
        read: Source = getattr(self, "from")
        return read


class CorrMatchConfig(SpreadingConfig):
    """`method.*` of `corrmatch`."""

    presets = PRESETS
    name: Literal["corrmatch"] = "corrmatch"
    preset: Literal["raysemi", "reference", "paper"] = "raysemi"
    """Set of defaults; a key that is given wins. reference: as the released code. paper: without the loss on perturbed
    features."""
    corr: CorrelationConfig = CorrelationConfig()
    average: Average = Average()
    """Averaged copy that is evaluated; none by default, as in the paper."""

    @field_validator("cutmix")
    @classmethod
    def _no_momentum_network(cls, cutmix: CutMixConfig) -> CutMixConfig:
        if cutmix.partner == "momentum_view":
            raise ValueError(
                "partner must be pair or second_view, corrmatch keeps no momentum network; got momentum_view. Use pair"
            )
        return cutmix


class CorrMatch(Method):
    """Label propagation along correlations."""

    threshold: Tensor
    strong_views = 1
    weighted = True
    unlabeled_optional = True

    def __init__(self, config: CorrMatchConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.config = config
        self.classes = num_classes
        self.channels = config.corr.dim or num_classes
        self.average = config.average
        self.second_view = not config.cutmix.pairs
        self.register_buffer("threshold", torch.tensor(config.threshold.initial, dtype=torch.float32))

    def heads(self, channels: Channels) -> dict[str, nn.Module]:
        """Both projections."""
        read = channels_read(channels, self.classes, self.config.corr.source)
        return {"correlation": CorrelationHead(read, self.channels, HIDDEN)}

    def objectives(self, batch: SemiBatch, context: StepContext) -> dict[str, Objective]:
        """All terms; without unlabeled images those of the labeled ones alone."""
        config, num_labeled = self.config, len(batch.image_L3HW)
        own, spread = config.labeled_weights
        both, perturbed_UKHW = weak_pass(batch, context, config.fp.weight > 0.0, config.corr.source)
        spread_BKHW = self._spread(both)
        terms = labeled_pair(
            config.criterion,
            both.logits_BKHW[:num_labeled],
            spread_BKHW[:num_labeled],
            batch.label_LHW,
            (_HALF * own, _HALF * spread),
            context,
        )
        if len(batch.weak_U3HW) == 0:
            return terms

        weak = both.images(slice(num_labeled, None))
        factors = self._factors(weak.projections)
        strong_U3HW, taught = teach(
            config, weak.logits_BKHW, self.threshold, factors, weak.cells, batch, context, self.training
        )
        observe_taught(taught, taught.base.label_UHW, self.threshold, batch, context)
        strong = strong_pass(strong_U3HW, batch, context, config.corr.source)

        views = both.images(slice(num_labeled)), weak, strong
        weak_lesson, strong_lesson = lessons(self.weighting, config, views, taught, batch, context)
        distribution_UKHW, allowed_UHW = soft_targets(taught, config.kl_target, batch.boxes_VU4[0])
        kept_UHW = (taught.trusted_UHW if config.kl_mask == "base" else taught.expanded_UHW) & allowed_UHW
        divergence = kl_divergence(strong.logits_BKHW, distribution_UKHW, kept_UHW * strong_lesson.weight_UHW)
        pairs = {
            "strong": (config.strong_weight, strong_lesson.loss(strong.logits_BKHW)),
            "kl": (config.kl_weight, strong_lesson.over_valid(divergence)),
            "propagated_strong": (0.5 * config.propagated_weight, strong_lesson.loss(self._spread(strong))),
            "propagated_weak": (0.5 * config.propagated_weight, weak_lesson.loss(spread_BKHW[num_labeled:])),
        }
        if perturbed_UKHW is not None:
            pairs["perturbed"] = (config.fp.weight, weak_lesson.loss(perturbed_UKHW))
        return terms | {name: unsupervised(pair, _HALF * weight) for name, (weight, pair) in pairs.items()}

    def _factors(self, projections: Projections) -> tuple[Tensor, Tensor]:
        """Factors of the map before its softmax."""
        scale = self.channels**-0.5 if self.config.corr.scale == "inside" else 1.0
        return projections.first_BDN * scale, projections.second_BDN

    def _spread(self, view: View) -> Tensor:
        """Its logits, spread along its own map: [B, K, H, W]."""
        corr = self.config.corr
        spread_BKHW = propagated(view.logits_BKHW, *self._factors(view.projections), view.cells, corr.norm)
        return spread_BKHW if corr.scale == "inside" else spread_BKHW * self.channels**-0.5
