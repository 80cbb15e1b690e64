"""Checkpoints beside the training: what is written is the state of its step, and a fault stops the run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from object_store import client

from raysemi.data.store import StoreConfig
from raysemi.engine import checkpoint, retention
from raysemi.engine.checkpoint import Snapshot
from raysemi.engine.folder import RunFolder
from raysemi.engine.saver import Saver
from raysemi.errors import CheckpointFailure, NoRoom
from raysemi.methods.base import SingleRank

CPU = torch.device("cpu")


def snapshot(step: int, size: int = 100) -> Snapshot:
    weights = torch.full((2, 3, size), float(step)).to(memory_format=torch.contiguous_format)
    return Snapshot(step, {"student": {"weight": weights}, "optimizer": {"weight/momentum": -weights}}, {"kept": step})


def test_what_is_written_is_the_state_of_its_step(tmp_path):
    """Training goes on, in place, as soon as `save` has returned."""
    folder = RunFolder(tmp_path)
    whole = snapshot(1, 200_000)
    weights, moments = whole.tensors["student"]["weight"], whole.tensors["optimizer"]["weight/momentum"]
    with Saver(folder, SingleRank(), CPU, keep=3) as saver:
        for step in (1, 2, 3):
            saver.save(Snapshot(step, whole.tensors, {}), best=40.0 + step if step < 3 else None)
            assert saver._job.is_alive() or step > 1  # the disk is slower than the two copies
            weights += 1
            moments -= 1
    for step in (1, 2, 3):
        loaded = checkpoint.load(folder, step).tensors
        assert loaded["student"]["weight"].unique().tolist() == [step]
        assert loaded["optimizer"]["weight/momentum"].unique().tolist() == [-step]
    assert retention.best_step(folder) == 2
    assert folder.names("checkpoints") == ["step-000001", "step-000002", "step-000003"]


def test_the_age_of_a_checkpoint_counts_from_when_it_was_whole(tmp_path):
    with Saver(RunFolder(tmp_path), SingleRank(), CPU, keep=1) as saver:
        time.sleep(0.3)
        assert 0.3 <= saver.age_s() < 60
        began = time.monotonic()
        saver.save(snapshot(1))
        saver._job.join(30)
        assert saver.age_s() <= time.monotonic() - began  # told before the next save, too
        saver.wait()
        time.sleep(0.1)
        assert 0.1 <= saver.age_s() <= time.monotonic() - began


def test_a_full_disk_stops_the_run_at_the_next_log_line(tmp_path):
    folder = RunFolder(tmp_path)
    saver = Saver(folder, SingleRank(), CPU, keep=1)
    saver.save(snapshot(1))
    saver.check()
    place = Path(folder.path(checkpoint.place_of(folder, 2, saver._token)))
    place.mkdir(parents=True)
    (place / "optimizer.safetensors.part").symlink_to("/dev/full")
    saver.save(snapshot(2))
    saver._job.join(30)
    with pytest.raises(NoRoom, match="must have room; got none left"):
        saver.check()
    saver.wait()  # nothing is under way any more
    assert checkpoint.load_newest(folder).step == 1
    assert folder.names("checkpoints") == ["step-000001"]


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from raysemi.engine import checkpoint
from raysemi.engine.folder import RunFolder
from raysemi.engine.saver import Saver
from raysemi.methods.base import SingleRank
sys.path[:0] = [sys.argv[1]]
from test_saver import CPU, snapshot

def save(run, point):
    with Saver(RunFolder(run), SingleRank(), CPU, keep=1) as saver:
        saver.save(snapshot(1))
        saver.wait()
        done = 0
        def counted(act):
            def acting(self, name, *rest, **options):
                nonlocal done
                done += 1
                if done == point and act is write:
                    path = Path(self.path(name + '.part'))
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(rest[0][: len(rest[0]) // 2])
                if done == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                return act(self, name, *rest, **options)
            return acting
        write = RunFolder.write_bytes
        for name in ('write_bytes', 'rename', 'remove'):
            setattr(RunFolder, name, counted(getattr(RunFolder, name)))
        saver.save(snapshot(2), best=50.0)
    print(done, flush=True)

torch.set_num_threads(1)
for point in range(1, 11):
    if (child := os.fork()) == 0:
        try:
            save(f'{sys.argv[2]}/{point}', point)
        finally:
            os._exit(3)
    print(point, os.WTERMSIG(os.waitpid(child, 0)[1]), flush=True)
"""


def test_killed_at_any_write_of_a_save_it_leaves_a_run_that_goes_on(tmp_path):
    """SIGKILL in the middle of each file, and before each renaming and removal, of step 2; step 1 is finished."""
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(Path(__file__).parent), str(tmp_path)]
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | paths)
    lines = [line.split() for line in said.stdout.splitlines()]
    points = [int(line[0]) for line in lines if len(line) == 2 and line[1] == "9"]
    # student, optimizer, state, manifest, rename, best, manifest of step 1, step 1
    assert points == list(range(1, 9)), said.stderr
    newest = []
    for point in points:
        folder = RunFolder(tmp_path / str(point))
        newest.append(checkpoint.load_newest(folder).step)
        with Saver(folder, SingleRank(), CPU, keep=1) as saver:
            assert not [name for name in folder.names("checkpoints") if name.startswith(".")]
            saver.save(snapshot(3))
        assert checkpoint.faults(folder, 3) == []
        assert checkpoint.steps(folder) in ([3], [2, 3])  # the best stays
    assert newest == [1] * 5 + [2] * 3


def test_a_store_that_fails_now_and_then_takes_checkpoints_all_the_same(s3, proxy):
    client(s3).create_dir("runs")
    bad = proxy(fails=0.05, slow=0.05, delay=0.1)
    store = StoreConfig(endpoint=bad.endpoint, region="us-east-1", deadline=60)
    folder = RunFolder("s3://runs/mine", store)
    with client(s3).open_output_stream("runs/mine/checkpoints/step-000009/student.safetensors") as left:
        left.write(b"of a writer that was killed")
    with Saver(folder, SingleRank(), CPU, keep=1) as saver:
        for step in range(1, 7):
            saver.save(snapshot(step, 600_000 if step == 6 else 100), best=30.0 if step == 4 else None)
    assert bad.failed
    assert checkpoint.steps(folder) == [4, 6]
    assert folder.names("checkpoints") == ["step-000004", "step-000006"]
    loaded = checkpoint.load_newest(folder)
    assert (loaded.step, loaded.state) == (6, {"kept": 6})
    assert torch.equal(loaded.tensors["student"]["weight"], snapshot(6, 600_000).tensors["student"]["weight"])
    with client(s3).open_output_stream("runs/mine/checkpoints/step-000006/optimizer.safetensors") as cut:
        cut.write(b"1234")
    assert len(checkpoint.faults(folder, 6)) == 1
    assert checkpoint.load_newest(folder).step == 4
    bad.down()
    gone = RunFolder("s3://runs/mine", store.model_copy(update={"deadline": 1.0}))
    with pytest.raises(CheckpointFailure, match="no answer"):  # and not: there is none, begin anew
        checkpoint.load_newest(gone)


def test_a_store_that_is_gone_stops_the_run_after_its_deadline(s3, proxy):
    client(s3).create_dir("runs")
    server = proxy()
    folder = RunFolder("s3://runs/gone", StoreConfig(endpoint=server.endpoint, region="us-east-1", deadline=1))
    saver = Saver(folder, SingleRank(), CPU, keep=1)
    saver.save(snapshot(1))
    saver.wait()
    server.down()
    saver.save(snapshot(2))
    with pytest.raises(CheckpointFailure, match=r"must be writable.*no answer"):
        saver.wait()
    server.up()
    assert checkpoint.load_newest(folder).step == 1
