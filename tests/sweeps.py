"""A sweep of tiny runs, for tests: recipes of three methods beside it, and what they need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from makers import tiny_run

from raysemi import config_io

METHODS = ("supervised", "fixmatch", "derprop")


def write_sweep(folder: Path, pools: Path, **settings: Any) -> Path:
    """Recipes `tiny-METHOD.yaml` and `sweep.yaml` in the folder; the sweep's file."""
    for method in METHODS:
        config = tiny_run(pools, folder / "made", method, "train.steps=6", "eval.every=2", "train.checkpoint_every=2")
        (folder / f"tiny-{method}.yaml").write_text(config_io.dump(config), encoding="utf-8")
    tree = {
        "recipes": str(folder / "tiny"),
        "methods": list(METHODS),
        "space": {"optim.lr": {"low": 0.001, "high": 0.1, "log": True}},
        "search": {"trials": 12},
        **settings,
    }
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file
