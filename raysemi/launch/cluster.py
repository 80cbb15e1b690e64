"""Joining a Ray cluster or starting one on this machine: authentication, resources, quiet output.

A cluster of our own always asks for a token: Ray listens on every network interface, even on a laptop, and whoever
reaches an open cluster runs code as us. The token lies in a file that only its owner may read, outside the home folder,
and goes when the process ends.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

from raysemi.config import RayConfig
from raysemi.errors import ConfigError, RaysemiError

_log = logging.getLogger(__name__)

_SERVER = "RAY_API_SERVER_ADDRESS"
"""Where Ray's processes ask what is running, such as whether a controller of Ray Train is alive."""
_TRIES = 3
"""Ray gives its processes 30 s to start, which nothing can change and a busy machine may not keep."""
_OBJECT_STORE_BYTES = 256 << 20
"""Nothing large travels through Ray here; its default, a third of the memory in /dev/shm, fails in small containers."""


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that this process is connected to."""

    own: bool
    """Started here, for this process alone."""
    here: bool
    """All of it is this machine."""


@contextmanager
def connected(config: RayConfig, *, dashboard: bool = False) -> Iterator[Cluster]:
    """Joins the cluster of `ray.address` or RAY_ADDRESS, or starts one; leaves it at the end.

    A connection that exists already (a notebook's, or that of a sweep's trial) is used and left open.

    Args:
        config: `ray.*`.
        dashboard: a cluster that is started here gets one, which answers what is running.

    Raises:
        RaysemiError: Ray does not start, or the address does not answer.
    """
    address = config.address or os.environ.get("RAY_ADDRESS")
    own = address in (None, "", "local")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield Cluster(own=False, here=_single_node())
        return
    set_authentication(own)
    import ray

    with _dashboard(started=own and dashboard) as settings:
        _init(config, address, own=own, **settings)
        try:
            yield Cluster(own, here=own or _single_node())
        finally:
            ray.shutdown()


def _init(config: RayConfig, address: str | None, *, own: bool, **settings: Any) -> None:
    import ray

    how: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if own:
        how |= settings | {
            "address": "local",
            "num_cpus": max(cores(), config.max_workers * _cpus_per_worker(config, own=True)),
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    for tries_left in reversed(range(_TRIES)):
        try:
            ray.init(**how)
            return
        except Exception as error:  # a bare one, where its processes take longer than 30 s to start
            slow = own and "timed out during startup" in str(error)
            # A dashboard's port may still be that of the processes that were too slow.
            if slow and tries_left and not how["include_dashboard"]:
                continue
            raise _not_there(address, own, error) from error


def _not_there(address: str | None, own: bool, error: Exception) -> RaysemiError:
    target = "start on this machine" if own else f"answer at {address}"
    advice = (
        "Run `raysemi doctor`, or do without: train with ray=none, pack with --ray none, predict without --workers."
        if own
        else "Check the address (ray.address, --ray) and the token."
    )
    first = str(error).strip().splitlines()[0].rstrip(".")
    return RaysemiError(f"Ray must {target}; got {type(error).__name__}: {first}. {advice}")


@contextmanager
def _dashboard(*, started: bool) -> Iterator[dict[str, Any]]:
    """What `ray.init` is told of a dashboard, and its processes, which inherit the environment, of its address.

    Where several clusters are alive on a machine, they would find none by themselves.
    """
    if not started:
        yield {"include_dashboard": False}
        return
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = int(one.getsockname()[1])
    before = os.environ.get(_SERVER)
    os.environ[_SERVER] = f"http://127.0.0.1:{port}"
    try:
        yield {"include_dashboard": True, "dashboard_port": port}
    finally:
        os.environ.pop(_SERVER)
        if before is not None:
            os.environ[_SERVER] = before


@contextmanager
def ctrl_c_wins() -> Iterator[threading.Event]:
    """Gives an event that Ctrl-C sets; afterwards any error is KeyboardInterrupt.

    A terminal sends the signal to all of its processes, so what the driver meets first may be a dead worker; and an
    exception that a signal raises inside a destructor is lost.
    """
    pressed, previous = threading.Event(), signal.getsignal(signal.SIGINT)
    if not callable(previous) or threading.current_thread() is not threading.main_thread():
        yield pressed  # ignored, as in a script's background job, or not ours to handle
        return

    def note(number: int, frame: FrameType | None) -> None:
        pressed.set()
        previous(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    except Exception as error:
        if pressed.is_set():
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, previous)


def worker_resources(config: RayConfig, cluster: Cluster) -> tuple[int, bool]:
    """CPU cores a worker, and whether each gets a GPU.

    Raises:
        RaysemiError: GPUs are asked for and there are fewer than workers on a cluster that cannot grow.
    """
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    enough = gpus >= config.min_workers
    if config.use_gpu is True and cluster.own and not enough:
        raise RaysemiError(
            f"ray.use_gpu must be false where there are fewer GPUs than workers; got {gpus} GPUs for "
            f"{config.min_workers} workers. Lower ray.num_workers or set ray.use_gpu=false."
        )
    if config.use_gpu == "auto" and 0 < gpus < config.min_workers:
        _log.warning(
            "%d workers share no %d GPUs: they compute on the CPU. Ask for fewer workers.", config.min_workers, gpus
        )
    return _cpus_per_worker(config, cluster.own), enough if config.use_gpu == "auto" else config.use_gpu


def refuse_relative_paths(
    paths: Iterable[tuple[str, str | None]], instead: str = "RAY_ADDRESS=local, and no ray.address"
) -> None:
    """Refuses what several machines would look up each in a folder of its own.

    Args:
        paths: (setting, path or URL) each; None is passed over.
        instead: what starts Ray on this machine alone.

    Raises:
        ConfigError: names every path that is relative.
    """
    faults = [
        f"{name} must be an absolute path or a URL that every node reaches; got {path}. Change it, or start a cluster "
        f"on this machine: {instead}."
        for name, path in paths
        if path and "://" not in path and not Path(path).expanduser().is_absolute()
    ]
    if faults:
        raise ConfigError(faults)


def _single_node() -> bool:
    import ray

    return sum(node["Alive"] for node in ray.nodes()) == 1


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpus_per_worker(config: RayConfig, own: bool) -> int:
    if config.cpus_per_worker != "auto":
        return config.cpus_per_worker
    return max(1, cores() // config.max_workers) if own else 1


def set_authentication(own: bool) -> None:
    """Says to Ray how it finds the token, before it is asked anything; `own`: of a cluster that this process starts."""
    # Said explicitly, since Ray's own default depends on its version and on how the cluster is reached.
    if "RAY_AUTH_MODE" in os.environ:
        return
    given = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if own:
        if not given:
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(_private_token())
        os.environ["RAY_AUTH_MODE"] = "token"
        _read_again()
        return
    at_home = Path.home() / ".ray" / "auth_token"
    if at_home.is_file():
        at_home.chmod(0o600)  # Ray writes it readable for everyone
    os.environ["RAY_AUTH_MODE"] = "token" if given or at_home.is_file() else "disabled"
    _read_again()
    if os.environ["RAY_AUTH_MODE"] == "disabled":
        _log.warning("joining Ray without a token; set RAY_AUTH_TOKEN_PATH where the cluster asks for one.")


def _read_again() -> None:
    # Ray reads these variables when it is imported; a notebook may have done so before. Ray itself does the same.
    if "ray" in sys.modules:
        core: Any = import_module("ray._raylet")
        core.Config.initialize("")
        core.AuthenticationTokenLoader.instance().reset_cache()


@cache
def _private_token() -> Path:
    """A file with a new token, one a process: Ray keeps the first token that it reads."""
    folder = tempfile.mkdtemp(prefix="raysemi-token-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32), encoding="ascii")
    return path
