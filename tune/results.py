"""The tables of a sweep's page: what was tried, what came of it on how many seeds, and what it took."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raysemi.report.html import number
from raysemi.report.runs import Spread
from raysemi.tune.spaces import Cell, Draw
from raysemi.tune.study import Trial, as_text, best_of, best_of_each
from raysemi.tune.sweep import SweepConfig


@dataclass(frozen=True)
class GridRow:
    """A line of a grid."""

    label: str
    cell: Cell
    settings: str
    miou: Spread | None
    """Over the seeds that have finished."""
    published: float | None
    unfinished: int
    """Seeds that failed or are to come."""
    best: bool = False

    @property
    def difference(self) -> float | None:
        """Points above the published number."""
        return None if self.miou is None or self.published is None else self.miou.mean - self.published


@dataclass(frozen=True)
class Repeated:
    """A trial's settings, or a recipe's, on new seeds."""

    name: str
    draw: Draw
    first: float | None
    """mIoU of the trial itself, for which it was chosen."""
    by_seed: dict[int, float]
    miou: Spread
    stopped: int | None = None
    """Step of `first` where the trial was stopped early."""
    recipe: Spread | None = None
    """The recipe of its method on the same seeds; None where it is the recipe itself."""
    above: Spread | None = None
    """Points above that recipe, seed by seed, where both have finished."""
    wins: int = 0
    """Seeds on which it is above."""


@dataclass(frozen=True)
class MethodRow:
    """The best of a method."""

    name: str
    count: int
    """Finished trials."""
    best: Trial
    """Of the trials; one that was stopped early where none finished."""
    again: Spread | None
    """Of its repeats, or over a grid's seeds."""
    repeated: Repeated | None = None
    """Its repeats; a grid has none."""


def settings_of(trial: Trial) -> str:
    """A trial's own settings in a line."""
    said = " ".join(f"{path}={_short(value)}" for path, value in trial.draw.settings.items())
    return said or "the recipe as it is"


def headline(sweep: SweepConfig, finished: Sequence[Trial], repeats: Sequence[Trial], rows: Sequence[GridRow]) -> str:
    """The result in a sentence."""
    if not finished:
        return "No trial has finished yet."
    if rows:
        row = next((row for row in rows if row.best), None)
        if row is None or row.miou is None:
            return "No row has finished yet."
        return f"{row.label} is best: {number(row.miou)} % mIoU over {_seeds(row.miou)}, of {len(rows)} rows."
    first = finished[0]
    said = f"Trial {first.number}, {first.draw.cell}, reaches {number(first.miou)} % mIoU"
    one = next((one for one in repeated(finished, repeats) if one.draw == first.draw), None)
    if one is None:
        return f"{said}, on one seed."
    said += f"; on {_seeds(one.miou, 'new ')} {number(one.miou)} %"
    if one.above is None:
        return f"{said}."
    side = "above" if one.above.mean >= 0 else "below"
    return f"{said}, {abs(one.above.mean):.1f} points {side} the recipe as it is on the same seeds."


def numbers(folder: Path, trials: Sequence[Trial], repeats: Sequence[Trial]) -> dict[str, Any]:
    """Counts by state and hours of trials, and of repeats; hours of the clock."""
    parts = [("trials", trials)] + ([("repeats", repeats)] if repeats else [])
    clock = folder / "clock.json"
    return {
        "rows": [
            {
                "name": name,
                "count": len(lines),
                "states": {state: sum(one.state == state for one in lines) for state in _STATES},
                "hours": sum(one.hours for one in lines),
            }
            for name, lines in parts
        ],
        "clock_s": Spread(json.loads(clock.read_text())["seconds"], None, 1) if clock.is_file() else None,
    }


_STATES = ("finished", "pruned", "failed", "running", "waiting")


def fixed(sweep: SweepConfig) -> list[tuple[str, str]]:
    """What all trials have in common, and how they were chosen."""
    search, prune = sweep.search, sweep.prune
    budget = f", at most {search.hours:g} hours" if search.hours else ""
    how = "grid" if search.name == "grid" else f"{search.name}, {search.trials} trials{budget}, seed {search.seed}"
    early = "none" if prune.name == "none" else f"{prune.name}, from step {prune.grace or 'of the first evaluation'}"
    each = f"{sweep.resources.workers} × {sweep.resources.cpus} CPU cores"
    each += f", {sweep.resources.gpus:g} GPU" if sweep.resources.gpus else ""
    return [
        ("recipes", f"{sweep.recipes}-METHOD"),
        ("methods", ", ".join(sweep.methods)),
        ("weightings", ", ".join(sweep.weightings)),
        ("gradient rules", ", ".join(sweep.gradients)),
        *((path, as_text(value)) for path, value in sweep.set.items()),
        ("seeds", ", ".join(map(str, sweep.seeds))),
        ("objectives", ", ".join(sweep.objectives)),
        ("search", how),
        ("stopped early", early),
        ("a trial takes", each),
    ]


def grid(sweep: SweepConfig, trials: Sequence[Trial]) -> list[GridRow]:
    """Its rows in their order, with mean and spread over seeds."""
    published = {row.label: row.published for row in sweep.rows}
    found: list[GridRow] = []
    for label in dict.fromkeys(trial.label for trial in trials if trial.label):
        own = [trial for trial in trials if trial.label == label]
        done = [miou for trial in own if (miou := _scored(trial)) is not None]
        spread, missing = Spread.of(done), len(own) - len(done)
        found.append(GridRow(label, own[0].draw.cell, settings_of(own[0]), spread, published.get(label), missing))
    top = max((row.miou.mean for row in found if row.miou), default=math.nan)
    return [replace(row, best=row.miou is not None and row.miou.mean == top) for row in found]


def methods(trials: Sequence[Trial], repeats: Sequence[Trial], *, grid: bool, by: str = "method") -> list[MethodRow]:
    """The best of each method, best first.

    Args:
        trials: all of the sweep.
        repeats: on new seeds.
        grid: the seeds are those of the rows themselves; the best row is that of the largest mean.
        by: method, or cell: each method with its weighting and gradient rule.
    """
    again = repeated(trials, repeats)
    finished = best_of(list(trials), len(trials))
    found: list[MethodRow] = []
    for name in dict.fromkeys(_group(trial, by) for trial in trials if trial.draw.cell.method):
        own = [trial for trial in finished if _group(trial, by) == name]
        if grid:
            means = [(spread.mean, one, spread) for one in own if (spread := _spread(one.draw, own)) is not None]
            if means:
                _, top, seeds = max(means, key=lambda found: found[0])
                found.append(MethodRow(name, len(own), top, seeds))
            continue
        every = [trial for trial in trials if _group(trial, by) == name]
        best = own[:1] or (best_of_each(every) if by == "method" else [])
        if best:
            one = next((one for one in again if one.draw == best[0].draw), None)
            found.append(MethodRow(name, len(own), best[0], one.miou if one else None, one))
    return sorted(found, key=_place)


def _group(trial: Trial, by: str) -> str:
    return trial.draw.cell.method if by == "method" else str(trial.draw.cell)


def _place(row: MethodRow) -> tuple[float, float]:
    """Repeated ones first: their numbers were not chosen for being large."""
    return (-row.again.mean if row.again else math.inf, -(row.best.miou or 0.0))


def repeated(trials: Sequence[Trial], repeats: Sequence[Trial]) -> list[Repeated]:
    """What was trained on new seeds: the best trials by their mean, then the recipes as they are."""
    by_number = {trial.number: trial for trial in trials}
    ours: list[Repeated] = []
    recipes: dict[Cell, Repeated] = {}
    for draw in _different([one.draw for one in repeats]):
        own = [one for one in repeats if one.draw == draw]
        by_seed = {one.seed: miou for one in own if (miou := _scored(one)) is not None}
        spread = Spread.of(list(by_seed.values()))
        if spread is None:
            continue
        if not draw.settings:
            recipes[draw.cell] = Repeated(f"{draw.cell}: the recipe", draw, None, by_seed, spread)
        if (first := by_number.get(own[0].of if own[0].of is not None else -1)) is not None:
            stopped = first.step if first.state == "pruned" else None
            ours.append(Repeated(f"trial {first.number}, {draw.cell}", draw, first.miou, by_seed, spread, stopped))
    compared = []
    for one in ours:
        recipe = recipes.get(one.draw.cell)
        if recipe is not None and recipe.draw != one.draw:
            both = sorted(one.by_seed.keys() & recipe.by_seed.keys())
            above = [one.by_seed[seed] - recipe.by_seed[seed] for seed in both]
            wins = sum(points > 0 for points in above)
            one = replace(one, recipe=recipe.miou, above=Spread.of(above), wins=wins)
        compared.append(one)
    compared.sort(key=lambda one: -one.miou.mean)
    return [*compared, *(recipe for recipe in recipes.values() if all(recipe.draw != one.draw for one in ours))]


def cost(trials: Sequence[Trial], repeats: Sequence[Trial]) -> list[tuple[str, str, str, str, str]]:
    """(what, how many, median, least, largest): hours of trials by state, time from start to first step."""
    every = [*trials, *repeats]
    rows = [
        (f"hours of a {state} trial", [one.hours for one in every if one.state == state and one.hours])
        for state in ("finished", "pruned", "failed")
    ]
    rows.append(("seconds from its start to its end", [one.seconds for one in every if one.seconds]))
    starts = [one.first_step_s for one in every if one.first_step_s is not None]
    rows.append(("seconds from its start to its first step", starts))
    return [
        (name, str(len(values)), *(f"{of(values):.3g}" for of in (statistics.median, min, max)))  # type: ignore[misc]
        for name, values in rows
        if values
    ]


def _different(draws: Sequence[Draw]) -> list[Draw]:
    """Without repetition."""
    found: list[Draw] = []
    for draw in draws:
        if draw not in found:
            found.append(draw)
    return found


def _spread(draw: Draw, trials: Sequence[Trial]) -> Spread | None:
    scores = [miou for one in trials if one.draw == draw and (miou := _scored(one)) is not None]
    return Spread.of(scores)


def _scored(trial: Trial) -> float | None:
    if trial.state != "finished" or trial.miou is None or not math.isfinite(trial.miou):
        return None
    return trial.miou


def _seeds(spread: Spread, kind: str = "") -> str:
    return f"{spread.count} {kind}{'seed' if spread.count == 1 else 'seeds'}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else as_text(value)
