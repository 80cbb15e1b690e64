"""What a trial does, in a process of Ray Tune: an ordinary run in a folder of its own, that reports its evaluations."""

from __future__ import annotations

import time
import traceback
from typing import Any

from raysemi import config_io
from raysemi.config import RayConfig, RunConfig
from raysemi.errors import RaysemiError


def train(work: dict[str, Any]) -> None:
    """Trains a trial, from its last checkpoint where there is one.

    Every end that says something about the settings is reported, and not raised, so that Tune begins only those trials
    again that may go better: whose process died, or whose disk or store did not answer.

    Args:
        work: `config` (YAML), `begun` (time when the trial was handed out), `hours` (spent before), `devices` (GPUs, or
            CPU cores without).
    """
    import torch
    from ray import tune

    from raysemi.data.kept import keep_indexes
    from raysemi.launch.train import launch, may_go_better

    if work.get("refused"):
        tune.report({"step": 0, "failed": work["refused"]})
        return
    config = config_io.parse(work["config"])
    if not isinstance(config.ray, RayConfig):
        torch.set_num_threads(work["threads"])
    since, first_step_s = time.time(), None

    def numbers(step: int) -> dict[str, Any]:
        hours = work["hours"] + (time.time() - since) * work["devices"] / 3600.0
        return {"step": step, "hours": hours, "first_step_s": first_step_s}

    def on_log(step: int, metrics: dict[str, float]) -> None:
        nonlocal first_step_s
        if first_step_s is None:
            first_step_s = max(0.0, time.time() - work["begun"] - _of_steps(config, step, metrics))
        if "eval/miou" in metrics and step < config.train.steps:  # the last one comes with the result
            tune.report({**numbers(step), "miou": metrics["eval/miou"]})

    try:
        with keep_indexes():  # of the trials before this one in its process
            result = launch(config, on_log)
    except Exception as error:
        own = isinstance(error, RaysemiError)
        if own and may_go_better(error):
            raise
        if not own:
            traceback.print_exc()
        reason = " ".join((str(error) if own else f"{type(error).__name__}: {error}").split())
        tune.report({**numbers(0), "failed": reason})
        return
    tune.report({**numbers(result["steps"]), "miou": result["miou"], "finished": True})


def _of_steps(config: RunConfig, step: int, metrics: dict[str, float]) -> float:
    """Seconds that the steps of the first log line took."""
    rate = metrics.get("images_per_s")
    steps = (step - 1) % config.train.log_every + 1
    return steps * (config.train.batch.labeled + config.train.batch.unlabeled) / rate if rate else 0.0
