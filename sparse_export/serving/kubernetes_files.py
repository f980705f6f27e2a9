"""Write the Kubernetes objects that run a model repository."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparse_export.serving.workload import (
    GRACE_S,
    Workload,
    environment,
    pre_stop,
    resources,
    server_arguments,
    tensorrt_comment,
    yaml_text,
)

__all__ = ["adapter_values", "kubernetes_objects"]

_QUEUE_TIME = "triton_queue_time_us"


def kubernetes_objects(workload: Workload) -> str:
    """Return the objects of a workload with an image as one YAML file.

    These are Deployment, Service, PodDisruptionBudget, autoscaler, ServiceMonitor and two ingresses.
    """
    name = workload.name
    size = {"nginx.ingress.kubernetes.io/proxy-body-size": f"{workload.max_body_mb}m"}
    http = _ingress(
        name,
        service=name,
        port="http",
        annotations={**size, "nginx.ingress.kubernetes.io/proxy-read-timeout": "60"},
        paths=["/v2/models", "/v2/health"],
    )
    grpc = _ingress(
        f"{name}-grpc",
        service=name,
        port="grpc",
        annotations={"nginx.ingress.kubernetes.io/backend-protocol": "GRPC", **size},
        paths=["/inference.GRPCInferenceService"],
    )
    pushed = (
        "the image of docker/Dockerfile"
        if workload.base_image
        else "an image with model_repository/ as /models"
    )
    deployment_comments = [
        f"kubectl apply -f kubernetes/triton.yaml. First push {pushed}, and name it under `image`.",
        (
            "preStop: while the container sleeps, it gets no new requests and answers those it has. Triton "
            "resets the"
        ),
        "connections that are still waiting when it ends.",
        (
            "args: keep the line break at the end of `closed`. No client "
            "can send it, so these calls stay closed."
        ),
        *tensorrt_comment(workload),
    ]
    autoscaler_comments = [
        (
            "Scales on the time that requests wait, in microseconds. "
            "kubernetes/prometheus-adapter-values.yaml "
            "makes it a"
        ),
        "metric.",
    ]
    ingress_comments = [
        (
            "Set your host and your certificate. The server itself "
            "accepts a body of any size: the limit is here."
        ),
    ]
    documents = [
        yaml_text(_deployment(workload), deployment_comments),
        yaml_text(_service(name), []),
        yaml_text(_disruption_budget(name), []),
        yaml_text(_autoscaler(name), autoscaler_comments),
        yaml_text(_monitor(name), ["Needs the Prometheus operator."]),
        yaml_text(http, ingress_comments),
        yaml_text(grpc, []),
    ]
    return "---\n".join(documents)


def adapter_values() -> str:
    """Return Helm values of the Prometheus adapter, which turns the time in the queue into a metric."""
    query = (
        "sum(rate(nv_inference_queue_duration_us{<<.LabelMatchers>>}[1m])) by (<<.GroupBy>>) / "
        "clamp_min(sum(rate(nv_inference_request_success{<<.LabelMatchers>>}[1m])) by (<<.GroupBy>>), 0.001)"
    )
    rule = {
        "seriesQuery": 'nv_inference_queue_duration_us{namespace!="",pod!=""}',
        "resources": {"overrides": {"namespace": {"resource": "namespace"}, "pod": {"resource": "pod"}}},
        "name": {"as": _QUEUE_TIME},
        "metricsQuery": query,
    }
    comments = [
        (
            "Values of the Helm chart prometheus-community/prometheus-adapter: the mean time that a request "
            "waits, by pod."
        ),
    ]
    return yaml_text({"rules": {"custom": [rule]}}, comments)


def _labels(name: str) -> dict[str, str]:
    """A new dictionary for each use: YAML would write one that is used twice as an alias."""
    return {"app.kubernetes.io/name": name}


def _deployment(workload: Workload) -> dict[str, Any]:
    name = workload.name
    pod = {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": GRACE_S,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "runAsGroup": 1000,
            "fsGroup": 1000,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(workload)],
        "volumes": [
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
        ],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": _labels(name)},
        "spec": {
            "replicas": 1,
            "minReadySeconds": 5,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "selector": {"matchLabels": _labels(name)},
            "template": {"metadata": {"labels": _labels(name)}, "spec": pod},
        },
    }


def _container(workload: Workload) -> dict[str, Any]:
    return {
        "name": "triton",
        "image": workload.image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["tritonserver"],
        "args": server_arguments("/models", workload),
        "env": environment(),
        "ports": [
            {"name": "http", "containerPort": 8000},
            {"name": "grpc", "containerPort": 8001},
            {"name": "metrics", "containerPort": 8002},
        ],
        "startupProbe": _probe("ready", every_s=2, failures=150),
        "readinessProbe": _probe("ready", every_s=2, failures=2),
        "livenessProbe": _probe("live", every_s=10, failures=3),
        "lifecycle": pre_stop(),
        "resources": resources(workload),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, {"name": "shm", "mountPath": "/dev/shm"}],
    }


def _probe(health: str, *, every_s: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": f"/v2/health/{health}", "port": "http"},
        "periodSeconds": every_s,
        "failureThreshold": failures,
    }


def _service(name: str) -> dict[str, Any]:
    ports = {"http": 8000, "grpc": 8001, "metrics": 8002}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": _labels(name)},
        "spec": {
            "selector": _labels(name),
            "ports": [{"name": port, "port": number, "targetPort": port} for port, number in ports.items()],
        },
    }


def _disruption_budget(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": name},
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": _labels(name)}},
    }


def _autoscaler(name: str) -> dict[str, Any]:
    metric = {
        "type": "Pods",
        "pods": {
            "metric": {"name": _QUEUE_TIME},
            "target": {"type": "AverageValue", "averageValue": "5000"},
        },
    }
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": name},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
            "minReplicas": 1,
            "maxReplicas": 8,
            "metrics": [metric],
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": 300}},
        },
    }


def _monitor(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "ServiceMonitor",
        "metadata": {"name": name},
        "spec": {
            "selector": {"matchLabels": _labels(name)},
            "endpoints": [{"port": "metrics", "interval": "10s"}],
        },
    }


def _ingress(
    name: str, *, service: str, port: str, annotations: dict[str, str], paths: Sequence[str]
) -> dict[str, Any]:
    """Return an Ingress with a host and a certificate of its own; `port` is a port of the service, by
    name.
    """
    host = f"{name}.example.com"
    backends = [
        {
            "path": path,
            "pathType": "Prefix",
            "backend": {"service": {"name": service, "port": {"name": port}}},
        }
        for path in paths
    ]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "Ingress",
        "metadata": {"name": name, "annotations": annotations},
        "spec": {
            "ingressClassName": "nginx",
            "tls": [{"hosts": [host], "secretName": f"{name}-tls"}],
            "rules": [{"host": host, "http": {"paths": backends}}],
        },
    }
