"""The Dockerfile, which needs a Docker engine to be built: rules that can be read off it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import raysemi
from raysemi.infra.check import pinned

ROOT = Path(__file__).parents[2]
FILE = ROOT / "infra/docker/Dockerfile"


def instructions(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in joined]


def faults(text: str) -> list[str]:
    found = []
    given = instructions(text)
    for name, rest in given:
        if name == "FROM" and "@${PYTHON_DIGEST}" not in rest:
            found.append(f"base must have a digest: {rest}")
        if name == "ADD":
            found.append("ADD")
        if name in ("ARG", "ENV") and re.search(r"TOKEN|PASSWORD|SECRET|_KEY", rest.replace("RAY_AUTH_MODE=token", "")):
            found.append(f"secret: {rest}")
        if name == "RUN" and re.search(r"\b(pip|uv) (install|build|pip)", rest) and "--no-cache" not in rest:
            found.append(f"cache: {rest}")
        if name == "RUN" and "uv pip install" in rest and "--verify-hashes" not in rest:
            found.append("hashes")
        if (
            name == "RUN"
            and "apt-get install" in rest
            and ("--no-install-recommends" not in rest or "rm -rf" not in rest)
        ):
            found.append("apt")
        if name == "RUN" and re.search(r"\b(sudo|curl|chmod 777)\b", rest):
            found.append(rest)
        if name == "COPY" and not rest.startswith("--from"):
            found += [f"{path} is absent" for path in rest.split()[:-1] if not (ROOT / path).exists()]
    users = [rest for name, rest in given if name == "USER"]
    if users[-1:] != ["10001:10001"]:
        found.append(f"user: {users}")
    if len([name for name, _ in given if name == "FROM"]) < 2:
        found.append("one stage")
    if any(name == "ARG" and rest.startswith("PYTHON_DIGEST=") for name, rest in given):
        found.append("a digest that nobody chose")
    return found


def test_the_dockerfile_keeps_the_rules() -> None:
    assert faults(FILE.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("@${PYTHON_DIGEST} AS runtime", " AS runtime"),
        ("USER 10001:10001", "USER root"),
        ("--verify-hashes", ""),
        ("uv build --no-cache", "true\nRUN pip install tqdm\nRUN true --no-cache"),
        ("--no-install-recommends", ""),
        ("RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN=abc"),
        ("COPY raysemi raysemi", "COPY raysemy raysemi"),
        ("ARG PYTHON_DIGEST", "ARG PYTHON_DIGEST=sha256:0"),
    ],
)
def test_a_broken_dockerfile_does_not(old: str, new: str) -> None:
    text = FILE.read_text(encoding="utf-8")
    assert old in text
    assert len(faults(text.replace(old, new))) >= 1


def test_what_is_copied_is_not_ignored_and_nothing_else_is_sent() -> None:
    lines = (FILE.parent / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    copied = {
        path
        for name, rest in instructions(FILE.read_text(encoding="utf-8"))
        if name == "COPY" and not rest.startswith("--from")
        for path in rest.split()[:-1]
    }
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied


def test_tag_user_and_versions_are_those_of_the_manifests() -> None:
    text = FILE.read_text(encoding="utf-8")
    train = (ROOT / "infra/kuberay/base/jobs/train.yaml").read_text(encoding="utf-8")
    tag = f"raysemi:{raysemi.__version__}-ray{pinned(ROOT / 'requirements/all.txt', 'ray')}"
    assert tag in text
    assert f"image: &image {tag}\n" in train
    assert "runAsUser: 10001" in train
    for tool in ("pkill", "pgrep"):
        assert tool in train
    assert "procps" in text
