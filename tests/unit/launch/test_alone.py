"""One launch at a time in a run folder: the second waits for a moment and is refused, a death frees the folder."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from makers import tiny_run

from raysemi import config_io
from raysemi.errors import ConfigError
from raysemi.launch import alone
from raysemi.launch.alone import alone_in
from raysemi.launch.detect import train_detector
from raysemi.launch.train import launch

HOLDS = """
import sys, time
from raysemi.launch.alone import alone_in
with alone_in(sys.argv[1]):
    print("holds it", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds the run folder `run`."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds it\n"
        yield process
        process.kill()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone, "PATIENCE_S", 0.5)


def test_a_second_launch_is_refused_and_changes_nothing(
    scenes: Path, tmp_path: Path, other: subprocess.Popen[str], impatient: None
) -> None:
    run = tmp_path / "run"
    config = tiny_run(scenes, run, "supervised", "train.steps=1")
    for ray in ("ray=none", "ray.num_workers=1"):
        with pytest.raises(ConfigError, match=r"run must be written by one launch at a time; got .*run, which another"):
            launch(config_io.change(config, [ray]))
    detector = config_io.load_detector("scenes", [f"run={run}", f"data.labeled={scenes / 'labeled'}"])
    with pytest.raises(ConfigError, match="one launch at a time"):
        train_detector(detector)
    assert list(run.iterdir()) == []
    other.kill()
    other.wait()
    assert launch(config)["steps"] == 1


def test_where_ray_runs_already_nothing_is_held(
    scenes: Path, tmp_path: Path, other: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial begins again on another node when its own has vanished, with the lock."""
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    assert launch(tiny_run(scenes, tmp_path / "run", "supervised", "train.steps=1"))["steps"] == 1
    assert other.poll() is None


def test_a_launch_waits_for_one_that_is_about_to_end(
    tmp_path: Path, other: subprocess.Popen[str], caplog: pytest.LogCaptureFixture
) -> None:
    threading.Timer(0.6, other.send_signal, [signal.SIGKILL]).start()
    since = time.monotonic()
    with alone_in(str(tmp_path / "run")):
        assert time.monotonic() - since < alone.PATIENCE_S
    (said,) = caplog.messages
    assert said == f"{tmp_path / 'run'} is written by another process; waiting 20 s for its end."


def test_a_folder_that_stays_empty_goes_again(tmp_path: Path) -> None:
    with alone_in(str(tmp_path / "new")):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with alone_in(str(tmp_path / "old")), alone_in(str(tmp_path / "beside")):
        (tmp_path / "beside/config.yaml").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"old", "beside"}


def test_where_nothing_can_be_held_nobody_is_kept_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for run in (tmp_path / "file", tmp_path / "file/below"):
        with alone_in(str(run)):
            pass
    assert (tmp_path / "file").is_file()
