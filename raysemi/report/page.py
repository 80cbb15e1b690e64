"""One HTML file that shows a run, or compares several: opens without a network, reads well on light and on dark.

A section stands on the page only where a run has written what it shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup

from raysemi.errors import CheckpointError
from raysemi.report import figures, html, tables
from raysemi.report.pictures import comparisons
from raysemi.report.runs import Confusion, Floats, Group, Spread, differences, group_runs, read_run
from raysemi.report.svg import NUM_SERIES

LARGEST_TABLE = 32
"""Classes of a confusion matrix that a table still shows; more become a picture."""
MOST_SKIPPED = 200
"""Corrupt samples of a run that are listed; its `skipped.json` has all."""
_STAGES = ("before", "after")
_QUALITY = {
    "accuracy": ("Accuracy", "correct / valid"),
    "kept_accuracy": ("Accuracy of kept pixels", "kept and correct / kept"),
    "mining": ("Mining ratio", "kept and correct / correct"),
    "effective": ("Effective ratio", "kept and correct / valid"),
}
"""Measures of pseudo-labels: heading and meaning."""
_TITLES = {
    "eval/miou": "mIoU, %",
    "eval/pixel_accuracy": "Pixel accuracy, %",
    "loss/total": "Total loss",
    "method/threshold": "Confidence threshold",
    "method/kept_ratio": "Kept pixels, %",
    "method/alpha": "Ramp α",
    "gradients/norm_supervised": "Norm of both gradients",
    "gradients/cosine": "Cosine of the two gradients",
    "gradients/weight_unsupervised": "Weight of the unsupervised side",
    "gradients/scale": "Factor λ on the step",
    "gradients/least_cosine": "Least cosine of the step",
    "gradients/fallback": "Steps with a vanished gradient, %",
    "gradients/capped": "Steps whose λ was cut, %",
    "lr": "Learning rate",
    "images_per_s": "Images per second",
    "skipped_steps": "Skipped steps",
}


_GRADIENTS_NOTE = (
    "Gradients of the supervised side (solid) and the unsupervised side (dashed). The least cosine is that of the step "
    "with either: below 0, the step hurts one side. Distributions are over single steps, in percent of those measured."
)


@dataclass(frozen=True)
class _Figure:
    title: str
    note: str
    svg: Markup


def build_report(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Writes the report of some runs, and its tables as CSV and LaTeX beside it.

    Args:
        runs: run folders, local or in an object store; runs that differ only in their seed become one row.
        out: the HTML file, or a folder for `report.html`. The tables are `report-table.csv` and `report-table.tex`
            (with the HTML file's own stem).

    Returns:
        Path of the HTML file.

    Raises:
        CheckpointError: no run was given, a folder is no run folder or broken, or `out` cannot be written.
    """
    if not runs:
        raise CheckpointError("runs must hold at least one run folder; got none. Name the run to report on.")
    twice = [str(run) for position, run in enumerate(runs) if run in runs[:position]]
    if twice:
        raise CheckpointError(f"runs must name each run once; got {twice[0]} twice. Leave one out.")
    groups = group_runs([read_run(run) for run in runs])
    page = render(groups)
    path = Path(out).expanduser()
    path = path if path.suffix.lower() in (".html", ".htm") else path / "report.html"
    files = {
        path: page,
        path.with_name(f"{path.stem}-table.csv"): tables.as_csv(groups),
        path.with_name(f"{path.stem}-table.tex"): tables.as_latex(groups),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"the report must be writable; got {path}. {error}") from error
    return path


def render(groups: Sequence[Group]) -> str:
    """The page as text."""
    title = groups[0].name if len(groups) == 1 else " · ".join(group.name for group in groups[:4])
    return html.render(
        __package__,
        title=title,
        headline=_headline(groups),
        groups=groups,
        num_runs=sum(len(group.runs) for group in groups),
        several=len(groups) > 1,
        spreads=any(len(group.runs) > 1 for group in groups),
        summary=_summary(groups),
        curves=_curve_sections(groups),
        quality=_pseudo_by_class(groups),
        classes=_class_rows(groups),
        colours=_colours(groups),
        confusions=_confusions(groups),
        pictures=comparisons(groups, NUM_SERIES),
        skipped=_skipped(groups),
        differences=differences(groups),
        configs=[yaml.safe_dump(dict(group.runs[0].config), sort_keys=False) for group in groups],
        num_series=NUM_SERIES,
    )


def _headline(groups: Sequence[Group]) -> str:
    """The result in a sentence: the best group, and how far it is from the supervised one, or from the next."""
    scored = [(spread, group) for group in groups if (spread := group.spread(tables.field("miou"))) is not None]
    if not scored:
        return "Not evaluated yet."
    scored.sort(key=lambda pair: -pair[0].mean)
    (best, group), rest = scored[0], scored[1:]
    text = f"{group.name} reaches {html.number(best)} % mIoU"
    labeled, unlabeled = (group.spread(tables.field(name)) for name in ("labeled", "unlabeled"))
    if labeled is not None:
        text += f" from {html.number(labeled, 0)} labeled"
        text += f" and {html.number(unlabeled, 0)} unlabeled images" if unlabeled and unlabeled.mean else " images"
    if rest:
        supervised = [pair for pair in rest if pair[1].runs[0].method == "supervised"]
        other, rival = supervised[0] if supervised else rest[0]
        text += f", {best.mean - other.mean:.1f} points above {rival.name}"
        deviations = [spread.deviation for spread in (best, other) if spread.deviation is not None]
        if deviations:
            text += f" (standard deviation over seeds: at most {max(deviations):.1f})"
    return f"{text}."


def _summary(groups: Sequence[Group]) -> list[dict[str, Any]]:
    columns = {name: [group.spread(tables.field(name)) for group in groups] for name in tables.SUMMARY}
    leaders = {name: tables.best(columns[name]) for name in ("miou", "pixel_accuracy")}
    rows = []
    for position, group in enumerate(groups):
        done = [run.result.get("steps") if run.result else None for run in group.runs]
        short = sum(
            1
            for run, steps in zip(group.runs, done, strict=True)
            if steps is None or (run.steps_planned is not None and steps < run.steps_planned)
        )
        rows.append(
            {
                "series": position % NUM_SERIES,
                "name": group.name,
                "seeds": ", ".join(str(run.config.get("seed", 0)) for run in group.runs),
                "values": {name: column[position] for name, column in columns.items()},
                "passes": {
                    name: Spread.of([float(run.curves[of][1][-1]) for run in group.runs if of in run.curves])
                    for name, of in (("labeled", "data/labeled_passes"), ("unlabeled", "data/unlabeled_passes"))
                },
                "best": {name for name, marks in leaders.items() if position in marks},
                "unfinished": short,
                "count": len(group.runs),
            }
        )
    return rows


def _curve_sections(groups: Sequence[Group]) -> list[tuple[str, str, list[_Figure]]]:
    """(heading, explanation, figures) of the metrics that any run has."""
    names = sorted({name for group in groups for run in group.runs for name in run.curves})
    evaluation = [name for name in ("eval/miou", "eval/pixel_accuracy") if name in names]
    losses = sorted((name for name in names if name.startswith("loss/")), key=lambda name: name != "loss/total")
    first = ["method/threshold", "method/kept_ratio", "method/alpha"]
    method = [name for name in first if name in names]
    method += [name for name in names if name.startswith("method/") and name not in first]
    taken = ("data/", "eval/", "loss/", "method/", "pseudo/", "gradients/")
    progress = [name for name in names if not name.startswith(taken)]
    quality = [
        _Figure(heading, meaning, svg)
        for measure, (heading, meaning) in _QUALITY.items()
        if (svg := _drawn(groups, f"pseudo/{measure}_after", f"pseudo/{measure}_before")) is not None
    ]
    stages = "Measured on unlabeled images whose truth was kept for this, in percent. "
    stages += "Dashed: before propagation. Solid: after it, or of a method without propagation."
    student = any(len(run.curves.get("eval/student_miou", ((),))[0]) > 1 for group in groups for run in group.runs)
    note = "Solid: the averaged network. Dashed: the student." if student else ""
    sections = [
        ("Validation", note, _figures(groups, evaluation)),
        ("Pseudo-labels", stages, quality),
        ("Method", "", _figures(groups, method)),
        ("Losses", "", _figures(groups, losses)),
        ("Gradients", _GRADIENTS_NOTE, _gradient_figures(groups, names)),
        ("Progress", "", _figures(groups, progress)),
    ]
    return [section for section in sections if section[2]]


def _gradient_figures(groups: Sequence[Group], names: Sequence[str]) -> list[_Figure]:
    """Curves, and the distributions of single steps, which a mean over steps would hide."""
    wanted = ("norm_supervised", "cosine", "least_cosine", "weight_unsupervised", "scale", "fallback", "capped")
    found = _figures(groups, [f"gradients/{name}" for name in wanted if f"gradients/{name}" in names])
    pairs = {"norm_supervised": "norm_unsupervised", "cosine": None, "least_cosine": None}
    for main, faint in pairs.items():
        bars = [
            figures.Bars(values, position, faint=name != main)
            for position, group in enumerate(groups)
            for name in (main, faint)
            if name is not None and len(values := _measured(group, f"gradients/{name}", positive=faint is not None))
        ]
        if bars:
            span = None if faint is not None else (-1.0, 1.0)
            svg = Markup(figures.histogram(bars, f"histogram/{main}", span))  # noqa: S704 - escaped by matplotlib
            found.append(_Figure(_TITLES[f"gradients/{main}"], "distribution", svg))
    return found


def _measured(group: Group, name: str, *, positive: bool) -> Floats:
    """Values of a metric at single steps, of all runs of a group."""
    found = [run.curves[name][1] for run in group.runs if name in run.curves]
    values = np.concatenate(found) if found else np.empty(0)
    return values[values > 0] if positive else values


def _figures(groups: Sequence[Group], names: Iterable[str]) -> list[_Figure]:
    found = []
    seconds = {"eval/miou": "eval/student_miou", "gradients/norm_supervised": "gradients/norm_unsupervised"}
    for name in names:
        faint = seconds.get(name)
        scale = 100.0 if name.endswith(("_ratio", "/fallback", "/capped")) else 1.0
        svg = _drawn(groups, name, faint, scale)
        if svg is not None:
            title = name.partition("/")[2] or name
            found.append(_Figure(_TITLES.get(name, title.replace("_", " ").capitalize()), "", svg))
    return found


def _drawn(groups: Sequence[Group], name: str, faint: str | None = None, scale: float = 1.0) -> Markup | None:
    lines = []
    for position, group in enumerate(groups):
        main, second = group.curve(name), group.curve(faint) if faint is not None else None
        if main is not None:
            lines.append(figures.Line(main, position))
        if second is not None and (main is None or len(second.steps) > 1):
            lines.append(figures.Line(second, position, faint=main is not None))
    if not lines:
        return None
    svg = figures.curves(lines, name, scale, log=name.startswith("gradients/norm"))
    return Markup(svg)  # noqa: S704 - escaped by matplotlib


def _pseudo_by_class(groups: Sequence[Group]) -> dict[str, Any] | None:
    """Last measured quality of pseudo-labels: for each group, a row a class and a column a measure and stage."""
    columns = [(measure, stage) for measure in _QUALITY for stage in _STAGES]
    names = dict.fromkeys(
        [*tables.class_names(groups), *(c for g in groups if g.confusion for c in g.confusion.classes)]
    )
    parts: list[dict[str, Any]] = []
    for position, group in enumerate(groups):
        rows = []
        for name in (None, *names):
            suffix = f"/{name}" if name is not None else ""
            cells = [group.curve(f"pseudo/{measure}_{stage}{suffix}") for measure, stage in columns]
            if any(cell is not None for cell in cells):
                rows.append(
                    (name or "all classes", [float(cell.mean[-1]) if cell is not None else None for cell in cells])
                )
        if rows:
            used = [any(cells[column] is not None for _, cells in rows) for column in range(len(columns))]
            parts.append({"series": position % NUM_SERIES, "name": group.name, "rows": rows, "used": used})
    if not parts:
        return None
    shown = [any(part["used"][column] for part in parts) for column in range(len(columns))]
    keep = [column for column, show in enumerate(shown) if show]
    for part in parts:
        part["rows"] = [(name, [cells[column] for column in keep]) for name, cells in part["rows"]]
    kept = [columns[column] for column in keep]
    headings = [
        (_QUALITY[measure][0], [stage for _, stage in stages])
        for measure, stages in ((m, list(s)) for m, s in groupby(kept, key=lambda column: column[0]))
    ]
    return {"headings": headings, "parts": parts}


def _class_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    rows = []
    for name in tables.class_names(groups):
        spreads = [group.spread(tables.class_iou(name)) for group in groups]
        rows.append({"name": name, "spreads": spreads, "best": tables.best(spreads)})
    return rows


def _colours(groups: Sequence[Group]) -> dict[str, str]:
    """Class name -> CSS colour, from the first run that tells."""
    for group in groups:
        for run in group.runs:
            if run.confusion is not None:
                palette = run.confusion.palette
                return {
                    name: "#{:02x}{:02x}{:02x}".format(*colour)
                    for name, colour in zip(run.confusion.classes, palette, strict=False)
                }
    return {}


def _confusions(groups: Sequence[Group]) -> list[dict[str, Any]]:
    found = []
    for position, group in enumerate(groups):
        confusion = group.confusion
        if confusion is None or not confusion.matrix_KK.sum():
            continue
        totals = confusion.matrix_KK.sum(axis=1, keepdims=True)
        shares = confusion.matrix_KK / np.maximum(totals, 1)
        small = len(confusion.classes) <= LARGEST_TABLE
        picture = None if small else Markup(figures.matrix(shares, f"confusion-{position}"))  # noqa: S704 - as above
        found.append(
            {
                "series": position % NUM_SERIES,
                "name": group.name,
                "classes": confusion.classes,
                "shares": (100 * shares).tolist() if small else None,
                "present": (totals[:, 0] > 0).tolist(),
                "svg": picture,
                "worst": _worst(confusion),
            }
        )
    return found


def _skipped(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Corrupt samples of each run that has passed over some; of very many, the first."""
    return [
        {
            "series": position % NUM_SERIES,
            "name": group.name,
            "seed": run.config.get("seed", 0),
            "count": len(run.skipped),
            "rows": run.skipped[:MOST_SKIPPED],
        }
        for position, group in enumerate(groups)
        for run in group.runs
        if run.skipped
    ]


def _worst(confusion: Confusion, count: int = 5) -> list[tuple[str, str, float]]:
    """The confusions that cost most pixels: truth, prediction, share of the truth's pixels in percent."""
    wrong = confusion.matrix_KK.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    pairs = [divmod(int(flat), len(confusion.classes)) for flat in order]
    return [
        (confusion.classes[i], confusion.classes[j], float(100 * wrong[i, j] / confusion.matrix_KK[i].sum()))
        for i, j in pairs
        if wrong[i, j]
    ]
