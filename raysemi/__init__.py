"""Semi-supervised semantic segmentation from few labels and a large unlabeled pool.

The functions for notebooks and other programs; importing the package itself loads neither torch nor ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raysemi.api import evaluate, load_config, load_exported, load_model, predict, predict_shards, train

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "evaluate",
    "load_config",
    "load_exported",
    "load_model",
    "predict",
    "predict_shards",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("raysemi.api"), name)
    raise AttributeError(f"module 'raysemi' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
