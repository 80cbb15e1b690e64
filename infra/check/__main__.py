"""`python -m raysemi.infra.check FOLDER|FILE ...`: exit code 0, or 2 with a line for each fault.

`--pods FOLDER` prints the manifests with each pod of Ray as a Pod, for linters that know no RayJob.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

try:
    from raysemi.infra.check import faults, render, schemas
    from raysemi.infra.check.objects import Manifests
except ModuleNotFoundError as missing:
    print(f"error: {missing.name} must be installed; got none. pip install 'raysemi[infra]'", file=sys.stderr)
    raise SystemExit(2) from None


def main(paths: list[str]) -> int:
    """Prints the faults of each path."""
    if not paths:
        print(__doc__, file=sys.stderr)
        return 2
    if paths[0] == "--pods":
        print(yaml.safe_dump_all(_with_pods(list(render(Path(paths[1]))))))
        return 0
    found = 0
    for path in map(Path, paths):
        documents = list(render(path) if path.is_dir() else yaml.safe_load_all(path.read_text(encoding="utf-8")))
        for fault in [
            *schemas.core_faults(documents),
            *schemas.kueue_faults(documents),
            *faults(documents, version("ray")),
        ]:
            print(f"{path}: {fault}")
            found += 1
    return 2 if found else 0


def _with_pods(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    pods = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": pod.where.lower().replace("/", "-").replace(" ", "-"),
                "namespace": "raysemi",
                "labels": dict(pod.labels),
            },
            "spec": pod.spec,
        }
        for workload in Manifests(documents, version("ray")).workloads
        for pod in workload.pods
    ]
    return [document for document in documents if document["kind"] not in ("RayJob", "RayCluster")] + pods


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
