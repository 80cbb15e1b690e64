"""Pools that many tests read: drawn once a session, small."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import forks
import pytest
import torch
from object_store import CREDENTIALS, Proxy, moto_server
from postgres import PASSWORD, Server, postgres_server

from raysemi.data.pack import pack
from raysemi.data.sources.scenes import Scenes

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAYSEMI_COMPILE_BACKEND", "aot_eager")  # train.compile without minutes of a C++ compiler
# Ignored in a script's background job, for its children too: tests of Ctrl-C want a terminal's default.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # tests run beside each other on few cores; more threads only wait for one another


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the pools labeled (8), unlabeled (16, masks kept) and val (5) of drawn scenes, 64 px."""
    out = tmp_path_factory.mktemp("scenes")
    source = Scenes(train=24, val=5, size=64)
    pack(source, out, split=8, processes=1, keep_unlabeled_masks=True, shard_samples=6)
    return out


@pytest.fixture(scope="session")
def fork_server() -> None:
    """Runs before a test needs it, and before there are credentials: as in a program that has packed before."""
    forks.start()


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address host:port of a real S3 server on loopback."""
    with moto_server(tmp_path_factory.mktemp("moto") / "log.txt") as address:
        yield address


@pytest.fixture
def s3(moto: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same, with credentials in the environment for the time of a test."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    return moto


@pytest.fixture(scope="session")
def postgres_running() -> Iterator[Server]:
    """A real PostgreSQL server on loopback."""
    with postgres_server() as server:
        yield server


@pytest.fixture
def postgres(postgres_running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The same, with its password in the environment for the time of a test."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    return postgres_running


@pytest.fixture
def proxy(s3: str) -> Iterator[Callable[..., Proxy]]:
    """proxy(...) -> a proxy before the server; see `Proxy`."""
    made: list[Proxy] = []

    def make(**settings: object) -> Proxy:
        made.append(Proxy(s3, **settings))
        return made[-1]

    yield make
    for one in made:
        one.down()
