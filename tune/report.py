"""A sweep as one HTML file that opens without a network, and as CSV and JSON for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna

from raysemi.errors import CheckpointError, ConfigError
from raysemi.report import html
from raysemi.report.svg import NUM_SERIES
from raysemi.tune import checks, importance, plots, results, winner
from raysemi.tune.figures import finite
from raysemi.tune.results import settings_of
from raysemi.tune.spaces import Space
from raysemi.tune.study import Trial, as_text, best_of, is_driven, read
from raysemi.tune.sweep import SweepConfig, dump

BEST = 10
"""Trials in the table of the best."""
MOST_FAILED = 200
"""Failed trials that are listed; the CSV file has all."""


def write_report(folder: Path) -> Path:
    """Writes `report.html` and `trials.csv` into a sweep's folder, and the best trial's recipe, `best.yaml`.

    Returns:
        The HTML file.

    Raises:
        CheckpointError: the folder cannot be written.
        ConfigError: no sweep was begun there.
    """
    sweep, trials, repeats = read(folder)
    file = folder / "report.html"
    try:
        page = _page(folder, sweep, trials, repeats)
        (folder / "trials.csv").write_text(as_csv(trials, repeats), encoding="utf-8")
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"the report must be writable; got {file}. {error}") from error
    return file


def as_json(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Trials as JSON values; numbers that are not finite are None."""
    return [
        {
            "number": trial.number,
            "state": trial.state,
            "method": trial.draw.cell.method,
            "weighting": trial.draw.cell.weighting,
            "gradients": trial.draw.cell.gradients,
            "settings": dict(trial.draw.settings),
            "label": trial.label,
            "of": trial.of,
            "seed": trial.seed,
            "step": trial.step,
            "miou": finite(trial.miou),
            "curve": [[step, finite(miou)] for step, miou in sorted(trial.curve.items())],
            "hours": trial.hours,
            "seconds": trial.seconds,
            "first_step_s": trial.first_step_s,
            "reason": trial.reason,
        }
        for trial in trials
    ]


def as_csv(trials: Sequence[Trial], repeats: Sequence[Trial]) -> str:
    """A line a trial, numbers not rounded, a column a setting; empty where a trial has none."""
    lines = [{"study": "trials", **line} for line in as_json(trials)]
    lines += [{"study": "repeats", **line} for line in as_json(repeats)]
    paths = sorted({path for line in lines for path in line["settings"]})
    fixed = [name for name in _COLUMNS if name not in ("settings", "curve")]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*fixed, *paths])
    for line in lines:
        cells = [line[name] for name in fixed] + [line["settings"].get(path) for path in paths]
        writer.writerow(["" if cell is None else as_text(cell) for cell in cells])
    return file.getvalue()


_COLUMNS = (
    *("study", "number", "state", "method", "weighting", "gradients", "label", "of", "seed", "step", "miou"),
    *("hours", "seconds", "first_step_s", "reason"),
)


def _page(folder: Path, sweep: SweepConfig, trials: list[Trial], repeats: list[Trial]) -> str:
    grid = sweep.search.name == "grid"
    hours = "GPU hours" if sweep.resources.gpus else "CPU core hours"
    space, unreadable = _space(sweep)
    cells = list(dict.fromkeys(trial.draw.cell for trial in trials if trial.draw.cell.method))
    series = {cell: place % NUM_SERIES for place, cell in enumerate(cells)}
    finished = best_of(trials, len(trials))
    again, no_winner = _again(folder, finished)
    rows = results.grid(sweep, trials) if grid else []
    by_method, by_cell = (results.methods(trials, repeats, grid=grid, by=by) for by in ("method", "cell"))
    left_out: list[tuple[str, str]] = []

    def shown(heading: str, content: Any, why_not: str) -> Any:
        """The content; where there is none, the page's end says why."""
        if not content:
            left_out.append((heading, why_not))
        return content

    none_finished = "no trial has finished yet."
    return html.render(
        __package__,
        name=folder.name,
        headline=results.headline(sweep, finished, repeats, rows),
        question=sweep.question,
        alive=is_driven(folder),
        hours=hours,
        gpus=sweep.resources.gpus > 0,
        labelled=bool(sweep.rows),
        numbers=results.numbers(folder, trials, repeats),
        best=shown("Best trials", [] if grid else finished[:BEST], _GRID_HAS_ROWS if grid else none_finished),
        num_finished=len(finished),
        series=series,
        again=shown("Train the winner again", again, no_winner),
        columns=_searched_columns(space),
        searched=shown(
            "What was searched",
            space.table()[1] if space is not None else [],
            unreadable or "the sweep draws nothing; its rows, methods or fixed settings are all there is.",
        ),
        fixed=results.fixed(sweep),
        rows=shown("Grid", rows, "the sweep is no grid, it draws its trials."),
        published=any(row.published is not None for row in rows),
        methods=shown("Methods", by_method, none_finished),
        cells=by_cell if len(by_cell) > len(by_method) else [],
        repeats=shown("Repeats on new seeds", results.repeated(trials, repeats), _no_repeats(sweep, repeats)),
        history=shown("History", plots.history(trials, series, finished), "no trial has been evaluated yet."),
        importances=shown("Importance", *_importances(folder, sweep)),
        parallel=shown("Parallel coordinates", *plots.parallel(space, finished)),
        slices=shown("Slices", *plots.slices(space, finished, series)),
        pareto=shown("Pareto front", *plots.pareto(sweep, finished, hours)),
        cost=shown("Cost", results.cost(trials, repeats), "no trial has taken any time yet."),
        cost_figure=plots.cost(trials, hours),
        failed=shown("Failed trials", _failed(trials, repeats), "none has failed."),
        settings=dump(sweep),
        left_out=left_out,
        optuna=optuna.__version__,
        top=importance.TOP,
        num_series=NUM_SERIES,
        settings_of=settings_of,
    )


_GRID_HAS_ROWS = "the grid's rows stand in its own table."


def _space(sweep: SweepConfig) -> tuple[Space | None, str]:
    """The space, or why it cannot be made here any more: a recipe that is gone, another version."""
    try:
        return checks.build(sweep, tried=False), ""
    except ConfigError as error:
        return None, f"this raysemi cannot read the sweep: {error.faults[0]}"


def _searched_columns(space: Space | None) -> list[str]:
    return space.table()[0] if space is not None else []


def _again(folder: Path, finished: list[Trial]) -> tuple[dict[str, Any] | None, str]:
    if not finished:
        return None, "no trial has finished yet."
    recipe = winner.write_recipe(folder, number=finished[0].number)
    return {
        "trial": recipe.trial,
        "command": winner.command(recipe),
        "file": str(recipe.file),
        "text": recipe.file.read_text(encoding="utf-8"),
    }, ""


def _importances(folder: Path, sweep: SweepConfig) -> tuple[dict[str, Any] | None, str]:
    if sweep.search.name == "grid":
        return None, "the grid gives its values, it does not draw them."
    drawn = importance.drawn_trials(folder, sweep)
    if len(drawn) < importance.LEAST:
        return None, (
            f"it takes {importance.LEAST} finished trials whose values were drawn (the recipes as they are do not "
            f"count); there are {len(drawn)}."
        )
    found = importance.importances(drawn)
    return {
        "rows": found,
        "count": len(drawn),
        "half": any(one.among_half is not None for one in found),
    }, "the trials differ in no parameter."


def _no_repeats(sweep: SweepConfig, repeats: list[Trial]) -> str:
    if sweep.search.name == "grid":
        return "a grid runs each row on every seed."
    if not sweep.repeat.seeds:
        return (
            "the sweep asks for none (repeat.seeds=0), so the best result is that of one seed, chosen for being best."
        )
    return "none has finished yet." if repeats else "they begin when all trials are over."


def _failed(trials: list[Trial], repeats: list[Trial]) -> dict[str, Any] | None:
    failed = [("trial", one) for one in trials if one.state == "failed"]
    failed += [("repeat", one) for one in repeats if one.state == "failed"]
    return {"rows": failed[:MOST_FAILED], "count": len(failed)} if failed else None
