"""One picture that compares runs by what they predict: label maps alone, no photograph."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image

from raysemi.report.runs import Panel, Run

MOST_BYTES = 1_000_000
"""Of the file."""
_COLUMNS = 6
_WIDTH = 1.9
"""Inches a map."""
_RESOLUTIONS = (120, 90, 60, 40)
"""Dots an inch; the first at which the file is small enough."""


@dataclass(frozen=True)
class Titled:
    """A run, and what stands above its maps."""

    title: str
    run: Run


def label_maps(runs: Sequence[Titled], num_images: int) -> bytes | None:
    """PNG with the truth and each run's prediction of validation images, and the colours of the classes.

    Args:
        runs: that are compared, from left to right.
        num_images: as many of the images that every run has drawn, evenly spaced.

    Returns:
        The file; None when there is no image that all have drawn.
    """
    drawn = [{picture.key: picture for picture in each.run.pictures if picture.kind == "val"} for each in runs]
    keys = [key for key in (drawn[0] if drawn else {}) if all(key in own for own in drawn)]
    if not keys:
        return None
    chosen = np.linspace(0, len(keys) - 1, min(num_images, len(keys))).round().astype(int)
    maps: list[list[tuple[str, NDArray[np.uint8]]]] = []
    for key in (keys[place] for place in chosen):
        panels = [{panel.title: panel for panel in own[key].panels} for own in drawn]
        predictions = [(each.title, _pixels(own["prediction"])) for each, own in zip(runs, panels, strict=True)]
        maps.append([("truth", _pixels(panels[0]["truth"])), *predictions])
    for resolution in _RESOLUTIONS:
        content = _drawn(maps, runs[0].run, resolution)
        if len(content) <= MOST_BYTES:
            break
    return content


def _pixels(panel: Panel) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(panel.content)) as picture:
        return np.asarray(picture.convert("RGB"))


def _drawn(maps: Sequence[Sequence[tuple[str, NDArray[np.uint8]]]], any_run: Run, resolution: int) -> bytes:
    columns = min(_COLUMNS, len(maps[0]))
    rows = [
        line[start : start + columns]  # many cells take several rows
        for line in maps
        for start in range(0, len(line), columns)
    ]
    height, width = maps[0][0][1].shape[:2]
    title_lines = 1 + max(title.count("\n") for title, _ in maps[0])
    row_height = _WIDTH * height / width + 0.16 * title_lines + 0.06
    legend = 0.0 if any_run.confusion is None else 0.35
    figure = Figure(figsize=(_WIDTH * columns, row_height * len(rows) + legend), layout="constrained")
    all_axes = figure.subplots(len(rows), columns, squeeze=False)
    for axes_of_row, row in zip(all_axes, rows, strict=True):
        for axes in axes_of_row:
            axes.set_axis_off()
        for axes, (title, picture) in zip(axes_of_row, row, strict=False):
            axes.imshow(picture, interpolation="nearest")
            axes.set_title(title, fontsize=7, pad=2)
    if any_run.confusion is not None:
        named = zip(any_run.confusion.classes, any_run.confusion.palette, strict=True)
        patches = [Patch(color=(r / 255, g / 255, b / 255), label=name) for name, (r, g, b) in named]
        figure.legend(
            handles=patches, loc="outside lower center", ncols=min(12, len(patches)), fontsize=6, frameon=False
        )
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(resolution)
    canvas.draw()
    # few colours: a palette makes the file a third as large
    page = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    buffer = io.BytesIO()
    page.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
