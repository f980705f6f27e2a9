"""The objects that a model repository is in a Kubernetes cluster."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import indent

from sparse_export.serving.workload import (
    GRACE_S,
    Deployment,
    arguments,
    environment,
    pre_stop,
    quoted,
    resources,
    warning,
)

__all__ = ["adapter_values", "objects"]

_DRAIN_COMMENT = """\
      # While it sleeps, no new requests are sent here and those in flight are answered.
      # Triton resets what still waits when it ends.
"""


def objects(facts: Deployment) -> str:
    """Deployment, Service, PodDisruptionBudget, autoscaler, monitor and the ingresses, as one YAML file."""
    name = facts.name
    size = f"nginx.ingress.kubernetes.io/proxy-body-size: {facts.max_body_mb}m"
    parts = [
        "# kubectl apply -f kubernetes/triton.yaml. Push the image of docker/Dockerfile first, and name it under `image`.\n"
        + warning(facts)
        + _deployment(facts),
        _service(name),
        _disruption_budget(name),
        _autoscaler(name),
        _monitor(name),
        "# The server itself takes a body of any size: this is where it is limited. Name your host and your certificate.\n"
        + _ingress(
            name,
            service=name,
            port="http",
            annotations=[size, 'nginx.ingress.kubernetes.io/proxy-read-timeout: "60"'],
            paths=["/v2/models", "/v2/health"],
        ),
        _ingress(
            f"{name}-grpc",
            service=name,
            port="grpc",
            annotations=["nginx.ingress.kubernetes.io/backend-protocol: GRPC", size],
            paths=["/inference.GRPCInferenceService"],
        ),
    ]
    return "---\n".join(parts)


def _deployment(facts: Deployment) -> str:
    name = facts.name
    return f"""\
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {name}
  labels:
    app.kubernetes.io/name: {name}
spec:
  replicas: 1
  minReadySeconds: 5
  strategy:
    type: RollingUpdate
    rollingUpdate:
      maxUnavailable: 0
      maxSurge: 1
  selector:
    matchLabels:
      app.kubernetes.io/name: {name}
  template:
    metadata:
      labels:
        app.kubernetes.io/name: {name}
    spec:
      automountServiceAccountToken: false
      terminationGracePeriodSeconds: {GRACE_S}
      securityContext:
        runAsNonRoot: true
        runAsUser: 1000
        runAsGroup: 1000
        fsGroup: 1000
        seccompProfile:
          type: RuntimeDefault
      containers:
        - name: triton
{indent(_container(facts), " " * 10)}      volumes:
        - name: tmp
          emptyDir: {{}}
        - name: shm
          emptyDir:
            medium: Memory
            sizeLimit: 1Gi
"""


def _container(facts: Deployment) -> str:
    """The server's, without its name, as YAML without indentation."""
    probes = (
        _probe("startup", "ready", every_s=2, failures=150)
        + _probe("readiness", "ready", every_s=2, failures=2)
        + _probe("liveness", "live", every_s=10, failures=3)
    )
    return f"""\
image: {facts.image}
imagePullPolicy: IfNotPresent
command: ["tritonserver"]
args:
{quoted(arguments("/models", facts), 2)}
{environment()}ports:
  - name: http
    containerPort: 8000
  - name: grpc
    containerPort: 8001
  - name: metrics
    containerPort: 8002
{probes}{pre_stop(_DRAIN_COMMENT)}{resources(facts)}securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: ["ALL"]
volumeMounts:
  - name: tmp
    mountPath: /tmp
  - name: shm
    mountPath: /dev/shm
"""


def _probe(kind: str, health: str, *, every_s: int, failures: int) -> str:
    return f"""\
{kind}Probe:
  httpGet:
    path: /v2/health/{health}
    port: http
  periodSeconds: {every_s}
  failureThreshold: {failures}
"""


def _service(name: str) -> str:
    return f"""\
apiVersion: v1
kind: Service
metadata:
  name: {name}
  labels:
    app.kubernetes.io/name: {name}
spec:
  selector:
    app.kubernetes.io/name: {name}
  ports:
    - name: http
      port: 8000
      targetPort: http
    - name: grpc
      port: 8001
      targetPort: grpc
    - name: metrics
      port: 8002
      targetPort: metrics
"""


def _disruption_budget(name: str) -> str:
    return f"""\
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {name}
spec:
  maxUnavailable: 1
  selector:
    matchLabels:
      app.kubernetes.io/name: {name}
"""


def _autoscaler(name: str) -> str:
    return f"""\
# Scales on how long requests wait, in microseconds, which kubernetes/prometheus-adapter-values.yaml makes a metric.
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {name}
spec:
  scaleTargetRef:
    apiVersion: apps/v1
    kind: Deployment
    name: {name}
  minReplicas: 1
  maxReplicas: 8
  metrics:
    - type: Pods
      pods:
        metric:
          name: triton_queue_time_us
        target:
          type: AverageValue
          averageValue: "5000"
  behavior:
    scaleDown:
      stabilizationWindowSeconds: 300
"""


def _monitor(name: str) -> str:
    return f"""\
# Needs the Prometheus operator.
apiVersion: monitoring.coreos.com/v1
kind: ServiceMonitor
metadata:
  name: {name}
spec:
  selector:
    matchLabels:
      app.kubernetes.io/name: {name}
  endpoints:
    - port: metrics
      interval: 10s
"""


def _ingress(name: str, *, service: str, port: str, annotations: Sequence[str], paths: Sequence[str]) -> str:
    """An ingress of its own host and certificate. port: of the service, by name.  paths: what it lets through."""
    told = "".join(f"    {one}\n" for one in annotations)
    backends = "".join(
        f"""\
          - path: {path}
            pathType: Prefix
            backend:
              service:
                name: {service}
                port:
                  name: {port}
"""
        for path in paths
    )
    return f"""\
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata:
  name: {name}
  annotations:
{told}spec:
  ingressClassName: nginx
  tls:
    - hosts: ["{name}.example.com"]
      secretName: {name}-tls
  rules:
    - host: {name}.example.com
      http:
        paths:
{backends}"""


def adapter_values() -> str:
    """Of the adapter that makes how long requests wait a metric to scale on."""
    return """\
# Values of the Helm chart prometheus-community/prometheus-adapter: the mean time that a request waits, per pod.
rules:
  custom:
    - seriesQuery: 'nv_inference_queue_duration_us{namespace!="",pod!=""}'
      resources:
        overrides:
          namespace:
            resource: namespace
          pod:
            resource: pod
      name:
        as: triton_queue_time_us
      metricsQuery: >-
        sum(rate(nv_inference_queue_duration_us{<<.LabelMatchers>>}[1m])) by (<<.GroupBy>>)
        / clamp_min(sum(rate(nv_inference_request_success{<<.LabelMatchers>>}[1m])) by (<<.GroupBy>>), 0.001)
"""
