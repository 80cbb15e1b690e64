"""Ranks that do not see the same run folder: told on all of them, before a step is taken."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

import torch
from makers import tiny_run

from raysemi.config import RunConfig
from raysemi.engine import checkpoint, distributed
from raysemi.engine.folder import RunFolder
from raysemi.errors import CheckpointError
from raysemi.launch.worker import run


def rank(number: int, folder: Path, config: RunConfig) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder / 'store'}", rank=number, world_size=2)
    try:
        run(config)
    except CheckpointError as error:
        (folder / f"said-{number}.txt").write_text(str(error), encoding="utf-8")
    distributed.leave()


def test_ranks_that_would_go_on_from_different_steps_all_stop(scenes, tmp_path):
    """Each machine has a run folder of its own under one name: rank 1's lacks the newest checkpoint."""
    settings = ["train.steps=4", "train.batch.unlabeled=4", "model.batch_norm=frozen", "train.stop_at=2"]
    run(tiny_run(scenes, tmp_path / "run-0", "fixmatch", *settings))
    assert checkpoint.steps(RunFolder(tmp_path / "run-0")) == [1, 2]
    shutil.copytree(tmp_path / "run-0", tmp_path / "run-1")
    shutil.rmtree(tmp_path / "run-1" / "checkpoints" / "step-000002")
    spawn = multiprocessing.get_context("spawn")
    configs = [tiny_run(scenes, tmp_path / f"run-{number}", "fixmatch", *settings[:-1]) for number in range(2)]
    ranks = [spawn.Process(target=rank, args=(number, tmp_path, config)) for number, config in enumerate(configs)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    for number in range(2):
        said = (tmp_path / f"said-{number}.txt").read_text(encoding="utf-8")
        assert "step 1 on one rank and 2 on another" in said
        assert checkpoint.steps(RunFolder(tmp_path / f"run-{number}"))[-1] == 2 - number
