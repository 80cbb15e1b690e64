"""Predictions by Ray Data's workers: the bytes of one process, whoever dies meanwhile; Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from makers import tiny_run

import raysemi
from raysemi.data.pool import Pool
from raysemi.launch.train import launch

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]  # of Ray's own code


@pytest.fixture(scope="module")
def run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    launch(tiny_run(scenes, folder, "fixmatch", "train.steps=2"))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def when_a_shard_is_begun(out: Path, act: Callable[[], None]) -> threading.Thread:
    """Does something as soon as a worker has begun a shard, before it has loaded its network."""

    def watch() -> None:
        while not list(out.glob(".parts/*.tried")):
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_workers_of_which_one_dies_write_the_bytes_of_one_process(
    run: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    how = {"pool": scenes / "unlabeled", "min_confidence": 0.2}
    raysemi.predict_shards(run, out=tmp_path / "one", **how)
    killed: list[int] = []
    told: list[tuple[int, int]] = []

    def kill() -> None:
        workers = [p for p in psutil.Process().children(recursive=True) if "MapWorker" in p.name()]
        for worker in workers[:1]:
            worker.send_signal(signal.SIGKILL)
            killed.append(worker.pid)

    watch = when_a_shard_is_begun(tmp_path / "two", kill)
    made = raysemi.predict_shards(run, out=tmp_path / "two", workers=2, progress=lambda *done: told.append(done), **how)
    watch.join()
    assert len(killed) == 1
    assert [total for _, total in told] == [16] * 3
    assert told[-1] == (16, 16)
    assert made.num_samples == 16
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_ctrl_c_ends_ray_and_says_how_to_go_on(run: Path, scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "raysemi.cli", "predict", str(run), "--pool", str(scenes / "unlabeled")]
    command += ["--shards", "--workers", "1", "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        assert process.stderr is not None
        children: list[psutil.Process] = []

        def interrupt() -> None:
            children.extend(psutil.Process(process.pid).children(recursive=True))
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does

        when_a_shard_is_begun(out, interrupt)
        text = process.stderr.read()
    assert process.returncode == 130, text
    assert text.splitlines()[-1] == f"stopped. {out} has 0 of 3 shards; the same command goes on with the others."
    assert children
    assert psutil.wait_procs(children, timeout=30)[1] == []
    assert not list(out.glob("*.tar"))
    assert raysemi.predict_shards(run, pool=scenes / "unlabeled", out=out).digest == Pool.open(out).digest
