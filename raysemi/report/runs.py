"""What a report is made from: run folders as they are found, and runs that differ only in their seed as one group."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import ArrowInvalid

from raysemi.bounded import parse_json, parse_yaml
from raysemi.engine.folder import RunFolder
from raysemi.errors import CheckpointError

Floats = NDArray[np.float64]
_NOT_COMPARED = ("seed", "run")
"""Settings in which the runs of a group may differ."""


@dataclass(frozen=True)
class Panel:
    """One ready picture: its title, its file's bytes and their media type."""

    title: str
    content: bytes
    media: str


@dataclass(frozen=True)
class Picture:
    """Panels of one image, from left to right; `kind` is `unlabeled` or `val`."""

    kind: str
    key: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Confusion:
    """Counts of pixels, rows truth and columns prediction, with the names and colours of the classes."""

    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    matrix_KK: NDArray[np.int64]


@dataclass(frozen=True)
class Run:
    """One run folder. What the run did not write is None or empty."""

    location: str
    config: Mapping[str, Any]
    result: Mapping[str, Any] | None
    curves: Mapping[str, tuple[NDArray[np.int64], Floats]]
    """Metric name -> (steps, values), finite values alone, steps ascending."""
    confusion: Confusion | None
    pictures: tuple[Picture, ...]
    skipped: tuple[Mapping[str, str], ...] = ()
    """Corrupt samples that it passed over: pool, shard, key and reason of each."""

    @property
    def method(self) -> str:
        """Name of the method."""
        method = self.config.get("method", {})
        return str(method.get("name", "run") if isinstance(method, Mapping) else method)

    @property
    def steps_planned(self) -> int | None:
        """Steps of the whole run, done or not."""
        train = self.config.get("train", {})
        steps = train.get("steps") if isinstance(train, Mapping) else None
        return int(steps) if steps is not None else None


@dataclass(frozen=True)
class Spread:
    """Mean over `count` runs and their sample standard deviation, None for a single run."""

    mean: float
    deviation: float | None
    count: int

    @staticmethod
    def of(numbers: Sequence[float]) -> Spread | None:
        """Of some numbers; None of none."""
        if not numbers:
            return None
        deviation = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
        return Spread(float(np.mean(numbers)), deviation, len(numbers))


@dataclass(frozen=True)
class Curve:
    """A metric over steps: mean over the runs that have the step, and standard deviation where two or more do."""

    steps: NDArray[np.int64]
    mean: Floats
    deviation: Floats | None


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed: one row of every table, one line of every curve."""

    name: str
    runs: tuple[Run, ...]

    def spread(self, value: Callable[[Mapping[str, Any]], float | None]) -> Spread | None:
        """Mean and deviation of a number of `result.json`; None when no run has it."""
        found = [value(run.result) for run in self.runs if run.result is not None]
        return Spread.of([float(number) for number in found if number is not None and math.isfinite(number)])

    def curve(self, name: str, most_points: int = 240) -> Curve | None:
        """A metric of all runs together; None when no run has it.

        Args:
            name: the metric.
            most_points: longer curves are averaged in equal stretches of steps.
        """
        found = [run.curves[name] for run in self.runs if name in run.curves]
        if not found:
            return None
        steps = np.unique(np.concatenate([run_steps for run_steps, _ in found]))
        values = np.full((len(found), len(steps)), np.nan)
        for row, (run_steps, run_values) in zip(values, found, strict=True):
            row[np.searchsorted(steps, run_steps)] = run_values
        if len(steps) > most_points:
            edges = np.linspace(0, len(steps), most_points + 1).astype(int)[:-1]
            present = np.add.reduceat(~np.isnan(values), edges, axis=1)
            totals = np.add.reduceat(np.nan_to_num(values), edges, axis=1)
            values = np.where(present > 0, totals / np.maximum(present, 1), np.nan)
            steps = np.maximum.reduceat(steps, edges)
        present = (~np.isnan(values)).sum(axis=0)
        mean = np.nansum(values, axis=0) / present
        if len(found) == 1:
            return Curve(steps, mean, None)
        squares = np.nansum((values - mean) ** 2, axis=0)
        return Curve(steps, mean, np.sqrt(squares / np.maximum(present - 1, 1)))

    @property
    def confusion(self) -> Confusion | None:
        """Pixels of all runs together; None without any or when the runs have other classes."""
        found = [run.confusion for run in self.runs if run.confusion is not None]
        if not found or any(other.classes != found[0].classes for other in found):
            return None
        matrix = np.sum([confusion.matrix_KK for confusion in found], axis=0)
        return Confusion(found[0].classes, found[0].palette, matrix)


def read_run(location: str | Path) -> Run:
    """Reads a run folder, local or in an object store.

    Raises:
        CheckpointError: not a run folder, a run that has written neither result nor metrics, or a broken file.
    """
    folder = RunFolder(location)
    if not folder.exists():
        raise CheckpointError(f"run must be a folder that exists; got {location}. Check the path.")
    if not folder.exists("config.yaml"):
        raise CheckpointError(
            f"run must be a run folder with a config.yaml; got {location}. Give the folder that `raysemi train` wrote."
        )
    config = _parse(folder, "config.yaml", lambda content: parse_yaml(content.decode()))
    result = _parse(folder, "result.json", parse_json) if folder.exists("result.json") else None
    curves = _parse(folder, "metrics.parquet", _curves) if folder.exists("metrics.parquet") else {}
    if result is None and not curves:
        raise CheckpointError(
            f"run must have a result.json or a metrics.parquet; got {location} with neither. Train it first."
        )
    confusion_file = "evaluation/confusion.json"
    confusion = _parse(folder, confusion_file, _confusion) if folder.exists(confusion_file) else None
    return Run(str(location), config, result, curves, confusion, _pictures(folder), _skipped(folder))


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs whose settings are equal but for `seed` and `run`, together, in order of appearance, seeds ascending."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        settings = {key: value for key, value in run.config.items() if key not in _NOT_COMPARED}
        members.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(run)
    sorted_members = [sorted(same, key=lambda run: int(run.config.get("seed", 0))) for same in members.values()]
    return [Group(name, tuple(same)) for name, same in zip(_names(sorted_members), sorted_members, strict=True)]


def differences(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Dotted paths of the settings in which groups differ, each with every group's value (`·` where it has none)."""
    flat = [_flatten(group.runs[0].config) for group in groups]
    paths = dict.fromkeys(path for settings in flat for path in settings if path.split(".")[0] not in _NOT_COMPARED)
    rows = [(path, [_short(settings[path]) if path in settings else "·" for settings in flat]) for path in paths]
    return [(path, values) for path, values in rows if len(set(values)) > 1]


def _names(members: Sequence[Sequence[Run]]) -> list[str]:
    """The method's name; where two groups share it, what they differ in besides."""
    methods = [runs[0].method for runs in members]
    names = []
    for runs, method in zip(members, methods, strict=True):
        rivals = [other[0] for other, name in zip(members, methods, strict=True) if name == method]
        own, others = _flatten(runs[0].config), [_flatten(rival.config) for rival in rivals]
        paths = [
            path
            for path in own
            if path.split(".")[0] not in _NOT_COMPARED and any(other.get(path) != own[path] for other in others)
        ]
        # gradients.name=pareto reads gradients=pareto, as on the command line
        labels = [path.removesuffix(".name").rpartition(".")[2] for path in paths[:3]]
        pairs = zip(labels, paths, strict=False)
        names.append(" ".join([method, *(f"{label}={_short(own[path])}" for label, path in pairs)]))
    # Settings beyond the third, or ones that only the other run has, may leave two names equal.
    return [
        name if names.count(name) == 1 else f"{name} ({Path(runs[0].location).name})"
        for name, runs in zip(names, members, strict=True)
    ]


def _flatten(settings: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(settings, Mapping):
        return {path: settings}
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{path}.{key}" if path else str(key))
    return flat


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _parse(folder: RunFolder, name: str, parse: Callable[[bytes], Any]) -> Any:
    """A file's content; what cannot be read names the file. Every part but the lists is a mapping."""
    try:
        content = parse(folder.read_bytes(name))
        if not name.startswith(("pictures/", "skipped")) and not isinstance(content, Mapping | Confusion):
            raise TypeError(f"a {type(content).__name__} at its top")
    except (ValueError, KeyError, TypeError, AttributeError, ArrowInvalid) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder.location}/{name} must be as `raysemi train` writes it; got {reason or type(error).__name__}. "
            "Continue the run to write it anew."
        ) from error
    return content


def _curves(content: bytes) -> dict[str, tuple[NDArray[np.int64], Floats]]:
    table = pq.read_table(io.BytesIO(content), columns=["step", "name", "value"])
    names, codes = np.unique(np.asarray(table["name"].to_pylist(), dtype=str), return_inverse=True)
    steps, values = table["step"].to_numpy(), table["value"].to_numpy()
    curves = {}
    for code, name in enumerate(names.tolist()):
        chosen = (codes == code) & np.isfinite(values)
        if chosen.any():
            # reversed, so that of two rows of a step the later one is kept
            unique, first = np.unique(steps[chosen][::-1], return_index=True)
            curves[name] = unique, values[chosen][::-1][first]
    return curves


def _confusion(content: bytes) -> Confusion:
    parts = parse_json(content)
    classes = tuple(str(name) for name in parts["classes"])
    matrix = np.array(parts["matrix"], np.int64)
    if matrix.shape != (len(classes),) * 2:
        raise ValueError(f"a matrix of shape {matrix.shape} for {len(classes)} classes")
    red_green_blue = [(int(r), int(g), int(b)) for r, g, b in parts["palette"]]
    return Confusion(classes, tuple(red_green_blue), matrix)


def _pictures(folder: RunFolder) -> tuple[Picture, ...]:
    name = "pictures/pictures.json"
    if not folder.exists(name):
        return ()

    def parse(content: bytes) -> tuple[Picture, ...]:
        return tuple(
            Picture(
                str(entry["kind"]),
                str(entry["key"]),
                tuple(_panel(folder, str(panel["title"]), str(panel["file"])) for panel in entry["panels"]),
            )
            for entry in parse_json(content)
        )

    pictures: tuple[Picture, ...] = _parse(folder, name, parse)
    return pictures


def _skipped(folder: RunFolder) -> tuple[Mapping[str, str], ...]:
    name = "skipped.json"
    if not folder.exists(name):
        return ()

    def parse(content: bytes) -> tuple[Mapping[str, str], ...]:
        names = ("pool", "shard", "key", "reason")
        return tuple({name: str(row[name]) for name in names} for row in parse_json(content))

    rows: tuple[Mapping[str, str], ...] = _parse(folder, name, parse)
    return rows


def _panel(folder: RunFolder, title: str, file: str) -> Panel:
    if file != Path(file).name or file.startswith("."):  # a run folder may come from elsewhere
        raise ValueError(f"the file name {file!r}, which leads out of the folder")
    content = folder.read_bytes(f"pictures/{file}")
    media = "image/png" if content.startswith(b"\x89PNG") else "image/jpeg"
    return Panel(title, content, media)
