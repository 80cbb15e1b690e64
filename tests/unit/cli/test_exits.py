"""How commands end: exit codes, full disks, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from makers import call
from PIL import Image

from raysemi.cli.exits import FAILURE, MISTAKE, exit_code
from raysemi.engine import checkpoint
from raysemi.engine.folder import RunFolder
from raysemi.errors import (
    CheckpointError,
    CheckpointFailure,
    ConfigError,
    DataError,
    DataFailure,
    NoRoom,
    RaysemiError,
)


def test_exit_codes() -> None:
    def raised(error: RaysemiError, *causes: BaseException) -> RaysemiError:
        last: BaseException = error
        for cause in causes:
            last.__cause__ = last = cause
        return error

    full, quota, forbidden = OSError(28, "No space left on device"), OSError(122, "Quota"), PermissionError(13, "No")
    for error in (
        RaysemiError("a dead worker"),
        DataFailure("no room, said by another process"),
        raised(CheckpointError("x"), full),
        raised(CheckpointFailure("x"), forbidden),
        NoRoom("said by another rank"),
        raised(DataError("x"), quota),
        raised(DataError("x"), DataError("y"), full),
    ):
        assert exit_code(error) == FAILURE
    for error in (ConfigError("x"), DataError("x"), CheckpointError("x"), raised(DataError("x"), forbidden)):
        assert exit_code(error) == MISTAKE


needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")


@pytest.mark.usefixtures("fork_server")
@needs_dev_full
@pytest.mark.parametrize(("full", "processes"), [("labeled-000001.tar", 2), ("index.parquet", 1)])
def test_a_full_disk_while_packing_is_a_failure(tmp_path: Path, full: str, processes: int) -> None:
    (tmp_path / "labeled/.parts").mkdir(parents=True)
    (tmp_path / f"labeled/{full}.part").symlink_to("/dev/full")
    command = ["pack", "scenes", "train=6", "val=2", "size=40", "--pools", "labeled", "--shard-samples", 2]
    command += ["--processes", processes, "--out", tmp_path]
    result = call(*command)
    assert result.exit_code == FAILURE, result.output
    assert f"{full}; got" in result.output or f"{full} must be writable; got" in result.output
    assert "No space left" in result.output
    assert call(*command).exit_code == 0  # with room again


@needs_dev_full
def test_a_full_disk_while_indexing_or_predicting_is_a_failure(trained: Path, scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes((scenes / "unlabeled/unlabeled-000000.tar").read_bytes())
    (tmp_path / "index.parquet.part").symlink_to("/dev/full")
    names = json.loads((scenes / "val/pool.json").read_text())["classes"]
    (tmp_path / "classes.txt").write_text("\n".join(names))
    indexed = call("index", tmp_path, "--classes", tmp_path / "classes.txt", "--processes", 1)
    assert indexed.exit_code == FAILURE
    assert "index.parquet must be writable; got" in indexed.output

    images, labels = tmp_path / "images", tmp_path / "out/labels"
    images.mkdir()
    labels.mkdir(parents=True)
    Image.new("RGB", (37, 58)).save(images / "x.png")
    (labels / ".x.png.part").symlink_to("/dev/full")
    predicted = call("predict", trained, "--images", images, "--out", tmp_path / "out")
    assert predicted.exit_code == FAILURE
    assert "must have room; got none left" in predicted.output


@pytest.mark.parametrize(
    ("command", "where", "text"),
    [
        (["pack", "scenes", "--out", "x"], "raysemi.data.pack.pack", "goes on with what is finished"),
        (["predict", "run", "--out", "x"], "raysemi.api.predict", "begins anew"),
        (["evaluate", "run"], "raysemi.api.evaluate", "begins anew"),
        (["verify", "VAL"], "raysemi.data.verify.verify", "begins anew"),
    ],
)
def test_ctrl_c_says_what_the_same_command_does(
    scenes: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], where: str, text: str
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    result = call(*(str(scenes / "val") if part == "VAL" else part for part in command))
    assert result.exit_code == 130
    assert f"stopped. The same command {text}." in result.output


def test_a_full_disk_is_a_failure_and_keeps_what_was_finished(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert call("train", recipe, f"run={run}", "train.stop_at=1").exit_code == 0

    (run / "metrics.parquet.part").symlink_to("/dev/full")
    result = call("train", recipe, f"run={run}")
    assert result.exit_code == FAILURE
    assert "must have room; got none left" in result.output
    assert checkpoint.steps(RunFolder(run)) == [1]


SHORT_OF_ROOM = """
import json, resource, sys
from pathlib import Path
from makers import call
from raysemi.engine.trainer import Trainer

step = Trainer.train_step

def with_little_room(self, host):
    taken = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, ((int(taken.split()[1]) << 10) + (400 << 20), -1))
    return step(self, host)

Trainer.train_step = with_little_room
results = []
for more in ([], ["train.micro_batch=2"]):
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    result = call("train", *sys.argv[1:], *more)
    results.append((result.exit_code, result.output))
    del result  # its error holds the step's tensors
print(json.dumps(results))
"""


@pytest.mark.timeout(600)  # of a busy machine: a process with torch begins
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_step_without_room_ends_in_one_line_and_what_it_says_fits(recipe: Path, tmp_path: Path) -> None:
    """A real allocator, which gets 400 MB more than what there was before the step."""
    command = [sys.executable, "-c", SHORT_OF_ROOM, recipe, f"run={tmp_path / 'run'}", "train.stop_at=1"]
    command += ["data.crop=321", "train.batch.labeled=4", "train.batch.unlabeled=8"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, check=True)
    (whole_code, whole), (parts_code, parts) = json.loads(done.stdout.splitlines()[-1])
    assert whole_code == FAILURE, whole
    line = whole.splitlines()[-1]
    assert line.startswith("error: memory of rank 0 must hold step 1; got ")
    assert re.search(
        r"got \d+\.\d+ GiB on cpu, of which \d+\.\d+ GiB were taken at most\. Set train\.micro_batch=4: ", line
    )
    assert re.search(
        r"memory that a step takes of a rank: about 0\.\d+ GiB \(parameters 0\.00, .* passes 0\.\d+\)", whole
    )
    assert parts_code == 0, parts
    assert "step 1/1" in parts


def test_ctrl_c_saves_says_how_to_go_on_and_is_130(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "raysemi.cli", "train", recipe, f"run={run}", "train.steps=100000"]
    with subprocess.Popen(
        [str(part) for part in command], stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("step 3/"):
                process.send_signal(2)
    assert process.returncode == 130, lines
    assert "the same command goes on from its last checkpoint" in lines[-1]
    (step,) = checkpoint.steps(RunFolder(run))
    assert step >= 3
