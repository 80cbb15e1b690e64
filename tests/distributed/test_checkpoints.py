"""Checkpoints of two ranks: each writes its share, a fault of one stops both, and one rank goes on where two were.

One pair of processes has all the cases.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from forks import ranks
from makers import tiny_run

from raysemi.config import RunConfig
from raysemi.engine import checkpoint, distributed, saver
from raysemi.engine.checkpoint import Snapshot
from raysemi.engine.folder import RunFolder
from raysemi.engine.saver import Saver
from raysemi.errors import CheckpointError
from raysemi.launch.worker import run

CPU = torch.device("cpu")


def snapshot(step: int) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    student = {f"layer{number}.weight": torch.randn(number + 1, 7, generator=generator) for number in range(9)}
    return Snapshot(step, {"student": student, "method": {"threshold": torch.tensor(0.5)}}, {"seconds": 1.0})


def fails(act) -> str:
    try:
        act()
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def faulty_saves(number: int, folder: Path) -> dict[str, str]:
    """What each rank says of: whole, a full disk under either rank's shard, a folder of its own."""
    across = distributed.join()
    said = {}
    shared = RunFolder(folder / "shared")
    with Saver(shared, across, CPU, keep=2) as whole:
        for step in (1, 2, 3):
            whole.save(snapshot(step), best=10.0 if step == 1 else None)
            whole.check()
    for broken in range(2):
        part = Saver(shared, across, CPU, keep=2)
        place = checkpoint.place_of(shared, 4, part._token)
        if number == 0:
            shared.make(place)
            shard = f"{place}/student-0000{broken}-of-00002.safetensors.part"
            Path(shared.path(shard)).symlink_to("/dev/full")
        distributed.barrier(across)
        part.save(snapshot(4))
        part._job.written.wait()
        distributed.barrier(across)
        said[f"full {broken}"] = fails(part.check)
    saver._SEEN_S = 0.5
    said["own"] = fails(lambda: Saver(RunFolder(folder / f"own-{number}"), across, CPU, keep=2))
    return said


def saves(number: int, folder: Path, apart: list[RunConfig], config: RunConfig) -> None:
    """Saves; goes on from folders that differ; begins a run on two ranks."""
    said = faulty_saves(number, folder) | {"apart": fails(lambda: run(apart[number]))}
    (folder / f"said-{number}.json").write_text(json.dumps(said))
    run(config)


def goes_on(number: int, config: RunConfig) -> None:
    run(config)


@pytest.fixture(scope="module")
def two_ranks(scenes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    settings = ["train.steps=3", "train.batch.unlabeled=4", "model.batch_norm=frozen", "eval.every=3"]
    settings += ["optim.lr=0.001", "method.threshold=0.2", "train.checkpoint_every=1", "train.keep=9"]

    def config(name: str, *more: str) -> RunConfig:
        return tiny_run(scenes, folder / name, "fixmatch", *settings, *more)

    # each machine has a run folder of its own under one name, and rank 1's lacks the newest checkpoint
    run(config("apart-0", "train.stop_at=2"))
    shutil.copytree(folder / "apart-0", folder / "apart-1")
    shutil.rmtree(folder / "apart-1" / "checkpoints" / "step-000002")
    apart = [config(f"apart-{number}") for number in range(2)]
    assert ranks(2, folder, saves, folder, apart, config("parts", "train.stop_at=1")) == [0, 0]
    run(config("parts", "train.stop_at=2"))
    assert ranks(2, folder, goes_on, config("parts")) == [0, 0]
    run(config("whole"))
    return folder


def test_shares_of_two_ranks_are_one_checkpoint(two_ranks):
    folder = RunFolder(two_ranks / "shared")
    assert folder.names("checkpoints") == ["step-000001", "step-000002", "step-000003"]  # 1 is the best
    assert folder.names("checkpoints/step-000003") == [
        "manifest.json", "method-00001-of-00002.safetensors", "state.json",
        "student-00000-of-00002.safetensors", "student-00001-of-00002.safetensors",
    ]  # fmt: skip
    assert checkpoint.faults(folder, 3) == []
    loaded, expected = checkpoint.load_newest(folder), snapshot(3)
    assert loaded.state == expected.state
    for group, tensors in expected.tensors.items():
        assert loaded.tensors[group].keys() == tensors.keys()
        assert all(torch.equal(loaded.tensors[group][name], value) for name, value in tensors.items())


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("full 0", "NoRoom: the disk of "),
        ("full 1", "NoRoom: the disk of "),
        ("own", "CheckpointError: run must name one folder that all ranks share"),
        ("apart", "CheckpointError: run must name one folder that all ranks share; got "),
    ],
)
def test_a_fault_of_one_rank_stops_all(two_ranks, case, text):
    for number in range(2):
        assert json.loads((two_ranks / f"said-{number}.json").read_text())[case].startswith(text)


def test_ranks_that_would_go_on_from_different_steps_change_nothing(two_ranks):
    for number in range(2):
        said = json.loads((two_ranks / f"said-{number}.json").read_text())["apart"]
        assert "step 1 on one rank and 2 on another" in said
        assert checkpoint.steps(RunFolder(two_ranks / f"apart-{number}"))[-1] == 2 - number


def test_two_ranks_then_one_then_two_are_one_run(two_ranks):
    parts, whole = RunFolder(two_ranks / "parts"), RunFolder(two_ranks / "whole")
    assert [checkpoint.read_manifest(parts, step)["world"] for step in (1, 2, 3)] == [2, 1, 2]
    a, b = checkpoint.load(parts, 3), checkpoint.load(whole, 3)
    assert a.tensors.keys() == b.tensors.keys()
    for group, tensors in b.tensors.items():
        for name, value in tensors.items():
            torch.testing.assert_close(a.tensors[group][name], value, rtol=1e-4, atol=1e-5, msg=f"{group}/{name}")
