"""Manifests as the rules see them: workloads of Ray with their pods, other pods, and everything else by kind."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

_UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12} | {
    f"{letter}i": 1024.0**power for power, letter in enumerate("KMGT", 1)
}


def quantity(value: Any) -> float:
    """A quantity of Kubernetes (500m, 64Gi, 8) as a number."""
    found = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(value))
    if found is None or found[2] not in _UNITS:
        raise ValueError(f"quantity must be a number with a unit of Kubernetes; got {value!r}.")
    return float(found[1]) * _UNITS[found[2]]


def selects(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """Whether a label selector, {} being everything, takes these labels."""
    if selector is None:
        return False
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for term in selector.get("matchExpressions", []):
        value, operator = labels.get(term["key"]), term["operator"]
        holds = {
            "In": value in term.get("values", []),
            "NotIn": value not in term.get("values", []),
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }[operator]
        if not holds:
            return False
    return True


@dataclass(frozen=True)
class Pod:
    """A pod template."""

    where: str
    """For texts: RayJob/raysemi-train head."""
    role: str
    """head, worker, submitter, or the kind that owns it."""
    labels: Mapping[str, str]
    spec: dict[str, Any]
    params: Mapping[str, str]
    """Of `ray start`; empty for pods without Ray."""
    count: int = 1
    """How many of them at most."""

    @property
    def container(self) -> dict[str, Any]:
        """The first one: Ray's."""
        return self.spec["containers"][0]

    @property
    def containers(self) -> list[dict[str, Any]]:
        """All of them, those that run before included."""
        return [*self.spec["containers"], *self.spec.get("initContainers", [])]

    def limit(self, resource: str) -> float:
        """Of all containers together; 0 where there is none."""
        limits = (container.get("resources", {}).get("limits", {}) for container in self.spec["containers"])
        return sum(quantity(limit.get(resource, 0)) for limit in limits)

    def volume(self, name: str) -> dict[str, Any]:
        """A volume by name; empty where there is none."""
        return next((volume for volume in self.spec.get("volumes", []) if volume["name"] == name), {})

    def mounts(self) -> dict[str, dict[str, Any]]:
        """Path -> volume, of the first container."""
        return {mount["mountPath"]: self.volume(mount["name"]) for mount in self.container.get("volumeMounts", [])}


@dataclass(frozen=True)
class Workload:
    """A RayJob or a RayCluster."""

    document: dict[str, Any]

    @property
    def name(self) -> str:
        """For texts."""
        return name_of(self.document)

    @property
    def is_job(self) -> bool:
        """Whether it is a RayJob."""
        return self.document["kind"] == "RayJob"

    @property
    def spec(self) -> dict[str, Any]:
        """Its own."""
        return self.document["spec"]

    @property
    def cluster(self) -> dict[str, Any]:
        """The spec of its cluster."""
        return self.spec.get("rayClusterSpec", {}) if self.is_job else self.spec

    @property
    def labels(self) -> Mapping[str, str]:
        """Its own."""
        return self.document["metadata"].get("labels", {})

    @property
    def head(self) -> Pod:
        """Its head."""
        return next(pod for pod in self.pods if pod.role == "head")

    @property
    def nodes(self) -> list[Pod]:
        """Head and workers."""
        return [pod for pod in self.pods if pod.role in ("head", "worker")]

    @cached_property
    def pods(self) -> list[Pod]:
        """Head, workers, and a RayJob's submitter."""
        head = self.cluster.get("headGroupSpec", {})
        made = [self._pod("head", head.get("template", {}), head.get("rayStartParams", {}))]
        for group in self.cluster.get("workerGroupSpecs", []):
            count = group.get("maxReplicas", group.get("replicas", 1))
            made.append(self._pod("worker", group["template"], group.get("rayStartParams", {}), count))
        if self.is_job:
            made.append(self._pod("submitter", self.spec.get("submitterPodTemplate", {}), {}))
        return made

    def _pod(self, role: str, template: dict[str, Any], params: Mapping[str, str], count: int = 1) -> Pod:
        spec = template.get("spec") or {"containers": [{"name": "missing"}]}
        return Pod(f"{self.name} {role}", role, template.get("metadata", {}).get("labels", {}), spec, params, count)


class Manifests:
    """All documents of a namespace.

    Args:
        documents: parsed YAML.
        ray_version: that of the image.
    """

    def __init__(self, documents: list[dict[str, Any]], ray_version: str) -> None:
        self.documents = documents
        self.ray_version = ray_version
        self.workloads = [Workload(document) for document in documents if document["kind"] in ("RayJob", "RayCluster")]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Documents of a kind."""
        return [document for document in self.documents if document["kind"] == kind]

    def has(self, kind: str, name: str | None) -> bool:
        """Whether an object of this name is among them."""
        return any(document["metadata"]["name"] == name for document in self.of(kind))

    @cached_property
    def pods(self) -> list[Pod]:
        """Pods of Ray and all others."""
        return [pod for workload in self.workloads for pod in workload.pods] + list(self._others())

    def _others(self) -> Iterator[Pod]:
        for kind in ("StatefulSet", "Deployment", "DaemonSet", "Job"):
            for document in self.of(kind):
                template = document["spec"]["template"]
                labels = template.get("metadata", {}).get("labels", {})
                count = document["spec"].get("replicas", 1)
                yield Pod(name_of(document), kind, labels, template["spec"], {}, count)


def name_of(document: Mapping[str, Any]) -> str:
    """Kind/name, for texts."""
    return f"{document['kind']}/{document['metadata']['name']}"
