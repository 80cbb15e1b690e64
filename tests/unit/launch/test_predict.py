"""A pool of predictions: the same bytes whatever interrupts it, a pool like any other, nothing lost silently."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from makers import tiny_run, tiny_segmentor

from raysemi import config_io
from raysemi.config import RunConfig
from raysemi.data.pool import Pool
from raysemi.data.reader import Reader
from raysemi.data.shard import PARTS, ShardDone
from raysemi.data.verify import verify
from raysemi.engine.predict_shards import ShardPredictor
from raysemi.errors import CheckpointError, ConfigError, DataError, DataFailure, RaysemiError
from raysemi.launch.predict import _Job as Job
from raysemi.launch.predict import _read_result as read_result
from raysemi.launch.predict import _Worker as Worker
from raysemi.launch.predict import predict_shards
from raysemi.launch.restore import Trained
from raysemi.launch.train import launch


def trained_on(pool: Pool, config: RunConfig) -> Trained:
    return Trained(tiny_segmentor(len(pool.classes)), config, pool.classes, pool.palette, 20, "0123")


@pytest.fixture
def pool(scenes: Path) -> Pool:
    """16 images in three shards."""
    return Pool.open(scenes / "unlabeled")


@pytest.fixture
def trained(scenes: Path, pool: Pool, tmp_path: Path) -> Trained:
    return trained_on(pool, tiny_run(scenes, tmp_path / "run", "fixmatch"))


def predict(trained: Trained, pool: Pool, out: str | Path, *overrides: str, **how: object) -> Pool:
    config = config_io.change(trained.config, overrides)
    return predict_shards("runs/a", trained, config, pool, out, **how)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_result_is_a_labeled_pool_of_the_same_keys(trained: Trained, pool: Pool, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    made = predict(trained, pool, tmp_path / "out", min_confidence=0.2, progress=lambda *done: told.append(done))
    assert told == [(6, 16), (12, 16), (16, 16)]
    assert made.labeled
    assert made.classes == pool.classes
    assert made.palette == pool.palette
    assert [made.key(row) for row in range(16)] == [pool.key(row) for row in range(16)]
    assert [shard.samples for shard in made.shard_files] == [6, 6, 4]
    assert sorted(content(tmp_path / "out")) == [
        "index.parquet",
        "pool.json",
        *(f"predicted-{number:06d}.tar" for number in range(3)),
    ]
    verify(made)
    was, now = Reader(pool), Reader(made)
    assert all(np.array_equal(was.image(row), now.image(row)) for row in range(16))
    assert now.mask(7).shape == was.mask(7).shape
    expected = {
        "source": "predict",
        "run": "runs/a",
        "step": 20,
        "checkpoint": "0123",
        "eval": {"mode": "original", "window": None, "stride": None, "shifted": None},
        "precision": "auto",
        "min_confidence": 0.2,
        "pool": pool.path,
        "pool_digest": pool.digest,
    }
    assert {name: made.made[name] for name in expected} == expected


def test_a_run_trains_on_it(trained: Trained, pool: Pool, scenes: Path, tmp_path: Path) -> None:
    predict(trained, pool, tmp_path / "pseudo")
    labeled = f"data.labeled={tmp_path / 'pseudo'}"
    run = tiny_run(scenes, tmp_path / "next", "supervised", "data.unlabeled=null", labeled, "train.steps=1")
    assert launch(run)["labeled"] == 16


@pytest.mark.parametrize("moment", ["first", "between", "last", "before the index"])
def test_an_interrupted_prediction_goes_on_to_the_same_bytes(
    trained: Trained, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    calm, torn = tmp_path / "calm", tmp_path / "torn"
    predict(trained, pool, calm, min_confidence=0.2)
    with monkeypatch.context() as patch:
        stop_at = ("first", "between", "last").index(moment) if moment != "before the index" else None
        write = ShardPredictor.write

        def interrupted(self: ShardPredictor, number: int, *rest: object):
            if number == stop_at:
                raise KeyboardInterrupt
            return write(self, number, *rest)

        def no_room(*_: object) -> None:
            raise DataFailure("the disk must have room; got none left")

        patch.setattr(ShardPredictor, "write", interrupted)
        if moment == "before the index":
            patch.setattr("raysemi.launch.predict.finish_pool", no_room)
            with pytest.raises(DataFailure):
                predict(trained, pool, torn, min_confidence=0.2)
        else:
            with pytest.raises(KeyboardInterrupt, match=rf"{torn} has {stop_at} of 3 shards; the same command goes on"):
                predict(trained, pool, torn, min_confidence=0.2)
    assert not (torn / "pool.json").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in torn.glob("*.tar")}
    assert len(finished) == (3 if stop_at is None else stop_at)
    again = predict(trained, pool, torn, "eval.batch=3", min_confidence=0.2)  # a smaller batch may be needed to go on
    assert finished.items() <= {path.name: path.stat().st_mtime_ns for path in torn.glob("*.tar")}.items()
    assert again.digest == Pool.open(calm).digest
    assert content(torn) == content(calm)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[4:]
from raysemi.data import shard
from raysemi.data.pool import Pool
from test_predict import predict, trained_on
from raysemi import config_io
size = shard.file_sha256
def killed(file):  # the second shard is written, and not yet under its name
    if "predicted-000001" in file.name:
        os.kill(os.getpid(), signal.SIGKILL)
    return size(file)
shard.file_sha256 = killed
pool = Pool.open(sys.argv[1])
config = config_io.parse(Path(sys.argv[2]).read_text())
predict(trained_on(pool, config), pool, Path(sys.argv[3]), min_confidence=0.2)
"""


def test_kill_9_in_the_middle_leaves_what_the_same_command_finishes(
    trained: Trained, pool: Pool, tmp_path: Path
) -> None:
    calm, torn, recipe = tmp_path / "calm", tmp_path / "torn", tmp_path / "config.yaml"
    recipe.write_text(config_io.dump(trained.config), encoding="utf-8")
    here = Path(__file__).parent
    command = [sys.executable, "-c", KILLED, pool.path, recipe, torn, here, here.parents[1], Path.cwd()]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(path.name for path in torn.iterdir()) == [PARTS, "predicted-000000.tar", "predicted-000001.tar.part"]
    predict(trained, pool, calm, min_confidence=0.2)
    predict(trained, pool, torn, min_confidence=0.2)
    assert content(torn) == content(calm)


def test_a_finished_shard_that_changed_is_written_again(
    trained: Trained, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, torn = tmp_path / "calm", tmp_path / "torn"
    predict(trained, pool, calm)
    with monkeypatch.context() as patch:
        patch.setattr("raysemi.data.shard.read_part", lambda plan: "another")
        with pytest.raises(DataError, match="must stay until its pool is done; got another"):
            predict(trained, pool, torn)
    with (torn / "predicted-000001.tar").open("r+b") as shard:
        shard.seek(700)
        shard.write(b"other")
    predict(trained, pool, torn)
    assert content(torn) == content(calm)


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_another_prediction_is_refused(
    trained: Trained, pool: Pool, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    out = tmp_path / "out"
    if finished:
        predict(trained, pool, out)
    else:
        with monkeypatch.context() as patch:
            patch.setattr("raysemi.launch.predict.finish_pool", lambda *_: None)
            with pytest.raises(DataError, match="pool must be a folder"):
                predict(trained, pool, out)
    before = content(out)
    other, val = replace(trained, step=30, digest="4567"), Pool.open(scenes / "val")
    sliding = ("eval.mode=sliding_window", "eval.window=48")
    for differs, change in {
        "step, checkpoint": lambda: predict(other, pool, out),
        "eval": lambda: predict(trained, pool, out, *sliding),
        "min_confidence": lambda: predict(trained, pool, out, min_confidence=0.5),
        "pool_digest": lambda: predict(trained, val, out),
    }.items():
        with pytest.raises(DataError, match=f"must be free for this prediction; got one that differs in {differs}. "):
            change()
    assert content(out) == before
    moved = predict_shards("/elsewhere/a", trained, trained.config, pool, out)  # the same network under another name
    assert moved.num_samples == 16


def test_a_folder_with_anything_else_is_refused(trained: Trained, pool: Pool, scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must be free for this prediction; got another pool"):
        predict(trained, pool, scenes / "val")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match=r"must be empty or hold an unfinished prediction; got .*mine\.txt"):
        predict(trained, pool, tmp_path / "out")
    assert content(tmp_path / "out") == {"mine.txt": b"mine"}


def test_corrupt_images_are_named_when_the_other_shards_are_done(trained: Trained, pool: Pool, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(pool.path, broken)
    rows = [pool.row(row) for row in (7, 9)]
    with (broken / rows[0].shard).open("r+b") as shard:
        for row in rows:
            shard.seek(row.image_offset)
            shard.write(bytes(row.image_bytes))
    with pytest.raises(DataError, match=r"got 2 that are not\. .*out has 2 of 3 shards") as caught:
        predict(trained, Pool.open(broken), tmp_path / "out")
    assert all(row.key in str(caught.value) for row in rows)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        PARTS,
        "predicted-000000.tar",
        "predicted-000002.tar",
    }


@pytest.mark.parametrize(
    ("overrides", "how", "text"),
    [
        (("eval.mode=center_crop", "eval.window=48"), {}, r"eval\.mode must be original or sliding_window to predict"),
        ((), {"out": "s3://bucket/out"}, "--out must be a folder, local or shared; got s3://bucket/out"),
        ((), {"min_confidence": 95.0}, "--min-confidence must be from 0 to 1; got 95"),
        ((), {"min_confidence": float("nan")}, "--min-confidence must be from 0 to 1; got nan"),
        ((), {"workers": 0}, "--workers must be at least 1; got 0"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    trained: Trained,
    pool: Pool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...],
    how: dict[str, object],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before, out = list(tmp_path.iterdir()), how.pop("out", "out")
    with pytest.raises(ConfigError, match=text):
        predict(trained, pool, out, *overrides, **how)
    assert list(tmp_path.iterdir()) == before


def test_ranks_of_torchrun_are_sent_to_ray(
    trained: Trained, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"--shards must run as one process; .* Use --workers"):
        predict(trained, pool, tmp_path / "out")


@pytest.fixture
def job(scenes: Path, pool: Pool, tmp_path: Path) -> Job:
    """What a worker is told: a run of two steps, a pool of three shards of which the second has a broken image."""
    launch(tiny_run(scenes, tmp_path / "trained", "fixmatch", "train.steps=2"))
    broken = tmp_path / "broken"
    shutil.copytree(pool.path, broken)
    row = pool.row(8)
    with (broken / row.shard).open("r+b") as shard:
        shard.seek(row.image_offset)
        shard.write(bytes(row.image_bytes))
    (tmp_path / "out" / PARTS).mkdir(parents=True)
    config = config_io.parse((tmp_path / "trained/config.yaml").read_text())
    return Job(str(tmp_path / "trained"), 2, config, Pool.open(broken), tmp_path / "out", "plan", 0.2)


def test_a_worker_says_what_became_of_a_shard(job: Job) -> None:
    worker = Worker(pickle.loads(pickle.dumps(job)))
    assert read_result(worker({"number": 2})["result"]) == (2, ShardDone(4))
    number, done = read_result(worker({"number": 1})["result"])
    assert (number, done.samples) == (1, 6)
    assert len(done.faults) == 1
    assert job.pool.key(8) in done.faults[0]
    assert sorted(path.name for path in job.folder.rglob("*") if path.is_file()) == [
        "predicted-000002.json",
        "predicted-000002.tar",
    ]
    gone = Worker(replace(job, step=7))
    with pytest.raises(CheckpointError, match="step-000007"):
        read_result(gone({"number": 0})["result"])


def test_a_shard_that_kills_every_worker_ends_the_work(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        """In place of a death: nothing of the worker runs after it."""

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ShardPredictor, "write", killed)
        for _ in range(3):
            with pytest.raises(Killed):
                Worker(job)({"number": 0})
    with pytest.raises(RaysemiError, match=r"got 3 that died over predicted-000000\.tar, often for lack of memory"):
        read_result(Worker(job)({"number": 0})["result"])
    assert read_result(Worker(job)({"number": 2})["result"])[1].samples == 4
