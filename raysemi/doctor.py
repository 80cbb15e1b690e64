"""What this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

_RAY_CHECK = """
import json, sys
from raysemi.config import RayConfig
from raysemi.launch.cluster import connected
with connected(RayConfig(address="local")):
    import ray
    print(json.dumps(ray.cluster_resources().get("CPU", 0)))
"""
_RAY_TIMEOUT_S = 120
_SHARED_BYTES = 1 << 30
_MEMORY_BYTES = 2 << 30
_DISK_BYTES = 5 << 30
_OPEN_FILES = 4096


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    name: str
    state: Literal["ok", "warning", "missing"]
    value: str
    advice: str = ""
    """What to do; empty when nothing needs to be done."""


def examine(path: str | Path = ".", *, start_ray: bool = True) -> list[Finding]:
    """Looks at software, devices, memory and disk.

    Args:
        path: folder whose disk is measured: where runs and pools will lie.
        start_ray: start a cluster of one node and stop it again, in a process of its own.
    """
    findings = [
        Finding("python", "ok" if sys.version_info[:2] in ((3, 11), (3, 12)) else "warning", platform.python_version()),
        _package("torch", "Install raysemi again: `make install`."),
        _devices(),
        _package("ray", "Train with ray=none, or install it: `pip install 'ray[default,train,tune,data]'`."),
    ]
    if start_ray and findings[-1].state == "ok":
        findings.append(_ray_starts())
    return [
        *findings,
        _deepspeed(),
        _bytecode(),
        _cores(),
        _memory(),
        _shared_memory(),
        _disk(Path(path)),
        _open_files(),
    ]


def as_json(findings: list[Finding]) -> dict[str, Any]:
    """Findings by name, for programs; `ok` is False when something that is needed is missing."""
    return {
        "ok": all(finding.state != "missing" for finding in findings),
        "findings": {finding.name: asdict(finding) for finding in findings},
    }


def _package(name: str, advice: str) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "missing", "not installed", advice)


def _deepspeed() -> Finding:
    found = _package("deepspeed", "Only train.strategy=deepspeed needs it: `pip install 'raysemi[deepspeed]'`.")
    return replace(found, state="ok") if found.state == "missing" else found


def _devices() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("devices", "missing", str(error), "Install raysemi again: `make install`.")
    if torch.cuda.is_available():
        of = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return Finding("devices", "ok", ", ".join(f"{gpu.name} {_gib(gpu.total_memory)}" for gpu in of))
    if torch.backends.mps.is_available():
        return Finding("devices", "ok", "Apple MPS", "Used with ray=none; Ray's workers train on the CPU here.")
    built = torch.version.cuda
    advice = "Fine for small runs. " + (
        "torch sees no GPU: where there is one, look at its driver (`nvidia-smi`)."
        if built
        else "This torch is built for the CPU; with an NVIDIA GPU install the build for it."
    )
    return Finding("devices", "warning", f"CPU only (torch built for CUDA {built})" if built else "CPU only", advice)


def _ray_starts() -> Finding:
    # In its own process: a broken Ray can abort the interpreter, and its settings should not stay here.
    command = [sys.executable, "-c", _RAY_CHECK]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_RAY_TIMEOUT_S, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        return Finding("ray starts", "missing", f"no answer in {_RAY_TIMEOUT_S} s", "Train with ray=none.")
    if done.returncode == 0:
        return Finding("ray starts", "ok", f"yes, {float(done.stdout.split()[-1]):.0f} CPUs")
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return Finding("ray starts", "missing", last, "Train with ray=none; see the logs in /tmp/ray/session_latest/logs.")


def _bytecode() -> Finding:
    """Whether a process finds its imports compiled: each worker of a run imports some ten thousand files."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None or Path(importlib.util.cache_from_source(spec.origin)).is_file():
        return Finding("bytecode", "ok", "compiled")
    folder = Path(spec.origin).parents[1]
    advice = f"Processes start in half the time after `python -m compileall -q -j 0 {folder}`."
    return Finding("bytecode", "warning", "each process compiles what it imports", advice)


def _cores() -> Finding:
    from raysemi.launch.cluster import cores

    return Finding("cores", "ok", str(cores()))


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    listing = Path("/proc/meminfo")
    if not listing.is_file():
        return Finding("memory", "ok", _gib(total))
    rows = dict(line.split(":", 1) for line in listing.read_text(encoding="ascii").splitlines())
    available = int(rows["MemAvailable"].split()[0]) << 10
    value = f"{_gib(available)} free of {_gib(total)}"
    if available < _MEMORY_BYTES:
        return Finding("memory", "warning", value, "Close other programs, or lower train.batch and data.crop.")
    return Finding("memory", "ok", value)


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")  # noqa: S108 - measured, not written
    if not folder.is_dir():
        return Finding("shared memory", "ok", "not used on this system")
    total = shutil.disk_usage(folder).total
    if total < _SHARED_BYTES:
        advice = "Start the container with --shm-size=2g, or set data.loader_processes=0."
        return Finding("shared memory", "warning", _gib(total), advice)
    return Finding("shared memory", "ok", _gib(total))


def _disk(path: Path) -> Finding:
    present = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(present).free
    value = f"{_gib(free)} free at {path}"
    if free < _DISK_BYTES:
        return Finding("disk", "warning", value, "Free space, or put `run` and the pools on another disk.")
    return Finding("disk", "ok", value)


def _open_files() -> Finding:
    try:
        import resource
    except ImportError:
        return Finding("open files", "ok", "no limit known on this system")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        return Finding(
            "open files", "warning", f"{soft} (at most {hard})", f"Run `ulimit -n {min(hard, 65536)}` first."
        )
    return Finding("open files", "ok", str(soft))


def _gib(number: float) -> str:
    return f"{number / (1 << 30):.1f} GiB"
