"""On a CUDA device: a step of every method runs under bf16 without a single wait of the host for the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from makers import tiny_run

from raysemi.data.loader import Stream
from raysemi.data.pool import Pool
from raysemi.engine.trainer import Trainer
from raysemi.launch.restore import build
from raysemi.methods import METHODS
from raysemi.methods.base import SingleRank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


OF_METHOD = {"u2pl": ["method.warmup_periods=0"]}  # else the first step would not be like the others


@pytest.mark.parametrize(
    ("method", "rule"),
    [(name, "uniform") for name in METHODS]
    + [(name, "pareto") for name, (_, method) in METHODS.items() if method.uses_unlabeled],
)
def test_no_line_of_a_step_waits_for_the_device(scenes: Path, tmp_path: Path, method: str, rule: str) -> None:
    settings = ["train.precision=bf16", "train.steps=20", f"gradients={rule}", *OF_METHOD.get(method, [])]
    settings += ["gradients.measure_every=1"] if rule == "pareto" else []
    config = tiny_run(scenes, tmp_path / "run", method, *settings)
    student, learner = build(config, 7)
    trainer = Trainer(
        student, learner, config.train, config.optim,
        across=SingleRank(), device=torch.device("cuda", 0), period=2, seed=0, gradients=config.gradients,
    )  # fmt: skip
    read = ("labeled", "unlabeled") if learner.uses_unlabeled else ("labeled",)
    pools = {name: Pool.open(scenes / name) for name in read}
    stream = Stream(
        config.data, pools, 0, 2, 2, 0, 1, learner.strong_views, learner.second_view, 0, 4, pinned=True,
        strong=learner.strong, given=learner.given,
    )  # fmt: skip
    hosts = list(stream)
    trainer.train_step(hosts[0])  # libraries choose their kernels here
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = [trainer.train_step(host) for host in hosts[1:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(value["loss/total"]) for value in values)
    assert all(float(value["skipped_steps"]) == 0 for value in values)
