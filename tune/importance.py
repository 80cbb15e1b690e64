"""Which parameters decide whether a trial is among the best."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState

from raysemi.tune.study import frozen_trials
from raysemi.tune.sweep import SweepConfig

LEAST = 4
"""Finished trials without which nothing can be said."""
TOP = 0.25
"""Share of trials that count as the best."""
HALF = 0.5
"""Of all trials, those that the second column is over."""


class Importance(NamedTuple):
    """A parameter's share, in [0, 1]."""

    name: str
    overall: float
    """For being in the best quarter of all."""
    among_half: float | None
    """For being in that quarter, of the best half; None: too few trials."""


def drawn_trials(folder: Path, sweep: SweepConfig) -> list[FrozenTrial]:
    """Finished trials whose values were drawn, with mIoU as their only value."""
    place = sweep.objectives.index("miou")
    return [
        optuna.create_trial(params=trial.params, distributions=trial.distributions, value=trial.values[place])
        for trial in frozen_trials(folder, sweep, "trials")
        if trial.state == TrialState.COMPLETE and trial.params
    ]


def importances(trials: list[FrozenTrial]) -> list[Importance]:
    """By PED-ANOVA, largest first; a parameter that some trials do not draw counts where it is drawn.

    Args:
        trials: from `drawn_trials`, `LEAST` at least.
    """
    study = optuna.create_study(direction="maximize")
    study.add_trials(trials)
    overall = _shares(study, 1.0)
    half = _shares(study, HALF) if len(trials) * HALF >= LEAST else {}
    return [Importance(name, share, half.get(name)) for name, share in overall.items()]


def _shares(study: optuna.Study, region: float) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental; trials that are all alike
        judge = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=TOP, region_quantile=region)
        return optuna.importance.get_param_importances(study, evaluator=judge)
