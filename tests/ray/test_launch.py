"""Runs on real Ray workers: the same numbers as without Ray, restarts, errors as one line, Ctrl-C, the token."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
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

    code = f"import ray; ray.init('{ray.get_runtime_context().gcs_address}', logging_level='ERROR')"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    intruder = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert intruder.returncode != 0
    assert "InvalidAuthToken" in intruder.stderr


def test_two_workers_give_the_losses_of_one_process_and_go_on(cluster: Path, scenes: Path, tmp_path: Path) -> None:
    alone: list[tuple[int, float]] = []
    spread: list[tuple[int, float]] = []

    def note(into: list[tuple[int, float]]):
        return lambda step, metrics: into.append((step, metrics["loss/total"])) if "loss/total" in metrics else None

    one = config_io.change(on_ray(scenes, tmp_path / "one"), ["ray=none", "train.steps=4"])
    launch(one, note(alone))
    two = on_ray(scenes, tmp_path / "two", "train.steps=4")
    assert launch(config_io.change(two, ["train.stop_at=2"]), note(spread)) == {}
    assert checkpoint.steps(RunFolder(tmp_path / "two"))[-1] == 2
    result = launch(two, note(spread))
    assert [step for step, _ in spread] == [1, 2, 3, 4]
    assert [loss for _, loss in spread] == pytest.approx([loss for _, loss in alone], abs=1e-5)
    assert result == json.loads((tmp_path / "two/result.json").read_text())
    assert result["steps"] == 4


def test_a_dead_worker_is_replaced_as_long_as_the_run_gets_further(
    cluster: Path, scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[int] = []
    killed_at: list[int] = []

    def kill_at_three_and_forty(step: int, _: dict[str, float]) -> None:
        seen.append(step)
        if step in (3, 40) and step not in killed_at:
            killed_at.append(step)
            below = psutil.Process().children(recursive=True)  # others may test beside this one
            workers = [p for p in below if p.name().startswith("ray::RayTrainWorker")]
            max(workers, key=lambda process: process.pid).send_signal(signal.SIGKILL)

    overrides = ["train.steps=120", "train.checkpoint_every=2", "ray.max_failures=1"]
    assert launch(on_ray(scenes, tmp_path / "run", *overrides), kill_at_three_and_forty)["steps"] == 120
    assert killed_at == [3, 40]
    # the second time the run had got further: its one failure is granted anew
    said = [r.getMessage() for r in caplog.records if "Starting again" in r.getMessage()]
    assert [text.split(". ")[-1] for text in said] == [
        "Starting again; 0 more times at most without getting further."
    ] * 2
    assert all(text.startswith("workers must stay alive; got rank ") for text in said)
    assert seen.count(1) == 1  # it went on from a checkpoint


def test_zero_goes_on_in_the_same_cluster_after_its_driver_was_killed(
    cluster: Path, scenes: Path, tmp_path: Path
) -> None:
    import ray

    zero = ["train.strategy=deepspeed", "train.zero.stage=2", "train.steps=24", "train.checkpoint_every=2"]
    config = on_ray(scenes, tmp_path / "run", *zero)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config_io.dump(config), encoding="utf-8")
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-m", "raysemi.cli", "train", str(recipe)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as driver:
        assert driver.stderr is not None
        lines = []
        for line in driver.stderr:
            lines.append(line)
            if line.startswith("step 3/"):
                driver.kill()
    assert driver.returncode == -signal.SIGKILL, "".join(lines[-30:])

    def note(into: dict[int, float]):
        return lambda step, metrics: into.update({step: metrics["loss/total"]} if "loss/total" in metrics else {})

    alone: dict[int, float] = {}
    spread: dict[int, float] = {}
    launch(config, note(spread))
    first = min(spread)
    assert 3 <= first <= 20  # from its checkpoint
    assert max(spread) == 24
    one = on_ray(scenes, tmp_path / "one", "train.steps=24", "ray=none", f"train.stop_at={first + 4}")
    launch(one, note(alone))
    for step in range(first, first + 5):
        assert spread[step] == pytest.approx(alone[step], abs=1e-4)


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
        launch(on_ray(pools, tmp_path / "run", "train.steps=50"))
    assert row.key in str(caught.value)
    assert row.shard in str(caught.value)


def test_ctrl_c_ends_ray_and_says_how_to_go_on(scenes: Path, tmp_path: Path) -> None:
    config = on_ray(scenes, tmp_path / "run", "train.steps=100000", "train.checkpoint_every=2")
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
