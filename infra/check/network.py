"""Rules of the network: everything is closed but the ports that Ray needs; heads are not evicted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from raysemi.infra.check.objects import Manifests, Pod, name_of, selects

NODE_PORTS = (
    "node-manager-port", "object-manager-port", "runtime-env-agent-port", "dashboard-agent-grpc-port",
    "dashboard-agent-listen-port", "min-worker-port", "max-worker-port",
)  # fmt: skip
"""What nodes reach of each other; Ray draws those that are not given."""
HEAD_PORTS = ("port", "dashboard-port")
METRICS = "metrics-export-port"
EPHEMERAL = (32768, 60999)
"""The kernel's, from which torch's store, gloo and NCCL take theirs."""


def closed(manifests: Manifests) -> Iterator[str]:
    """One policy denies everything; each other one names who, and which ports."""
    policies = manifests.of("NetworkPolicy")
    denies = [policy for policy in policies if policy["spec"].get("podSelector") == {}]
    if not any(
        set(policy["spec"].get("policyTypes", [])) == {"Ingress", "Egress"}
        and not policy["spec"].get("ingress")
        and not policy["spec"].get("egress")
        for policy in denies
    ):
        yield "NetworkPolicy: one must select every pod and deny ingress and egress; got none."
    for policy in policies:
        for direction, peers in (("ingress", "from"), ("egress", "to")):
            for rule in policy["spec"].get(direction, []):
                if not rule.get(peers):
                    yield f"{name_of(policy)}: {direction} must name its {peers}; got anyone."
                if not rule.get("ports"):
                    yield f"{name_of(policy)}: {direction} must name its ports; got all of them."
                for peer in rule.get(peers, []):
                    block = peer.get("ipBlock")
                    if block and block["cidr"] == "0.0.0.0/0" and "169.254.0.0/16" not in block.get("except", []):
                        yield f"{name_of(policy)}: {direction} must except 169.254.0.0/16, the machine's metadata."


def fixed_ports(manifests: Manifests) -> Iterator[str]:
    """Every port of Ray is given, once, and containerPorts say the same."""
    for workload in manifests.workloads:
        for pod in workload.nodes:
            needed = (*NODE_PORTS, METRICS, *(HEAD_PORTS if pod.role == "head" else ()))
            if missing := [name for name in needed if name not in pod.params]:
                yield f"{pod.where}: rayStartParams must fix all ports; got none for {', '.join(missing)}."
                continue
            low, high = (int(pod.params[name]) for name in ("min-worker-port", "max-worker-port"))
            single = [int(pod.params[name]) for name in needed if "worker-port" not in name]
            if len(set(single)) < len(single) or any(low <= port <= high for port in single) or low >= high:
                yield f"{pod.where}: ports of rayStartParams must differ, and lie outside the workers'; got {single}."
            if high - low + 1 < 64 + 8 * pod.limit("cpu"):
                yield f"{pod.where}: ports of workers must be 64 and 8 a core at least; got {high - low + 1}."
            declared = {port["name"]: port["containerPort"] for port in pod.container.get("ports", [])}
            given = {"gcs": pod.params.get("port"), "dashboard": pod.params.get("dashboard-port")}
            for name, port in declared.items():
                if name in given and str(port) != given[name]:
                    yield f"{pod.where}: containerPort {name} must be rayStartParams', {given[name]}; got {port}."


def reachable(manifests: Manifests) -> Iterator[str]:
    """Nodes reach each other's ports, the submitter the dashboard, everyone names; both sides must allow it."""
    for workload in manifests.workloads:
        for target in workload.nodes:
            ports = [int(target.params[name]) for name in NODE_PORTS if name in target.params]
            ports += [
                int(target.params[name]) for name in HEAD_PORTS if name in target.params and target.role == "head"
            ]
            for source in workload.nodes:
                for port in (*ports, *EPHEMERAL):
                    yield from _blocked(manifests, source, target, port)
            for source in workload.pods:
                if source.role == "submitter" and target.role == "head" and "dashboard-port" in target.params:
                    yield from _blocked(manifests, source, target, int(target.params["dashboard-port"]))
        for pod in workload.pods:
            rules = _rules(manifests, pod, "egress")
            if not any(_opens(rule, 53) for rule in rules):
                yield f"{pod.where}: a NetworkPolicy must allow it DNS (53); got none."


def services(manifests: Manifests) -> Iterator[str]:
    """A Service has pods that listen; who needs Redis may reach it, and nobody else."""
    for service in manifests.of("Service"):
        spec = service["spec"]
        pods = [pod for pod in manifests.pods if selects({"matchLabels": spec["selector"]}, pod.labels)]
        if not pods:
            yield f"{name_of(service)}: selector must take pods of these manifests; got none."
        for pod in pods:
            ports = {port["name"]: port["containerPort"] for port in pod.container.get("ports", [])}
            for port in spec["ports"]:
                if port.get("targetPort") not in ports:
                    got = port.get("targetPort")
                    yield f"{name_of(service)}: targetPort must be a named port of {pod.where}; got {got}."
                    continue
                number = ports[port["targetPort"]]
                for workload in manifests.workloads:
                    if "gcsFaultToleranceOptions" in workload.cluster and port["name"] == "redis":
                        yield from _blocked(manifests, workload.head, pod, number)
                    for worker in workload.nodes:
                        if worker.role == "worker" and not list(_blocked(manifests, worker, pod, number)):
                            yield f"{name_of(service)}: workers must not reach it, only the head; got an open way."


def heads_stay(manifests: Manifests) -> Iterator[str]:
    """A PodDisruptionBudget keeps every head from being evicted."""
    for workload in manifests.workloads:
        if not any(
            selects(budget["spec"]["selector"], workload.head.labels) and budget["spec"].get("minAvailable", 0) >= 1
            for budget in manifests.of("PodDisruptionBudget")
        ):
            yield f"{workload.name}: a PodDisruptionBudget must select its head; got none."


def _blocked(manifests: Manifests, source: Pod, target: Pod, port: int) -> Iterator[str]:
    for pod, other, direction, peers in ((target, source, "ingress", "from"), (source, target, "egress", "to")):
        rules = _rules(manifests, pod, direction)
        if not any(_opens(rule, port) and _names(rule[peers], other) for rule in rules if peers in rule):
            way = f"{source.where} -> {target.where}"
            yield f"{way}: a NetworkPolicy must allow port {port} ({direction}); got none."


def _rules(manifests: Manifests, pod: Pod, direction: str) -> list[dict[str, Any]]:
    return [
        rule
        for policy in manifests.of("NetworkPolicy")
        if selects(policy["spec"]["podSelector"], pod.labels)
        for rule in policy["spec"].get(direction, [])
    ]


def _opens(rule: dict[str, Any], port: int) -> bool:
    return any(entry["port"] <= port <= entry.get("endPort", entry["port"]) for entry in rule.get("ports", []))


def _names(peers: list[dict[str, Any]], pod: Pod) -> bool:
    # without a namespaceSelector: of the same namespace
    return any("namespaceSelector" not in peer and selects(peer.get("podSelector"), pod.labels) for peer in peers)


RULES = (closed, fixed_ports, reachable, services, heads_stay)
