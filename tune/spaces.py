"""What a trial of a sweep draws: its method, weighting and gradient rule, and its settings.

A parameter of a method has the method's name in front (`derprop.order` is `method.order` of derprop), since methods
declare other ranges under one path. A parameter whose conditions do not hold is not drawn.
`checks.build` makes a space.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from raysemi import config_io
from raysemi.config import RunConfig
from raysemi.tune.sweep import Row


class Cell(NamedTuple):
    """A method with a weighting and a gradient rule."""

    method: str
    weighting: str
    gradients: str

    def __str__(self) -> str:
        return "+".join((self.method, *(part for part in self[1:] if part not in ("none", "uniform"))))


class Draw(NamedTuple):
    """What a trial trains: its cell, and its own settings by dotted path."""

    cell: Cell
    settings: dict[str, Any]


@dataclass(frozen=True)
class Parameter:
    """What a trial draws, one value."""

    name: str
    """In tables and in the storage."""
    path: str
    """The setting."""
    cells: tuple[Cell, ...]
    """Where there is such a setting."""
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    """Whole numbers."""
    choices: tuple[Any, ...] = ()
    """In place of an interval."""
    requires: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Path -> values: drawn where each of these settings has one of its values."""
    beside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Choice -> settings that come with it."""

    def suggest(self, trial: Any) -> Any:
        """Draws a value by an Optuna trial."""
        if self.choices:
            return _decoded(trial.suggest_categorical(self.name, [_encoded(value) for value in self.choices]))
        if self.whole:
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that the config must take for it to take all."""
        return self.choices or tuple(int(end) if self.whole else end for end in (self.low, self.high))

    def __str__(self) -> str:
        if self.choices:
            return ", ".join(short(value) for value in self.choices)
        return f"{short(self.ends[0])} to {short(self.ends[1])}{', log' if self.log else ''}"


@dataclass(frozen=True)
class Space:
    """Everything that a sweep's trials may be."""

    recipes: str
    fixed: Mapping[str, Any]
    """Settings of every trial."""
    bases: Mapping[Cell, Mapping[str, Any]]
    """Cell -> dotted path -> value of its recipe with the fixed settings."""
    parameters: tuple[Parameter, ...]
    rows: tuple[Row, ...] = ()
    seeds: tuple[int, ...] = (0,)

    def draw(self, trial: Any) -> Draw:
        """What an Optuna trial is to train; asked again, it is the same."""
        method = _choose(trial, "method", self.methods)
        own = [cell for cell in self.bases if cell.method == method]
        weighting = _choose(trial, f"{method}.weighting", list(dict.fromkeys(cell.weighting for cell in own)))
        rules = [cell.gradients for cell in own if cell.weighting == weighting]
        cell = Cell(method, weighting, _choose(trial, f"{method}.gradients", list(dict.fromkeys(rules))))
        settings: dict[str, Any] = {}
        for parameter in self.parameters:
            if cell in parameter.cells and self._holds(parameter, cell, settings):
                value = parameter.suggest(trial)
                settings[parameter.path] = value
                along = parameter.beside.get(value, {}) if isinstance(value, str) else {}
                settings |= {path: other for path, other in along.items() if path not in self.fixed}
        return Draw(cell, settings)

    def value(self, parameter: Parameter, draw: Draw) -> Any:
        """What a trial trained with: drawn, given or the recipe's own; None where there is no such parameter."""
        if draw.cell not in parameter.cells or not self._holds(parameter, draw.cell, draw.settings):
            return None
        return draw.settings.get(parameter.path, self.bases[draw.cell].get(parameter.path))

    def _holds(self, parameter: Parameter, cell: Cell, settings: Mapping[str, Any]) -> bool:
        base = self.bases[cell]
        return all(settings.get(path, base.get(path)) in values for path, values in parameter.requires.items())

    @cached_property
    def grid(self) -> list[tuple[str, Draw]]:
        """All trials of a grid but for their seeds, each with its label."""
        if self.rows:
            return [(row.label, self.row(row)) for row in self.rows]
        found: dict[str, Draw] = {}
        for cell in self.bases:
            own = [parameter for parameter in self.parameters if cell in parameter.cells]
            for values in itertools.product(*(parameter.choices for parameter in own)):
                given = {parameter.name: _encoded(value) for parameter, value in zip(own, values, strict=True)}
                draw = self.draw(_Given(cell, given))
                found.setdefault(label_of(draw), draw)
        return list(found.items())

    def row(self, row: Row) -> Draw:
        """A line of a table."""
        words = {"method": self.methods[0], "weighting": "none", "gradients": "uniform"}
        words |= {part: row.set[part] for part in words if part in row.set}
        return Draw(Cell(**words), {path: value for path, value in row.set.items() if path not in words})

    @property
    def methods(self) -> list[str]:
        """Without repetition."""
        return list(dict.fromkeys(cell.method for cell in self.bases))

    def recipe(self, method: str) -> str:
        """File or name of a method's recipe."""
        file = Path(f"{self.recipes}-{method}.yaml").expanduser()
        return str(file) if file.is_file() else f"{self.recipes}-{method}"

    def overrides(self, draw: Draw) -> list[str]:
        """A trial's settings as on the command line."""
        cell = draw.cell
        words = [
            f"{part}={word}"
            for part, word, usual in (("weighting", cell.weighting, "none"), ("gradients", cell.gradients, "uniform"))
            if word != usual
        ]
        return [*words, *(f"{path}={_yaml(value)}" for path, value in {**self.fixed, **draw.settings}.items())]

    def config(self, draw: Draw, *own: str) -> RunConfig:
        """A trial's config.

        Args:
            draw: the trial.
            own: more overrides.

        Raises:
            ConfigError: what the config refuses.
        """
        return config_io.load(self.recipe(draw.cell.method), [*self.overrides(draw), *own])

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows for people: a line a parameter."""
        rows = []
        for parameter in self.parameters:
            defaults = {short(self.bases[cell].get(parameter.path)) for cell in parameter.cells}
            needs = "; ".join(f"{path}={' or '.join(map(short, v))}" for path, v in parameter.requires.items())
            rows.append([parameter.name, str(parameter), ", ".join(sorted(defaults)), needs])
        return ["parameter", "drawn from", "the recipe's own", "drawn where"], rows


def label_of(draw: Draw) -> str:
    """A trial in words: its cell and its own settings."""
    return " ".join([str(draw.cell), *(f"{path}={_yaml(value)}" for path, value in draw.settings.items())])


class _Given:
    """In place of an Optuna trial: values that are given."""

    def __init__(self, cell: Cell, values: Mapping[str, Any]) -> None:
        words = {"method": cell.method}
        words |= {f"{cell.method}.weighting": cell.weighting, f"{cell.method}.gradients": cell.gradients}
        self._values = {**words, **values}

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._values[name]


def _choose(trial: Any, name: str, words: Sequence[str]) -> str:
    """One of the words; no parameter where there is only one."""
    chosen: str = words[0] if len(words) == 1 else trial.suggest_categorical(name, list(words))
    return chosen


_JSON = "json:"


def _encoded(value: Any) -> Any:
    """As Optuna stores it: lists as texts."""
    return _JSON + json.dumps(value) if isinstance(value, list | dict) else value


def _decoded(value: Any) -> Any:
    return json.loads(value.removeprefix(_JSON)) if isinstance(value, str) and value.startswith(_JSON) else value


def _yaml(value: Any) -> str:
    """As an override reads it."""
    return value if isinstance(value, str) and value.replace("_", "").isalpha() else json.dumps(value)


def short(value: Any) -> str:
    """A value for a person."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)
