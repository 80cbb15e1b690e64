"""What one rank meets, all of them tell: a loss that is not finite, a signal, a hang, a death. And another number of
ranks goes on with the same run. Real gloo processes, no Ray."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from forks import ranks
from makers import tiny_run

from raysemi.config import RunConfig
from raysemi.data.pool import Pool
from raysemi.engine import checkpoint
from raysemi.engine.folder import RunFolder
from raysemi.errors import RaysemiError, TrainingError
from raysemi.launch import worker
from raysemi.launch.restore import load_network
from raysemi.launch.stop import Stopped

pytestmark = pytest.mark.timeout(900)  # of a busy machine: up to four processes of training each
FROZEN = ("train.batch.labeled=4", "train.batch.unlabeled=8", "model.batch_norm=frozen", "method.threshold=0.145")


def say(config: RunConfig, rank: int, error: BaseException) -> None:
    Path(f"{config.run}-{rank}.txt").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")


def said(config: RunConfig) -> list[str]:
    return [Path(f"{config.run}-{rank}.txt").read_text(encoding="utf-8") for rank in range(2)]


def faults(rank: int, diverging: RunConfig, signalled: RunConfig, dying: RunConfig) -> None:
    try:
        worker.run(diverging)
    except TrainingError as error:
        say(diverging, rank, error)
    try:
        worker.run(signalled, lambda step, _: os.kill(os.getpid(), signal.SIGTERM) if (step, rank) == (3, 1) else None)
    except Stopped as error:
        say(signalled, rank, error)
    try:
        worker.run(dying, lambda step, _: os._exit(9) if (step, rank) == (3, 1) else None)
    except RaysemiError as error:
        say(dying, rank, error)
        os._exit(0)  # the group cannot be left any more


def test_two_ranks_tell_what_one_of_them_meets(scenes: Path, tmp_path: Path) -> None:
    diverging, signalled, dying = (
        tiny_run(scenes, tmp_path / name, "fixmatch", *FROZEN, *settings)
        for name, settings in (
            ("diverging", ["train.steps=40", "optim.lr=1e30", "train.skip_limit=3", "train.log_every=3"]),
            ("signalled", ["train.steps=400", "train.checkpoint_every=400"]),
            ("dying", ["train.steps=400", "train.checkpoint_every=2"]),
        )
    )
    assert ranks(2, tmp_path, faults, diverging, signalled, dying) == [0, 9]

    one, other = said(diverging)
    assert one == other  # with the keys of both
    assert "must be at most train.skip_limit, 3; got 5, lately 4, 5, 6. The batch of the last: " in one
    keys = one.split("The batch of the last: ")[1].split(". Weights")[0].split(", ")
    pools = [Pool.open(scenes / name) for name in ("labeled", "unlabeled")]
    assert len(keys) == 12
    assert set(keys) <= {pool.key(row) for pool in pools for row in range(pool.num_samples)}
    newest = checkpoint.load_newest(RunFolder(diverging.run))
    assert newest.step == 6
    assert all(value.isfinite().all() for value in newest.tensors["student"].values())

    one, other = said(signalled)
    assert one == other == "Stopped: "
    stopped = checkpoint.load_newest(RunFolder(signalled.run)).step
    assert 3 <= stopped < 400

    assert said_of_rank_0(dying).startswith("RaysemiError: workers must stay alive; got rank 0: it lost another one (")
    assert checkpoint.load_newest(RunFolder(dying.run)).step == 2


def said_of_rank_0(config: RunConfig) -> str:
    return Path(f"{config.run}-0.txt").read_text(encoding="utf-8")


def hang(rank: int, config: RunConfig) -> None:
    def wait_for_ever(step: int, _: dict[str, float]) -> None:
        while (step, rank) == (3, 1):
            time.sleep(1.0)

    worker.run(config, wait_for_ever)


def test_a_hang_of_one_rank_ends_all_with_the_stack_of_each(scenes: Path, tmp_path: Path) -> None:
    config = tiny_run(
        scenes, tmp_path / "run", "fixmatch", *FROZEN, "train.steps=400", "train.checkpoint_every=2",
        "train.hang_after_s=8",
    )  # fmt: skip
    began = time.monotonic()
    assert ranks(2, tmp_path, hang, config) == [1, 1]
    assert time.monotonic() - began < 150
    one, other = ((tmp_path / "run" / "stacks" / f"rank-{rank}.txt").read_text() for rank in range(2))
    for rank, text in enumerate((one, other)):
        assert "a step must be done within train.hang_after_s, 8 s; got none for " in text
        assert f"after step 3 on rank {rank} " in text or f"after step 2 on rank {rank} " in text
    assert "wait_for_ever" in other
    assert "wait_for_ever" not in one
    assert "_reduce" in one  # where it waits for the other
    assert checkpoint.load_newest(RunFolder(config.run)).step == 2


def in_fp64(rank: int, config: RunConfig) -> None:
    build = worker.build

    def double(*arguments: object, **settings: object) -> object:
        student, method = build(*arguments, **settings)
        return student.double(), method

    worker.build = double
    worker.run(config)


@pytest.mark.slow
def test_four_ranks_two_and_four_again_are_four(scenes: Path, tmp_path: Path) -> None:
    """fp64 and frozen BatchNorm: what is left are sums in another order."""
    settings = [*FROZEN, "train.steps=18", "train.checkpoint_every=3"]
    assert ranks(4, tmp_path, in_fp64, tiny_run(scenes, tmp_path / "whole", "fixmatch", *settings)) == [0] * 4
    for world, stop in ((4, 6), (2, 12), (4, 18)):
        config = tiny_run(scenes, tmp_path / "parts", "fixmatch", *settings, f"train.stop_at={stop}")
        assert ranks(world, tmp_path, in_fp64, config) == [0] * world
    first, whole, parts = (
        load_network(tmp_path / name, step) for name, step in (("whole", 15), ("whole", 18), ("parts", 18))
    )
    weights, others = whole.network.state_dict(), parts.network.state_dict()
    snapshots = [checkpoint.load_newest(RunFolder(tmp_path / name)) for name in ("whole", "parts")]
    for stem, tensors in snapshots[0].tensors.items():
        for name, value in tensors.items():
            if value.is_floating_point():
                assert value.dtype == torch.float64, (stem, name)
                torch.testing.assert_close(value, snapshots[1].tensors[stem][name], rtol=0, atol=1e-8)
    assert any(not torch.equal(weights[name], value) for name, value in first.network.state_dict().items())
    assert weights.keys() == others.keys()
