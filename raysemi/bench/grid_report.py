"""What a grid has found so far: a table for people and for programs, and a picture of label maps."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raysemi.bench.grid import Cell, GridRun, Plan
from raysemi.engine.folder import RunFolder
from raysemi.report.label_maps import Titled, label_maps
from raysemi.report.runs import Group, Run, Spread, read_run
from raysemi.report.tables import field

BASELINE = Cell("supervised", "none", "uniform")
"""What gains are measured from."""
_IMAGES = 2


@dataclass(frozen=True)
class Row:
    """A cell over its seeds."""

    cell: Cell
    runs: Mapping[int, Run]
    """Finished ones by seed."""
    missing: Mapping[int, str]
    """Seed -> how the others stand."""
    records: tuple[Mapping[str, Any], ...]
    """Of the finished ones."""

    def spread(self, name: str) -> Spread | None:
        """Of a number of `result.json`."""
        return Group(self.cell.name, tuple(self.runs.values())).spread(field(name))

    @property
    def by_seed(self) -> dict[int, float]:
        """mIoU, percent."""
        return {seed: float(run.result["miou"]) for seed, run in self.runs.items() if run.result is not None}

    def gain(self, baseline: Row | None) -> Spread | None:
        """mIoU above the baseline's, of the seeds that both have."""
        if baseline is None or baseline.cell == self.cell:
            return None
        pairs = [(own, baseline.by_seed[seed]) for seed, own in self.by_seed.items() if seed in baseline.by_seed]
        gains = [own - other for own, other in pairs]
        if not gains:
            return None
        return Spread(float(np.mean(gains)), float(np.std(gains, ddof=1)) if len(gains) > 1 else None, len(gains))

    @property
    def images(self) -> dict[str, dict[str, int]] | None:
        """Network -> part -> images that pass through it in a step; None where no run has counted them."""
        passes = next((record["passes"] for record in self.records if record.get("passes")), None)
        if passes is None:
            return None
        counted: dict[str, dict[str, int]] = {}
        for one in passes:
            parts = counted.setdefault(one["network"], {})
            parts[one["part"]] = parts.get(one["part"], 0) + one["images"]
        return counted

    @property
    def backwards(self) -> int | None:
        """Backward passes of a step."""
        passes = next((record["passes"] for record in self.records if record.get("passes")), None)
        return None if passes is None else max(one["backwards"] for one in passes)

    @property
    def peak_bytes(self) -> int | None:
        """Largest of its runs."""
        return max((record["peak_bytes"] for record in self.records if record.get("peak_bytes")), default=None)

    @property
    def memory(self) -> str | None:
        """What kind of memory that is."""
        return next((record["memory"] for record in self.records if record.get("memory")), None)


def read_rows(plan: Plan, folder: Path) -> list[Row]:
    """The cells of a grid as their folders stand.

    Raises:
        CheckpointError: a broken file in a finished run.
    """
    rows = []
    for cell in plan.cells:
        runs = [GridRun(cell, seed, folder) for seed in sorted(plan.seeds)]
        finished = [run for run in runs if run.finished]
        rows.append(
            Row(
                cell,
                {run.seed: read_run(run.location) for run in finished},
                {run.seed: run.standing() for run in runs if run not in finished},
                tuple(run.record for run in finished),
            )
        )
    return rows


def as_json(plan: Plan, rows: Sequence[Row]) -> dict[str, Any]:
    """For programs: `cells`, numbers not rounded, and `refused`."""
    baseline = _baseline(rows)
    cells = []
    for row in rows:
        miou, gain, seconds = row.spread("miou"), row.gain(baseline), row.spread("seconds")
        cells.append(
            {
                **row.cell._asdict(),
                "miou": None if miou is None else miou.mean,
                "miou_std": None if miou is None else miou.deviation,
                "miou_by_seed": {str(seed): value for seed, value in row.by_seed.items()},
                "gain": None if gain is None else gain.mean,
                "gain_std": None if gain is None else gain.deviation,
                "images": row.images,
                "backwards": row.backwards,
                "peak_bytes": row.peak_bytes,
                "memory": row.memory,
                "seconds": None if seconds is None else seconds.mean,
                "missing": {str(seed): standing for seed, standing in row.missing.items()},
            }
        )
    refused = [{**cell._asdict(), "reason": reason} for cell, reason in plan.refused]
    return {"recipes": plan.recipes, "overrides": list(plan.overrides), "cells": cells, "refused": refused}


def as_csv(plan: Plan, rows: Sequence[Row]) -> str:
    """A line a cell; what is not known is empty."""
    seeds = sorted(plan.seeds)
    columns = [
        "method", "weighting", "gradients", "miou", "miou_std", *(f"miou_seed_{seed}" for seed in seeds), "gain",
        "gain_std", "images", "backwards", "peak_bytes", "seconds",
    ]  # fmt: skip
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row, about in zip(rows, as_json(plan, rows)["cells"], strict=True):
        by_seed = {f"miou_seed_{seed}": value for seed, value in row.by_seed.items()}
        writer.writerow(about | by_seed | {"images": images_text(row.images)})
    return file.getvalue()


def table(plan: Plan, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, rounded."""
    seeds, baseline = sorted(plan.seeds), _baseline(rows)
    columns = [
        "method", "weighting", "gradients", "mIoU %", f"seeds {', '.join(map(str, seeds))}", "above supervised",
        "images a step", "backward passes", "peak memory, MiB", "seconds a run",
    ]  # fmt: skip
    lines = []
    for row in rows:
        by_seed = ", ".join(f"{row.by_seed[seed]:.1f}" if seed in row.by_seed else "·" for seed in seeds)
        gain, seconds, peak = row.gain(baseline), row.spread("seconds"), row.peak_bytes
        lines.append(
            [
                *row.cell,
                _spread(row.spread("miou")),
                by_seed,
                _spread(gain, sign="+"),
                images_text(row.images),
                "" if row.backwards is None else str(row.backwards),
                "" if peak is None else f"{peak / 2**20:.0f}",
                "" if seconds is None else f"{seconds.mean:.0f}",
            ]
        )
    return columns, lines


def notes(plan: Plan, rows: Sequence[Row]) -> list[str]:
    """What the table does not hold: kinds of memory, runs that are missing, cells that are refused."""
    kinds = sorted({row.memory for row in rows if row.memory is not None})
    lines = [f"Peak memory: {' or '.join(kinds)} of a run's own process, evaluation included."] if kinds else []
    lines += [f"{row.cell.name}, seed {seed}: {how}" for row in rows for seed, how in row.missing.items()]
    return [*lines, *(f"{cell.name} is not run: {reason}" for cell, reason in plan.refused)]


def as_markdown(plan: Plan, rows: Sequence[Row]) -> str:
    """The table with its notes."""
    columns, lines = table(plan, rows)
    text = [f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *lines]]
    return "\n".join([*text, "", *(f"- {line}" for line in notes(plan, rows))]).rstrip() + "\n"


def picture(rows: Sequence[Row]) -> bytes | None:
    """Truth and each cell's prediction, of its first seed that has pictures; None without any."""
    titled = []
    for row in rows:
        run = next((run for run in row.runs.values() if any(each.kind == "val" for each in run.pictures)), None)
        if run is not None:
            cell = " ".join(
                part for part, usual in zip(row.cell, (None, "none", "uniform"), strict=True) if part != usual
            )
            titled.append(Titled(f"{cell}\nmIoU {_spread(row.spread('miou'))}", run))
    return label_maps(titled, _IMAGES)


def write(plan: Plan, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes grid.md, grid.csv and, where runs have drawn pictures, grid.png; returns them."""
    files = {"grid.md": as_markdown(plan, rows).encode(), "grid.csv": as_csv(plan, rows).encode()}
    if (drawn := picture(rows)) is not None:
        files["grid.png"] = drawn
    for name, content in files.items():
        RunFolder(folder).write_bytes(name, content)
    return [folder / name for name in files]


def images_text(images: Mapping[str, Mapping[str, int]] | None) -> str:
    """`student 12, decoder 16; teacher 4`: the encoder's, and other parts where they differ from it."""
    if images is None:
        return ""
    networks = []
    for network, parts in images.items():
        most = parts.get("encoder", 0)
        others = [f"{part} {count}" for part, count in parts.items() if part != "encoder" and count != most]
        networks.append(", ".join([f"{network} {most}", *others]))
    return "; ".join(networks)


def _baseline(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if row.cell == BASELINE), None)


def _spread(spread: Spread | None, sign: str = "") -> str:
    if spread is None:
        return ""
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:.1f}"
    return f"{spread.mean:{sign}.1f}{deviation}"
