"""The registry: name -> (config, class). Adding a method adds one file and one line here."""

from __future__ import annotations

from raysemi.base import Config
from raysemi.methods.ael import AEL, AELConfig
from raysemi.methods.augseg import AugSeg, AugSegConfig
from raysemi.methods.base import Method
from raysemi.methods.corrmatch import CorrMatch, CorrMatchConfig
from raysemi.methods.derprop import DerProp, DerPropConfig
from raysemi.methods.fixmatch import FixMatch, FixMatchConfig
from raysemi.methods.mean_teacher import MeanTeacher, MeanTeacherConfig
from raysemi.methods.supervised import Supervised, SupervisedConfig
from raysemi.methods.u2pl import U2PL, U2PLConfig
from raysemi.methods.unimatch import UniMatch, UniMatchConfig
from raysemi.methods.unimatch_v2 import UniMatchV2, UniMatchV2Config

METHODS: dict[str, tuple[type[Config], type[Method]]] = {
    "supervised": (SupervisedConfig, Supervised),
    "fixmatch": (FixMatchConfig, FixMatch),
    "mean_teacher": (MeanTeacherConfig, MeanTeacher),
    "unimatch": (UniMatchConfig, UniMatch),
    "unimatch_v2": (UniMatchV2Config, UniMatchV2),
    "corrmatch": (CorrMatchConfig, CorrMatch),
    "derprop": (DerPropConfig, DerProp),
    "u2pl": (U2PLConfig, U2PL),
    "augseg": (AugSegConfig, AugSeg),
    "ael": (AELConfig, AEL),
}
