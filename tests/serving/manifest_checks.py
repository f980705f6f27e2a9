"""Check the deployment files that `package` writes: their formats' schemas, and what we promise beyond them.

Kubernetes' own objects are held to its schemas, strictly, by `kubernetes-validate`. The schemas of the other
formats are stored in `schemas/`. A schema knows names and types of fields; that a container is not root, or
that a port is one, is checked here.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

__all__ = ["KUBERNETES", "documents_problem", "object_problem", "problem"]

KUBERNETES = ("1.31.0", "1.37.0")
"""Versions whose schemas the objects are held to."""

_SCHEMAS = Path(__file__).with_name("schemas")
_STORED = {
    "InferenceService": "kserve-inferenceservice-v1beta1",
    "ServiceMonitor": "servicemonitor-v1",
    "compose.yaml": "compose",
    "prometheus-adapter-values.yaml": "prometheus-adapter-values",
}
# It reads a file of two megabytes at each call.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)


def _matches(pattern: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _at_least(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= least


def _one_of(*values: object) -> Callable[[Any], bool]:
    return lambda value: any(value == one and type(value) is type(one) for one in values)


def _pinned(value: Any) -> bool:
    """Does an image name a tag other than `latest`, or a digest?"""
    name, _, digest = str(value).partition("@")
    tag = re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9.:/_-]*?:([A-Za-z0-9_][A-Za-z0-9_.-]{0,127})", name)
    return bool(re.fullmatch(r"sha256:[0-9a-f]{64}", digest)) or (tag is not None and tag[1] != "latest")


def _port(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 65535


def _listed(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0


def _labels(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(len(one) <= 63 for one in value.values())


def _sleeps(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and value[0] == "sleep" and value[1].isdigit()


def _resource_list(value: Any) -> bool:
    known = {"cpu", "memory", "nvidia.com/gpu"}
    return (
        bool(value)
        and "memory" in value
        and value.keys() <= known
        and all(_QUANTITY(str(one)) for one in value.values())
    )


_QUANTITY = _matches(r"\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
_LABEL = _matches(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")  # a Service's name begins with a letter
_HOST = _matches(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_PATH = _matches(r"/.*")
_POD = "spec.template.spec"
_CONTAINER = f"{_POD}.containers[]"
_PROMISES: dict[str, dict[str, Callable[[Any], bool]]] = {
    "Deployment": {
        "spec.replicas": _at_least(0),
        "spec.minReadySeconds": _at_least(0),
        "spec.strategy.type": _one_of("RollingUpdate"),
        "spec.strategy.rollingUpdate.maxUnavailable": _at_least(0),
        "spec.strategy.rollingUpdate.maxSurge": _at_least(0),
        "spec.selector.matchLabels": _labels,
        "spec.template.metadata.labels": _labels,
        f"{_POD}.automountServiceAccountToken": _one_of(False),
        f"{_POD}.terminationGracePeriodSeconds": _at_least(1),
        f"{_POD}.securityContext.runAsNonRoot": _one_of(True),
        f"{_POD}.securityContext.runAsUser": _at_least(1),
        f"{_POD}.securityContext.runAsGroup": _at_least(1),
        f"{_POD}.securityContext.fsGroup": _at_least(1),
        f"{_POD}.securityContext.seccompProfile.type": _one_of("RuntimeDefault"),
        f"{_POD}.volumes[].name": _LABEL,
        f"{_POD}.volumes[].emptyDir": lambda value: (
            value is not None
            and value.get("medium", "") in ("", "Memory")
            and _QUANTITY(value.get("sizeLimit", "1"))
        ),
        f"{_CONTAINER}.name": _LABEL,
        f"{_CONTAINER}.image": _pinned,
        f"{_CONTAINER}.imagePullPolicy": _one_of("Always", "IfNotPresent", "Never"),
        f"{_CONTAINER}.command": _listed,
        f"{_CONTAINER}.args": lambda args: (
            args is not None and sum(":sparse-export=closed\n" in one for one in args) == 2
        ),
        f"{_CONTAINER}.env[].value": _matches(".+"),
        f"{_CONTAINER}.ports[].name": _matches(r"[a-z0-9-]{1,15}"),
        f"{_CONTAINER}.ports[].containerPort": _port,
        **{
            f"{_CONTAINER}.{probe}.{field}": promise
            for probe in ("startupProbe", "readinessProbe", "livenessProbe")
            for field, promise in {
                "httpGet.path": _PATH,
                "httpGet.port": lambda value: _LABEL(value) or _port(value),
                "periodSeconds": _at_least(1),
                "failureThreshold": _at_least(1),
            }.items()
        },
        f"{_CONTAINER}.lifecycle.preStop.exec.command": _sleeps,
        f"{_CONTAINER}.resources.requests": _resource_list,
        f"{_CONTAINER}.resources.limits": _resource_list,
        f"{_CONTAINER}.securityContext.allowPrivilegeEscalation": _one_of(False),
        f"{_CONTAINER}.securityContext.readOnlyRootFilesystem": _one_of(True),
        f"{_CONTAINER}.securityContext.capabilities.drop": _one_of(["ALL"]),
        f"{_CONTAINER}.volumeMounts[].name": _LABEL,
        f"{_CONTAINER}.volumeMounts[].mountPath": _PATH,
    },
    "Service": {
        "spec.selector": _labels,
        "spec.ports[].name": _LABEL,
        "spec.ports[].port": _port,
        "spec.ports[].targetPort": lambda value: _LABEL(value) or _port(value),
    },
    "PodDisruptionBudget": {
        "spec.maxUnavailable": _at_least(0),
        "spec.selector.matchLabels": _labels,
    },
    "HorizontalPodAutoscaler": {
        "apiVersion": _one_of("autoscaling/v2"),
        "spec.scaleTargetRef.apiVersion": _one_of("apps/v1"),
        "spec.scaleTargetRef.kind": _one_of("Deployment"),
        "spec.scaleTargetRef.name": _LABEL,
        "spec.minReplicas": _at_least(1),
        "spec.maxReplicas": _at_least(1),
        "spec.metrics[].type": _one_of("Pods"),
        "spec.metrics[].pods.metric.name": _matches(r"[a-z_]+"),
        "spec.metrics[].pods.target.type": _one_of("AverageValue"),
        "spec.metrics[].pods.target.averageValue": _QUANTITY,
        "spec.behavior.scaleDown.stabilizationWindowSeconds": lambda value: (
            _at_least(0)(value) and value <= 3600
        ),
    },
    "Ingress": {
        "metadata.annotations": lambda value: _matches(r"[1-9]\d{0,3}m")(
            (value or {}).get("nginx.ingress.kubernetes.io/proxy-body-size")
        ),
        "spec.ingressClassName": _HOST,
        "spec.tls[].hosts[]": _HOST,
        "spec.tls[].secretName": _HOST,
        "spec.rules[].host": _HOST,
        "spec.rules[].http.paths[].path": _PATH,
        "spec.rules[].http.paths[].pathType": _one_of("Prefix", "Exact"),
        "spec.rules[].http.paths[].backend.service.name": _LABEL,
        "spec.rules[].http.paths[].backend.service.port.name": _LABEL,
    },
    "InferenceService": {
        "spec.predictor.model.image": lambda value: value is None or _pinned(value),
        "spec.predictor.model.lifecycle.preStop.exec.command": _sleeps,
    },
    "ServiceMonitor": {},
}


def problem(name: str, text: str, *, kubernetes: str = KUBERNETES[-1]) -> str | None:
    """Return what is wrong with a deployment file, or None.

    Args:
        name: its path in the package.
        text: its content.
        kubernetes: version whose schemas are used.
    """
    if name.endswith("Dockerfile"):
        return _dockerfile(text)
    try:
        documents = list(yaml.safe_load_all(text))
    except yaml.YAMLError as error:
        return str(error)
    return documents_problem(name, documents, kubernetes=kubernetes)


def documents_problem(name: str, documents: list[Any], *, kubernetes: str = KUBERNETES[-1]) -> str | None:
    """Return what is wrong with the documents of a YAML file, or None; arguments as for `problem`."""
    base = Path(name).name
    if base in _STORED:
        found = next(_stored(base, documents[0]), None)
        return found or (_compose(documents[0]) if base == "compose.yaml" else None)
    for document in documents:
        found = object_problem(document, kubernetes=kubernetes)
        if found is not None:
            return found
    return next(_disagreements(documents), None)


def object_problem(document: dict[str, Any], *, kubernetes: str = KUBERNETES[-1]) -> str | None:
    """Return what is wrong with a Kubernetes object by itself, or None."""
    found = next(_object(document, kubernetes), None)
    return None if found is None else f"{document.get('kind')}: {found}"


def _object(document: Any, kubernetes: str) -> Iterator[str]:
    kind, version = document.get("kind"), document.get("apiVersion")
    if not isinstance(version, str) or not isinstance(kind, str) or kind not in _PROMISES:
        yield f"unknown kind {kind} of API version {version}"
        return
    if kind in _STORED:
        yield from _stored(kind, document)
    else:
        try:
            kubernetes_validate.validate(document, kubernetes, strict=True)
        except kubernetes_validate.SchemaNotFoundError as error:
            yield error.message
        except jsonschema.ValidationError as error:
            yield f"{error.json_path}: {error.message}"
    for path, promise in {"metadata.name": _LABEL, **_PROMISES[kind]}.items():
        found = list(_values(document, path.split(".")))
        if not found or not all(promise(value) for value in found):
            yield f"{path} is {found}"


def _stored(key: str, document: Any) -> Iterator[str]:
    schema = json.loads((_SCHEMAS / f"{_STORED[key]}.json").read_text())
    for error in jsonschema.Draft202012Validator(schema).iter_errors(document):
        yield f"{error.json_path}: {error.message}"


def _values(value: Any, path: list[str]) -> Iterator[Any]:
    """Yield every value at a path, None where a field is missing."""
    if not path:
        yield value
        return
    field, is_list = path[0].removesuffix("[]"), path[0].endswith("[]")
    found = value.get(field) if isinstance(value, dict) else None
    if not is_list:
        yield from _values(found, path[1:])
        return
    for one in found if isinstance(found, list) else [None]:
        yield from _values(one, path[1:])


def _compose(document: Any) -> str | None:
    images = [service["image"] for service in document["services"].values()]
    return None if all(_pinned(image) for image in images) else f"an image without a tag: {images}"


def _disagreements(documents: list[Any]) -> Iterator[str]:
    """Yield names that point from one object to another which there is not."""
    kinds: dict[str, list[Any]] = {}
    for document in documents:
        kinds.setdefault(document["kind"], []).append(document)
    if "InferenceService" in kinds:
        predictor = kinds["InferenceService"][0]["spec"]["predictor"]
        if _drain_s(predictor["model"]) >= predictor["terminationGracePeriodSeconds"]:
            yield "the drain takes as long as the pod is given to end"
        return
    (deployment,), (service,) = kinds["Deployment"], kinds["Service"]
    template = deployment["spec"]["template"]
    labels, pod = template["metadata"]["labels"], template["spec"]
    selectors = [deployment["spec"]["selector"]["matchLabels"], service["spec"]["selector"]]
    selectors += [budget["spec"]["selector"]["matchLabels"] for budget in kinds["PodDisruptionBudget"]]
    if not all(selector.items() <= labels.items() for selector in selectors):
        yield f"a selector does not choose the pods, whose labels are {labels}"
    (container,) = pod["containers"]
    if {one["name"] for one in container["volumeMounts"]} != {one["name"] for one in pod["volumes"]}:
        yield "volumes and mounts differ"
    if _drain_s(container) >= pod["terminationGracePeriodSeconds"]:
        yield "the drain takes as long as the pod is given to end"
    ports = {one["name"] for one in container["ports"]}
    service_ports = {one["name"] for one in service["spec"]["ports"]}
    if not {one["targetPort"] for one in service["spec"]["ports"]} <= ports:
        yield "the Service points to a port that no container names"
    if (
        not {container[f"{kind}Probe"]["httpGet"]["port"] for kind in ("startup", "readiness", "liveness")}
        <= ports
    ):
        yield "a probe asks a port that the container does not name"
    (autoscaler,), (monitor,) = kinds["HorizontalPodAutoscaler"], kinds["ServiceMonitor"]
    if autoscaler["spec"]["scaleTargetRef"]["name"] != deployment["metadata"]["name"]:
        yield "the autoscaler scales another Deployment"
    if (
        not monitor["spec"]["selector"]["matchLabels"].items()
        <= service["metadata"].get("labels", {}).items()
    ):
        yield "the ServiceMonitor does not choose the Service"
    if not {one["port"] for one in monitor["spec"]["endpoints"]} <= service_ports:
        yield "the ServiceMonitor asks a port that the Service has not"
    for ingress in kinds["Ingress"]:
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                to = path["backend"]["service"]
                if to["name"] != service["metadata"]["name"] or to["port"]["name"] not in service_ports:
                    yield f"an Ingress points to {to}, which there is not"


def _drain_s(container: Any) -> int:
    return int(container["lifecycle"]["preStop"]["exec"]["command"][-1])


def _dockerfile(text: str) -> str | None:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    known = {"FROM", "RUN", "ENV", "COPY", "USER", "EXPOSE", "HEALTHCHECK", "CMD"}
    unknown = [line for line in lines if line.split()[0] not in known]
    if unknown:
        return f"{unknown[0]!r} is no instruction that we write"
    if not lines or lines[0].split()[0] != "FROM" or not _pinned(lines[0].split()[1]):
        return "it does not begin with FROM and a pinned image"
    if not any(line.startswith("USER ") and line.split()[1] not in {"0", "root"} for line in lines):
        return "it runs as root"
    return None
