"""Ranks that do not see the same run folder: told on all of them, before a step is taken."""

from __future__ import annotations

import shutil
from pathlib import Path

from forks import ranks
from makers import tiny_run

from raysemi.config import RunConfig
from raysemi.engine import checkpoint
from raysemi.engine.folder import RunFolder
from raysemi.errors import CheckpointError
from raysemi.launch.worker import run


def rank(number: int, folder: Path, configs: list[RunConfig]) -> None:
    try:
        run(configs[number])
    except CheckpointError as error:
        (folder / f"said-{number}.txt").write_text(str(error), encoding="utf-8")


def test_ranks_that_would_go_on_from_different_steps_all_stop(scenes, tmp_path):
    """Each machine has a run folder of its own under one name: rank 1's lacks the newest checkpoint."""
    settings = ["train.steps=4", "train.batch.unlabeled=4", "model.batch_norm=frozen", "train.stop_at=2"]
    run(tiny_run(scenes, tmp_path / "run-0", "fixmatch", *settings))
    assert checkpoint.steps(RunFolder(tmp_path / "run-0")) == [1, 2]
    shutil.copytree(tmp_path / "run-0", tmp_path / "run-1")
    shutil.rmtree(tmp_path / "run-1" / "checkpoints" / "step-000002")
    configs = [tiny_run(scenes, tmp_path / f"run-{number}", "fixmatch", *settings[:-1]) for number in range(2)]
    assert ranks(2, tmp_path, rank, tmp_path, configs) == [0, 0]
    for number in range(2):
        said = (tmp_path / f"said-{number}.txt").read_text(encoding="utf-8")
        assert "step 1 on one rank and 2 on another" in said
        assert checkpoint.steps(RunFolder(tmp_path / f"run-{number}"))[-1] == 2 - number
