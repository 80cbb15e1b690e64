"""Packing and indexing over real Ray workers: the bytes of one process, deaths, Ctrl-C, an object store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from object_store import CREDENTIALS, client, upload
from PIL import Image
from pyarrow import fs

from raysemi.config import RayConfig
from raysemi.data.index import index_shards
from raysemi.data.pack import pack
from raysemi.data.sources import open_source
from raysemi.data.sources.scenes import Scenes
from raysemi.errors import ConfigError, DataError, DataFailure
from raysemi.launch import cluster as clusters
from raysemi.launch import spread
from raysemi.launch.spread import runner

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]  # of Ray's own code
SOURCE = Scenes(train=40, val=6, size=32)
OPTIONS = {"split": 9, "shard_samples": 4}


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster of two CPUs that the tests of this module share, and that may read object stores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            patch.delenv(name, raising=False)
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        with clusters.connected(RayConfig(num_workers=2, cpus_per_worker=1)):
            yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the source."""
    out = tmp_path_factory.mktemp("alone")
    pack(SOURCE, out, processes=1, **OPTIONS)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_two_workers_pack_and_index_the_bytes_of_one_process(alone: Path, tmp_path: Path) -> None:
    seen = []
    with runner("auto", None, {"--out": tmp_path}) as run:
        pack(SOURCE, tmp_path / "out", run=run, progress=lambda *counts: seen.append(counts), **OPTIONS)
        assert contents(tmp_path / "out") == contents(alone)
        assert seen[0] == (0, 46)
        assert seen[-1] == (46, 46)
        assert len(seen) == 1 + sum(name.endswith(".tar") for name in contents(alone))
        foreign = [tmp_path / "spread", tmp_path / "one"]
        for folder in foreign:
            folder.mkdir()
            for shard in (alone / "labeled").glob("*.tar"):
                (folder / shard.name).write_bytes(shard.read_bytes())
        index_shards(foreign[0], classes=SOURCE.classes, run=run)
    index_shards(foreign[1], classes=SOURCE.classes, processes=1)
    assert contents(foreign[0]) == contents(foreign[1])


def test_a_killed_worker_is_replaced_and_its_half_shard_written_again(alone: Path, tmp_path: Path) -> None:
    mark = tmp_path / "killed"

    def killing(work):
        def once(task):
            if task.path.name == "unlabeled-000002.tar" and not mark.exists():
                mark.touch()
                task.path.with_name(f"{task.path.name}.part").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            return work(task)

        return once

    with runner("auto", 2, {}) as run:
        pack(SOURCE, tmp_path / "out", run=lambda work, tasks: run(killing(work), tasks), **OPTIONS)
    assert mark.exists()
    assert contents(tmp_path / "out") == contents(alone)


def test_a_task_that_kills_every_worker_and_a_fault_are_told_by_name(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread, "_RETRIES", 1)

    def killing(work):
        def always(task):
            if task.path.name == "unlabeled-000002.tar":
                os.kill(os.getpid(), signal.SIGKILL)
            return work(task)

        return always

    with runner("auto", 1, {}) as run:
        with pytest.raises(DataFailure, match=r"until .*unlabeled-000002\.tar is done; got 2 that did not") as caught:
            pack(SOURCE, tmp_path / "out", run=lambda work, tasks: run(killing(work), tasks), **OPTIONS)
        assert "\n" not in str(caught.value)
        finished = sorted(path.name for path in (tmp_path / "out").rglob("*.tar"))
        assert "unlabeled-000001.tar" in finished
        assert "unlabeled-000002.tar" not in finished
        (tmp_path / "out/labeled/labeled-000000.tar").unlink()
        (tmp_path / "out/labeled/labeled-000000.tar").mkdir()  # nothing can be written there
        with pytest.raises(DataError, match=r"labeled-000000\.tar must be writable") as caught:
            pack(SOURCE, tmp_path / "out", run=run, **OPTIONS)
        assert type(caught.value) is DataError
        (tmp_path / "out/labeled/labeled-000000.tar").rmdir()
        pack(SOURCE, tmp_path / "out", run=run, **OPTIONS)
    assert contents(tmp_path / "out") == contents(alone)


def test_workers_read_and_write_an_object_store(tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "source"
    for number in range(12):
        place = f"{'train' if number < 9 else 'val'}/{number}.png"
        for kind, size, high in (("images", (6, 5, 3), 256), ("labels", (6, 5), 2)):
            (root / kind / place).parent.mkdir(parents=True, exist_ok=True)
            values = np.random.default_rng(number).integers(0, high, size, dtype=np.uint8)
            Image.fromarray(values).save(root / kind / place)
    (root / "classes.txt").write_text("sky\ntree\n")
    upload(root, s3, "spread/source")
    pack(open_source("folder", root), tmp_path / "alone", processes=1, split=3, shard_samples=2)
    # the workers began without these: what says where the store is travels with each path
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3}")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    with runner("auto", 2, {"--out": "s3://spread/out"}) as run:
        pack(open_source("folder", "s3://spread/source"), "s3://spread/out", split=3, shard_samples=2, run=run)
    store = client(s3)
    infos = store.get_file_info(fs.FileSelector("spread/out", recursive=True))
    files = [info.path for info in infos if info.type == fs.FileType.File]
    made = {path.removeprefix("spread/out/"): store.open_input_file(path).readall() for path in files}
    assert made == contents(tmp_path / "alone")


def test_relative_paths_are_refused_where_machines_do_not_share_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_single_node", lambda: False)
    paths = {"--root": "data", "--out": "s3://bucket/out", "POOL": "/shared/pool", "--split": None}
    with (
        pytest.raises(ConfigError, match=r"--root must be an absolute path .*got data") as caught,
        runner("auto", 2, paths),
    ):
        pass
    assert len(caught.value.faults) == 1


def test_ctrl_c_ends_ray_and_the_same_command_goes_on(tmp_path: Path) -> None:
    arguments = ["pack", "scenes", "train=150", "val=4", "size=64", "--split", "20", "--shard-samples", "2"]
    command = [sys.executable, "-m", "raysemi.cli", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    out = tmp_path / "out"
    with subprocess.Popen(
        [*command, "--out", out, "--ray", "local", "--processes", "2"], stderr=subprocess.PIPE, text=True,
        env=environment, start_new_session=True,
    ) as process:  # fmt: skip
        until = time.monotonic() + 300
        while len(list(out.rglob("*.tar"))) < 5:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 130, said
    assert "The same command goes on with what is finished" in said
    assert psutil.wait_procs(children, timeout=30)[1] == []
    finished = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    assert 5 <= len(finished) < 77
    assert not list(out.rglob("pool.json"))
    again = Scenes(train=150, val=4, size=64)
    pack(again, out, split=20, shard_samples=2, processes=1)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    pack(again, tmp_path / "fresh", split=20, shard_samples=2, processes=1)
    assert contents(out) == contents(tmp_path / "fresh")
