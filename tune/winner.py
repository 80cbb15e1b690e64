"""The best trial as a recipe, and the command that trains it again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from raysemi import config_io
from raysemi.errors import ConfigError
from raysemi.tune.spaces import Space
from raysemi.tune.study import Trial, best_of, read
from raysemi.tune.sweep import SweepConfig


@dataclass(frozen=True)
class Recipe:
    """A recipe that was written."""

    file: Path
    trial: Trial
    threads: int
    """Of each rank, for the same bits."""
    workers: int


def write_recipe(folder: Path, out: Path | None = None, number: int | None = None) -> Recipe:
    """Writes a trial as a recipe: what it changes in the one that it began with.

    Args:
        folder: of the sweep.
        out: the file; None: `best.yaml` in the folder.
        number: of the trial; None: the finished one with the largest mIoU.

    Raises:
        ConfigError: no such trial.
    """
    sweep, trials, _ = read(folder)
    trial = _chosen(folder, trials, number)
    space = Space(sweep.recipes, sweep.set, {}, ())
    tree = {"base": space.recipe(trial.draw.cell.method), **_tree(overrides(sweep, trial)), "run": "runs/best"}
    score = "" if trial.miou is None else f", mIoU {trial.miou:.2f} % at step {trial.step}"
    file = out or folder / "best.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)
    file.write_text(f"# Trial {trial.number} of {folder.name}{score}.\n{text}", encoding="utf-8")
    return Recipe(file, trial, sweep.resources.cpus, sweep.resources.workers)


def overrides(sweep: SweepConfig, trial: Trial) -> list[str]:
    """A trial's settings as on the command line, its seed among them."""
    space = Space(sweep.recipes, sweep.set, {}, ())
    return [*space.overrides(trial.draw), f"seed={trial.seed}"]


def command(recipe: Recipe) -> str:
    """What trains it again; on a CPU to the same mIoU."""
    ray = f"ray.num_workers={recipe.workers} ray.cpus_per_worker={recipe.threads}"
    return f"raysemi train {recipe.file} {ray} run=runs/best"


def _chosen(folder: Path, trials: list[Trial], number: int | None) -> Trial:
    if number is None:
        if found := best_of(trials):
            return found[0]
        raise ConfigError(f"sweep must have a finished trial; got {folder} without one. Let it run on.")
    if not 0 <= number < len(trials):
        raise ConfigError(f"--trial must be a trial of {folder}, 0 to {len(trials) - 1}; got {number}. Choose another.")
    return trials[number]


def _tree(settings: list[str]) -> dict[str, object]:
    tree: dict[str, object] = {}
    faults = config_io.apply_overrides(tree, settings)
    assert not faults, faults  # they have trained
    return tree
