"""Jobs of a real head that asks for a token: what comes back is the program's own exit code."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]  # on a busy machine a head alone takes a minute
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Head:
    address: str
    folder: Path
    environment: dict[str, str]
    token: str

    def submit(self, *words: str, token: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*words), **self.how(token), capture_output=True, timeout=400)

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "raysemi", "submit", "--address", self.address, *words]

    def how(self, token: bool = True) -> dict[str, object]:
        # the folder of a checkout: its code travels with the job
        hidden = () if token else ("RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")
        return {"cwd": ROOT, "env": {k: v for k, v in self.environment.items() if k not in hidden}, "text": True}


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("h")  # short: Ray's sockets lie below it
    (folder / "home").mkdir()
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "HOME": str(folder / "home"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    temp = Path("/tmp") / f"raysemi-head-{os.getpid()}"
    for _ in range(3):  # Ray gives a node 30 s, which a busy machine may not keep
        process, port = start(temp, environment, folder / "log")
        if "Ray runtime started" in (folder / "log").read_text():
            break
        end(process, temp)
    else:
        raise AssertionError((folder / "log").read_text())
    yield Head(f"http://127.0.0.1:{port}", temp, environment, token.read_text())
    end(process, temp)


def start(temp: Path, environment: dict[str, str], log: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A head, started or ended; its dashboard's port."""
    names = ("--port", "--dashboard-port", "--dashboard-agent-listen-port", "--ray-client-server-port")
    ports = free_ports(len(names))
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address", "127.0.0.1"]
    command += ["--dashboard-host", "127.0.0.1", "--num-cpus", "2", "--object-store-memory", str(100 << 20)]
    command += [f"{name}={port}" for name, port in zip(names, ports, strict=True)]
    with log.open("w") as file:
        process = subprocess.Popen([*command, "--temp-dir", str(temp)], env=environment, stdout=file, stderr=file)
    until = time.monotonic() + 120
    while "Ray runtime started" not in log.read_text() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.5)
    return process, ports[1]


def end(process: subprocess.Popen[bytes], temp: Path) -> None:
    """Ends a head, and what it has left; nothing of another one."""
    process.terminate()
    process.wait(60)
    left = [p for p in psutil.process_iter(["cmdline"]) if any(str(temp) in w for w in p.info["cmdline"] or ())]
    for one in left:
        one.kill()
    psutil.wait_procs(left, timeout=30)
    shutil.rmtree(temp, ignore_errors=True)


def test_without_the_token_nothing_is_taken(head: Head, tmp_path: Path) -> None:
    done = head.submit("--job", "pack", "--", "scenes", "--out", str(tmp_path / "pools"), token=False)
    assert done.returncode == 1, done.stderr
    assert "cluster must take the token" in done.stderr
    assert head.token not in done.stdout + done.stderr


def test_a_job_packs_and_says_which_raysemi_it_is(head: Head, tmp_path: Path) -> None:
    words = f"scenes train=24 val=5 size=64 --split 8 --ray none --out {tmp_path / 'pools'}".split()
    done = head.submit("--job", "pack", "--", *words)
    assert done.returncode == 0, done.stderr + done.stdout
    assert (tmp_path / "pools/unlabeled/pool.json").is_file()
    assert ", uploaded with the job: " in done.stdout
    assert "labeled: 8 images" in done.stdout
    assert "submitted: raysubmit_" in done.stderr
    assert head.token not in done.stdout + done.stderr
    (package,) = (head.folder / "session_latest/runtime_resources/working_dir_files").glob("_ray_pkg_*/")
    assert (package / "raysemi/infra/kuberay/base/jobs/train.yaml").is_file()  # a link here, a file over there
    assert not (package / "tests").exists()
    sizes = [file.stat().st_size for file in package.rglob("*") if file.is_file()]
    assert 1 << 20 < sum(sizes) < 5 << 20


def test_a_mistake_that_shows_over_there_comes_back_as_2(head: Head, tmp_path: Path) -> None:
    done = head.submit("--job", "evaluate", "--", str(tmp_path / "nowhere"))
    assert done.returncode == 2, done.stderr + done.stdout
    assert "submitted: raysubmit_" in done.stderr
    assert f"error: {tmp_path / 'nowhere'} must be a run folder" in done.stdout


def test_ctrl_c_stops_the_job_too_and_its_folder_is_one_job_s(head: Head, tmp_path: Path) -> None:
    words = (
        "--job",
        "pack",
        "--",
        "scenes",
        "train=90000",
        "--split",
        "8",
        "--out",
        str(tmp_path / "pools"),
        "--ray",
        "none",
    )
    with subprocess.Popen(
        head.command("--stop-with-me", *words), **head.how(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as first:
        assert first.stdout is not None
        for line in first.stdout:  # it runs
            if "uploaded with the job" in line:
                break
        second = head.submit(*words)
        first.send_signal(signal.SIGINT)
        out, err = first.communicate(timeout=200)
    assert second.returncode == 2, second.stderr
    assert "run must be written by one job at a time" in second.stderr
    assert first.returncode == 130, err + out
    assert "stopping the job" in err
