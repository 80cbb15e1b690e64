"""The picture of `raysemi bench data --plot`: images a second against the number of loader processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from raysemi.bench.data import DataResult
from raysemi.errors import ConfigError

SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Refuses before anything is measured what could not be written afterwards.

    Raises:
        ConfigError: another suffix, or no such folder.
    """
    if path.suffix.lower() not in SUFFIXES or not path.parent.is_dir():
        raise ConfigError(
            f"--plot must be a file {', '.join(SUFFIXES)} in a folder that exists; got {path}. Change it."
        )


def plot(results: Sequence[DataResult], path: Path) -> None:
    """Draws the stream, its floor, and what was timed beside it.

    Args:
        results: of one pool, for several numbers of loader processes.
        path: as `check_plot` wants it.
    """
    results = sorted(results, key=lambda result: result.processes)
    processes = [result.processes for result in results]
    lines = {
        "raysemi": [result.images_per_s for result in results],
        "floor: the same images decoded and resized": [result.floor_images_per_s for result in results],
        **{name: [result.rivals[name]["images_per_s"] for result in results] for name in results[0].rivals},
    }
    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, rates in lines.items():
        style = {"raysemi": "o-", "floor: the same images decoded and resized": "k--"}.get(name, "o:")
        axes.plot(processes, rates, style, label=name, linewidth=2.0 if name == "raysemi" else 1.2)
    axes.set_xticks(processes)
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("loader processes (0: in the process that asks)")
    axes.set_ylabel(f"images a second, crop {results[0].crop}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
