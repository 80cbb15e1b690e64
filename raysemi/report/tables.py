"""The tables of a report as CSV, for programs, and as LaTeX, for papers."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raysemi.report.runs import Group, Spread

SUMMARY: dict[str, tuple[str, int]] = {
    "miou": ("mIoU", 1),
    "pixel_accuracy": ("pixel accuracy", 1),
    "labeled": ("labeled", 0),
    "unlabeled": ("unlabeled", 0),
    "steps": ("steps", 0),
    "seconds": ("seconds", 0),
}
"""Field of `result.json` -> heading and decimals."""


def field(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    """Reads a number of `result.json`."""
    return lambda result: result.get(name)


def class_iou(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    """Reads the IoU of a class from `result.json`."""
    return lambda result: result.get("iou", {}).get(name)


def class_names(groups: Sequence[Group]) -> list[str]:
    """Names of the classes of all groups, in the order of the first that has them."""
    results = [run.result for group in groups for run in group.runs if run.result is not None]
    return list(dict.fromkeys(name for result in results for name in result.get("iou", {})))


def as_csv(groups: Sequence[Group]) -> str:
    """A line a group: every number with its sample standard deviation (empty for a single run), not rounded."""
    readers = {name: field(name) for name in SUMMARY}
    readers |= {f"iou/{name}": class_iou(name) for name in class_names(groups)}
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    header = [column for name in readers for column in (name, f"{name}_std")]
    writer.writerow(["name", "method", "runs", "seeds", *header])
    for group in groups:
        seeds = " ".join(str(run.config.get("seed", 0)) for run in group.runs)
        row: list[Any] = [group.name, group.runs[0].method, len(group.runs), seeds]
        for read in readers.values():
            spread = group.spread(read)
            row.append("" if spread is None else repr(spread.mean))
            row.append("" if spread is None or spread.deviation is None else repr(spread.deviation))
        writer.writerow(row)
    return file.getvalue()


def as_latex(groups: Sequence[Group]) -> str:
    """Two tables for the booktabs package: groups with their summary, and classes with the IoU of each group.

    The best mean of a column of mIoU or pixel accuracy, and of each class, is bold when there are several groups.
    """
    lines = ["% needs \\usepackage{booktabs}"]
    headings = [heading for heading, _ in SUMMARY.values()]
    lines += [f"\\begin{{tabular}}{{l{'r' * (len(headings) + 1)}}}", "\\toprule"]
    lines += [" & ".join(["run", "runs", *headings]) + r" \\", "\\midrule"]
    columns = {name: [group.spread(field(name)) for group in groups] for name in SUMMARY}
    for position, group in enumerate(groups):
        cells = [escaped(group.name), str(len(group.runs))]
        for name, (_, decimals) in SUMMARY.items():
            marks = best(columns[name]) if name in ("miou", "pixel_accuracy") else set()
            cells.append(_cell(columns[name][position], decimals, position in marks))
        lines.append(" & ".join(cells) + r" \\")
    lines += ["\\bottomrule", "\\end{tabular}"]
    if names := class_names(groups):
        lines += ["", f"\\begin{{tabular}}{{l{'r' * len(groups)}}}", "\\toprule"]
        lines += [" & ".join(["class", *(escaped(group.name) for group in groups)]) + r" \\", "\\midrule"]
        for name in names:
            spreads = [group.spread(class_iou(name)) for group in groups]
            marks = best(spreads)
            cells = [_cell(spread, 1, position in marks) for position, spread in enumerate(spreads)]
            lines.append(" & ".join([escaped(name), *cells]) + r" \\")
        lines += ["\\bottomrule", "\\end{tabular}"]
    return "\n".join(lines) + "\n"


def best(spreads: Sequence[Spread | None]) -> set[int]:
    """Positions of the largest mean; none where there is nothing to compare with."""
    means = {position: spread.mean for position, spread in enumerate(spreads) if spread is not None}
    if len(means) < 2:
        return set()
    return {position for position, mean in means.items() if mean == max(means.values())}


def escaped(text: str) -> str:
    """Text for LaTeX."""
    signs = {character: f"\\{character}" for character in "&%$#_{}"}
    signs |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
    return "".join(signs.get(character, character) for character in text)


def _cell(spread: Spread | None, decimals: int, bold: bool) -> str:
    if spread is None:
        return "--"
    text = f"{spread.mean:.{decimals}f}"
    text = f"\\textbf{{{text}}}" if bold else text
    if spread.deviation is not None and spread.deviation >= 0.5 * 10**-decimals:
        text += f" $\\pm$ {spread.deviation:.{decimals}f}"
    return text
