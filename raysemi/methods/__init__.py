"""The registry: name -> (config, class). Adding a method adds one file and one line here."""

from __future__ import annotations

from torch import nn

from raysemi.base import Config
from raysemi.methods.fixmatch import FixMatch, FixMatchConfig
from raysemi.methods.supervised import Supervised, SupervisedConfig

METHODS: dict[str, tuple[type[Config], type[nn.Module]]] = {
    "supervised": (SupervisedConfig, Supervised),
    "fixmatch": (FixMatchConfig, FixMatch),
}
