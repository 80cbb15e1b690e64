"""What a sweep has tried: Optuna studies in a database, written at each change, so that a death loses a line at most.

A sweep has two studies: its trials, and the best ones' repeats on new seeds. A trial that was running when its driver
died is taken up again under its own number, from its own run folder.
"""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import TrialState

from raysemi.errors import ConfigError
from raysemi.tune.spaces import Cell, Draw, Space
from raysemi.tune.storage import answering, close, is_made, open_storage
from raysemi.tune.sweep import MAY_CHANGE, SweepConfig, dump, parse

optuna.logging.set_verbosity(optuna.logging.ERROR)
FILE = "sweep.yaml"
"""Of the sweep's folder: its settings."""
State = Literal["waiting", "running", "finished", "pruned", "failed"]
_STATES: dict[TrialState, State] = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True)
class Trial:
    """A line of the history."""

    number: int
    state: State
    draw: Draw
    seed: int
    label: str | None
    """Of a grid's row."""
    of: int | None
    """Of a repeat: the number of the trial that it repeats; -1: the recipe as it is."""
    step: int
    """Of its last evaluation; 0 before the first."""
    miou: float | None
    """Of its last evaluation, percent."""
    curve: Mapping[int, float]
    """Step -> mIoU."""
    hours: float
    """Of GPUs, or of CPU cores without."""
    seconds: float
    """From its start to its end, all starts together."""
    first_step_s: float | None
    """From its start to its first step."""
    reason: str | None
    """Why it failed or was stopped."""
    params: Mapping[str, Any]
    """What Optuna drew, by parameter."""


class Study:
    """The trials of a sweep, or its repeats.

    Args:
        sweep: its settings.
        space: what its trials may be.
        folder: of the sweep.
        name: of the study within the sweep: `trials` or `repeats`.
    """

    def __init__(self, sweep: SweepConfig, space: Space, folder: Path, name: str = "trials") -> None:
        self.sweep = sweep
        self.space = space
        self.folder = folder
        self.name = name
        self.objectives: list[str] = list(sweep.objectives) if name == "trials" else ["miou"]
        self._storage = open_storage(sweep, folder)
        try:
            with answering(sweep):
                self.optuna = optuna.create_study(
                    storage=self._storage,
                    study_name=study_name(folder, name),
                    directions=["maximize" if objective == "miou" else "minimize" for objective in self.objectives],
                    load_if_exists=True,
                )
                self._refuse_another()
                self.optuna.sampler = self._sampler()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the connections to its database."""
        close(self._storage)

    def _refuse_another(self) -> None:
        kept = self.optuna.user_attrs.get("sweep")
        if kept is None:
            self.optuna.set_user_attr("sweep", dump(self.sweep))
            return
        if changed := differences(parse(kept), self.sweep):
            raise ConfigError(
                f"storage must hold this sweep or none under the name {self.optuna.study_name}; got one that differs "
                f"in {', '.join(changed)}. Give another --out, or undo the change to go on."
            )
        self.optuna.set_user_attr("sweep", dump(self.sweep))

    def _sampler(self) -> Any:
        seed = self.sweep.search.seed * 10_007 + len(self.optuna.trials)  # a new start must not draw the same again
        if self.sweep.search.name != "tpe":
            return optuna.samplers.RandomSampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)

    def enqueue(self, draw: Draw, seed: int, **attributes: Any) -> None:
        """Plans a trial, unless it is planned or done already."""
        given = {"cell": list(draw.cell), "settings": draw.settings}
        planned = [trial.user_attrs for trial in self.optuna.trials]
        if not any(one.get("given") == given and one.get("seed") == seed for one in planned):
            self.optuna.enqueue_trial({}, user_attrs={"given": given, "seed": seed, **attributes})

    def draw(self, trial: optuna.Trial) -> Draw:
        """What a trial trains; its seed is noted."""
        given = trial.user_attrs.get("given")
        draw = self.space.draw(trial) if given is None else Draw(Cell(*given["cell"]), given["settings"])
        if "cell" not in trial.user_attrs:
            trial.set_user_attr("cell", list(draw.cell))
            trial.set_user_attr("settings", draw.settings)
        if "seed" not in trial.user_attrs:
            trial.set_user_attr("seed", self.space.seeds[trial.number % len(self.space.seeds)])
        return draw

    def left_running(self) -> list[optuna.Trial]:
        """Trials whose driver died."""
        return [optuna.Trial(self.optuna, one._trial_id) for one in self._of(TrialState.RUNNING)]

    def num(self, *states: State) -> int:
        """How many trials there are."""
        return sum(_STATES[trial.state] in states for trial in self.optuna.get_trials(deepcopy=False))

    def run_folder(self, number: int) -> str:
        """Of a trial."""
        name = f"{self.name}/{number:04d}"
        if self.sweep.runs is None:
            return str((self.folder / name).absolute())
        return f"{self.sweep.runs.rstrip('/')}/{self.folder.name}/{name}"

    def history(self) -> list[Trial]:
        """All trials, by number."""
        return [_line(trial) for trial in self.optuna.get_trials(deepcopy=False)]

    def _of(self, state: TrialState) -> list[optuna.trial.FrozenTrial]:
        return self.optuna.get_trials(deepcopy=False, states=(state,))


def _line(trial: optuna.trial.FrozenTrial) -> Trial:
    noted = trial.user_attrs
    given = noted.get("given", {})
    cell, settings = noted.get("cell") or given.get("cell"), noted.get("settings") or given.get("settings") or {}
    curve = {int(step): float(miou) for step, miou in noted.get("curve", [])}
    return Trial(
        number=trial.number,
        state=_STATES[trial.state],
        draw=Draw(Cell(*(cell or ("", "none", "uniform"))), settings),
        seed=noted.get("seed", 0),
        label=noted.get("label"),
        of=noted.get("of"),
        step=max(curve, default=0),
        miou=curve[max(curve)] if curve else None,
        curve=curve,
        hours=noted.get("hours", 0.0),
        seconds=noted.get("seconds", 0.0),
        first_step_s=noted.get("first_step_s"),
        reason=noted.get("reason"),
        params=trial.params,
    )


def study_name(folder: Path, name: str) -> str:
    """In the database."""
    return f"{folder.name}.{name}"


def differences(earlier: SweepConfig, now: SweepConfig) -> list[str]:
    """Settings that make it another sweep."""
    from raysemi.config_io import difference

    return [path for path in difference(earlier, now) if not path.startswith(MAY_CHANGE)]


def begun(folder: Path) -> SweepConfig | None:
    """The sweep of a folder; None where none was begun."""
    file = folder / FILE
    return parse(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else None


def read(folder: Path) -> tuple[SweepConfig, list[Trial], list[Trial]]:
    """A sweep's settings, trials and repeats; changes nothing.

    Raises:
        ConfigError: no sweep was begun there.
        CheckpointFailure: its database does not answer.
    """
    sweep = begun(folder)
    if sweep is None:
        raise ConfigError(f"sweep must name the folder of one that was begun; got {folder} without {FILE}. Check it.")
    found = [[_line(trial) for trial in frozen_trials(folder, sweep, name)] for name in ("trials", "repeats")]
    return sweep, *found  # type: ignore[return-value]  # two lists


def frozen_trials(folder: Path, sweep: SweepConfig, name: str) -> list[optuna.trial.FrozenTrial]:
    """The trials of a study as Optuna has them; none where there is no such study yet. Raises as `read`."""
    if not is_made(sweep, folder):
        return []
    storage = open_storage(sweep, folder)
    try:
        with answering(sweep):
            return optuna.load_study(study_name=study_name(folder, name), storage=storage).get_trials(deepcopy=False)
    except KeyError:
        return []
    finally:
        close(storage)


@contextlib.contextmanager
def only_driver(folder: Path) -> Iterator[None]:
    """Keeps a second driver off the same folder.

    Raises:
        ConfigError: there is one.
    """
    import fcntl

    with (folder / "driver.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"--out must be a sweep's folder that nobody else runs; got {folder}, whose driver is alive. Wait, "
                f"or look at it: raysemi tune show {folder}"
            ) from error
        yield


def is_driven(folder: Path) -> bool:
    """Whether a driver is at work on a folder."""
    if not (folder / "driver.lock").is_file():  # looking makes none: the folder may be read-only
        return False
    try:
        with only_driver(folder):
            return False
    except ConfigError:
        return True


def best_of(trials: list[Trial], count: int = 1) -> list[Trial]:
    """Finished trials with the largest mIoU, best first."""
    finished = [trial for trial in trials if trial.state == "finished" and trial.miou is not None]
    return sorted(finished, key=lambda trial: -(trial.miou or 0.0))[:count]


def best_of_each(trials: list[Trial], count: int = 1) -> list[Trial]:
    """The best of each method; where none of its trials finished, those that got furthest before they were stopped."""
    found: list[Trial] = []
    for method in dict.fromkeys(trial.draw.cell.method for trial in trials):
        own = [trial for trial in trials if trial.draw.cell.method == method]
        stopped = [one for one in own if one.state == "pruned" and one.miou is not None and math.isfinite(one.miou)]
        stopped.sort(key=lambda trial: (-trial.step, -(trial.miou or 0.0)))
        found += best_of(own, count) or stopped[:count]
    return found


def as_text(value: Any) -> str:
    """For one cell of a table or a CSV file."""
    return value if isinstance(value, str) else json.dumps(value)
