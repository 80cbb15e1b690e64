"""Curves, histograms and large matrices as SVG that stands inside a page and takes its colours from the page's style.

matplotlib draws with stand-in colours; in the text of the SVG they become CSS variables (`--series-0`, `--quiet`, ...),
so that one drawing is readable on light and on dark. Everything goes through figure objects, never through pyplot.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, ScalarFormatter
from numpy.typing import NDArray

from raysemi.report.runs import Curve

NUM_SERIES = 8
"""Colours of the page's style; more groups begin anew."""
_QUIET, _RULE = "#0a0b0c", "#0a0b0d"
_SERIES = tuple(f"#0a0c{index:02x}" for index in range(NUM_SERIES))
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: the page's own font, and it can be searched
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that no machine warns of a missing font
    "font.size": 8.5,
    "axes.edgecolor": _RULE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.7,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _QUIET,
    "ytick.labelcolor": _QUIET,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "path.simplify_threshold": 0.2,
}


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
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(3.9, 2.1), layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            steps, mean = line.curve.steps, line.curve.mean * scale
            colour = _SERIES[line.series % NUM_SERIES]
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
        axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
        if log:
            axes.set_yscale("log", nonpositive="mask")
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(_thousands))
            return _svg(figure)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        numbers = ScalarFormatter(useOffset=False)
        numbers.set_powerlimits((-3, 4))
        axes.yaxis.set_major_formatter(numbers)
        return _svg(figure)


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
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(3.9, 2.1), layout="constrained")
        axes = figure.add_subplot()
        for part in bars:
            # cosines may lie a rounding beyond 1
            counts, _ = np.histogram(np.clip(part.values, edges[0], edges[-1]), edges)
            shares = 100.0 * counts / len(part.values)
            colour = _SERIES[part.series % NUM_SERIES]
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
            axes.axvline(0.0, color=_QUIET, linewidth=0.8)
            axes.set_xlim(*span)
            axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g} %"))
        return _svg(figure)


def matrix(shares_KK: NDArray[np.float64], name: str) -> str:
    """A square matrix of shares as a picture, for more classes than a table can show.

    Args:
        shares_KK: values in [0, 1], rows truth.
        name: name of the figure, unique on the page.
    """
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name, "axes.grid": False}):
        figure = Figure(figsize=(5.2, 5.2), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(np.sqrt(shares_KK), cmap=_shades(), vmin=0, vmax=1, interpolation="nearest")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("predicted class, by number", color=_QUIET)
        axes.set_ylabel("true class, by number", color=_QUIET)
        return _svg(figure)


def _shades() -> LinearSegmentedColormap:
    """From nothing to blue, so that the page shows through."""
    return LinearSegmentedColormap.from_list("shades", [(0.2, 0.45, 0.8, 0.0), (0.2, 0.45, 0.8, 1.0)])


def _thousands(value: float, position: int | None = None) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:g}"


def _svg(figure: Figure) -> str:
    FigureCanvasAgg(figure)
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # `axes_1` and the like would stand on the page many times
    text = text.replace("xlink:href", "href")
    text = re.sub(r'<svg([^>]*?)\swidth="[^"]*"', r"<svg\1", text, count=1)
    text = re.sub(r'<svg([^>]*?)\sheight="[^"]*"', r'<svg role="img"\1', text, count=1)
    for colour, variable in [(_QUIET, "--quiet"), (_RULE, "--rule")] + [
        (colour, f"--series-{index}") for index, colour in enumerate(_SERIES)
    ]:
        text = text.replace(colour, f"var({variable})")
    return text
