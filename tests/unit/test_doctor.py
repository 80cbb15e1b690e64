"""What the doctor finds, and what it advises when something is short or missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from raysemi import doctor

Usage = namedtuple("Usage", "total used free")


def found(path: Path | str = ".") -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine(path, start_ray=False)}


def test_this_machine_has_what_training_needs(tmp_path: Path) -> None:
    findings = found(tmp_path / "not" / "made" / "yet")
    for name in (
        "python",
        "torch",
        "devices",
        "ray",
        "deepspeed",
        "bytecode",
        "cores",
        "memory",
        "shared memory",
        "disk",
        "open files",
    ):
        assert findings[name].value
    assert findings["torch"].value == importlib.metadata.version("torch")
    report = doctor.as_json(list(findings.values()))
    assert report["ok"]
    assert json.loads(json.dumps(report)) == report


def test_short_disk_and_shared_memory_come_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(64 << 20, 0, 1 << 30))
    findings = found()
    assert findings["disk"].state == "warning"
    assert "1.0 GiB free" in findings["disk"].value
    assert "Free space" in findings["disk"].advice
    if Path("/dev/shm").is_dir():
        assert findings["shared memory"].state == "warning"
        assert "--shm-size" in findings["shared memory"].advice
    assert doctor.as_json(list(findings.values()))["ok"]  # short is not missing


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "ray":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    findings = {finding.name: finding for finding in doctor.examine(start_ray=True)}
    assert "ray starts" not in findings
    assert findings["ray"].state == "missing"
    assert "ray=none" in findings["ray"].advice
    assert not doctor.as_json(list(findings.values()))["ok"]


def test_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 10240))
    finding = found()["open files"]
    assert (finding.state, finding.value) == ("warning", "256 (at most 10240)")
    assert "ulimit -n 10240" in finding.advice


def test_imports_that_each_process_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path))
    finding = found()["bytecode"]
    assert finding.state == "warning"
    assert finding.advice.endswith(f" {Path(torch.__file__).parents[1]}`.")
    compiled = Path(importlib.util.cache_from_source(torch.__file__))
    compiled.parent.mkdir(parents=True)
    compiled.touch()
    assert found()["bytecode"].state == "ok"
