"""Ray Tune's searcher and scheduler over a `Study`, which remembers for both."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optuna.trial import Trial as OptunaTrial
from optuna.trial import TrialState
from ray.tune import Stopper
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from raysemi.tune.study import Study
from raysemi.tune.sweep import PruneConfig

_NOTE_S = 10.0
Work = Callable[[OptunaTrial], dict[str, Any]]
"""A trial of Optuna -> what `trial.train` is given."""


class Search(OptunaSearch):
    """OptunaSearch that goes on with what is there: trials left running first, then planned ones, then new ones.

    A trial ends as finished, pruned or failed by what it reported, never as running, and its numbers are noted with it.

    Args:
        study: the trials.
        work: what a trial is given.
        limit: trials in all.
    """

    def __init__(self, study: Study, work: Work, limit: int) -> None:
        directions = ["max" if objective == "miou" else "min" for objective in study.objectives]
        super().__init__(
            space=_no_space,
            metric=study.objectives if len(directions) > 1 else study.objectives[0],
            mode=directions if len(directions) > 1 else directions[0],
            sampler=study.optuna.sampler,
            storage=study.optuna._storage,
            study_name=study.optuna.study_name,
        )
        self._study = study
        self._work = work
        self._limit = limit
        self._left = study.left_running()
        self._begun: dict[str, float] = {}
        self.out_of_time = False

    def suggest(self, trial_id: str) -> Any:
        """The next trial's work, or FINISHED."""
        if trial_id not in self._ot_trials:
            if self._left:
                trial = self._left.pop(0)
            elif self.out_of_time or not (self._study.num("waiting") or self._undecided() < self._limit):
                return Searcher.FINISHED
            else:
                trial = self._study.optuna.ask()
            self._ot_trials[trial_id] = trial
            self._begun[trial_id] = time.time()
        return self._work(self._ot_trials[trial_id])

    def _undecided(self) -> int:
        return self._study.num("running", "finished", "pruned", "failed", "waiting")

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Notes an evaluation."""
        trial = self._ot_trials[trial_id]
        if "miou" in result:
            curve = dict(map(tuple, trial.user_attrs.get("curve", [])))
            if result["step"] not in curve:
                trial.set_user_attr("curve", sorted([*curve.items(), (result["step"], result["miou"])]))
                if len(self._study.objectives) == 1:
                    trial.report(result["miou"], result["step"])
        for name in ("hours", "first_step_s"):
            if name in result:
                trial.set_user_attr(name, result[name])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Ends a trial in the storage, once."""
        if trial_id in self._completed_trials:
            return
        self._completed_trials.add(trial_id)
        trial = self._ot_trials[trial_id]
        result = result or {}
        if result and not error:
            self.on_trial_result(trial_id, result)
        trial.set_user_attr("seconds", trial.user_attrs.get("seconds", 0.0) + time.time() - self._begun[trial_id])
        values: list[Any] = [result.get(objective) for objective in self._study.objectives]
        sound = all(value is not None and math.isfinite(value) for value in values)
        reason = result.get("failed")
        if error:
            reason = "its process died, or its disk or store did not answer, more often than resources.max_failures"
        elif reason is None and result.get("finished") and not sound:
            reason = f"its result must be finite; got {values}"
        if reason is not None:
            state, values = TrialState.FAIL, []
        elif result.get("finished"):
            state = TrialState.COMPLETE
        else:
            state, values = TrialState.PRUNED, []
            reason = "the sweep's hours were over" if self.out_of_time else f"stopped at step {result.get('step', 0)}"
        if reason is not None:
            trial.set_user_attr("reason", reason)
        self._study.optuna.tell(trial, values or None, state=state)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is the memory."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study is the memory."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles all that it is given; nobody reads it


class Hours(Stopper):
    """Stops a sweep when its hours are over.

    Args:
        search: is told so.
        clock: of the sweep.
        hours: over all starts; None: no limit.
    """

    def __init__(self, search: Search, clock: Clock, hours: float | None) -> None:
        self._search = search
        self._clock = clock
        self._hours = hours

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stops no single trial."""
        return False

    def stop_all(self) -> bool:
        """Whether all is over."""
        self._clock.note()
        self._search.out_of_time = self._hours is not None and self._clock.spent_s > self._hours * 3600.0
        return self._search.out_of_time

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Clock:
    """Wall-clock time of a sweep over all of its starts, kept in its folder."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "clock.json"
        self._before = json.loads(self._file.read_text())["seconds"] if self._file.is_file() else 0.0
        self._since = self._noted = time.monotonic()

    @property
    def spent_s(self) -> float:
        """Seconds so far."""
        return float(self._before + time.monotonic() - self._since)

    def note(self, *, now: bool = False) -> None:
        """Writes it down, every ten seconds at most."""
        if now or time.monotonic() - self._noted > _NOTE_S:
            self._noted = time.monotonic()
            beside = self._file.with_suffix(".new")
            beside.write_text(json.dumps({"seconds": self.spent_s}))
            beside.replace(self._file)


def _no_space(trial: OptunaTrial) -> dict[str, Any]:
    return {}


def scheduler(prune: PruneConfig, study: Study, steps: int, every: int) -> TrialScheduler:
    """What stops trials early, with what earlier starts of the sweep have seen.

    Args:
        prune: `prune.*`.
        study: the trials.
        steps: of a whole trial.
        every: steps between evaluations.
    """
    grace = prune.grace or every
    common: dict[str, Any] = {"time_attr": "step", "metric": "miou", "mode": "max", "grace_period": grace}
    made: TrialScheduler
    if prune.name == "asha":
        last = steps - 1  # no rung where a trial ends: stopping it there saves nothing
        made = ASHAScheduler(max_t=last, reduction_factor=prune.reduction, stop_last_trials=False, **common)
    elif prune.name == "median":
        made = MedianStoppingRule(min_samples_required=prune.min_trials, **common)
    else:
        return FIFOScheduler()
    nobody: Any = _Nobody()
    for trial in study.history():
        if trial.state in ("finished", "pruned") and trial.curve:
            stand_in: Any = _Earlier(f"earlier-{trial.number}")
            made.on_trial_add(nobody, stand_in)
            for step, miou in sorted(trial.curve.items()):
                made.on_trial_result(nobody, stand_in, {"step": step, "miou": miou})
    return made


class _Earlier:
    """In place of Tune's trial: one of an earlier start."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


class _Nobody:
    """In place of Tune's controller: none of those trials runs."""

    def get_live_trials(self) -> list[Any]:
        return []
