"""Trials on a Ray cluster: of several Ray Train workers, on parts of a GPU, several in one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sweeps import write_sweep

from raysemi.config import RayConfig
from raysemi.data.pool import INDEX_FILE
from raysemi.launch.cluster import connected
from raysemi.tune import driver, sweep
from raysemi.tune.study import Trial, read

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
HAS = {"CPU": 4.0, "GPU": 1.0}
"""What the cluster says it has: Ray gives out GPUs by number and looks for none."""


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """As a sweep of trials of several workers starts it, with more cores than there are and a GPU."""
    import ray

    before = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "init", partial(ray.init, num_gpus=int(HAS["GPU"])))
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            del os.environ[name]
        os.environ["HOME"] = str(tmp_path_factory.mktemp("home"))
        try:
            with connected(RayConfig(num_workers=int(HAS["CPU"]), cpus_per_worker=1), dashboard=True):
                yield
        finally:
            os.environ.clear()
            os.environ.update(before)


@pytest.fixture
def neighbour() -> Iterator[None]:
    """What Ray takes for another cluster on this machine: it looks for the command lines of raylets."""
    line = ["raylet", "-c", "import time; time.sleep(600)", "--gcs-address=192.0.2.9:6379"]
    with subprocess.Popen(line, executable=sys.executable) as process:
        yield
        process.kill()


def run(folder: Path, pools: Path, **settings: Any) -> list[Trial]:
    """A sweep of supervised trials: what became of them."""
    config = sweep.load(write_sweep(folder, pools, methods=["supervised"], **settings))
    driver.run(config, driver.prepare(config, folder / "out", "auto"), folder / "out")
    return read(folder / "out")[1]


@contextmanager
def watching(look: Callable[[], None]) -> Iterator[None]:
    """Looks again and again, beside the block."""
    over = threading.Event()
    failed: list[Exception] = []

    def go() -> None:
        while not over.wait(0.3):
            try:
                look()
            except Exception as error:
                failed.append(error)
                return

    thread = threading.Thread(target=go)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert failed == []


def trial_processes() -> set[int]:
    """Process ids of Tune's trials that hold their resources."""
    from ray.util.state import list_actors

    alive = list_actors(filters=[("state", "=", "ALIVE")])
    return {one.pid for one in alive if "ImplicitFunc" in one.class_name}


def all_is_given_back(within_s: float = 30.0) -> bool:
    import ray

    until = time.monotonic() + within_s
    while (has := ray.available_resources()) and any(has.get(name, 0.0) < count for name, count in HAS.items()):
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def test_trials_of_two_workers_finish_and_are_stopped_and_give_all_back(
    tmp_path: Path, scenes: Path, neighbour: None
) -> None:
    rows = [{"label": "learns", "set": {"optim.lr": 0.03}}, {"label": "does not", "set": {"optim.lr": 1e-9}}]
    learns, does_not = run(
        tmp_path, scenes,
        rows=rows, space={}, search={"name": "grid"}, prune={"name": "asha", "grace": 6},
        resources={"workers": 2, "concurrent": 1},
        set={"train.steps": 12, "eval.every": 6, "train.batch.labeled": 4},
    )  # fmt: skip
    assert (learns.state, sorted(learns.curve)) == ("finished", [6, 12])
    assert (does_not.state, sorted(does_not.curve)) == ("pruned", [6])
    assert learns.curve[6] > does_not.curve[6] + 1.0
    assert all_is_given_back()
    assert json.loads((tmp_path / "out" / "trials" / "0000" / "result.json").read_text())["steps"] == 12


def test_a_gpu_holds_as_many_trials_as_it_is_parted_into(tmp_path: Path, scenes: Path) -> None:
    gpus, at_once = 0.5, 2
    pools = Path(shutil.copytree(scenes, tmp_path / "pools"))
    held: set[int] = set()
    most = 0

    def look() -> None:
        nonlocal most, held
        alive = trial_processes()
        most, held = max(most, len(alive)), held | alive
        if (tmp_path / "out" / "sweep.yaml").is_file():
            begun = read(tmp_path / "out")[1][:at_once]
            if len(begun) == at_once and all(trial.curve for trial in begun):
                for index in pools.rglob(INDEX_FILE):
                    index.unlink()  # each process has trained and evaluated: from here on none can read it again

    with watching(look):
        trials = run(
            tmp_path, pools,
            space={"optim.lr": {"low": 0.001, "high": 0.1, "log": True}}, search={"trials": 3},
            resources={"gpus": gpus}, set={"train.steps": 8, "eval.every": 2},
        )  # fmt: skip
    assert [trial.state for trial in trials] == ["finished"] * 3, [trial.reason for trial in trials]
    assert (most, len(held)) == (at_once, at_once)  # the third trial shares a process, and its indexes
    assert not list(pools.rglob(INDEX_FILE))
    for trial in trials:  # a share of the GPU's hours
        assert 0 < trial.hours <= gpus * trial.seconds / 3600
    assert all_is_given_back()
