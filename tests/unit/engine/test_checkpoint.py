"""A checkpoint is whole or it is none: real bytes are damaged here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from raysemi.engine import checkpoint, retention
from raysemi.engine.checkpoint import Snapshot
from raysemi.engine.folder import RunFolder
from raysemi.errors import CheckpointError


def snapshot(step: int) -> Snapshot:
    torch.manual_seed(step)
    tensors = {
        "student": {"a.weight": torch.randn(3, 5, 2, 2).to(memory_format=torch.channels_last), "a.n": torch.tensor(7)},
        "method": {"threshold": torch.tensor(0.85)},
    }
    return Snapshot(step, tensors, {"seconds": 1.5})


def damage(folder: RunFolder, step: int) -> None:
    file = Path(folder.path(f"checkpoints/step-{step:06d}/student.safetensors"))
    file.write_bytes(file.read_bytes()[:-3])


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    for step in (10, 20, 30):
        checkpoint.save(folder, snapshot(step))
    return folder


def test_what_was_saved_comes_back(folder):
    loaded = checkpoint.load_newest(folder)
    assert loaded.step == 30
    assert loaded.state == {"seconds": 1.5}
    expected = snapshot(30).tensors
    assert loaded.tensors.keys() == expected.keys()
    for stem, tensors in expected.items():
        for name, value in tensors.items():
            assert torch.equal(loaded.tensors[stem][name], value)


@pytest.mark.parametrize("kind", ["flip", "cut", "remove", "manifest"])
def test_a_damaged_checkpoint_is_named_and_passed_over(folder, kind, caplog):
    path = Path(folder.path("checkpoints/step-000030"))
    file = path / ("manifest.json" if kind == "manifest" else "student.safetensors")
    content = bytearray(file.read_bytes())
    if kind == "remove":
        file.unlink()
    elif kind == "flip":
        content[-3] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="step-000030"):
        checkpoint.load(folder, 30)
    assert checkpoint.load_newest(folder).step == 20
    assert "step-000030" in caplog.text


def test_a_folder_without_manifest_is_no_checkpoint(folder):
    Path(folder.path("checkpoints/step-000030/manifest.json")).unlink()
    assert checkpoint.steps(folder) == [10, 20]


def test_keeps_the_newest_and_the_best_and_sweeps_what_a_killed_writer_left(folder):
    left = Path(folder.path("checkpoints/.writing-x"))
    left.mkdir()
    retention.mark_best(folder, 10, 41.5)
    retention.keep_newest(folder, keep=1, newest=30)
    assert checkpoint.steps(folder) == [10, 30]
    assert not left.exists()
    assert retention.best_step(folder) == 10


def test_a_broken_checkpoint_does_not_count_among_those_kept(folder):
    """Back from 30, which is broken, to 20; then 25 is saved, and it is the one to keep."""
    damage(folder, 30)
    assert checkpoint.load_newest(folder).step == 20
    checkpoint.save(folder, snapshot(25))
    retention.keep_newest(folder, keep=1, newest=25)
    assert checkpoint.load_newest(folder).step == 25
    assert checkpoint.steps(folder) == [25]


def test_a_broken_best_checkpoint_counts_as_none(folder, caplog):
    assert retention.best_miou(folder) == float("-inf")
    retention.mark_best(folder, 20, 41.5)
    assert retention.best_miou(folder) == 41.5
    damage(folder, 20)
    assert retention.best_miou(folder) == float("-inf")
    assert "chosen anew" in caplog.text
    assert "step-000020" in caplog.text


def test_an_unwritable_run_folder_is_said_in_one_line(tmp_path):
    (tmp_path / "run").write_text("a file stands where the folder should be")
    with pytest.raises(CheckpointError, match="must be writable"):
        checkpoint.save(RunFolder(tmp_path / "run"), snapshot(1))


def test_a_full_disk_keeps_what_was_finished(folder, monkeypatch):
    """The error of a full disk arrives from the file system; the earlier checkpoints must survive it."""

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"must have room.*continues from the last complete checkpoint"):
        checkpoint.save(folder, snapshot(40))
    assert checkpoint.load_newest(folder).step == 30
    assert [n for n in folder.names("checkpoints") if n.startswith(".")] == []


def test_remote_folder_writes_the_manifest_last(tmp_path, monkeypatch):
    """An object store has no rename: the manifest's presence is what says that the rest is there."""
    folder = RunFolder(tmp_path / "run")
    monkeypatch.setattr(RunFolder, "is_local", property(lambda self: False))
    checkpoint.save(folder, snapshot(5))
    path = Path(folder.path("checkpoints/step-000005"))
    times = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    assert max(times, key=times.__getitem__) == "manifest.json"
    assert json.loads((path / "manifest.json").read_text())["files"].keys() == times.keys() - {"manifest.json"}
    assert checkpoint.load_newest(folder).step == 5
