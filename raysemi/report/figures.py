"""Curves, histograms and large matrices as SVG for a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, ScalarFormatter
from numpy.typing import NDArray

from raysemi.report.runs import Curve
from raysemi.report.svg import NUM_SERIES, QUIET, SERIES, STYLE, as_svg, thousands


@dataclass(frozen=True)
class Line:
    """A curve in the colour of its group; `faint` lines are dashed (a second stage or network of the same group)."""

    curve: Curve
    series: int
    faint: bool = False


def curves(lines: Sequence[Line], name: str, scale: float = 1.0, *, log: bool = False) -> str:
    """Lines over steps, each with a band of one standard deviation where its group has several runs.

    Args:
        lines: at least one.
        name: name of the figure, unique on the page (names inside the SVG are derived from it).
        scale: factor of the values, 100 for shares shown in percent.
        log: logarithmic axis of values, for what spans decades.

    Returns:
        An `<svg>` element.
    """
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(3.9, 2.1), layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            steps, mean = line.curve.steps, line.curve.mean * scale
            colour = SERIES[line.series % NUM_SERIES]
            few = len(steps) <= 12
            axes.plot(
                steps,
                mean,
                color=colour,
                linewidth=1.2 if line.faint else 1.7,
                linestyle=(0, (4, 2)) if line.faint else "-",
                marker="o" if few else None,
                markersize=2.4 if line.faint else 3.2,
                solid_capstyle="round",
                zorder=2 if line.faint else 3,
            )
            if line.curve.deviation is not None and not line.faint:
                width = line.curve.deviation * scale
                axes.fill_between(steps, mean - width, mean + width, color=colour, alpha=0.16, linewidth=0, zorder=1)
        axes.margins(x=0.02, y=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(thousands))
        if log:
            axes.set_yscale("log", nonpositive="mask")
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(thousands))
            return as_svg(figure)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        numbers = ScalarFormatter(useOffset=False)
        numbers.set_powerlimits((-3, 4))
        axes.yaxis.set_major_formatter(numbers)
        return as_svg(figure)


@dataclass(frozen=True)
class Bars:
    """Values whose distribution is drawn in the colour of its group; `faint` outlines are dashed."""

    values: NDArray[np.float64]
    series: int
    faint: bool = False


def histogram(bars: Sequence[Bars], name: str, span: tuple[float, float] | None = None) -> str:
    """Outlines of distributions over common bins; the height is the share of each one's own values, in percent.

    Args:
        bars: at least one, each with at least one value.
        name: name of the figure, unique on the page.
        span: ends of the axis, with a line at 0 between them; None = a logarithmic axis over all values, which must be
            above 0.
    """
    everything = np.concatenate([part.values for part in bars])
    if span is None:
        low, high = np.log10(everything.min()), np.log10(everything.max())
        edges = np.logspace(low - 0.05, high + 0.05, 41)
    else:
        edges = np.linspace(*span, 41)
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(3.9, 2.1), layout="constrained")
        axes = figure.add_subplot()
        for part in bars:
            # cosines may lie a rounding beyond 1
            counts, _ = np.histogram(np.clip(part.values, edges[0], edges[-1]), edges)
            shares = 100.0 * counts / len(part.values)
            colour = SERIES[part.series % NUM_SERIES]
            if not part.faint:
                axes.stairs(shares, edges, fill=True, color=colour, alpha=0.16, linewidth=0)
            axes.stairs(
                shares,
                edges,
                color=colour,
                linewidth=1.2 if part.faint else 1.5,
                linestyle=(0, (4, 2)) if part.faint else "-",
            )
        if span is None:
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.axvline(0.0, color=QUIET, linewidth=0.8)
            axes.set_xlim(*span)
            axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(thousands))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g} %"))
        return as_svg(figure)


def matrix(shares_KK: NDArray[np.float64], name: str) -> str:
    """A square matrix of shares as a picture, for more classes than a table can show.

    Args:
        shares_KK: values in [0, 1], rows truth.
        name: name of the figure, unique on the page.
    """
    with mpl.rc_context({**STYLE, "svg.hashsalt": name, "axes.grid": False}):
        figure = Figure(figsize=(5.2, 5.2), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(np.sqrt(shares_KK), cmap=_shades(), vmin=0, vmax=1, interpolation="nearest")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("predicted class, by number", color=QUIET)
        axes.set_ylabel("true class, by number", color=QUIET)
        return as_svg(figure)


def _shades() -> LinearSegmentedColormap:
    """From nothing to blue, so that the page shows through."""
    return LinearSegmentedColormap.from_list("shades", [(0.2, 0.45, 0.8, 0.0), (0.2, 0.45, 0.8, 1.0)])
