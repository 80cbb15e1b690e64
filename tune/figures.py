"""The drawings of a sweep's page, as SVG with the page's colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from raysemi.report.svg import CARD, NUM_SERIES, QUIET, RULE, SERIES, STYLE, as_svg, thousands
from raysemi.tune.study import Trial, as_text

WIDE = (9.4, 2.9)
"""Inches of a figure over the page's whole width."""
MANY = 40
"""Trials beyond which lines and marks are thinner."""
_ABSENT = -0.16
"""Height of values that were not drawn, below an axis from 0 to 1."""
_MOST_NAMED = 12
"""Points that carry their trial's number."""


@dataclass(frozen=True)
class Axis:
    """A parameter as an axis."""

    name: str
    choices: tuple[str, ...] = ()
    """As texts; empty: an interval."""
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    whole: bool = False
    usual: tuple[Any, ...] = ()
    """The recipes' own values."""

    def at(self, value: Any) -> float:
        """Where a value lies: 0 at the bottom, 1 at the top."""
        if self.choices:
            return (self.choices.index(as_text(value)) + 0.5) / len(self.choices)
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return 0.5 if high == low else (value - low) / (high - low)


@dataclass(frozen=True)
class Point:
    """A finished trial on an axis."""

    value: Any
    miou: float
    series: int
    given: bool = False
    """Not drawn: the recipe as it is, or a row."""


def history(trials: Sequence[Trial], series: Sequence[int]) -> str:
    """mIoU by trial number, with the best so far among finished ones.

    Args:
        trials: at least one.
        series: colour of each.
    """
    with _style("history"):
        figure, axes = _wide()
        small = 16 if len(trials) > MANY else 26
        for trial, colour in zip(trials, series, strict=True):
            paint = SERIES[colour % NUM_SERIES]
            if trial.state == "failed":
                axes.plot(trial.number, 0.03, "x", color=paint, markersize=5, transform=axes.get_xaxis_transform())
            elif (miou := finite(trial.miou)) is not None:
                marks: dict[str, Any] = {"facecolors": paint} if trial.state == "finished" else {"facecolors": "none"}
                shape = "^" if trial.state in ("running", "waiting") else "o"
                axes.scatter(
                    trial.number, miou, s=small, edgecolors=paint, marker=shape, zorder=3, linewidths=1, **marks
                )
        done = [trial for trial in trials if trial.state == "finished" and finite(trial.miou) is not None]
        if done:
            best = np.maximum.accumulate([trial.miou or 0.0 for trial in done])
            numbers = [*(trial.number for trial in done), trials[-1].number]
            axes.step(numbers, [*best, best[-1]], where="post", color=QUIET, linewidth=1.2, zorder=2)
        axes.set_xlim(trials[0].number - 0.8, trials[-1].number + 0.8)
        axes.margins(y=0.12)
        _labels(axes, "trial", "mIoU, %")
        return as_svg(figure)


def curves(trials: Sequence[Trial], series: Sequence[int], best: int | None) -> str:
    """mIoU by step, a line a trial.

    Args:
        trials: with a curve each.
        series: colour of each.
        best: number of the trial that stands out.
    """
    with _style("curves"):
        figure, axes = _wide()
        faint = 0.35 if len(trials) > MANY else 0.6
        for trial, colour in zip(trials, series, strict=True):
            paint = SERIES[colour % NUM_SERIES]
            points = [(step, miou) for step, miou in sorted(trial.curve.items()) if math.isfinite(miou)]
            if not points:
                continue
            steps, mious = zip(*points, strict=True)
            first = trial.number == best
            ended = trial.state == "finished"
            axes.plot(
                steps,
                mious,
                color=paint,
                alpha=1.0 if first else faint,
                linewidth=2.6 if first else 1.0,
                linestyle="-" if ended else (0, (4, 2)),
                marker="o" if len(steps) == 1 else None,
                markersize=3,
                zorder=4 if first else 2,
            )
            if not ended:
                axes.plot(steps[-1], mious[-1], "o", color=paint, markerfacecolor="none", markersize=4, alpha=0.8)
        axes.margins(x=0.02, y=0.08)
        _labels(axes, "step", "mIoU, %")
        return as_svg(figure)


def parallel(axes_of: Sequence[Axis], lines: Sequence[Sequence[Any]], mious: Sequence[float], name: str) -> str:
    """Parallel coordinates: an upright axis a parameter, the last one mIoU, a line a trial, the best quarter strong.

    Args:
        axes_of: the parameters.
        lines: values of each trial by parameter; None: not drawn.
        mious: of each trial, percent.
        name: of the figure, unique on the page.
    """
    with _style(name):
        figure = Figure(figsize=(max(WIDE[0], 1.05 * (len(axes_of) + 1)), 3.7), layout="constrained")
        axes = figure.add_subplot()
        score = Axis("mIoU, %", low=min(mious), high=max(mious))
        every = [*axes_of, score]
        strong = sorted(mious, reverse=True)[max(1, math.ceil(len(mious) / 4)) - 1]
        faint = 0.22 if len(mious) > MANY else 0.4
        for values, miou in zip(lines, mious, strict=True):
            heights = [_ABSENT if v is None else axis.at(v) for axis, v in zip(every, [*values, miou], strict=True)]
            top = miou >= strong
            axes.plot(
                range(len(every)),
                heights,
                color=SERIES[1 if top else 0],
                alpha=0.9 if top else faint,
                linewidth=1.5 if top else 0.9,
                zorder=3 if top else 2,
                solid_joinstyle="round",
            )
        for position, axis in enumerate(every):
            axes.plot([position, position], [0, 1], color=QUIET, linewidth=0.9, zorder=1)
            for height, text in _ticks(axis):
                axes.plot([position - 0.03, position], [height, height], color=QUIET, linewidth=0.9)
                axes.text(
                    position - 0.05,
                    height,
                    text,
                    ha="right",
                    va="center",
                    color=QUIET,
                    fontsize=7.5,
                    zorder=4,
                    bbox={"facecolor": CARD, "edgecolor": "none", "alpha": 0.85, "pad": 0.8},
                )
        gaps = any(value is None for values in lines for value in values)
        if gaps:
            axes.text(-0.05, _ABSENT, "not drawn", ha="right", va="center", color=QUIET, fontsize=7.5)
        axes.set_xlim(-0.75, len(every) - 0.8)
        axes.set_ylim(_ABSENT - 0.08 if gaps else -0.05, 1.05)
        axes.set_xticks(range(len(every)), [_two_lines(axis.name) for axis in every])
        axes.yaxis.set_major_locator(NullLocator())
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="x", length=0, labeltop=True, labelbottom=False)
        return as_svg(figure)


def slice_of(axis: Axis, points: Sequence[Point], name: str) -> str:
    """mIoU of finished trials by one parameter; the recipes' own values as dashed lines.

    Args:
        axis: the parameter.
        points: at least one.
        name: of the figure, unique on the page.
    """
    with _style(name):
        figure = Figure(figsize=(3.9, 2.3), layout="constrained")
        axes = figure.add_subplot()
        small = 10 if len(points) > MANY else 20
        for place, point in enumerate(points):
            x = axis.choices.index(as_text(point.value)) + _jitter(place) if axis.choices else float(point.value)
            paint = SERIES[point.series % NUM_SERIES]
            marks: dict[str, Any] = {"marker": "D", "facecolors": "none"} if point.given else {"facecolors": paint}
            axes.scatter(x, point.miou, s=small, edgecolors=paint, alpha=0.8, linewidths=1, zorder=3, **marks)
        for value in axis.usual:
            at = axis.choices.index(as_text(value)) if axis.choices else value
            axes.axvline(at, color=QUIET, linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
        if axis.choices:
            long = max(map(len, axis.choices)) * len(axis.choices) > 40
            axes.set_xticks(
                range(len(axis.choices)),
                axis.choices,
                rotation=30 if long else 0,
                ha="right" if long else "center",
                rotation_mode="anchor",
            )
            axes.set_xlim(-0.5, len(axis.choices) - 0.5)
        else:
            if axis.log and axis.low > 0:
                axes.set_xscale("log")
                decades = math.log10(axis.high / axis.low)
                axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2.5 else (1.0, 2.0, 5.0), numticks=8))
                axes.xaxis.set_minor_locator(NullLocator())
            else:
                axes.xaxis.set_major_locator(MaxNLocator(5, integer=axis.whole))
            axes.xaxis.set_major_formatter(FuncFormatter(thousands))
            axes.set_xlim(_wider(axis.low, axis.high, log=axes.get_xscale() == "log"))
        axes.margins(y=0.1)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        return as_svg(figure)


def pareto(trials: Sequence[Trial], front: Sequence[Trial], hours: str) -> str:
    """Finished trials by hours and mIoU; those that none surpasses in both are joined.

    Args:
        trials: finished ones.
        front: some of them, by hours.
        hours: what the hours are of.
    """
    with _style("pareto"):
        figure, axes = _wide()
        axes.scatter(
            [trial.hours for trial in trials],
            [trial.miou or 0.0 for trial in trials],
            s=22,
            facecolors="none",
            edgecolors=SERIES[0],
            linewidths=1,
            zorder=2,
        )
        x, y = [trial.hours for trial in front], [trial.miou or 0.0 for trial in front]
        axes.step(x, y, where="post", color=SERIES[1], linewidth=1.2, zorder=3)
        axes.scatter(x, y, s=26, color=SERIES[1], zorder=4)
        for trial in front if len(front) <= _MOST_NAMED else [front[0], front[-1]]:
            at = (trial.hours, trial.miou or 0.0)
            axes.annotate(f"{trial.number}", at, (0, 5), textcoords="offset points", ha="center", color=QUIET)
        axes.margins(x=0.05, y=0.14)
        _labels(axes, hours, "mIoU, %", whole=False)
        return as_svg(figure)


def cost(trials: Sequence[Trial], hours: str) -> str:
    """Hours of each trial: finished ones full, pruned ones pale, failed ones in another colour."""
    with _style("cost"):
        figure, axes = _wide(2.3)
        paints = {"failed": (SERIES[1], 0.9), "finished": (SERIES[0], 0.9)}
        for trial in trials:
            colour, alpha = paints.get(trial.state, (SERIES[0], 0.35))
            axes.bar(trial.number, trial.hours, 0.8, color=colour, alpha=alpha, linewidth=0)
        axes.set_xlim(trials[0].number - 0.8, trials[-1].number + 0.8)
        _labels(axes, "trial", hours)
        return as_svg(figure)


def finite(value: float | None) -> float | None:
    """A number that can be drawn, or None."""
    return value if value is not None and math.isfinite(value) else None


def _style(name: str) -> Any:
    return mpl.rc_context({**STYLE, "svg.hashsalt": f"sweep/{name}"})


def _wide(height: float = WIDE[1]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDE[0], height), layout="constrained")
    return figure, figure.add_subplot()


def _labels(axes: Axes, x: str, y: str, *, whole: bool = True) -> None:
    axes.set_xlabel(x, color=QUIET)
    axes.set_ylabel(y, color=QUIET)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=whole, min_n_ticks=1 if whole else 2))
    axes.xaxis.set_major_formatter(FuncFormatter(thousands))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.spines["bottom"].set_color(RULE)


def _wider(low: float, high: float, *, log: bool) -> tuple[float, float]:
    """An interval with room for marks at its ends."""
    if log:
        room = (high / low) ** 0.04 if high > low else 1.5
        return low / room, high * room
    room = 0.04 * (high - low) if high > low else 0.5
    return low - room, high + room


def _ticks(axis: Axis) -> list[tuple[float, str]]:
    if axis.choices:
        return [((place + 0.5) / len(axis.choices), text) for place, text in enumerate(axis.choices)]
    ends = [axis.low, axis.high] if axis.high > axis.low else [axis.low]
    return [(axis.at(end), f"{end:.3g}" if not axis.whole else thousands(end)) for end in ends]


def _two_lines(name: str) -> str:
    """Broken at the sign nearest to its middle."""
    breaks = [place for place, sign in enumerate(name) if sign in "_."]
    if len(name) <= 10 or not breaks:
        return name
    at = min(breaks, key=lambda place: abs(place - len(name) / 2)) + 1
    return f"{name[:at]}\n{name[at:]}"


def _jitter(place: int) -> float:
    """Moves points of one choice apart, always the same way."""
    return ((place * 0.618) % 1.0 - 0.5) * 0.4
