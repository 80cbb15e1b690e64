"""The registry: name -> (config, class). Adding a method adds one file and one line here."""

from __future__ import annotations

from raysemi.base import Config
from raysemi.methods.augseg import AugSeg, AugSegConfig
from raysemi.methods.base import Method
from raysemi.methods.derprop import DerProp, DerPropConfig
from raysemi.methods.fixmatch import FixMatch, FixMatchConfig
from raysemi.methods.supervised import Supervised, SupervisedConfig

METHODS: dict[str, tuple[type[Config], type[Method]]] = {
    "supervised": (SupervisedConfig, Supervised),
    "fixmatch": (FixMatchConfig, FixMatch),
    "derprop": (DerPropConfig, DerProp),
    "augseg": (AugSegConfig, AugSeg),
}
