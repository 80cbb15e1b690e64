"""A Ray cluster on this machine: a head that asks for a token, and nodes with addresses of their own.

What it starts it ends, and nothing else. Linux alone has the addresses 127.0.0.2 and on without being told.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

STARTED = "Ray runtime started"
TRIES = 5
"""Ray gives a node 30 s to start, which nothing can change and a busy machine may not keep."""
STORE_BYTES = 100 << 20


@dataclass(frozen=True)
class Command:
    """A command that was begun."""

    words: tuple[str, ...]
    process: subprocess.Popen[bytes]
    said: Path
    token: str
    patience: float
    """Seconds that it may take."""

    @property
    def text(self) -> str:
        """What it has said so far, on both streams."""
        return self.said.read_text()

    def wait(self, holds: Callable[[], object], what: str) -> None:
        """Waits while it runs.

        Raises:
            AssertionError: it ended, or it took too long.
        """
        until = time.monotonic() + self.patience
        while not holds():
            assert self.process.poll() is None, f"{what} must come before the end\n{self}"
            assert time.monotonic() < until, f"{what} must come within {self.patience:g} s\n{self}"
            time.sleep(0.05)

    def end(self, code: int, *phrases: str) -> str:
        """Waits for its end; what it said.

        Raises:
            AssertionError: another exit code, or it did not say this, or it told the token.
        """
        found = self.process.wait(self.patience)
        assert found == code, f"exit code must be {code}; got {found}\n{self}"
        for phrase in phrases:
            assert phrase in self.text, f"it must say {phrase!r}\n{self}"
        assert self.token not in self.text, "the token must not be told"
        return self.text

    def __str__(self) -> str:
        return f"$ {shlex.join(self.words)}\n{self.text}"


@dataclass(frozen=True)
class Cluster:
    """A cluster that runs."""

    address: str
    """Of its job server, on loopback."""
    folder: Path
    """With a folder of Ray's for the head and for each node."""
    environment: dict[str, str]
    """Of those who have the token."""
    token: str
    patience: float
    """Seconds that one command may take."""

    def begin(self, checkout: Path, *words: str, token: bool = True) -> Command:
        """Begins a command in a checkout, whose code travels with a job."""
        hidden = () if token else ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
        environment = {name: value for name, value in self.environment.items() if name not in hidden}
        number, name = tempfile.mkstemp(prefix="said-", suffix=".txt", dir=self.folder)
        with os.fdopen(number, "w") as file:
            process = subprocess.Popen(words, cwd=checkout, env=environment, stdout=file, stderr=file)
        return Command(words, process, Path(name), self.token, self.patience)

    def ask(self, path: str) -> Any:
        """What the dashboard answers."""
        request = urllib.request.Request(f"{self.address}/{path}", headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def listed(self, what: str) -> list[dict[str, Any]]:
        """`nodes` or `actors` of the state API."""
        return self.ask(f"api/v0/{what}?detail=1")["data"]["result"]["result"]


@contextmanager
def cluster(workers: int, folder: Path, patience: float) -> Iterator[Cluster]:
    """A head without CPUs for work, and as many nodes with one each.

    Args:
        workers: nodes beside the head.
        folder: new, with a short name: Ray's sockets lie below it.
        patience: seconds that a command may take.

    Raises:
        AssertionError: a node did not start.
    """
    (folder / "home").mkdir(parents=True)
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "HOME": str(folder / "home"),
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",  # a crash of the interpreter says where
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",  # it kills workers for what other processes take
        "RAY_worker_niceness": "0",  # or they wait for whatever else this machine does
    }
    nodes = _Nodes(folder, environment)
    try:
        port, dashboard = nodes.head()
        nodes.join(workers, port)
        yield Cluster(f"http://127.0.0.1:{dashboard}", folder, environment, token.read_text(), patience)
    finally:
        nodes.end()
        shutil.rmtree(folder, ignore_errors=True)


class _Nodes:
    """`ray start` a node; each has a folder of its own and a file with what it says. Number 0 is the head."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder = folder
        self._environment = environment
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def head(self) -> tuple[int, int]:
        """Starts the head; its port and its dashboard's."""
        names = ("--port", "--dashboard-port", "--dashboard-agent-listen-port", "--ray-client-server-port")
        ports = free_ports(len(names))
        options = [f"{name}={port}" for name, port in zip(names, ports, strict=True)]
        self._run({0: ["--head", "--dashboard-host=127.0.0.1", "--num-cpus=0", *options]})
        return ports[0], ports[1]

    def join(self, count: int, port: int) -> None:
        """Starts the other nodes, all at once."""
        own = [f"--dashboard-agent-listen-port={free}" for free in free_ports(count)]
        shared = (f"--address=127.0.0.2:{port}", "--num-cpus=1", "--include-log-monitor=false")  # the head's is enough
        self._run({1 + i: [*shared, own[i]] for i in range(count)})

    def end(self) -> None:
        """Kills all nodes, and what runs for them."""
        for number in list(self._processes):
            self._end(number)
        self._kill(self._folder)

    def _run(self, options: dict[int, list[str]]) -> None:
        """Starts nodes, all at once; those that Ray gives up again, one by one."""
        together = [list(options)]
        for _ in range(TRIES):
            failed = []
            for numbers in together:
                for number in numbers:
                    self._start(number, *options[number])
                failed += [number for number in numbers if not self._runs(number)]
            for number in failed:
                self._end(number)
            together = [[number] for number in failed]
            if not failed:
                return
        raise AssertionError(self._said(failed[0]))

    def _start(self, number: int, *options: str) -> None:
        command = [str(Path(sys.executable).parent / "ray"), "start", "--block", *options]
        command += [f"--node-ip-address=127.0.0.{2 + number}", f"--object-store-memory={STORE_BYTES}"]
        command += ["--min-worker-port=0", "--max-worker-port=0"]  # any: the nodes share this machine's
        command += [f"--temp-dir={self._folder / str(number)}"]
        with (self._folder / f"{number}.log").open("w") as file:
            self._processes[number] = subprocess.Popen(command, env=self._environment, stdout=file, stderr=file)

    def _runs(self, number: int) -> bool:
        """Waits until a node runs, or has given up."""
        while STARTED not in self._said(number):
            if self._processes[number].poll() is not None:
                return False
            time.sleep(0.2)
        return True

    def _end(self, number: int) -> None:
        process = self._processes.pop(number)
        process.kill()
        process.wait()
        self._kill(self._folder / str(number))

    @staticmethod
    def _kill(folder: Path) -> None:
        """Kills every process whose command names the folder; Ray's workers go with their raylet."""
        named = [one for one in psutil.process_iter(["cmdline"]) if _names(one.info["cmdline"] or (), folder)]
        for process in named:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(named, timeout=30)

    def _said(self, number: int) -> str:
        return (self._folder / f"{number}.log").read_text()


def _names(words: Sequence[str], folder: Path) -> bool:
    return any(f"{folder}/" in f"{word}/" for word in words)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listened at a moment ago, all different."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
