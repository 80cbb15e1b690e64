"""What a person sees: a bar with rate and time left on a terminal, plain lines elsewhere; tables of results."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from raysemi.launch import logs

if TYPE_CHECKING:
    from raysemi.config import RunConfig
    from raysemi.engine.detect import DetectConfig

_LINE_EVERY_S = 10.0
"""Seconds between two plain lines of a bar that has no terminal."""


def is_first_rank() -> bool:
    """False on the ranks other than 0 that torchrun started: they show nothing."""
    return os.environ.get("RANK", "0") == "0"


def train_with_progress(config: RunConfig) -> dict[str, Any]:
    """`launch` with progress on the terminal.

    Raises:
        KeyboardInterrupt: after Ctrl-C, with a text that says how to go on.
    """
    from raysemi.launch.train import launch

    until = min(config.train.steps, config.train.stop_at or config.train.steps)
    with TrainingProgress(until, quiet=not is_first_rank()) as progress:
        try:
            return launch(config, progress)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(
                f"{config.run} was at step {progress.step} of {config.train.steps}; the same command goes on from its "
                "last checkpoint."
            ) from error


def detector_with_progress(config: DetectConfig) -> dict[str, Any]:
    """`train_detector` with progress on the terminal.

    Raises:
        KeyboardInterrupt: after Ctrl-C, with a text that says how to go on.
    """
    from raysemi.launch.detect import train_detector

    until = min(config.train.steps, config.train.stop_at or config.train.steps)
    with TrainingProgress(until) as progress:
        try:
            return train_detector(config, progress)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(
                f"{config.run} was at step {progress.step} of {config.train.steps}; the same command goes on from its "
                "last checkpoint."
            ) from error


def check_tables(result: Mapping[str, Any]) -> Iterator[tuple[list[str], list[list[str]]]]:
    """What `detect check` measured, as tables (columns, rows): the boxes, and the pixels where they were measured."""

    def text(value: float | int | None) -> str:
        return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.1f}"

    of = {"all things": result, **result["classes"]}
    keys = ("true_boxes", "accepted_boxes", "precision", "recall")
    columns = [
        f"score >= {result['accepted']}",
        "true boxes",
        "accepted",
        "precision %",
        "recall %",
        "accepted an image",
    ]
    rows = [[name, *(text(one[key]) for key in keys), ""] for name, one in of.items()]
    rows[0][-1] = f"{result['boxes_per_image']:.2f}"
    yield columns, rows
    if "pixel_accuracy" in result:
        columns = ["pixels called so, and sure", "accuracy %", "inside agreeing boxes %", "outside %"]
        shares = ("pixel_accuracy", "pixel_accuracy_inside", "pixel_accuracy_outside")
        yield columns, [[name, *(text(one[share]) for share in shares)] for name, one in of.items()]


def print_results(results: Mapping[str, Mapping[str, Any]], *, classes: bool = False) -> None:
    """A table, a line a run; with its classes below when asked for."""
    rows = [
        [run, result["method"], f"{result['miou']:.2f}", f"{result['pixel_accuracy']:.2f}", str(result["steps"])]
        for run, result in results.items()
        if result
    ]
    if not rows:
        print("no evaluation yet: the run stopped before its first one")
        return
    print_table(["run", "method", "mIoU %", "pixel accuracy %", "steps"], rows)
    if classes:
        for result in results.values():
            print_table(["class", "IoU %"], [[name, f"{value:.2f}"] for name, value in result["iou"].items()])


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout, as wide as it needs to be where that is no terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)


class TrainingProgress:
    """Shows a run: give it to `launch` as `on_log`.

    Args:
        steps: where the run ends.
        quiet: show nothing (ranks other than 0 under torchrun).
    """

    def __init__(self, steps: int, *, quiet: bool = False) -> None:
        self._steps = steps
        self._quiet = quiet
        self._bar: Any = None
        self._first: tuple[int, float] | None = None
        self.step = 0
        """Steps done, as far as reported."""

    def __enter__(self) -> TrainingProgress:
        if not self._quiet and _has_bars():
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("step"),
                progress.MofNCompleteColumn(),
                progress.BarColumn(bar_width=24),
                progress.TextColumn("{task.fields[numbers]}"),
                progress.TimeRemainingColumn(),
                console=_stderr_console(),
            )
            self._task = self._bar.add_task("train", total=self._steps, numbers="starting")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        """Shows the numbers of a log line or of an evaluation."""
        self.step = max(self.step, step)
        if self._quiet:
            return
        if "eval/miou" in metrics:
            text = f"mIoU {metrics['eval/miou']:.1f} %  pixel accuracy {metrics['eval/pixel_accuracy']:.1f} %"
            logs.say(f"step {step}/{self._steps}  evaluation  {text}", rank=0, step=step, metrics=metrics)
        elif self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers(metrics))
        else:
            line = f"step {step}/{self._steps}  {numbers(metrics)}{self._left(step)}"
            logs.say(line, rank=0, step=step, metrics=metrics)

    def _left(self, step: int) -> str:
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        first, since = self._first
        if step == first:
            return ""
        return f"  {_duration((now - since) / (step - first) * (self._steps - step))} left"


def numbers(metrics: dict[str, float]) -> str:
    """Rate, losses and kept ratio of a log line, for people."""
    terms = {name.removeprefix("loss/"): value for name, value in metrics.items() if name.startswith("loss/")}
    parts = [f"{metrics['images_per_s']:.1f} images/s"] if "images_per_s" in metrics else []
    if "total" in terms:
        total = terms.pop("total")
        each = ", ".join(f"{name} {value:.3f}" for name, value in terms.items())
        parts.append(f"loss {total:.3f} ({each})" if len(terms) > 1 else f"loss {total:.3f}")
    if "method/kept_ratio" in metrics:
        parts.append(f"kept {100 * metrics['method/kept_ratio']:.0f} %")
    if metrics.get("skipped_steps"):
        parts.append(f"skipped steps {metrics['skipped_steps']:.0f}")
    return "  ".join(parts)


class Bar:
    """A bar for work of known size: call it with (done, in all). Ranks other than 0 under torchrun show nothing.

    Args:
        what: what is counted, such as `images`.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._bar: Any = None
        self._start = self._shown = time.monotonic()

    def __enter__(self) -> Bar:
        if _has_bars() and is_first_rank():
            from rich import progress

            columns = (progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeRemainingColumn())
            self._bar = progress.Progress(progress.TextColumn(self._what), *columns, console=_stderr_console())
            self._task = self._bar.add_task(self._what, total=None)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Shows how far the work is."""
        if not is_first_rank():
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
            return
        now = time.monotonic()
        if done == total or now - self._shown >= _LINE_EVERY_S:
            self._shown = now
            rate = done / max(now - self._start, 1e-9)
            logs.say(f"{self._what} {done}/{total}  {rate:.1f}/s")


def _has_bars() -> bool:
    return sys.stderr.isatty() and not logs.as_json()


def _stderr_console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
