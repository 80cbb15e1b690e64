"""A checkpoint is whole or it is none: real bytes are damaged here."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from raysemi.engine import checkpoint, retention
from raysemi.engine.checkpoint import Snapshot
from raysemi.engine.folder import RunFolder
from raysemi.errors import CheckpointError, CheckpointFailure, NoRoom


def snapshot(step: int) -> Snapshot:
    torch.manual_seed(step)
    tensors = {
        "student": {"a.weight": torch.randn(3, 5, 2, 2).to(memory_format=torch.channels_last), "a.n": torch.tensor(7)},
        "method": {"threshold": torch.tensor(0.85)},
    }
    return Snapshot(step, tensors, {"seconds": 1.5})


def assert_equal(loaded: Snapshot, expected: Snapshot) -> None:
    assert (loaded.step, loaded.state) == (expected.step, expected.state)
    assert loaded.tensors.keys() == expected.tensors.keys()
    for group, tensors in expected.tensors.items():
        assert loaded.tensors[group].keys() == tensors.keys()
        for name, value in tensors.items():
            assert torch.equal(loaded.tensors[group][name], value)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def say(path: Path, **changed: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def append(path: Path, content: bytes) -> None:
    path.write_bytes(path.read_bytes() + content)


ENTRY = {"bytes": 1, "sha256": ""}
DAMAGE = {
    "a shard cut short": lambda path: (path / "student.safetensors").write_bytes(b"1234"),
    "a bit of a shard": lambda path: flip(path / "student.safetensors"),
    "garbage behind a shard": lambda path: append(path / "method.safetensors", b"\0"),
    "an empty shard": lambda path: (path / "method.safetensors").write_bytes(b""),
    "a shard gone": lambda path: (path / "method.safetensors").unlink(),
    "a bit of the state": lambda path: flip(path / "state.json"),
    "an empty manifest": lambda path: (path / "manifest.json").write_bytes(b""),
    "half a manifest": lambda path: (path / "manifest.json").write_bytes((path / "manifest.json").read_bytes()[:90]),
    "a manifest of garbage": lambda path: (path / "manifest.json").write_bytes(bytes(range(128, 256))),
    "a manifest of other files": lambda path: say(path / "manifest.json", files={"../../best.json": ENTRY}),
    "the manifest of another step": lambda path: shutil.copy(path.parent / "step-000020" / "manifest.json", path),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    for step in (10, 20, 30):
        checkpoint.save(folder, snapshot(step))
    return folder


def damage(folder: RunFolder, step: int, kind: str = "a bit of a shard") -> None:
    DAMAGE[kind](Path(folder.path(checkpoint.checkpoint_name(step))))


def test_what_was_saved_comes_back(folder):
    assert_equal(checkpoint.load_newest(folder), snapshot(30))
    assert checkpoint.faults(folder, 30) == []
    assert checkpoint.load(folder, 20, ("method",)).tensors.keys() == {"method"}
    manifest = json.loads(Path(folder.path("checkpoints/step-000030/manifest.json")).read_text())
    assert (manifest["format"], manifest["step"], manifest["world"]) == (2, 30, 1)
    assert manifest["versions"]["torch"] == torch.__version__
    assert {name: entry["tensors"] for name, entry in manifest["files"].items()} == {
        "student.safetensors": 2, "method.safetensors": 1, "state.json": 0,
    }  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(folder, kind, caplog):
    damage(folder, 30, kind)
    with pytest.raises(CheckpointError, match="step-000030"):
        checkpoint.load(folder, 30)
    assert len(checkpoint.faults(folder, 30)) == 1
    assert checkpoint.load_newest(folder).step == 20
    (warned,) = caplog.messages
    assert "step-000030" in warned


def test_every_fault_of_a_checkpoint_is_named(folder):
    damage(folder, 30, "a bit of a shard")
    damage(folder, 30, "a shard gone")
    damage(folder, 30, "a bit of the state")
    assert [text.split(" must ")[0].rpartition("/")[2] for text in checkpoint.faults(folder, 30)] == [
        "student.safetensors", "method.safetensors", "state.json"
    ]  # fmt: skip


def test_other_files_in_a_checkpoint_do_no_harm(folder):
    path = Path(folder.path("checkpoints/step-000030"))
    (path / "notes.txt").write_text("mine")
    (path / "teacher.safetensors").write_bytes(b"garbage")
    (path.parent / "step-000040").mkdir()
    assert_equal(checkpoint.load_newest(folder), snapshot(30))


def test_a_checkpoint_of_the_first_format_is_read(tmp_path):
    path = tmp_path / "checkpoints" / "step-000007"
    path.mkdir(parents=True)
    expected = snapshot(7)
    for group, tensors in expected.tensors.items():
        save_file({name: value.contiguous() for name, value in tensors.items()}, path / f"{group}.safetensors")
    (path / "state.json").write_text(json.dumps({"step": 7, **expected.state}))
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in path.iterdir()
    }
    (path / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    assert_equal(checkpoint.load_newest(RunFolder(tmp_path)), expected)


def test_a_later_format_stops_rather_than_going_back(folder):
    say(Path(folder.path("checkpoints/step-000030/manifest.json")), format=3, versions={"raysemi": "9.1"})
    with pytest.raises(CheckpointFailure, match=r"must have format 2 or earlier; got 3\. Install .*\(9\.1\)"):
        checkpoint.load_newest(folder)


@pytest.mark.parametrize("world", [2, 3])
def test_shares_of_ranks_make_the_whole(tmp_path, world):
    folder, whole = RunFolder(tmp_path), snapshot(5)
    files = {}
    for rank in range(world):
        share = checkpoint.own_share(whole, rank, world)
        files |= checkpoint.write_share(folder, "checkpoints/.writing-a", share, rank, world)
    assert f"student-00000-of-0000{world}.safetensors" in files
    checkpoint.commit(folder, "checkpoints/.writing-a", 5, world, files)
    assert_equal(checkpoint.load_newest(folder), whole)


def test_shares_are_of_like_size_and_made_one_tensor_at_a_time():
    """As under ZeRO 3, where a whole tensor is gathered, on all ranks, when it is read."""

    class Gathered(dict):
        def __getitem__(self, name):
            return super().__getitem__(name).clone()

    sizes = torch.linspace(10, 1000, 40).long().tolist()
    tensors = Gathered({str(number): torch.zeros(size) for number, size in enumerate(sizes)})
    shares = [checkpoint.own_share(Snapshot(1, {"student": tensors}), rank, 4).tensors["student"] for rank in range(4)]
    held = [sum(value.numel() for value in share.values()) for share in shares]
    assert sum(held) == sum(sizes)
    assert max(held) - min(held) <= max(sizes)
    assert sorted(name for share in shares for name in share) == sorted(tensors)


def test_no_tensor_is_lost_where_ranks_have_them_in_other_orders():
    """As after a start from a checkpoint: what safetensors reads comes in an order of each process' own."""
    sizes = {"exp_avg": 5, "exp_avg_sq": 7, "step": 1}
    optimizer = {f"{name}/{key}": torch.zeros(size) for name in "abc" for key, size in sizes.items()}
    teacher = {"mean": torch.zeros(3), "std": torch.zeros(3), "weight": torch.zeros(11)}
    shares = []
    for rank, turn in enumerate((list, reversed)):
        tensors = {"optimizer": dict(turn(optimizer.items())), "teacher": dict(turn(teacher.items()))}
        shares.append(checkpoint.own_share(Snapshot(1, tensors), rank, 2).tensors)
    for group, whole in (("optimizer", optimizer), ("teacher", teacher)):
        assert sorted([*shares[0][group], *shares[1][group]]) == sorted(whole)


def test_a_folder_without_manifest_is_no_checkpoint(folder):
    Path(folder.path("checkpoints/step-000030/manifest.json")).unlink()
    assert checkpoint.steps(folder) == [10, 20]


def test_keeps_the_newest_and_the_best(folder):
    retention.mark_best(folder, 10, 41.5)
    retention.keep_newest(folder, keep=1, newest=30)
    assert checkpoint.steps(folder) == [10, 30]
    assert retention.best_step(folder) == 10


def test_a_start_sweeps_what_killed_writers_left_and_nothing_else(folder):
    path = Path(folder.path("checkpoints"))
    for left in (".writing-ab12-000040", "step-000040", "step-000050", "step-000060", "notes"):
        (path / left).mkdir()
    (path / ".writing-ab12-000040" / "student.safetensors.part").write_bytes(b"12")
    (path / "step-000040" / "student-00001-of-00002.safetensors").write_bytes(b"12")
    (path / "step-000040" / "part-00001.json").write_bytes(b"{}")
    (path / "step-000050" / "mine.txt").write_bytes(b"12")
    (path / "step-000060" / "manifest.json").write_bytes(b"")
    retention.sweep(folder)
    kept = ["notes", "step-000010", "step-000020", "step-000030", "step-000050", "step-000060"]
    assert folder.names("checkpoints") == kept


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
    Path(folder.path("best.json")).write_bytes(b"")
    assert retention.best_step(folder) is None


def test_an_unwritable_run_folder_is_said_in_one_line(tmp_path):
    (tmp_path / "run").write_text("a file stands where the folder should be")
    with pytest.raises(CheckpointError, match="must be writable"):
        checkpoint.save(RunFolder(tmp_path / "run"), snapshot(1))


def test_a_full_disk_keeps_what_was_finished(folder, monkeypatch):
    """The kernel says so: the shard's name leads to a device that is always full."""
    monkeypatch.setattr(checkpoint.secrets, "token_hex", lambda count: "full")
    place = Path(folder.path("checkpoints/.writing-full-000040"))
    place.mkdir()
    (place / "method.safetensors.part").symlink_to("/dev/full")
    with pytest.raises(NoRoom, match=r"must have room.*continues from the last complete checkpoint"):
        checkpoint.save(folder, snapshot(40))
    assert checkpoint.load_newest(folder).step == 30
    assert folder.names("checkpoints") == ["step-000010", "step-000020", "step-000030"]


@pytest.mark.parametrize("path", ["run", "run/", "run/checkpoints/step-000020", "run/checkpoints/step-000020/"])
def test_a_path_names_a_run_or_one_checkpoint_of_it(folder, tmp_path, path):
    found, step = checkpoint.locate(f"{tmp_path}/{path}")
    assert found.path() == str(tmp_path / "run")
    assert step == (20 if "checkpoints" in path else None)
