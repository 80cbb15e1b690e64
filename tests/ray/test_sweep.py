"""A sweep on a real Ray cluster whose driver and trials are killed: every trial ends once, nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from sweeps import write_sweep

from raysemi.tune.study import read
from raysemi.tune.winner import command, write_recipe

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
TRIALS = 10
DIVERGES = [1e29, 1e30]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def start(*arguments: object) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "raysemi.cli", *map(str, arguments)]
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(), start_new_session=True
    )


def ended(out: Path) -> int:
    """Trials; asked of SQLite itself, because Optuna takes a tenth of a second each time."""
    if not (out / "study.db").is_file():
        return 0
    with contextlib.closing(sqlite3.connect(out / "study.db", timeout=60)) as database:
        try:
            return int(
                *database.execute(
                    "SELECT COUNT(*) FROM trials WHERE state IN ('COMPLETE', 'PRUNED', 'FAIL')"
                ).fetchone()
            )
        except sqlite3.OperationalError:  # its tables are being made
            return 0


def wait(holds: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 240
    while not holds():
        assert time.monotonic() < until, "too slow"
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.2)


def test_a_sweep_survives_its_driver_and_its_trials(tmp_path: Path, scenes: Path) -> None:
    sweep = write_sweep(
        tmp_path,
        scenes,
        # two of three, so that some are drawn: the second step's loss is no number any more
        space={"optim.lr": {"choices": [0.01, *DIVERGES]}},
        search={"trials": TRIALS, "seed": 1},
        prune={"name": "asha", "grace": 2},
        set={"train.skip_limit": 1, "train.checkpoint_every": 1},
    )
    out = tmp_path / "out"
    driver = start("tune", "run", sweep, "--out", out)
    wait(lambda: ended(out) >= 3, driver)
    training = trial_processes(driver)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    assert training
    assert psutil.wait_procs(training, timeout=30)[1] == []
    told = {trial.number: trial.state for trial in read(out)[1]}

    driver = start("tune", "run", sweep, "--out", out)
    wait(lambda: bool(trial_processes(driver)), driver)
    trial_processes(driver)[0].kill()
    text, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, text

    _, trials, _ = read(out)
    assert [trial.number for trial in trials] == list(range(TRIALS))
    assert {trial.state for trial in trials} <= {"finished", "pruned", "failed"}
    # what had ended stayed as it was
    assert all(trials[number].state == state for number, state in told.items() if state != "running")
    assert {trial.draw.cell.method for trial in trials} == {"supervised", "fixmatch", "derprop"}
    failed = [trial for trial in trials if trial.state == "failed"]
    assert failed
    assert all(trial.draw.settings["optim.lr"] in DIVERGES for trial in failed), [trial.reason for trial in failed]
    assert all("finite" in (trial.reason or "") for trial in failed)
    assert (out / "report.html").is_file()

    # the command of the winner gives its number again, here without Ray
    recipe = write_recipe(out)
    words = command(recipe).split()
    again = [*words[:-1], f"run={tmp_path / 'again'}", "ray=none"]
    done = start(*again[1:])
    said, _ = done.communicate(timeout=200)
    assert done.returncode == 0, said
    result = json.loads((tmp_path / "again" / "result.json").read_text())
    assert result["miou"] == recipe.trial.miou


def trial_processes(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """Those that train: Ray names a worker after what it does."""
    found = []
    for child in psutil.Process(driver.pid).children(recursive=True):
        try:
            if any("ImplicitFunc" in part or "train" in part.partition("ray::")[2] for part in child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found
