"""Every overlay passes, strictly; manifests that are broken in one way each fail, with the words that say which."""

from __future__ import annotations

import copy
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysemi import config_io
from raysemi.errors import ConfigError
from raysemi.infra.check import RULES, faults, pinned, render, schemas
from raysemi.infra.check.objects import Manifests
from raysemi.infra.check.pods import CHECKPOINT_S
from raysemi.launch import stop

ROOT = Path(__file__).parents[2]
OVERLAYS = ROOT / "infra/kuberay/overlays"
CRDS = ROOT.parent / "shared/kuberay"
PIN = pinned(ROOT / "requirements/all.txt", "ray")
NAMES = ("gpu-kueue", "spot", "cpu-trial")

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which renders the folders, is absent")
Tree = Any


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[Tree]]:
    return {name: list(render(OVERLAYS / name)) for name in NAMES}


def test_the_folders_are_the_overlays() -> None:
    assert sorted(folder.name for folder in OVERLAYS.iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_overlay_keeps_every_rule(rendered: dict[str, list[Tree]], name: str) -> None:
    documents = rendered[name]
    assert {"RayJob", "RayCluster", "NetworkPolicy", "PodDisruptionBudget"} <= {doc["kind"] for doc in documents}
    assert faults(documents, PIN) == []
    assert list(schemas.core_faults(documents)) == []
    assert list(schemas.kueue_faults(documents)) == []


@pytest.mark.skipif(not CRDS.is_dir(), reason="KubeRay's CRDs are not at ../shared/kuberay")
@pytest.mark.parametrize("crd", ["rayjobs", "rayclusters"])
def test_the_custom_resources_fit_their_definitions(rendered: dict[str, list[Tree]], crd: str) -> None:
    documents = [document for name in NAMES for document in rendered[name]]
    assert list(schemas.custom_faults(documents, CRDS / f"crd_{crd}.yaml")) == []


@pytest.mark.skipif(not CRDS.is_dir(), reason="KubeRay's CRDs are not at ../shared/kuberay")
def test_a_misspelt_field_of_a_custom_resource_is_found(rendered: dict[str, list[Tree]]) -> None:
    documents = copy.deepcopy(rendered["cpu-trial"])
    job = named(documents, "RayJob", "raysemi-train")
    job["spec"]["ttlSecondsAfterFinish"] = 5
    pod(job, "worker")["containers"][0]["volumeMount"] = []
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] = "two"
    job["apiVersion"] = "ray.io/v1alpha1"
    text = "\n".join(schemas.custom_faults(documents, CRDS / "crd_rayjobs.yaml"))
    for said in (
        "'ttlSecondsAfterFinish' was unexpected",
        "'volumeMount' was unexpected",
        "'two' is not of type",
        "stored",
    ):
        assert said in text


def test_a_misspelt_field_of_a_core_object_is_found(rendered: dict[str, list[Tree]]) -> None:
    documents = copy.deepcopy(rendered["gpu-kueue"])
    named(documents, "PodDisruptionBudget", "raysemi-head")["spec"]["minAvailabel"] = 1
    assert "minAvailabel" in "\n".join(schemas.core_faults(documents))
    named(documents, "ClusterQueue", "raysemi")["spec"]["quota"] = 1
    assert "quota" in "\n".join(schemas.kueue_faults(documents))


def test_the_commands_of_the_manifests_are_commands_that_raysemi_takes(rendered: dict[str, list[Tree]]) -> None:
    for name in NAMES:
        words = shlex.split(named(rendered[name], "RayJob", "raysemi-train")["spec"]["entrypoint"])
        assert words[:2] == ["raysemi", "train"]
        config = config_io.load(words[2], words[3:])
        group = named(rendered[name], "RayJob", "raysemi-train")["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
        assert config.ray.max_workers <= group["maxReplicas"]
        cores = group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]
        assert config.ray.cpus_per_worker == int(cores)
        assert config.ray.use_gpu == (False if name == "cpu-trial" else "auto")
    with pytest.raises(ConfigError):
        config_io.load(words[2], [*words[3:], "train.stesp=3"])


def test_sweep_and_interactive_cluster_are_the_training_s(rendered: dict[str, list[Tree]]) -> None:
    for name in NAMES:
        train, sweep = (
            copy.deepcopy(named(rendered[name], "RayJob", f"raysemi-{kind}")) for kind in ("train", "sweep")
        )
        cluster = copy.deepcopy(named(rendered[name], "RayCluster", "raysemi-interactive")["spec"])
        assert cluster.pop("suspend", False) == (name == "gpu-kueue")
        assert cluster == train["spec"]["rayClusterSpec"]
        env = ray_container(sweep, "head")["env"]
        if name == "gpu-kueue":
            assert env.pop()["name"] == "PGPASSWORD"
        assert sweep["spec"].pop("entrypoint").startswith("raysemi tune run ")
        del train["spec"]["entrypoint"]
        assert sweep["spec"] == train["spec"]


def test_the_time_of_a_checkpoint_is_the_launcher_s() -> None:
    assert stop.ASKED_EVERY_S + stop._SAVE_S + 30 == CHECKPOINT_S


def named(documents: list[Tree], kind: str, name: str) -> Tree:
    return next(doc for doc in documents if (doc["kind"], doc["metadata"]["name"]) == (kind, name))


def cluster_of(job: Tree) -> Tree:
    return job["spec"]["rayClusterSpec"]


def pod(job: Tree, role: str) -> Tree:
    if role == "submitter":
        return job["spec"]["submitterPodTemplate"]["spec"]
    group = cluster_of(job)["headGroupSpec"] if role == "head" else cluster_of(job)["workerGroupSpecs"][0]
    return group["template"]["spec"]


def ray_container(job: Tree, role: str) -> Tree:
    return pod(job, role)["containers"][0]


def volume(job: Tree, role: str, name: str) -> Tree:
    return next(volume for volume in pod(job, role)["volumes"] if volume["name"] == name)


def policy(documents: list[Tree], name: str) -> Tree:
    return named(documents, "NetworkPolicy", name)["spec"]


def drop(documents: list[Tree], kind: str, name: str) -> None:
    documents.remove(named(documents, kind, name))


def without_port(spec: Tree, port: int) -> None:
    for rule in (*spec.get("ingress", []), *spec.get("egress", [])):
        rule["ports"] = [entry for entry in rule["ports"] if entry["port"] != port]


Break = Callable[[list[Tree], Tree], Any]
# overlay, what breaks it (documents, the RayJob raysemi-train), what is said
BROKEN: list[tuple[str, Break, str]] = [
    (
        "gpu-kueue",
        lambda _, job: cluster_of(job).update(rayVersion="2.59.0"),
        f"rayVersion must be .* {PIN}; got 2.59.0",
    ),
    ("gpu-kueue", lambda _, job: ray_container(job, "worker").update(image="raysemi:latest"), "image must be the same"),
    (
        "spot",
        lambda _, job: [
            ray_container(job, role).update(image="r/raysemi:1") for role in ("head", "worker", "submitter")
        ],
        r"image must have a tag that ends in ray2\.60\.0; got r/raysemi:1",
    ),
    ("spot", lambda _, job: cluster_of(job).pop("authOptions"), r"authOptions\.mode must be token; got None"),
    ("spot", lambda _, job: cluster_of(job)["authOptions"].update(mode="disabled"), "must be token; got disabled"),
    (
        "spot",
        lambda _, job: cluster_of(job)["authOptions"].update(enableK8sTokenAuth=True),
        "enableK8sTokenAuth must be left",
    ),
    (
        "gpu-kueue",
        lambda _, job: job["spec"].update(shutdownAfterJobFinishes=False),
        "must be true with suspend; got False",
    ),
    ("spot", lambda _, job: job["spec"].pop("shutdownAfterJobFinishes"), "or the GPUs stay taken"),
    (
        "spot",
        lambda _, job: job["spec"].update(clusterSelector={"a": "b"}),
        "backoffLimit must be 0 with clusterSelector",
    ),
    (
        "spot",
        lambda _, job: job["spec"].update(submissionMode="SidecarMode"),
        "submitterConfig must come with K8sJobMode",
    ),
    (
        "spot",
        lambda _, job: job["spec"].update(deletionStrategy={"deletionRules": [{"policy": "DeleteCluster"}]}),
        "deletionRules must come without",
    ),
    ("spot", lambda _, job: job["spec"].pop("preRunningDeadlineSeconds"), "preRunningDeadlineSeconds must be set"),
    (
        "cpu-trial",
        lambda _, job: job["spec"].update(
            entrypoint="raysemi train scenes-derprop run=runs/a data.pools=/storage/pools"
        ),
        "run of entrypoint must lie below /storage, or be a URL; got runs/a",
    ),
    (
        "spot",
        lambda _, job: job["spec"].update(entrypoint="raysemi train scenes-derprop run=/tmp/a data.pools=s3://b/pools"),
        "run of entrypoint must lie in an object store, or be a URL; got /tmp/a",
    ),
    ("spot", lambda _, job: job["spec"].update(entrypoint="raysemi train x"), "must name run with backoffLimit"),
    ("spot", lambda _, job: job["spec"].update(runtimeEnvYAML="pip: [tqdm]\n"), "must install nothing; got pip"),
    ("spot", lambda _, job: cluster_of(job)["autoscalerOptions"].update(version="v1"), "version must be v2; got v1"),
    (
        "spot",
        lambda _, job: cluster_of(job).pop("enableInTreeAutoscaling"),
        "enableInTreeAutoscaling must be true with",
    ),
    (
        "spot",
        lambda _, job: pod(job, "worker").update(restartPolicy="Always"),
        "restartPolicy must be Never .* got Always",
    ),
    (
        "spot",
        lambda _, job: ray_container(job, "head")["env"].append({"name": "RAY_enable_autoscaler_v2", "value": "1"}),
        "RAY_enable_autoscaler_v2 must not be set",
    ),
    (
        "spot",
        lambda _, job: cluster_of(job)["autoscalerOptions"].pop("volumeMounts"),
        "account's token mounted; got none",
    ),
    (
        "spot",
        lambda _, job: ray_container(job, "head")["volumeMounts"].append({"name": "kubernetes", "mountPath": "/k"}),
        "mounted in the autoscaler's container alone",
    ),
    (
        "gpu-kueue",
        lambda _, job: cluster_of(job)["workerGroupSpecs"][0].pop("minReplicas"),
        "must give minReplicas, replicas, maxReplicas",
    ),
    (
        "gpu-kueue",
        lambda _, job: cluster_of(job)["workerGroupSpecs"][0].update(maxReplicas=4),
        "must be of one size without",
    ),
    (
        "spot",
        lambda _, job: cluster_of(job).update(networkPolicy={"mode": "DenyAll"}),
        "networkPolicy must be left out",
    ),
    (
        "spot",
        lambda _, job: cluster_of(job)["gcsFaultToleranceOptions"].update(backend="rocksdb"),
        "backend must be redis",
    ),
    (
        "spot",
        lambda _, job: cluster_of(job)["gcsFaultToleranceOptions"].update(redisPassword={"value": "hunter2"}),
        "redisPassword must come from a Secret",
    ),
    (
        "spot",
        lambda docs, _: drop(docs, "Service", "raysemi-redis"),
        "redisAddress must name a Service .* got raysemi-redis",
    ),
    ("gpu-kueue", lambda _, job: job["spec"].update(suspend=False), "suspend must be true with a queue"),
    ("gpu-kueue", lambda _, job: job["metadata"]["labels"].pop("kueue.x-k8s.io/queue-name"), "passes by Kueue"),
    ("gpu-kueue", lambda docs, _: drop(docs, "ClusterQueue", "raysemi"), "must be a LocalQueue of a ClusterQueue here"),
    (
        "gpu-kueue",
        lambda docs, _: drop(docs, "WorkloadPriorityClass", "raysemi-train"),
        "must name a WorkloadPriorityClass",
    ),
    ("gpu-kueue", lambda _, job: cluster_of(job).update(enableInTreeAutoscaling=True), "must be false with a queue"),
    (
        "gpu-kueue",
        lambda _, job: cluster_of(job)["workerGroupSpecs"][0].update(minReplicas=9, replicas=9, maxReplicas=9),
        "nvidia.com/gpu must fit the quota, 8; got 9",
    ),
    (
        "gpu-kueue",
        lambda _, job: pod(job, "head")["securityContext"].pop("runAsNonRoot"),
        "runAsNonRoot must be True; got None",
    ),
    (
        "gpu-kueue",
        lambda _, job: pod(job, "worker")["securityContext"].update(runAsUser=1000),
        "runAsUser must be 10000",
    ),
    ("gpu-kueue", lambda _, job: pod(job, "head")["securityContext"].pop("seccompProfile"), "seccompProfile must be"),
    (
        "gpu-kueue",
        lambda _, job: ray_container(job, "submitter")["securityContext"].update(capabilities={"add": ["SYS_PTRACE"]}),
        r"capabilities must be .*ALL.* got .*SYS_PTRACE",
    ),
    (
        "gpu-kueue",
        lambda _, job: ray_container(job, "worker")["securityContext"].update(readOnlyRootFilesystem=False),
        "readOnlyRootFilesystem must be True; got False",
    ),
    ("spot", lambda _, job: cluster_of(job)["autoscalerOptions"].pop("securityContext"), "autoscaler: securityContext"),
    ("gpu-kueue", lambda _, job: pod(job, "worker").update(hostNetwork=True), "hostNetwork must be false"),
    (
        "gpu-kueue",
        lambda _, job: pod(job, "worker")["volumes"].append({"name": "disk", "hostPath": {"path": "/"}}),
        "must not be a hostPath; got /",
    ),
    (
        "gpu-kueue",
        lambda _, job: pod(job, "head").pop("automountServiceAccountToken"),
        "automountServiceAccountToken must",
    ),
    (
        "gpu-kueue",
        lambda _, job: pod(job, "head").update(serviceAccountName="default"),
        "serviceAccountName must .* got default",
    ),
    (
        "gpu-kueue",
        lambda _, job: ray_container(job, "worker")["resources"]["requests"].update({"cpu": "4"}),
        "request of cpu must equal its limit; got 4, 8",
    ),
    (
        "gpu-kueue",
        lambda _, job: ray_container(job, "worker")["resources"]["requests"].pop("nvidia.com/gpu"),
        "request of nvidia.com/gpu must equal",
    ),
    ("gpu-kueue", lambda _, job: pod(job, "worker").pop("tolerations"), "tolerations must have nvidia.com/gpu"),
    (
        "gpu-kueue",
        lambda docs, _: drop(docs, "PriorityClass", "raysemi-head"),
        "priorityClassName must be a PriorityClass",
    ),
    (
        "gpu-kueue",
        lambda _, job: volume(job, "worker", "shm")["emptyDir"].pop("medium"),
        "medium Memory with a sizeLimit",
    ),
    (
        "gpu-kueue",
        lambda _, job: volume(job, "worker", "shm")["emptyDir"].update(sizeLimit="48Gi"),
        "at most half of the memory",
    ),
    (
        "gpu-kueue",
        lambda _, job: cluster_of(job)["workerGroupSpecs"][0]["rayStartParams"].update(
            {"object-store-memory": str(16 << 30)}
        ),
        "object-store-memory must be given and at most 0.6",
    ),
    (
        "gpu-kueue",
        lambda _, job: ray_container(job, "worker")["volumeMounts"].__delitem__(0),
        "/tmp must be an emptyDir, since the image is read-only",
    ),
    ("gpu-kueue", lambda _, job: volume(job, "head", "tmp").update(emptyDir={}), "emptyDir must have a sizeLimit"),
    (
        "gpu-kueue",
        lambda _, job: volume(job, "head", "tmp")["emptyDir"].update(sizeLimit="80Gi"),
        "ephemeral-storage must hold",
    ),
    (
        "gpu-kueue",
        lambda _, job: ray_container(job, "worker")["volumeMounts"][3].update(mountPath="/data"),
        "storage must be mounted at the same path",
    ),
    (
        "gpu-kueue",
        lambda docs, _: drop(docs, "PersistentVolumeClaim", "raysemi-storage"),
        "claim raysemi-storage must be",
    ),
    (
        "cpu-trial",
        lambda _, job: pod(job, "worker").pop("affinity"),
        "accessModes must be ReadWriteMany, or .* worker beside",
    ),
    (
        "gpu-kueue",
        lambda _, job: pod(job, "worker").update(terminationGracePeriodSeconds=30),
        "must hold a checkpoint, 95; got 30",
    ),
    ("gpu-kueue", lambda _, job: ray_container(job, "worker").pop("lifecycle"), "lifecycle.preStop must tell Ray"),
    (
        "gpu-kueue",
        lambda _, job: ray_container(job, "head")["env"].append({"name": "AWS_SECRET_ACCESS_KEY", "value": "abc"}),
        "AWS_SECRET_ACCESS_KEY must come from a Secret",
    ),
    (
        "gpu-kueue",
        lambda _, job: job["spec"].update(entrypoint="raysemi tune run s storage=postgresql://me:pw@db/optuna"),
        "spec.entrypoint must hold no password",
    ),
    (
        "gpu-kueue",
        lambda docs, _: docs.append(
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "token"}, "data": {"a": "YQ=="}}
        ),
        "secrets must be made in the cluster",
    ),
    ("gpu-kueue", lambda docs, _: drop(docs, "NetworkPolicy", "default-deny"), "one must select every pod and deny"),
    ("gpu-kueue", lambda docs, _: drop(docs, "NetworkPolicy", "ray"), "must allow port 6380"),
    ("gpu-kueue", lambda docs, _: without_port(policy(docs, "ray"), 32768), "must allow port 32768"),
    ("gpu-kueue", lambda docs, _: drop(docs, "NetworkPolicy", "dns"), r"must allow it DNS \(53\)"),
    (
        "gpu-kueue",
        lambda docs, _: drop(docs, "NetworkPolicy", "submitter"),
        r"submitter -> .* head: .* 8265 \(egress\)",
    ),
    (
        "gpu-kueue",
        lambda docs, _: policy(docs, "metrics")["ingress"][0].pop("from"),
        "ingress must name its from; got anyone",
    ),
    ("gpu-kueue", lambda docs, _: policy(docs, "metrics")["ingress"][0].pop("ports"), "must name its ports; got all"),
    (
        "spot",
        lambda docs, _: policy(docs, "object-store")["egress"][0]["to"][0]["ipBlock"].pop("except"),
        r"must except 169\.254\.0\.0/16",
    ),
    (
        "gpu-kueue",
        lambda _, job: cluster_of(job)["workerGroupSpecs"][0]["rayStartParams"].pop("node-manager-port"),
        "must fix all ports; got none for node-manager-port",
    ),
    (
        "gpu-kueue",
        lambda _, job: cluster_of(job)["headGroupSpec"]["rayStartParams"].update({"object-manager-port": "6380"}),
        "must differ, and lie outside the workers'",
    ),
    (
        "gpu-kueue",
        lambda _, job: ray_container(job, "head")["ports"][1].update(containerPort=8266),
        "containerPort dashboard must be rayStartParams', 8265; got 8266",
    ),
    (
        "spot",
        lambda docs, _: drop(docs, "NetworkPolicy", "ray-head-to-redis"),
        r"StatefulSet/raysemi-redis: .* 6379 \(egress\)",
    ),
    (
        "spot",
        lambda docs, _: [
            policy(docs, "redis")["ingress"][0].update({"from": [{"podSelector": {}}]}),
            policy(docs, "ray-head-to-redis").update(podSelector={}),
        ],
        "workers must not reach it",
    ),
    (
        "spot",
        lambda docs, _: named(docs, "Service", "raysemi-redis")["spec"].update(selector={"a": "b"}),
        "selector must take",
    ),
    (
        "gpu-kueue",
        lambda docs, _: drop(docs, "PodDisruptionBudget", "raysemi-head"),
        "PodDisruptionBudget must select its head",
    ),
]


@pytest.mark.parametrize(("overlay", "broken", "said"), BROKEN, ids=[said[:50] for _, _, said in BROKEN])
def test_a_broken_manifest_fails(rendered: dict[str, list[Tree]], overlay: str, broken: Break, said: str) -> None:
    documents = copy.deepcopy(rendered[overlay])
    broken(documents, named(documents, "RayJob", "raysemi-train"))
    found = faults(documents, PIN)
    assert any(re.search(said, fault) for fault in found), found


def test_every_rule_is_broken_by_one_of_them(rendered: dict[str, list[Tree]]) -> None:
    silent = {rule.__name__ for rule in RULES}
    for overlay, broken, _ in BROKEN:
        documents = copy.deepcopy(rendered[overlay])
        broken(documents, named(documents, "RayJob", "raysemi-train"))
        silent -= {rule.__name__ for rule in RULES if list(rule(Manifests(documents, PIN)))}
    assert silent == set()
