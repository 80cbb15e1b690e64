"""The picture of `raysemi bench data --plot`: images a second against the number of loader processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from raysemi.errors import ConfigError

SUFFIXES = (".png", ".svg", ".pdf")


def check_picture(option: str, path: Path) -> None:
    """Refuses before anything is measured what could not be written afterwards.

    Raises:
        ConfigError: another suffix, or no such folder.
    """
    if path.suffix.lower() not in SUFFIXES or not path.parent.is_dir():
        raise ConfigError(
            f"{option} must be a file {', '.join(SUFFIXES)} in a folder that exists; got {path}. Change it."
        )


def draw_rates(path: Path, processes: Sequence[int], rates: Mapping[str, Sequence[float]], crop: int) -> None:
    """Draws a line for each reader.

    Args:
        path: as `check_picture` wants it.
        processes: numbers of loader processes, rising.
        rates: images a second by reader, one for each of them: ours, the floor, then others.
        crop: side of the views, pixels.
    """
    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    styles = ["o-", "k--", *["o:"] * len(rates)]
    for number, (name, values) in enumerate(rates.items()):
        axes.plot(processes, values, styles[number], label=name, linewidth=1.2 if number else 2.0)
    axes.set_xticks(processes)
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("loader processes (0: in the process that asks)")
    axes.set_ylabel(f"images a second, crop {crop}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
