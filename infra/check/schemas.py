"""Strict schemas: a field that does not exist is a fault, where an API server drops it or refuses."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from raysemi.infra.check.objects import name_of

_Fast: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
KUBERNETES = "1.33"
"""Version whose schemas core objects are checked against."""
CUSTOM = ("ray.io/", "kueue.x-k8s.io/")
"""API groups that Kubernetes itself does not know."""


def core_faults(documents: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Faults of Kubernetes' own objects."""
    for document in documents:
        if document["apiVersion"].startswith(CUSTOM):
            continue
        try:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{name_of(document)}: {'.'.join(map(str, error.path))}: {error.message}"


def custom_faults(documents: Iterable[dict[str, Any]], definition: Path) -> Iterator[str]:
    """Faults of objects of one kind against its CustomResourceDefinition.

    Args:
        documents: any; those of other kinds are passed over.
        definition: YAML file of the CRD.
    """
    crd = yaml.load(definition.read_text(encoding="utf-8"), _Fast)  # noqa: S506 - a safe one
    version = next(version for version in crd["spec"]["versions"] if version["storage"])
    schema = _strict(copy.deepcopy(version["schema"]["openAPIV3Schema"]), top=True)
    validator = jsonschema.Draft202012Validator(schema)
    for document in documents:
        if document["kind"] != crd["spec"]["names"]["kind"]:
            continue
        stored = f"{crd['spec']['group']}/{version['name']}"
        if document["apiVersion"] != stored:
            yield f"{name_of(document)}: apiVersion must be the stored one, {stored}; got {document['apiVersion']}."
        for error in validator.iter_errors(document):
            yield f"{name_of(document)}: {'.'.join(map(str, error.absolute_path))}: {error.message}"


def _strict(schema: dict[str, Any], *, top: bool = False) -> dict[str, Any]:
    """Refuses unknown fields wherever fields are listed; `int-or-string` in JSON Schema's words."""
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("anyOf", None)
        schema.pop("pattern", None)
        schema["type"] = ["integer", "string"]
    if "properties" in schema:
        for inner in schema["properties"].values():
            _strict(inner)
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema["additionalProperties"] = False
    if top:
        schema["properties"]["metadata"] = _METADATA
    if isinstance(schema.get("items"), dict):
        _strict(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        _strict(schema["additionalProperties"])
    return schema


_NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "maxLength": 253}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_METADATA = {
    "type": "object",
    "properties": {"name": _NAME, "namespace": _NAME, "labels": _TEXTS, "annotations": _TEXTS},
    "required": ["name"],
    "additionalProperties": False,
}
_QUANTITY = {"type": ["integer", "string"], "pattern": r"^[0-9]+([.][0-9]+)?(m|k|[KMGT]i?)?$"}


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


# Ours, not Kueue's: the fields that these manifests use, and no other. Kueue's CRDs were not at hand.
_SELECTOR = _object(matchLabels=_TEXTS)
_RESOURCE = _object(("name", "nominalQuota"), name={"type": "string"}, nominalQuota=_QUANTITY)
_FLAVOR = _object(("name", "resources"), name=_NAME, resources={"type": "array", "items": _RESOURCE, "minItems": 1})
_GROUP = _object(
    ("coveredResources", "flavors"),
    coveredResources={"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 16},
    flavors={"type": "array", "items": _FLAVOR, "minItems": 1, "maxItems": 16},
)
_ANY = {"type": "string"}
_KUEUE = {
    "ResourceFlavor": {"spec": _object(nodeLabels=_TEXTS)},
    "ClusterQueue": {
        "spec": _object(
            ("resourceGroups",),
            namespaceSelector=_SELECTOR,
            queueingStrategy={"enum": ["StrictFIFO", "BestEffortFIFO"]},
            preemption=_object(
                withinClusterQueue={"enum": ["Never", "LowerPriority", "LowerOrNewerEqualPriority"]},
                reclaimWithinCohort={"enum": ["Never", "LowerPriority", "Any"]},
            ),
            resourceGroups={"type": "array", "items": _GROUP, "minItems": 1, "maxItems": 16},
        )
    },
    "LocalQueue": {"spec": _object(("clusterQueue",), clusterQueue=_NAME)},
    "WorkloadPriorityClass": {"value": {"type": "integer"}, "description": _ANY},
}


def kueue_faults(documents: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Faults of Kueue's objects against a small schema of our own."""
    for document in documents:
        if not document["apiVersion"].startswith("kueue.x-k8s.io/"):
            continue
        fields = _KUEUE.get(document["kind"])
        if fields is None:
            yield f"{name_of(document)}: kind must be one of {', '.join(_KUEUE)}."
            continue
        versions = {"enum": ["kueue.x-k8s.io/v1beta1", "kueue.x-k8s.io/v1beta2"]}
        schema = _object(tuple(fields), apiVersion=versions, kind=_ANY, metadata=_METADATA, **fields)
        if document["kind"] == "WorkloadPriorityClass":
            schema["required"] = ["value"]
        for error in jsonschema.Draft202012Validator(schema).iter_errors(document):
            yield f"{name_of(document)}: {'.'.join(map(str, error.absolute_path))}: {error.message}"
        for group in document.get("spec", {}).get("resourceGroups", []):
            for flavor in group["flavors"]:
                if [resource["name"] for resource in flavor["resources"]] != group["coveredResources"]:
                    yield f"{name_of(document)}: flavor {flavor['name']} must list coveredResources, in their order."
