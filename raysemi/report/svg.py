"""Drawings as SVG that stands inside a page and takes its colours from the page's style.

matplotlib draws with stand-in colours; in the text of the SVG they become CSS variables (`--series-0`, `--quiet`, ...),
so that one drawing is readable on light and on dark. Everything goes through figure objects, never through pyplot.
"""

from __future__ import annotations

import io
import re
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

NUM_SERIES = 8
"""Colours of the page's style; more groups begin anew."""
QUIET, RULE, CARD = "#0a0b0c", "#0a0b0d", "#0a0b0e"
SERIES = tuple(f"#0a0c{index:02x}" for index in range(NUM_SERIES))
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: the page's own font, and it can be searched
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that no machine warns of a missing font
    "font.size": 8.5,
    "axes.edgecolor": RULE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "path.simplify_threshold": 0.2,
}


def thousands(value: float, position: int | None = None) -> str:
    """Label of a tick: 20000 as 20k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:g}"


def as_svg(figure: Figure) -> str:
    """An `<svg>` element as wide as its place, with the page's colours."""
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
    for colour, variable in [(QUIET, "--quiet"), (RULE, "--rule"), (CARD, "--card")] + [
        (colour, f"--series-{index}") for index, colour in enumerate(SERIES)
    ]:
        text = text.replace(colour, f"var({variable})")
    return text
