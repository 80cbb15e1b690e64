"""DerProp: pseudo-labels rectified along similarity maps, which are trained on features and on their derivatives.

The student labels the weak view. Its logits, spread along the map of orders 0 and 1, are blended in more and more as
training goes on; the strong view, the perturbed features and the propagated logits learn from the blend. The maps learn
the labels' map and the weak view's map in every order up to `order`; the next order is kept sparse. An average over
periods is the network that is evaluated; with `labeler=momentum` it also takes the student's place on the weak view.

Observed, maps of the un-mixed unlabeled images: "pseudo" (argmax before propagation), "propagated" (the final label:
blended, regions applied), "confidence", "trusted_before" and "trusted" (kept pixels before and after regions); inside a
CutMix box, where the partner is taught, they show what the image itself has, without regions. Scalars: "threshold",
"alpha", "kept_ratio" (of the mixed images), and the mean confidences (at the cells) "confidence_raw",
"confidence_propagated", "confidence_blended", whose scales differ since columns of the map do not sum to 1.

Source: "Semi-Supervised Semantic Segmentation via Derivative Label Propagation", eqs. 2-12, and its code, which stands
on CorrMatch (Sun et al. 2024). Where the two differ, `preset` chooses. Differs from both: labels are read at the cells
instead of interpolated, the scale of the labels' map is fixed, nothing depends on the number of ranks.
Axes: L labeled, U unlabeled, B any images, K classes, D channels, N cells, H x W pixels.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from raysemi.base import Config, choices, search
from raysemi.data.types import SemiBatch
from raysemi.errors import ConfigError
from raysemi.methods.base import Average, Method, StepContext
from raysemi.methods.derivative_maps import DerivativeConfig, DerivativeMaps, PropagationConfig
from raysemi.methods.passes import HIDDEN, View, labeled_and_strong_pass, momentum_pass, strong_pass, weak_pass
from raysemi.methods.propagation import (
    Lesson,
    Pair,
    Taught,
    labeled_pair,
    lessons,
    observe_taught,
    propagated,
    soft_targets,
    teach,
)
from raysemi.methods.propagation_config import SpreadingConfig
from raysemi.models.decoders import resize
from raysemi.models.heads import CorrelationHead
from raysemi.models.segmentor import Channels
from raysemi.ops.cells import at_nodes, outside_box
from raysemi.ops.losses import (
    Objective,
    kl_divergence,
    soft_cross_entropy,
    supervised,
    unsupervised,
)
from raysemi.ops.pseudo_label import confidence_and_label
from raysemi.ops.similarity import remaining_channels

_HALF = 0.5  # the published total is the half-sum of the supervised and the unsupervised side


class MomentumConfig(Config):
    """`method.momentum.*`: the network that is evaluated."""

    enable: bool | None = None
    """null: on, unless `dlp` or `deriv.loss` is off, as in the paper's tables; on whenever it is the `labeler`."""
    ratio: float = Field(0.5, gt=0.0, lt=1.0, json_schema_extra=choices([0.5, 0.7, 0.9]))
    """Share that it keeps at each update, once a `train.period`."""
    at: Literal["end", "start"] = "end"
    """end: at the end of each period. start: at the start of the next (code)."""


PRESETS: dict[str, dict[str, Any]] = {
    "raysemi": {},
    "reference": {
        "deriv": {"dim": "classes", "labeled_grad": False, "sparsity_form": "constant", "pair_mask": "none"},
        "threshold": {"ignore": "pasted"},
        "region": {"rows": "reference"},
        "cutmix": {"partner": "momentum_view"},
        "momentum": {"at": "start"},
        "kl_target": "unpasted",
    },
    "paper": {
        "deriv": {"sim": "cosine", "heads": "shared"},
        "prop": {"input": "normalised", "temp": 0.1},
        "strong_target": "hard",
    },
}
"""Preset -> the defaults that it changes."""


class DerPropConfig(SpreadingConfig):
    """`method.*` of `derprop`."""

    presets = PRESETS
    name: Literal["derprop"] = "derprop"
    preset: Literal["raysemi", "reference", "paper"] = "raysemi"
    """Set of defaults; a key that is given wins. reference: as the released code, terms that train nothing included.
    paper: cosine, one projection, hard labels."""
    order: int = Field(1, ge=0, le=8, json_schema_extra=choices([0, 1, 2]))
    """Largest order of the derivative whose map is matched; the logits spread along orders 0 and 1 at most."""
    kernel: tuple[float, ...] = Field((-1.0, 1.0), min_length=2, json_schema_extra=choices([[-1, 1], [-1, 0, 1]]))
    """Coefficients of the derivative along channels: (-1, 1) forward, (-1, 0, 1) wide, (1, 1) sum."""
    sparsity: float = Field(0.5, ge=0.0, json_schema_extra=search(0.02, 1.0, log=True))
    """lambda: coefficient of the sparsity of the next order, times `deriv.weight`; 0 = without."""
    deriv: DerivativeConfig = DerivativeConfig()
    prop: PropagationConfig = PropagationConfig()
    labeler: Literal["student", "momentum"] = Field(
        "student", json_schema_extra=choices(["student", "momentum"], beside={"momentum": {"fp.weight": 0.0}})
    )
    """Who sees the weak views, and so makes the pseudo-labels and the maps that strong views must match. student: as
    published, taught by its own weak views too. momentum: the averaged network, in eval mode; the student sees the
    strong views in one pass with the labeled images. About a fifth cheaper, steadier where few images share
    BatchNorm's statistics; without L_fp and the weak half of L_c."""
    dlp: bool = True
    """False: raw pseudo-labels, no map losses, no momentum network unless it labels (the paper's "w/o DLP")."""
    ramp: Literal["epoch", "step"] = Field("epoch", json_schema_extra=choices(["epoch", "step"]))
    """How alpha, the share of propagated logits, grows from 0: once a `train.period`, or every step."""
    alpha_max: float = Field(1.0, ge=0.0, le=1.0, json_schema_extra=choices([0.5, 0.75, 1.0]))
    """alpha at the end of the run."""
    momentum: MomentumConfig = MomentumConfig()
    strong_target: Literal["soft", "hard"] = Field("soft", json_schema_extra=choices(["soft", "hard"]))
    """soft: the blended distribution (code). hard: the label after region propagation (paper)."""

    @field_validator("kernel")
    @classmethod
    def _kernel_acts(cls, kernel: tuple[float, ...]) -> tuple[float, ...]:
        if not any(kernel):
            raise ValueError(f"must have a coefficient other than 0; got {list(kernel)}. Use [-1, 1]")
        return kernel

    @model_validator(mode="after")
    def _source_exists(self) -> DerPropConfig:
        if self.cutmix.partner == "momentum_view" and not self.has_momentum:
            raise ValueError(
                "cutmix.partner must be pair or second_view when no momentum network is kept; got momentum_view. "
                "Set momentum.enable to true, or the partner to pair"
            )
        if self.labeler == "momentum" and not self.has_momentum:
            raise ValueError(
                "labeler must be student when no momentum network is kept; got momentum. Set momentum.enable to true, "
                "or the labeler to student"
            )
        if self.labeler == "momentum" and self.fp.weight > 0.0:
            raise ValueError(
                "fp.weight must be 0 with the labeler momentum, since the student sees no weak view; "
                f"got {self.fp.weight}. Set fp.weight=0, or the labeler to student"
            )
        return self

    @property
    def matches_maps(self) -> bool:
        """True when the maps have losses of their own."""
        return self.dlp and self.deriv.loss

    @property
    def has_momentum(self) -> bool:
        """True when the momentum network is kept."""
        needed = self.matches_maps or self.labeler == "momentum"
        return needed if self.momentum.enable is None else self.momentum.enable


def projected_channels(config: DerPropConfig, num_classes: int) -> int:
    """D, channels of a projection.

    Raises:
        ConfigError: the derivative of order + 1, which the sparsity needs, would have no channel left.
    """
    dim = config.deriv.dim
    channels = num_classes if dim == "classes" else max(num_classes, 16) if dim is None else dim
    if remaining_channels(channels, config.order + 1, config.kernel) < 1:
        raise ConfigError(
            f"method.order must leave a channel to the next order, D - (order + 1) * {len(config.kernel) - 1} >= 1 "
            f"with D = {channels} channels; got {config.order}. Lower it, or raise method.deriv.dim."
        )
    return channels


class DerProp(Method):
    """Derivative label propagation."""

    threshold: Tensor
    strong_views = 1
    weighted = True
    unlabeled_optional = True

    def __init__(self, config: DerPropConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.config = config
        self.channels = projected_channels(config, num_classes)
        self.maps = DerivativeMaps(config.deriv, config.prop, config.order, config.kernel, num_classes)
        self.second_view = not config.cutmix.pairs
        kept = config.momentum
        self.average = Average(kind="period", ratio=kept.ratio, at=kept.at) if config.has_momentum else Average()
        self.register_buffer("threshold", torch.tensor(config.threshold.initial, dtype=torch.float32))

    def heads(self, channels: Channels) -> dict[str, nn.Module]:
        """The projections."""
        shared = self.config.deriv.heads == "shared"
        return {"correlation": CorrelationHead(channels.maps[-1], self.channels, HIDDEN, shared)}

    def alpha(self, step: int, steps: int, period: int) -> float:
        """Share of propagated logits in the blend, in [0, alpha_max); 0 in the first period."""
        if not self.config.dlp:
            return 0.0
        reached = step if self.config.ramp == "step" else step // period * period
        return self.config.alpha_max * reached / steps

    def objectives(self, batch: SemiBatch, context: StepContext) -> dict[str, Objective]:
        """All terms; without unlabeled images those of the labeled ones alone."""
        if len(batch.weak_U3HW) == 0:
            return self._labeled_terms(weak_pass(batch, context, perturb=False)[0], batch, context)

        if self.config.labeler == "momentum":
            weak = momentum_pass(batch, context)
            strong_U3HW, taught, _ = self._taught(weak, batch, context)
            labeled, strong = labeled_and_strong_pass(strong_U3HW, batch, context)
            spread_UKHW, perturbed_UKHW = None, None
        else:
            both, perturbed_UKHW = weak_pass(batch, context, perturb=self.config.fp.weight > 0.0)
            num_labeled = len(batch.image_L3HW)
            labeled, weak = both.images(slice(num_labeled)), both.images(slice(num_labeled, None))
            strong_U3HW, taught, spread_UKHW = self._taught(weak, batch, context)
            strong = strong_pass(strong_U3HW, batch, context)

        terms = self._labeled_terms(labeled, batch, context)
        views = labeled, weak, strong
        weak_lesson, strong_lesson = lessons(self.weighting, self.config, views, taught, batch, context)
        pairs = {} if spread_UKHW is None else self._weak_losses(perturbed_UKHW, spread_UKHW, weak_lesson)
        pairs |= self._strong_losses(strong, weak, taught, strong_lesson, batch)
        return terms | {name: unsupervised(pair, _HALF * weight) for name, (weight, pair) in pairs.items()}

    def _spread(self, view: View) -> Tensor:
        """Its logits, spread along its own map: [B, K, H, W]."""
        return propagated(view.logits_BKHW, *self.maps.propagation_factors(view.projections), view.cells)

    def _taught(self, weak: View, batch: SemiBatch, context: StepContext) -> tuple[Tensor, Taught, Tensor]:
        """The mixed strong views; what they and the weak ones are taught; the weak view's spread logits, with gradient
        into its map. Moves the threshold."""
        factors = self.maps.propagation_factors(weak.projections)
        spread_UKHW = propagated(weak.logits_BKHW, *factors, weak.cells)
        alpha = self.alpha(context.step, context.steps, context.period)
        blended_UKHW = weak.logits_BKHW.detach()
        if alpha > 0.0:
            blended_UKHW = (1.0 - alpha) * blended_UKHW + alpha * spread_UKHW.detach()
        strong_U3HW, taught = teach(
            self.config, blended_UKHW, self.threshold, factors, weak.cells, batch, context, self.training
        )
        if context.listener is not None:
            self._observe(weak, spread_UKHW, taught, alpha, batch, context)
        return strong_U3HW, taught, spread_UKHW

    def _labeled_terms(self, labeled: View, batch: SemiBatch, context: StepContext) -> dict[str, Objective]:
        config, spread_LKHW = self.config, self._spread(labeled)
        own, spread = config.labeled_weights
        weights = _HALF * own, _HALF * spread
        terms = labeled_pair(config.criterion, labeled.logits_BKHW, spread_LKHW, batch.label_LHW, weights, context)
        if config.matches_maps:
            match = self.maps.label_match(labeled.projections, at_nodes(batch.label_LHW, labeled.cells))
            terms["derivative_labeled"] = supervised(match, _HALF * config.deriv.weight)
            if config.sparsity > 0.0:
                sparse = self.maps.sparsity(labeled.projections)
                terms["sparsity_labeled"] = supervised(sparse, _HALF * config.deriv.weight * config.sparsity)
        return terms

    def _weak_losses(
        self, perturbed_UKHW: Tensor | None, spread_UKHW: Tensor, lesson: Lesson
    ) -> dict[str, tuple[float, Pair]]:
        """L_fp and the weak half of L_c: taught by un-mixed labels, which no region has changed."""
        losses = {"propagated_weak": (0.5 * self.config.propagated_weight, lesson.loss(spread_UKHW))}
        if perturbed_UKHW is not None:
            losses["perturbed"] = (self.config.fp.weight, lesson.loss(perturbed_UKHW))
        return losses

    def _strong_losses(
        self, strong: View, weak: View, taught: Taught, lesson: Lesson, batch: SemiBatch
    ) -> dict[str, tuple[float, Pair]]:
        """L_soft, L_kl, the strong half of L_c, L_der_u, L_sp of the strong view."""
        config, logits_UKHW = self.config, strong.logits_BKHW
        expanded_UHW, weight_UHW = taught.expanded_UHW, lesson.weight_UHW
        distribution_UKHW, allowed_UHW = soft_targets(taught, config.kl_target, batch.boxes_VU4[0])
        kl_kept_UHW = (taught.trusted_UHW if config.kl_mask == "base" else expanded_UHW) & allowed_UHW
        if config.strong_target == "hard":
            strong_pair = lesson.loss(logits_UKHW)
        else:
            kept_UHW = (expanded_UHW & allowed_UHW) * weight_UHW
            strong_pair = lesson.over_valid(soft_cross_entropy(logits_UKHW, distribution_UKHW, kept_UHW))
        divergence = kl_divergence(logits_UKHW, distribution_UKHW, kl_kept_UHW * weight_UHW)
        losses = {
            "strong": (config.strong_weight, strong_pair),
            "kl": (config.kl_weight, lesson.over_valid(divergence)),
            "propagated_strong": (0.5 * config.propagated_weight, lesson.loss(self._spread(strong))),
        }
        if config.matches_maps:
            size = logits_UKHW.shape[2], logits_UKHW.shape[3]
            # padding is shared by both views; inside the box the weak view shows another image
            counted_UN = at_nodes(batch.valid_UHW, strong.cells) & outside_box(batch.boxes_VU4[0], size, strong.cells)
            match = self.maps.view_match(strong.projections, weak.projections, counted_UN)
            losses["derivative_unlabeled"] = (config.deriv.weight, match)
            if config.sparsity > 0.0:
                sparse = self.maps.sparsity(strong.projections)
                losses["sparsity_strong"] = (config.deriv.weight * config.sparsity, sparse)
        return losses

    def _observe(
        self, weak: View, spread_UKHW: Tensor, taught: Taught, alpha: float, batch: SemiBatch, context: StepContext
    ) -> None:
        pseudo_UHW = weak.logits_BKHW.argmax(dim=1) if alpha > 0.0 else taught.base.label_UHW
        observe_taught(taught, pseudo_UHW, self.threshold, batch, context)
        context.observe("alpha", self.threshold.new_full((), alpha))
        raw, spread = resize(weak.logits_BKHW.detach(), weak.cells), resize(spread_UKHW.detach(), weak.cells)
        valid_UN = at_nodes(batch.valid_UHW, weak.cells)
        blended = (1.0 - alpha) * raw + alpha * spread
        for name, logits_UKhw in (("raw", raw), ("propagated", spread), ("blended", blended)):
            confidence_UN = confidence_and_label(logits_UKhw)[0].flatten(1)
            context.observe(f"confidence_{name}", (confidence_UN * valid_UN).sum() / valid_UN.sum().clamp(min=1))
