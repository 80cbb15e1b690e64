"""Rules of pods: rights, resources, shared memory, storage, time to end, secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from raysemi.infra.check.objects import Manifests, Pod, name_of, quantity

CHECKPOINT_S = 95
"""Seconds from the word to end until a checkpoint is written: 5 until all ranks know, 60 to save, 30 for the step under
way (`raysemi/launch/stop.py`; a test compares)."""
GPU = "nvidia.com/gpu"
_POD_CONTEXT = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
_CONTEXT: dict[str, Any] = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def rights(manifests: Manifests) -> Iterator[str]:
    """A normal user with no capability, no way to another one, a read-only image, nothing of the machine."""
    for pod in manifests.pods:
        context = pod.spec.get("securityContext", {})
        for key, value in _POD_CONTEXT.items():
            if context.get(key) != value:
                yield f"{pod.where}: securityContext.{key} must be {value}; got {context.get(key)}."
        if context.get("runAsUser", 0) < 10000:
            yield f"{pod.where}: securityContext.runAsUser must be 10000 or more; got {context.get('runAsUser')}."
        containers = [(container["name"], container.get("securityContext", {})) for container in pod.containers]
        for name, own in containers:
            yield from _container_rights(f"{pod.where} {name}", own)
        for key in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"):
            if pod.spec.get(key):
                yield f"{pod.where}: {key} must be false; got true."
        for volume in pod.spec.get("volumes", []):
            if "hostPath" in volume:
                yield f"{pod.where}: volume {volume['name']} must not be a hostPath; got {volume['hostPath']['path']}."
    for workload in manifests.workloads:
        options = workload.cluster.get("autoscalerOptions")
        if options is not None:
            yield from _container_rights(f"{workload.name} autoscaler", options.get("securityContext", {}))


def _container_rights(where: str, context: dict[str, Any]) -> Iterator[str]:
    for key, value in _CONTEXT.items():
        if context.get(key) != value:
            yield f"{where}: securityContext.{key} must be {value}; got {context.get(key)}."
    if context.get("privileged"):
        yield f"{where}: securityContext.privileged must be false; got true."


def account(manifests: Manifests) -> Iterator[str]:
    """An account of its own, whose token no pod has by itself."""
    for pod in manifests.pods:
        name = pod.spec.get("serviceAccountName")
        if not manifests.has("ServiceAccount", name):
            yield f"{pod.where}: serviceAccountName must be a ServiceAccount of these manifests; got {name}."
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.where}: automountServiceAccountToken must be false."
        if pod.spec.get("enableServiceLinks") is not False:
            yield f"{pod.where}: enableServiceLinks must be false, or its environment lists every Service."
        mounted = {mount["name"] for container in pod.containers for mount in container.get("volumeMounts", [])}
        for volume in pod.spec.get("volumes", []):
            sources = volume.get("projected", {}).get("sources", [])
            if volume["name"] in mounted and any("serviceAccountToken" in source for source in sources):
                yield f"{pod.where}: the account's token must be mounted in the autoscaler's container alone."


def resources(manifests: Manifests) -> Iterator[str]:
    """Every container says what it needs; memory, and all of GPU pods, is as much as it may take."""
    for pod in manifests.pods:
        for container in pod.containers:
            where = f"{pod.where} {container['name']}"
            asked, limits = (container.get("resources", {}).get(key, {}) for key in ("requests", "limits"))
            for name in ("cpu", "memory"):
                if name not in asked or name not in limits:
                    yield f"{where}: resources must give requests and limits of {name}."
            equal = set(asked) | set(limits) if GPU in limits or GPU in asked else {"memory", GPU}
            for name in sorted(equal & (set(asked) | set(limits))):
                if quantity(asked.get(name, -0)) != quantity(limits.get(name, 0)):
                    yield f"{where}: request of {name} must equal its limit; got {asked.get(name)}, {limits.get(name)}."
        if GPU in pod.container.get("resources", {}).get("limits", {}):
            keys = {toleration.get("key") for toleration in pod.spec.get("tolerations", [])}
            if GPU not in keys:
                yield f"{pod.where}: tolerations must have {GPU}, as machines with GPUs carry it; got {sorted(keys)}."
        priority = pod.spec.get("priorityClassName")
        if (pod.role in ("head", "worker") or priority) and not manifests.has("PriorityClass", priority):
            yield f"{pod.where}: priorityClassName must be a PriorityClass of these manifests; got {priority}."


def shared_memory(manifests: Manifests) -> Iterator[str]:
    """Shared memory is a volume with a limit, which counts as memory, and holds Ray's object store and batches."""
    for workload in manifests.workloads:
        for pod in workload.nodes:
            volume = pod.mounts().get("/dev/shm", {}).get("emptyDir", {})  # noqa: S108
            if volume.get("medium") != "Memory" or "sizeLimit" not in volume:
                yield f"{pod.where}: /dev/shm must be an emptyDir, medium Memory with a sizeLimit; got {volume}."
                continue
            shm, memory = quantity(volume["sizeLimit"]), pod.limit("memory")
            if shm > memory / 2:
                yield f"{pod.where}: /dev/shm must be at most half of the memory limit, which it is in; got {shm:.0f}."
            store = quantity(pod.params.get("object-store-memory", 0))
            if not 0 < store <= 0.6 * shm:
                yield (
                    f"{pod.where}: object-store-memory must be given and at most 0.6 of /dev/shm ({shm:.0f}), which "
                    f"the loaders' batches need too; got {store:.0f}."
                )


def disks(manifests: Manifests) -> Iterator[str]:
    """A read-only image needs /tmp and a home; volumes on a machine's disk have limits within the pod's."""
    for workload in manifests.workloads:
        for pod in workload.pods:
            home = next((v.get("value") for v in pod.container.get("env", []) if v["name"] == "HOME"), None)
            for path in ("/tmp", home or "HOME"):  # noqa: S108
                if "emptyDir" not in pod.mounts().get(path, {}):
                    yield f"{pod.where}: {path} must be an emptyDir, since the image is read-only."
            own = [v["emptyDir"] for v in pod.spec.get("volumes", []) if "emptyDir" in v]
            if any("sizeLimit" not in volume for volume in own):
                yield f"{pod.where}: emptyDir must have a sizeLimit, or one pod fills its machine's disk."
                continue
            taken = sum(quantity(volume["sizeLimit"]) for volume in own if volume.get("medium") != "Memory")
            limit = pod.limit("ephemeral-storage")
            if pod.role != "submitter" and taken > limit:
                yield f"{pod.where}: limits of ephemeral-storage must hold its emptyDirs, {taken:.0f}; got {limit:.0f}."


def storage(manifests: Manifests) -> Iterator[str]:
    """The shared volume is the same, under the same path, in all pods of a workload, and its claim exists."""
    for workload in manifests.workloads:
        seen = {pod.where: _claims(pod) for pod in workload.pods}
        if len({tuple(sorted(claims.items())) for claims in seen.values()}) > 1:
            yield f"{workload.name}: storage must be mounted at the same path in all pods; got {seen}."
        for claim in sorted({claim for claims in seen.values() for claim in claims.values()}):
            if not manifests.has("PersistentVolumeClaim", claim):
                yield f"{workload.name}: claim {claim} must be a PersistentVolumeClaim of these manifests; got none."
    for document in manifests.of("PersistentVolumeClaim"):
        # what only one machine mounts must hold pods that go to one machine
        if "ReadWriteMany" in document["spec"]["accessModes"]:
            continue
        for pod in manifests.pods:
            beside = pod.spec.get("affinity", {}).get("podAffinity")
            if document["metadata"]["name"] in _claims(pod).values() and pod.role != "head" and not beside:
                yield f"{name_of(document)}: accessModes must be ReadWriteMany, or {pod.where} beside its head."


def _claims(pod: Pod) -> dict[str, str]:
    mounts = pod.mounts().items()
    return {path: v["persistentVolumeClaim"]["claimName"] for path, v in mounts if "persistentVolumeClaim" in v}


def time_to_end(manifests: Manifests) -> Iterator[str]:
    """Whoever is told to go has time for a checkpoint, and is told."""
    for workload in manifests.workloads:
        for pod in workload.nodes:
            grace = pod.spec.get("terminationGracePeriodSeconds", 30)
            if grace < CHECKPOINT_S:
                yield f"{pod.where}: terminationGracePeriodSeconds must hold a checkpoint, {CHECKPOINT_S}; got {grace}."
            if "preStop" not in pod.container.get("lifecycle", {}):
                yield f"{pod.where}: lifecycle.preStop must tell Ray: its first process, bash, passes no signal on."


_SECRET_NAME = re.compile(r"PASSWORD|PASSWD|TOKEN|SECRET|_KEY|CREDENTIAL", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"://[^/@\s:$]*:[^/@\s$]+@|AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY")


def no_secrets(manifests: Manifests) -> Iterator[str]:
    """No secret stands in a manifest."""
    for document in manifests.documents:
        if document["kind"] == "Secret":
            yield f"{name_of(document)}: secrets must be made in the cluster, not written into a file."
        for path, value in _texts(document):
            if _SECRET_VALUE.search(value):
                yield f"{name_of(document)}: {path} must hold no password or key; got one."
    for pod in manifests.pods:
        for container in pod.containers:
            for variable in container.get("env", []):
                name, value = variable["name"], variable.get("value", "")
                if _SECRET_NAME.search(name) and value and not value.startswith("/"):
                    yield f"{pod.where} {container['name']}: {name} must come from a Secret; got a value."


def _texts(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _texts(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from _texts(value, f"{path}[{number}]")
    elif isinstance(tree, str):
        yield path, tree


RULES = (rights, account, resources, shared_memory, disks, storage, time_to_end, no_secrets)
