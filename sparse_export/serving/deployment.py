"""The files that bring a model repository into production: Docker, compose, Kubernetes, KServe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparse_export.serving.containers import Container
from sparse_export.serving.settings import HOST_CODE

__all__ = ["Deployment", "deployment_files"]

# No HTTP header or gRPC metadata can end with a line break: nobody can send this key.
_CLOSED = "model-repository,shared-memory,trace,logging:sparse-export=closed\\n"
_DRAIN_S = 15
_GRACE_S = 60


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What the files are made from.

    name: of the workload, a DNS label.  image: what the Dockerfile builds.  python_models: is there a model of the
    Python backend?  requirements: of it, as pip writes them.  needs_gpu: is there an engine?
    host_code: is one version compatible?
    max_body_mb: largest request that the ingress lets through.
    """

    name: str
    image: str
    container: Container
    python_models: bool
    requirements: tuple[str, ...]
    needs_gpu: bool
    host_code: bool
    max_body_mb: int


def deployment_files(facts: Deployment) -> dict[str, str]:
    """Each file's content by its path in the package."""
    return {
        "docker/Dockerfile": _dockerfile(facts),
        "docker/compose.yaml": _compose(facts),
        "kubernetes/triton.yaml": _kubernetes(facts),
        "kubernetes/prometheus-adapter-values.yaml": _adapter(),
        "kubernetes/kserve.yaml": _kserve(facts),
    }


def _arguments(repository: str, facts: Deployment) -> list[str]:
    return [
        f"--model-repository={repository}",
        "--model-control-mode=none",
        "--disable-auto-complete-config",
        "--allow-sagemaker=false",
        "--allow-vertex-ai=false",
        f"--exit-timeout-secs={_GRACE_S - _DRAIN_S - 5}",
        *([HOST_CODE] if facts.host_code else []),
        f"--http-restricted-api={_CLOSED}",
        f"--grpc-restricted-protocol={_CLOSED}",
    ]


def _quoted(words: Sequence[str], indent: int) -> str:
    """YAML and JSON strings, one a line; `\\n` in a word is a line break in both."""
    return "\n".join(f'{" " * indent}- "{word}"' for word in words)


def _warning(facts: Deployment) -> str:
    return f"# WARNING: {facts.container.warning}\n" if facts.container.warning else ""


def _escaped(version: str) -> str:
    return version.replace(".", "[.]")


def _dockerfile(facts: Deployment) -> str:
    lines = [
        "# Build it in the package's folder: docker build -f docker/Dockerfile -t " + facts.image + " .",
        _warning(facts) + f"FROM {facts.container.reference}",
    ]
    if facts.needs_gpu:
        version = facts.container.tensorrt or ""
        lines += [
            "",
            f"# The engines were built by TensorRT {version} and load in no other version: stop here rather than there.",
            f"RUN dpkg-query --show --showformat='${{Version}}\\n' 'libnvinfer1*' | grep -q '^{_escaped(version)}-'",
        ]
    if facts.python_models:
        words = " ".join(f"'{one}'" for one in facts.requirements)
        lines += [
            "",
            "# Of the models of the Python backend.",
            f"RUN pip install --no-cache-dir --break-system-packages {words}",
        ]
    command = ", ".join(f'"{word}"' for word in ["tritonserver", *_arguments("/models", facts)])
    lines += [
        "",
        "COPY --chown=1000:1000 model_repository /models",
        "USER 1000",
        "EXPOSE 8000 8001 8002",
        "HEALTHCHECK --interval=5s --start-period=60s CMD curl -fs http://127.0.0.1:8000/v2/health/ready",
        f"CMD [{command}]",
    ]
    return "\n".join(lines) + "\n"


def _compose(facts: Deployment) -> str:
    gpu = """    deploy:
      resources:
        reservations:
          devices:
            - driver: nvidia
              count: 1
              capabilities: [gpu]
"""
    return f"""\
# docker compose -f docker/compose.yaml up --build, in the package's folder.
# pre_stop needs Compose 2.30 or newer. Take the container out of whatever sends it requests before you stop it:
# Triton resets connections that still wait when it ends.
{_warning(facts)}services:
  triton:
    image: {facts.image}
    build:
      context: ..
      dockerfile: docker/Dockerfile
    ports:
      - "127.0.0.1:8000:8000"
      - "127.0.0.1:8001:8001"
      - "127.0.0.1:8002:8002"
    user: "1000"
    read_only: true
    tmpfs:
      - /tmp
    shm_size: 1gb
    cap_drop: [ALL]
    security_opt:
      - no-new-privileges:true
    restart: unless-stopped
    stop_grace_period: {_GRACE_S}s
    pre_stop:
      - command: ["sleep", "{_DRAIN_S}"]
{gpu if facts.needs_gpu else ""}"""


def _kubernetes(facts: Deployment) -> str:
    name = facts.name
    gpu = "              nvidia.com/gpu: 1\n" if facts.needs_gpu else ""
    return f"""\
# kubectl apply -f kubernetes/triton.yaml. Push the image of docker/Dockerfile first, and name it under `image`.
{_warning(facts)}apiVersion: apps/v1
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
      terminationGracePeriodSeconds: {_GRACE_S}
      securityContext:
        runAsNonRoot: true
        runAsUser: 1000
        runAsGroup: 1000
        fsGroup: 1000
        seccompProfile:
          type: RuntimeDefault
      containers:
        - name: triton
          image: {facts.image}
          imagePullPolicy: IfNotPresent
          command: ["tritonserver"]
          args:
{_quoted(_arguments("/models", facts), 12)}
          ports:
            - name: http
              containerPort: 8000
            - name: grpc
              containerPort: 8001
            - name: metrics
              containerPort: 8002
          startupProbe:
            httpGet:
              path: /v2/health/ready
              port: http
            periodSeconds: 2
            failureThreshold: 150
          readinessProbe:
            httpGet:
              path: /v2/health/ready
              port: http
            periodSeconds: 2
            failureThreshold: 2
          livenessProbe:
            httpGet:
              path: /v2/health/live
              port: http
            periodSeconds: 10
            failureThreshold: 3
          lifecycle:
            preStop:
              exec:
                # While it sleeps, no new requests are sent here and those in flight are answered.
                # Triton resets what still waits when it ends.
                command: ["sleep", "{_DRAIN_S}"]
          resources:
            requests:
              cpu: "1"
              memory: 2Gi
{gpu}            limits:
              memory: 4Gi
{gpu}          securityContext:
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities:
              drop: ["ALL"]
          volumeMounts:
            - name: tmp
              mountPath: /tmp
            - name: shm
              mountPath: /dev/shm
      volumes:
        - name: tmp
          emptyDir: {{}}
        - name: shm
          emptyDir:
            medium: Memory
            sizeLimit: 1Gi
---
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
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {name}
spec:
  maxUnavailable: 1
  selector:
    matchLabels:
      app.kubernetes.io/name: {name}
---
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
---
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
---
# The server itself takes a body of any size: this is where it is limited. Name your host and your certificate.
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata:
  name: {name}
  annotations:
    nginx.ingress.kubernetes.io/proxy-body-size: {facts.max_body_mb}m
    nginx.ingress.kubernetes.io/proxy-read-timeout: "60"
spec:
  ingressClassName: nginx
  tls:
    - hosts: ["{name}.example.com"]
      secretName: {name}-tls
  rules:
    - host: {name}.example.com
      http:
        paths:
          - path: /v2/models
            pathType: Prefix
            backend:
              service:
                name: {name}
                port:
                  name: http
          - path: /v2/health
            pathType: Prefix
            backend:
              service:
                name: {name}
                port:
                  name: http
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata:
  name: {name}-grpc
  annotations:
    nginx.ingress.kubernetes.io/backend-protocol: GRPC
    nginx.ingress.kubernetes.io/proxy-body-size: {facts.max_body_mb}m
spec:
  ingressClassName: nginx
  tls:
    - hosts: ["{name}-grpc.example.com"]
      secretName: {name}-grpc-tls
  rules:
    - host: {name}-grpc.example.com
      http:
        paths:
          - path: /inference.GRPCInferenceService
            pathType: Prefix
            backend:
              service:
                name: {name}
                port:
                  name: grpc
"""


def _adapter() -> str:
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


def _kserve(facts: Deployment) -> str:
    gpu = "          nvidia.com/gpu: 1\n" if facts.needs_gpu else ""
    python = (
        "# Models of the Python backend need the image of docker/Dockerfile: see `image`, below.\n"
        if facts.python_models
        else ""
    )
    # A version would be put in the place of our own image's tag.
    image = (
        f"      image: {facts.image}\n"
        if facts.python_models
        else f"      runtimeVersion: {facts.container.tag}\n"
    )
    # Added to those of the runtime.
    arguments = f"      args:\n{_quoted([HOST_CODE], 8)}\n" if facts.host_code else ""
    return f"""\
# kubectl apply -f kubernetes/kserve.yaml. Copy model_repository/ to the storage first, and name that under storageUri.
{python}{_warning(facts)}apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {facts.name}
spec:
  predictor:
    minReplicas: 1
    maxReplicas: 8
    terminationGracePeriodSeconds: {_GRACE_S}
    securityContext:
      runAsNonRoot: true
      runAsUser: 1000
      seccompProfile:
        type: RuntimeDefault
    model:
      modelFormat:
        name: triton
        version: "2"
      protocolVersion: v2
      runtime: kserve-tritonserver
{image}{arguments}      storageUri: pvc://models/{facts.name}
      lifecycle:
        preStop:
          exec:
            command: ["sleep", "{_DRAIN_S}"]
      resources:
        requests:
          cpu: "1"
          memory: 2Gi
{gpu}        limits:
          memory: 4Gi
{gpu}      securityContext:
        allowPrivilegeEscalation: false
        capabilities:
          drop: ["ALL"]
"""
