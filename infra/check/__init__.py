"""What is wrong with manifests, said before a cluster does, or does not: schemas, strictly, and rules of our own.

`python -m raysemi.infra.check infra/kuberay/overlays/spot` renders the folder and its jobs/ with kubectl and prints
every fault; a YAML file is taken as it is. What no schema states (KubeRay's webhooks, Ray's and Kueue's conditions)
stands in `ray`, the rules of pods in `pods`, those of the network in `network`.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from raysemi.infra.check import network, pods, ray
from raysemi.infra.check.objects import Manifests

RULES = (*ray.RULES, *pods.RULES, *network.RULES)
"""Functions: manifests -> texts of faults."""


def faults(documents: Iterable[dict[str, Any]], ray_version: str) -> list[str]:
    """Faults of a namespace's manifests against our own rules.

    Args:
        documents: everything that is applied together: an overlay and its jobs.
        ray_version: what is installed in the image, as pinned in requirements/all.txt.
    """
    manifests = Manifests(list(documents), ray_version)
    return [fault for rule in RULES for fault in rule(manifests)]


def render(folder: Path) -> Iterator[dict[str, Any]]:
    """What `kubectl kustomize` makes of a folder, and of its jobs/ where it has one.

    Raises:
        FileNotFoundError: kubectl is not installed.
        ValueError: kustomize refuses the folder; with its own words.
    """
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise FileNotFoundError("kubectl must be installed to render a folder; got none. Install it, or give a file.")
    for part in (folder, folder / "jobs"):
        if part.is_dir():
            done = subprocess.run([kubectl, "kustomize", str(part)], capture_output=True, text=True)  # noqa: S603
            if done.returncode:
                raise ValueError(f"{part} must be a folder that kustomize renders; got: {done.stderr.strip()}")
            yield from (document for document in yaml.safe_load_all(done.stdout) if document)


def pinned(requirements: Path, package: str) -> str:
    """The version of a package in a file of pins."""
    for line in requirements.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{package}=="):
            return line.removeprefix(f"{package}==").split()[0]
    raise ValueError(f"{requirements} must pin {package}; got no such line. Run `make requirements`.")
