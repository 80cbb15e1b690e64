"""Settings that CorrMatch and DerProp have in common: `method.*`.

Source: Sun et al. 2024, CorrMatch, CVPR 2024, on which DerProp stands. Where paper and code differ, `preset` chooses.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raysemi.base import Config, PresetConfig, choices, search
from raysemi.ops.losses import Criterion

KlTarget = Literal["pasted", "unpasted", "drop_box"]


class ThresholdConfig(Config):
    """`method.threshold.*`: from which confidence on a pseudo-label is trusted."""

    mode: Literal["dynamic", "fixed"] = Field("dynamic", json_schema_extra=choices(["dynamic", "fixed"]))
    """dynamic: follows the mean over present classes of their largest confidence. fixed: `initial` for ever."""
    initial: float = Field(0.85, gt=0.0, le=1.0, json_schema_extra=choices([0.65, 0.75, 0.85, 0.95]))
    """Threshold before the first step, a probability."""
    momentum: float = Field(
        0.999, ge=0.0, lt=1.0, json_schema_extra=choices([0.99, 0.999, 0.9995], requires={"mode": ["dynamic"]})
    )
    """Share of the old threshold that a step keeps."""
    ignore: Literal["base", "pasted"] = "base"
    """Pixels that count: valid ones of the weak view, or (the reference) those of the mixed view."""


class FeaturePerturbationConfig(Config):
    """`method.fp.*`."""

    weight: float = Field(0.25, ge=0.0, json_schema_extra=search(0.05, 0.5))
    """Coefficient of L_fp, the loss on features with half of the channels dropped; 0 spares its decoder pass."""


class RegionConfig(Config):
    """`method.region.*`: segments, rows of the map, that overwrite pseudo-labels."""

    enable: bool = True
    """False: pseudo-labels and trusted pixels stay as they are."""
    segments: int = Field(128, ge=1, le=4096, json_schema_extra=choices([16, 32, 64, 128, 256]))
    """S, rows of the map that are sampled; the same rows for all images of a step."""
    rows: Literal["random", "uniform", "reference"] = Field("random", json_schema_extra=choices(["random", "uniform"]))
    """random: with replacement. uniform: evenly spaced. reference: random, but the last cell is never drawn."""
    impl: Literal["auto", "oracle", "loop", "bitplane"] = "auto"
    """Implementation (`ops.regions`); all give the same bits."""


class CutMixConfig(Config):
    """`method.cutmix.*`."""

    partner: Literal["pair", "second_view", "momentum_view"] = "pair"
    """Whose pixels fill the box. pair: of the neighbouring slot, nothing is computed twice. second_view: of another
    view of the same image, labeled by the student in eval mode. momentum_view: the same, labeled by the momentum
    network (the reference of DerProp)."""

    @property
    def pairs(self) -> bool:
        """True when neighbouring images are mixed with each other."""
        return self.partner == "pair"


class SpreadingConfig(PresetConfig):
    """What both methods spread labels by, and the coefficients of the losses that both have."""

    name: str
    preset: Literal["raysemi", "reference", "paper"] = "raysemi"
    """Set of defaults; a key that is given wins."""
    threshold: ThresholdConfig = ThresholdConfig()
    region: RegionConfig = RegionConfig()
    cutmix: CutMixConfig = CutMixConfig()
    criterion: Criterion = Criterion()
    """Loss of the labeled images."""
    labeled_weight: float = Field(0.5, ge=0.0, json_schema_extra=search(0.25, 1.0))
    """Coefficient of L_x, and of L_xc unless that has its own."""
    labeled_propagated_weight: float | None = Field(None, ge=0.0, json_schema_extra=choices([None, 0.05, 0.25]))
    """Coefficient of L_xc, the loss of propagated logits of labeled images; null: `labeled_weight`. Lower it where a
    crop has few cells: labels that they cannot draw would move the encoder more than L_x does."""
    strong_weight: float = Field(0.25, ge=0.0, json_schema_extra=search(0.05, 0.5))
    """Coefficient of the cross-entropy of strong views."""
    kl_weight: float = Field(0.25, ge=0.0, json_schema_extra=search(0.05, 0.5))
    """Coefficient of L_kl, the divergence of strong views from the distribution that they are taught."""
    kl_target: KlTarget = "pasted"
    """Distribution inside the CutMix box, of all soft terms: the source's, (code) the wrong image's, or none."""
    kl_mask: Literal["base", "expanded"] = "base"
    """Pixels of the divergence: trusted before, or after region propagation."""
    propagated_weight: float = Field(0.25, ge=0.0, json_schema_extra=search(0.05, 0.5))
    """Coefficient of L_c, the loss of propagated logits of unlabeled images."""
    fp: FeaturePerturbationConfig = FeaturePerturbationConfig()

    @property
    def labeled_weights(self) -> tuple[float, float]:
        """Coefficients of L_x and of L_xc."""
        own = self.labeled_propagated_weight
        return self.labeled_weight, self.labeled_weight if own is None else own
