"""What a sweep's drawings show; where there is nothing to draw, the reason."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from markupsafe import Markup

from raysemi.tune import figures
from raysemi.tune.figures import Axis, Point
from raysemi.tune.spaces import Cell, Parameter, Space
from raysemi.tune.study import Trial, as_text
from raysemi.tune.sweep import SweepConfig

Series = Mapping[Cell, int]
"""Colour of each cell."""
_NO_SPACE = "the space cannot be read; see What was searched."


def history(trials: Sequence[Trial], series: Series, finished: Sequence[Trial]) -> list[tuple[str, str, Markup]]:
    """(title, note, figure): mIoU by trial, and by step."""
    seen = [trial for trial in trials if any(map(math.isfinite, trial.curve.values()))]
    if not seen:
        return []
    begun = [trial for trial in trials if trial.state != "waiting"]
    best = finished[0].number if finished else None
    return [
        ("mIoU by trial", _BY_TRIAL, _markup(figures.history(begun, _colours(begun, series)))),
        ("mIoU by step", _BY_STEP, _markup(figures.curves(seen, _colours(seen, series), best))),
    ]


_BY_TRIAL = (
    "full: finished, hollow: pruned, at its last evaluation, triangle: not at its end, ×: failed; line: the best so "
    "far of the finished ones"
)
_BY_STEP = "solid: finished, the best one thick; dashed to a circle: not finished"


def parallel(space: Space | None, finished: Sequence[Trial]) -> tuple[list[tuple[str, Markup]], str]:
    """A figure a method, over its own parameters."""
    if space is None:
        return [], _NO_SPACE
    found = []
    for method in dict.fromkeys(trial.draw.cell.method for trial in finished):
        own = [trial for trial in finished if trial.draw.cell.method == method]
        columns = _choices_of_parts(own) + _columns(space, own)
        columns = [(axis, values) for axis, values in columns if len({as_text(v) for v in values}) > 1]
        if len(own) < 2 or not columns:
            continue
        short = [_bare(axis, method) for axis, _ in columns]
        lines = list(zip(*(values for _, values in columns), strict=True))
        mious = [trial.miou or 0.0 for trial in own]
        found.append((method, _markup(figures.parallel(short, lines, mious, f"parallel/{method}"))))
    return found, "it takes two finished trials of one method that differ in a parameter."


def slices(space: Space | None, finished: Sequence[Trial], series: Series) -> tuple[list[tuple[str, Markup]], str]:
    """A figure a parameter; the first one is of the methods, where there are several."""
    if space is None:
        return [], _NO_SPACE
    columns = _columns(space, finished)
    cells = tuple(str(cell) for cell in dict.fromkeys(trial.draw.cell for trial in finished))
    if len(cells) > 1:
        columns.insert(0, (Axis("method", cells), [str(trial.draw.cell) for trial in finished]))
    found = []
    for axis, values in columns:
        points = [
            Point(value, trial.miou or 0.0, series[trial.draw.cell], given=not trial.params)
            for trial, value in zip(finished, values, strict=True)
            if value is not None
        ]
        if points:
            found.append((axis.name, _markup(figures.slice_of(axis, points, f"slice/{axis.name}"))))
    return found, "no trial has finished yet." if not finished else "the sweep draws no parameter."


def pareto(sweep: SweepConfig, finished: Sequence[Trial], hours: str) -> tuple[dict[str, Any] | None, str]:
    """The front of mIoU and hours."""
    if "hours" not in sweep.objectives:
        return None, "mIoU is the only objective."
    if not finished:
        return None, "no trial has finished yet."
    best, front = -math.inf, []
    for trial in sorted(finished, key=lambda one: (one.hours, -(one.miou or 0.0))):
        if (trial.miou or 0.0) > best:
            best = trial.miou or 0.0
            front.append(trial)
    return {"svg": _markup(figures.pareto(finished, front, hours)), "front": front}, ""


def cost(trials: Sequence[Trial], hours: str) -> Markup | None:
    """Hours by trial."""
    begun = [trial for trial in trials if trial.state != "waiting"]
    return _markup(figures.cost(begun, hours)) if any(trial.hours for trial in begun) else None


def _columns(space: Space, trials: Sequence[Trial]) -> list[tuple[Axis, list[Any]]]:
    """Each parameter's axis, with the trials' values; None where a trial does not draw it."""
    found = []
    for parameter in space.parameters:
        values = [_as_chosen(parameter, space.value(parameter, trial.draw)) for trial in trials]
        usual = [_as_chosen(parameter, space.bases[cell].get(parameter.path)) for cell in parameter.cells]
        found.append(
            (_axis(parameter, [v for v in values if v is not None], [v for v in usual if v is not None]), values)
        )
    return found


def _axis(parameter: Parameter, values: Sequence[Any], usual: Sequence[Any]) -> Axis:
    """Wide enough for what was given beside what may be drawn."""
    known = {as_text(value): value for value in usual}
    if parameter.choices:
        choices = tuple(dict.fromkeys(map(as_text, (*parameter.choices, *values))))
        return Axis(parameter.name, choices, usual=tuple(v for text, v in known.items() if text in choices))
    low, high = (end(parameter.low, parameter.high, *values) for end in (min, max))
    log = parameter.log and low > 0
    own = tuple(v for v in known.values() if isinstance(v, int | float) and low <= v <= high)
    return Axis(parameter.name, (), low, high, log, parameter.whole, own)


def _as_chosen(parameter: Parameter, value: Any) -> Any:
    """[-1.0, 1.0] as the choice [-1, 1]."""
    return next((choice for choice in parameter.choices if choice == value), value)


def _choices_of_parts(trials: Sequence[Trial]) -> list[tuple[Axis, list[Any]]]:
    """Weighting and gradient rule as axes."""
    found: list[tuple[Axis, list[Any]]] = []
    for part in ("weighting", "gradients"):
        words = [str(getattr(trial.draw.cell, part)) for trial in trials]
        found.append((Axis(part, tuple(sorted(set(words)))), list(words)))
    return found


def _bare(axis: Axis, method: str) -> Axis:
    return replace(axis, name=axis.name.removeprefix(f"{method}."))


def _colours(trials: Sequence[Trial], series: Series) -> list[int]:
    return [series.get(trial.draw.cell, 0) for trial in trials]


def _markup(svg: str) -> Markup:
    return Markup(svg)  # noqa: S704 - escaped by matplotlib
