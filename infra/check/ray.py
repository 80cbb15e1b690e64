"""Rules of RayJob, RayCluster and Kueue that no schema states."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from raysemi.infra.check.objects import Manifests, Workload, quantity

QUEUE = "kueue.x-k8s.io/queue-name"
GATED = ("networkPolicy", "tlsOptions", "historyServerOptions")
"""Fields of a RayCluster that need a feature gate, off by default."""
PATHS = (
    "run=",
    "runs=",
    "set.data.pools=",
    "data.pools=",
    "data.labeled=",
    "data.val=",
    "data.unlabeled=",
    "--root",
    "--out",
    "--pool",
)
"""What of a command names a folder that all pods must see."""


def one_version(manifests: Manifests) -> Iterator[str]:
    """The image's tag, `rayVersion` and the pin are one version; all pods of a workload have one image."""
    pin = manifests.ray_version
    for workload in manifests.workloads:
        if (version := workload.cluster.get("rayVersion")) != pin:
            yield f"{workload.name}: rayVersion must be the one that requirements/all.txt pins, {pin}; got {version}."
        images = {pod.role: pod.container.get("image", "") for pod in workload.pods}
        if len(set(images.values())) > 1:
            yield f"{workload.name}: image must be the same in all pods; got {images}."
        for image in sorted(set(images.values())):
            if not re.search(rf":[^/]*ray{re.escape(pin)}(@sha256:[0-9a-f]{{64}})?$", image):
                yield f"{workload.name}: image must have a tag that ends in ray{pin}; got {image or 'none'}."


def token(manifests: Manifests) -> Iterator[str]:
    """Every cluster asks for its token."""
    for workload in manifests.workloads:
        options = workload.cluster.get("authOptions", {})
        if options.get("mode") != "token":
            yield f"{workload.name}: authOptions.mode must be token; got {options.get('mode')}."
        if workload.is_job and "enableK8sTokenAuth" in options:
            yield f"{workload.name}: authOptions.enableK8sTokenAuth must be left out of a RayJob; KubeRay refuses it."


def lifecycle(manifests: Manifests) -> Iterator[str]:
    """Retries, suspension and deletion fit together."""
    for workload in manifests.workloads:
        spec, name = workload.spec, workload.name
        if not workload.is_job:
            continue
        if spec.get("backoffLimit") and "clusterSelector" in spec:
            yield f"{name}: backoffLimit must be 0 with clusterSelector; got {spec['backoffLimit']}."
        if "submitterConfig" in spec and spec.get("submissionMode", "K8sJobMode") != "K8sJobMode":
            yield f"{name}: submitterConfig must come with K8sJobMode; got {spec['submissionMode']}."
        ends = spec.get("shutdownAfterJobFinishes")
        if spec.get("suspend") and not ends:
            yield f"{name}: shutdownAfterJobFinishes must be true with suspend; got {ends}."
        rules = "deletionRules" in spec.get("deletionStrategy", {})
        if rules and (spec.get("shutdownAfterJobFinishes") or "ttlSecondsAfterFinished" in spec):
            yield f"{name}: deletionRules must come without shutdownAfterJobFinishes and ttlSecondsAfterFinished."
        if not rules and not spec.get("shutdownAfterJobFinishes"):
            yield f"{name}: shutdownAfterJobFinishes must be true, or the GPUs stay taken when the job has ended."
        if not spec.get("preRunningDeadlineSeconds"):
            yield f"{name}: preRunningDeadlineSeconds must be set, for a job that never gets its GPUs."


def entrypoint(manifests: Manifests) -> Iterator[str]:
    """A command names its run folder and pools as all pods see them: below the mount, or a URL."""
    for workload in manifests.workloads:
        if not workload.is_job:
            continue
        words = shlex.split(workload.spec.get("entrypoint", ""))
        if not words:
            yield f"{workload.name}: entrypoint must be a command; got none."
        for number, word in enumerate(words):
            option = next((option for option in PATHS if word.startswith(option)), None)
            elsewhere = option == "--out" and any(word.startswith("runs=") for word in words)
            if option is None or elsewhere:  # a sweep whose runs and trials lie in a store and a database
                continue
            value = word.partition("=")[2] if "=" in word else "".join(words[number + 1 : number + 2])
            mounted = [path for path, volume in workload.head.mounts().items() if "persistentVolumeClaim" in volume]
            shared = "://" in value or any(value.startswith(f"{path}/") for path in mounted)
            if not shared and not value.startswith(("[", "{")):
                where = f"below {' or '.join(mounted)}" if mounted else "in an object store"
                yield f"{workload.name}: {option.rstrip('=')} of entrypoint must lie {where}, or be a URL; got {value}."
        known = {"train": "run=", "tune": "--out"}.get("".join(words[1:2]))
        if workload.spec.get("backoffLimit") and known and not any(word.startswith(known) for word in words):
            yield f"{workload.name}: entrypoint must name {known.rstrip('=')} with backoffLimit: a new try goes on."


def no_installs(manifests: Manifests) -> Iterator[str]:
    """Nothing is installed when a job starts: the image has it, with hashes."""
    for workload in manifests.workloads:
        text = workload.spec.get("runtimeEnvYAML", "") if workload.is_job else ""
        if found := re.search(r"^\s*(pip|uv|conda)\s*:", text, re.MULTILINE):
            yield f"{workload.name}: runtimeEnvYAML must install nothing; got {found[1]}. Put it into the image."


def sizes(manifests: Manifests) -> Iterator[str]:
    """Replicas; what the autoscaler (version 2) asks for."""
    for workload in manifests.workloads:
        cluster, name = workload.cluster, workload.name
        grows = cluster.get("enableInTreeAutoscaling", False)
        options = cluster.get("autoscalerOptions", {})
        if grows and options.get("version") != "v2":
            yield f"{name}: autoscalerOptions.version must be v2; got {options.get('version')}."
        if options and not grows:
            yield f"{name}: enableInTreeAutoscaling must be true with autoscalerOptions; got {grows}."
        for pod in workload.nodes if grows else []:
            if pod.spec.get("restartPolicy", "Never") != "Never":
                yield f"{pod.where}: restartPolicy must be Never with autoscaler v2; got {pod.spec['restartPolicy']}."
            if any(variable["name"] == "RAY_enable_autoscaler_v2" for variable in pod.container.get("env", [])):
                yield f"{pod.where}: RAY_enable_autoscaler_v2 must not be set beside autoscalerOptions.version."
        if grows and not _reads_kubernetes(workload):
            yield f"{name}: the autoscaler's container must have the account's token mounted; got none."
        for group in cluster.get("workerGroupSpecs", []):
            bounds = [group.get(key) for key in ("minReplicas", "replicas", "maxReplicas")]
            if None in bounds:
                yield f"{name}: group {group['groupName']} must give minReplicas, replicas, maxReplicas; got {bounds}."
            elif not bounds[0] <= bounds[1] <= bounds[2] or bounds[2] == 0:
                yield f"{name}: group {group['groupName']} must have minReplicas <= replicas <= maxReplicas; {bounds}."
            elif not grows and bounds[0] != bounds[2]:
                yield f"{name}: group {group['groupName']} must be of one size without autoscaling; got {bounds}."


def _reads_kubernetes(workload: Workload) -> bool:
    mounts = workload.cluster.get("autoscalerOptions", {}).get("volumeMounts", [])
    volumes = (workload.head.volume(mount["name"]).get("projected", {}).get("sources", []) for mount in mounts)
    return any("serviceAccountToken" in source for sources in volumes for source in sources)


def gates(manifests: Manifests) -> Iterator[str]:
    """No field that an operator without feature gates ignores."""
    for workload in manifests.workloads:
        for field in GATED:
            if field in workload.cluster:
                yield f"{workload.name}: {field} must be left out: KubeRay ignores it unless a feature gate is on."
        if workload.cluster.get("gcsFaultToleranceOptions", {}).get("backend") == "rocksdb":
            yield f"{workload.name}: gcsFaultToleranceOptions.backend must be redis; rocksdb needs a feature gate."


def redis(manifests: Manifests) -> Iterator[str]:
    """Redis is one of the manifests', or named by a whole host name; its password comes from a Secret."""
    for workload in manifests.workloads:
        options = workload.cluster.get("gcsFaultToleranceOptions")
        if options is None:
            continue
        if "valueFrom" not in options.get("redisPassword", {}):
            yield f"{workload.name}: gcsFaultToleranceOptions.redisPassword must come from a Secret (valueFrom)."
        host = re.sub(r"^redis://|:\d+$", "", options.get("redisAddress", ""))
        if "." not in host and not manifests.has("Service", host):
            yield f"{workload.name}: redisAddress must name a Service here or a whole host name; got {host}."


def queue(manifests: Manifests) -> Iterator[str]:
    """Kueue: suspended, of one size, in a queue that exists and has room for all of its pods."""
    for workload in manifests.workloads:
        name = workload.labels.get(QUEUE)
        if name is None:
            if manifests.of("LocalQueue"):
                yield f"{workload.name}: label {QUEUE} must name a queue: without it the job passes by Kueue."
            continue
        if not workload.spec.get("suspend"):
            yield f"{workload.name}: suspend must be true with a queue; got {workload.spec.get('suspend')}."
        if workload.cluster.get("enableInTreeAutoscaling"):
            yield f"{workload.name}: enableInTreeAutoscaling must be false with a queue; got true."
        if len(workload.cluster.get("workerGroupSpecs", [])) > 7:
            yield f"{workload.name}: worker groups must be at most 7 with Kueue."
        local = next((queue for queue in manifests.of("LocalQueue") if queue["metadata"]["name"] == name), None)
        cluster = local["spec"]["clusterQueue"] if local else None
        if not manifests.has("ClusterQueue", cluster):
            yield f"{workload.name}: queue {name} must be a LocalQueue of a ClusterQueue here; got none of this name."
            continue
        if "kueue.x-k8s.io/priority-class" in workload.labels and not manifests.has(
            "WorkloadPriorityClass", workload.labels["kueue.x-k8s.io/priority-class"]
        ):
            yield f"{workload.name}: kueue.x-k8s.io/priority-class must name a WorkloadPriorityClass here; got none."
        found = next(queue for queue in manifests.of("ClusterQueue") if queue["metadata"]["name"] == cluster)
        quota: dict[str, float] = {}
        for group in found["spec"]["resourceGroups"]:
            for flavor in group["flavors"]:
                if not manifests.has("ResourceFlavor", flavor["name"]):
                    yield f"ClusterQueue/{cluster}: flavor {flavor['name']} must be a ResourceFlavor here; got none."
                for resource in flavor["resources"]:
                    quota[resource["name"]] = quota.get(resource["name"], 0) + quantity(resource["nominalQuota"])
        asked = {
            resource
            for pod in workload.pods
            for container in pod.containers
            for resource in container.get("resources", {}).get("requests", {})
        }
        for resource in sorted(asked):
            wanted = sum(pod.count * pod.limit(resource) for pod in workload.pods)
            if resource not in quota:
                yield f"ClusterQueue/{cluster}: resourceGroups must cover {resource}, which {workload.name} asks for."
            elif wanted > quota[resource]:
                yield f"{workload.name}: {resource} must fit the quota, {quota[resource]:g}; got {wanted:g}."


RULES = (one_version, token, lifecycle, entrypoint, no_installs, sizes, gates, redis, queue)
