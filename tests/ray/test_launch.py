"""Runs on real Ray workers: the same numbers as without Ray, restarts, errors as one line, Ctrl-C, the token."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from makers import tiny_run

from raysemi import config_io, doctor
from raysemi.config import RayConfig, RunConfig
from raysemi.data.pool import Pool
from raysemi.engine import checkpoint
from raysemi.engine.folder import RunFolder
from raysemi.errors import ConfigError, DataError
from raysemi.launch.cluster import connected
from raysemi.launch.train import _refuse_relative_paths, launch

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]  # of Ray's own code
TWO_WORKERS = ["ray.num_workers=2", "ray.cpus_per_worker=1", "train.batch.unlabeled=4", "model.batch_norm=frozen"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cluster that launches of this module share; the home folder that it was started with."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            patch.delenv(name, raising=False)
        with connected(RayConfig(num_workers=2, cpus_per_worker=1)) as started:
            assert started.own
            assert started.here
            yield home


def on_ray(pools: Path, run: Path, *overrides: str) -> RunConfig:
    return config_io.change(tiny_run(pools, run, "fixmatch"), ["ray.num_workers=1", *TWO_WORKERS, *overrides])


def test_the_cluster_asks_for_a_token_that_only_its_owner_reads(cluster: Path) -> None:
    assert os.environ["RAY_AUTH_MODE"] == "token"
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    assert len(token.read_text()) == 64
    assert not (cluster / ".ray").exists()
    import ray

    # what `ray.init` asks first, and again for 20 s
    code = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1]).internal_kv_keys(b'', None)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    intruder = subprocess.run(
        [sys.executable, "-c", code, ray.get_runtime_context().gcs_address],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert intruder.returncode != 0
    assert "when token authentication is enabled" in intruder.stderr, intruder.stderr


def test_two_workers_give_the_losses_of_one_process_though_one_of_them_dies(
    cluster: Path, scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone: list[tuple[int, float]] = []
    spread: list[tuple[int, float]] = []
    killed: list[int] = []

    def note(into: list[tuple[int, float]], step: int, metrics: dict[str, float]) -> None:
        if "loss/total" in metrics:
            into.append((step, metrics["loss/total"]))

    def kill_at_three(step: int, metrics: dict[str, float]) -> None:
        note(spread, step, metrics)
        if step == 3 and not killed:
            below = psutil.Process().children(recursive=True)  # others may test beside this one
            workers = [p for p in below if p.name().startswith("ray::RayTrainWorker")]
            killed.append(max(process.pid for process in workers))
            os.kill(killed[0], signal.SIGKILL)

    overrides = ["train.steps=40", "train.checkpoint_every=2"]
    one = on_ray(scenes, tmp_path / "one", *overrides, "ray=none", "train.stop_at=20")
    launch(one, partial(note, alone))
    result = launch(on_ray(scenes, tmp_path / "two", *overrides, "ray.max_failures=1"), kill_at_three)
    assert result == json.loads((tmp_path / "two/result.json").read_text())
    assert result["steps"] == 40
    assert len(killed) == 1
    (said,) = [r.getMessage() for r in caplog.records if "Starting again" in r.getMessage()]
    assert said.startswith("workers must stay alive; got rank ")
    assert said.endswith("Starting again; 0 more times at most without getting further.")
    steps = [step for step, _ in spread]
    assert steps.count(1) == 1  # it went on from a checkpoint
    assert set(steps) == set(range(1, 41))
    expected = dict(alone)
    for step, loss in spread:  # rounding grows with the steps
        if step <= 20:
            assert loss == pytest.approx(expected[step], abs=1e-5 if step <= 4 else 1e-4), step


def test_a_corrupt_sample_ends_the_run_at_once_with_its_own_error(cluster: Path, scenes: Path, tmp_path: Path) -> None:
    pools = tmp_path / "pools"
    for name in ("labeled", "unlabeled", "val"):
        (pools / name).mkdir(parents=True)
        for file in (scenes / name).iterdir():
            (pools / name / file.name).write_bytes(file.read_bytes())
    row = Pool.open(pools / "unlabeled").row(0)
    with (pools / "unlabeled" / row.shard).open("r+b") as shard:
        shard.seek(row.image_offset)
        shard.write(bytes(row.image_bytes))
    with pytest.raises(DataError) as caught:
        launch(on_ray(pools, tmp_path / "run", "train.steps=50", "ray.num_workers=1"))
    assert row.key in str(caught.value)
    assert row.shard in str(caught.value)


def test_ctrl_c_ends_ray_and_says_how_to_go_on(scenes: Path, tmp_path: Path) -> None:
    config = on_ray(scenes, tmp_path / "run", "train.steps=100000", "train.checkpoint_every=2", "ray.num_workers=1")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config_io.dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "raysemi.cli", "train", str(recipe)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        lines, children = [], []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("step 3/"):
                children = psutil.Process(process.pid).children(recursive=True)
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.returncode == 130, "".join(lines[-30:])
    assert "the same command goes on from its last checkpoint" in lines[-1]
    assert children
    assert psutil.wait_procs(children, timeout=30)[1] == []
    assert checkpoint.load_newest(RunFolder(tmp_path / "run")) is not None


def test_relative_paths_are_refused_where_nodes_do_not_share_a_folder(scenes: Path, tmp_path: Path) -> None:
    good = on_ray(scenes, tmp_path / "run")
    _refuse_relative_paths(good)
    _refuse_relative_paths(config_io.change(good, ["run=s3://bucket/run"]))
    with pytest.raises(ConfigError) as caught:
        _refuse_relative_paths(config_io.change(good, ["run=runs/a", "data.val=pools/val"]))
    assert [fault.split(" must ")[0] for fault in caught.value.faults] == ["run", "data.val"]
    with pytest.raises(ConfigError, match=r"data\.unlabeled must be an absolute path .*got pools/more"):
        _refuse_relative_paths(config_io.change(good, ["data.unlabeled=[s3://bucket/u, pools/more]"]))


def test_doctor_says_that_ray_starts() -> None:
    (finding,) = [finding for finding in doctor.examine() if finding.name == "ray starts"]
    assert finding.state == "ok", finding
    assert finding.value.startswith("yes, ")
