"""A sweep on a terminal: a table that follows it, plain lines elsewhere, and what there is afterwards."""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import Any

from optuna.exceptions import StorageInternalError
from ray.tune import Callback

from raysemi.launch.terminal import print_table
from raysemi.tune.study import Study, Trial, as_text, best_of

_LOOK_S = 2.0
_COLUMNS = ["trial", "method", "settings", "seed", "step", "mIoU %", "state"]
_MOST_ROWS = 30


class Watch(Callback):
    """Shows trials while they run.

    Args:
        study: the trials.
        limit: how many there are to be.
    """

    def __init__(self, study: Study, limit: int) -> None:
        self._study = study
        self._limit = limit
        self._live: Any = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), refresh_per_second=1)
            self._live.start()
            self._thread = threading.Thread(target=self._follow, name="watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            with contextlib.suppress(StorageInternalError):
                self._live.update(as_table(self._study.history(), self._limit))
            self._live.stop()

    def _follow(self) -> None:
        with contextlib.suppress(StorageInternalError):  # the main thread meets it too, and tells
            while not self._over.wait(_LOOK_S):
                self._live.update(as_table(self._study.history(), self._limit))

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Says which trial begins."""
        self._say(trial, "begins")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Says what a trial has reached."""
        if "failed" in result:
            self._say(trial, f"failed: {result['failed']}")
        elif "miou" in result:
            ended = ", finished" if result.get("finished") else ""
            self._say(trial, f"step {result['step']}  mIoU {result['miou']:.2f} %{ended}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Says that a trial's process is gone."""
        self._say(trial, "its process died")

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles all that it is given; nobody reads it

    def _say(self, trial: Any, what: str) -> None:
        if self._live is None:
            print(f"{self._study.name} {trial.config.get('number')}: {what}", file=sys.stderr, flush=True)


def as_table(trials: list[Trial], limit: int) -> Any:
    """The last trials, for a terminal that is redrawn."""
    from rich.table import Table

    done = sum(trial.state in ("finished", "pruned", "failed") for trial in trials)
    best = best_of(trials)
    title = f"{done} of {limit} trials" + (f", best {best[0].miou:.2f} % (trial {best[0].number})" if best else "")
    table = Table(*_COLUMNS, title=title)
    active = [trial for trial in trials if trial.state != "waiting"]
    for trial in active[-_MOST_ROWS:]:
        table.add_row(*_row(trial))
    return table


def print_trials(trials: list[Trial], repeats: list[Trial], *, alive: bool) -> None:
    """All trials, best first, then the repeats.

    Args:
        trials: of the sweep.
        repeats: of the best ones.
        alive: a driver is at work, so that running trials do run.
    """
    for title, lines in (("trials", trials), ("repeats on new seeds", repeats)):
        if not lines:
            continue
        shown = sorted(lines, key=lambda trial: (trial.state != "finished", -(trial.miou or -1.0), trial.number))
        print(f"{title}: {counts(lines, alive=alive)}")
        print_table(_COLUMNS, [_row(trial, alive=alive) for trial in shown])


def counts(trials: list[Trial], *, alive: bool) -> str:
    """How many trials are in which state."""
    states = [_state(trial, alive=alive) for trial in trials]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "none"


def _row(trial: Trial, *, alive: bool = True) -> list[str]:
    settings = " ".join(f"{path}={as_text(value)}" for path, value in trial.draw.settings.items())
    said = trial.label or settings or "the recipe"
    miou = "" if trial.miou is None else f"{trial.miou:.2f}"
    state = _state(trial, alive=alive) + (f": {trial.reason}" if trial.reason and trial.state == "failed" else "")
    return [str(trial.number), str(trial.draw.cell), said, str(trial.seed), str(trial.step or ""), miou, state]


def _state(trial: Trial, *, alive: bool) -> str:
    return "interrupted" if trial.state == "running" and not alive else trial.state
