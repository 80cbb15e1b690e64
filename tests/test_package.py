"""What is handed out: a wheel with all that a command reads, a source archive from which the same wheel comes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS, FILES = ("raysemi", "infra", "tune", "jobs", "tests"), ("pyproject.toml", "MANIFEST.in", "LICENSE")
BUILD = "import sys, setuptools.build_meta as build; print(getattr(build, sys.argv[1])(sys.argv[2]))"
"""The build backend of pyproject.toml, in this environment: no network."""


def built(kind: str, source: Path, out: Path) -> Path:
    command = [sys.executable, "-W", "ignore", "-c", BUILD, kind, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository: a build leaves files behind."""
    source = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*(ROOT / name for name in FILES), *ROOT.glob("*.md")):
        shutil.copy(file, source)
    return source


@pytest.fixture(scope="module")
def archive(source: Path) -> Path:
    return built("build_sdist", source, source)


@pytest.fixture(scope="module")
def wheel(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from the source archive, as an installer without a wheel would."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return built("build_wheel", next(folder.iterdir()), folder)


def in_repository() -> set[str]:
    """Files below raysemi/, its links followed, as a wheel names them."""
    found = set()
    for top, prefix in (("raysemi", "raysemi"), ("infra", "raysemi/infra"), ("tune", "raysemi/tune")):
        for file in (ROOT / top).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                found.add(f"{prefix}/{file.relative_to(ROOT / top).as_posix()}")
    return found


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
        links = [info.filename for info in opened.infolist() if info.external_attr >> 28 == 0xA]
        for name in ("raysemi/infra/kuberay/overlays/spot/kustomization.yaml", "raysemi/tune/sweeps/methods.yaml"):
            assert opened.read(name) == (ROOT / name.removeprefix("raysemi/")).read_bytes()
        entry_points = next(name for name in opened.namelist() if name.endswith("entry_points.txt"))
        assert "raysemi = raysemi.cli:main" in opened.read(entry_points).decode()
    assert names == in_repository()
    assert links == []
    assert wheel.stat().st_size < 2 << 20


def test_the_source_archive_has_no_tests_and_no_links(archive: Path) -> None:
    with tarfile.open(archive) as opened:
        members = {member.name.partition("/")[2]: member for member in opened.getmembers()}
    assert members.keys() >= {"README.md", "CHANGELOG.md", "LICENSE", "SECURITY.md", "pyproject.toml"}
    assert not [name for name, member in members.items() if member.issym() or member.islnk()]
    assert not [name for name in members if name.startswith(("tests", "/")) or ".." in name.split("/")]
