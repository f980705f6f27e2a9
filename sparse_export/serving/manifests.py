"""A schema check of the deployment files that `package` writes: unknown fields, missing ones, wrong kinds of values.

The schemas hold the fields of Kubernetes, KServe and Compose that we use, spelt as there, and no others. They find what
a mistake of ours would be; a cluster checks more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from sparse_export.errors import ArtefactError, MissingCapability, how_to_get

__all__ = ["check_deployment"]

DnsLabel = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
DnsName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]


def _pinned(reference: str) -> str:
    if reference.endswith(":latest"):
        raise ValueError("the tag 'latest' is another image tomorrow")
    return reference


Image = Annotated[
    str,
    Field(pattern=r"^[a-z0-9][a-z0-9._/:-]*:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$"),
    AfterValidator(_pinned),
]
Labels = dict[str, Annotated[str, Field(max_length=63)]]
Path = Annotated[str, Field(pattern=r"^/")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Metadata(_Strict):
    name: DnsLabel
    labels: Labels = {}
    annotations: dict[str, str] = {}


class _Selector(_Strict):
    matchLabels: Labels  # noqa: N815 - spelt as there, here and below


class _HttpGet(_Strict):
    path: Path
    port: str | Port


class _Probe(_Strict):
    httpGet: _HttpGet  # noqa: N815
    periodSeconds: int = Field(ge=1)  # noqa: N815
    failureThreshold: int = Field(ge=1)  # noqa: N815


class _Exec(_Strict):
    command: list[str]


class _Hook(_Strict):
    exec: _Exec


class _Lifecycle(_Strict):
    preStop: _Hook  # noqa: N815


_Resource = dict[Literal["cpu", "memory", "nvidia.com/gpu"], Quantity | int]


class _Resources(_Strict):
    requests: _Resource
    limits: _Resource


class _Capabilities(_Strict):
    drop: list[Literal["ALL"]]


class _ContainerSecurity(_Strict):
    allowPrivilegeEscalation: Literal[False]  # noqa: N815
    readOnlyRootFilesystem: bool | None = None  # noqa: N815
    capabilities: _Capabilities


class _Seccomp(_Strict):
    type: Literal["RuntimeDefault"]


class _PodSecurity(_Strict):
    runAsNonRoot: Literal[True]  # noqa: N815
    runAsUser: int = Field(ge=1)  # noqa: N815
    runAsGroup: int | None = Field(None, ge=1)  # noqa: N815
    fsGroup: int | None = Field(None, ge=1)  # noqa: N815
    seccompProfile: _Seccomp  # noqa: N815


class _ContainerPort(_Strict):
    name: Annotated[DnsLabel, Field(max_length=15)]
    containerPort: Port  # noqa: N815


class _Variable(_Strict):
    name: Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")]
    value: str


class _Mount(_Strict):
    name: DnsLabel
    mountPath: Path  # noqa: N815


class _Container(_Strict):
    name: DnsLabel
    image: Image
    imagePullPolicy: Literal["Always", "IfNotPresent", "Never"]  # noqa: N815
    command: list[str]
    args: list[str]
    env: list[_Variable]
    ports: list[_ContainerPort]
    startupProbe: _Probe  # noqa: N815
    readinessProbe: _Probe  # noqa: N815
    livenessProbe: _Probe  # noqa: N815
    lifecycle: _Lifecycle
    resources: _Resources
    securityContext: _ContainerSecurity  # noqa: N815
    volumeMounts: list[_Mount]  # noqa: N815


class _EmptyDir(_Strict):
    medium: Literal["", "Memory"] = ""
    sizeLimit: Quantity | None = None  # noqa: N815


class _Volume(_Strict):
    name: DnsLabel
    emptyDir: _EmptyDir  # noqa: N815


class _PodSpec(_Strict):
    automountServiceAccountToken: bool  # noqa: N815
    terminationGracePeriodSeconds: int = Field(ge=1)  # noqa: N815
    securityContext: _PodSecurity  # noqa: N815
    containers: list[_Container] = Field(min_length=1)
    volumes: list[_Volume]


class _PodMetadata(_Strict):
    labels: Labels


class _Template(_Strict):
    metadata: _PodMetadata
    spec: _PodSpec


class _RollingUpdate(_Strict):
    maxUnavailable: int  # noqa: N815
    maxSurge: int  # noqa: N815


class _Strategy(_Strict):
    type: Literal["RollingUpdate"]
    rollingUpdate: _RollingUpdate  # noqa: N815


class _DeploymentSpec(_Strict):
    replicas: int = Field(ge=0)
    minReadySeconds: int = Field(ge=0)  # noqa: N815
    strategy: _Strategy
    selector: _Selector
    template: _Template


class _Deployment(_Strict):
    apiVersion: Literal["apps/v1"]  # noqa: N815
    kind: Literal["Deployment"]
    metadata: _Metadata
    spec: _DeploymentSpec


class _ServicePort(_Strict):
    name: DnsLabel
    port: Port
    targetPort: str | Port  # noqa: N815


class _ServiceSpec(_Strict):
    selector: Labels
    ports: list[_ServicePort]


class _Service(_Strict):
    apiVersion: Literal["v1"]  # noqa: N815
    kind: Literal["Service"]
    metadata: _Metadata
    spec: _ServiceSpec


class _BudgetSpec(_Strict):
    maxUnavailable: int = Field(ge=0)  # noqa: N815
    selector: _Selector


class _Budget(_Strict):
    apiVersion: Literal["policy/v1"]  # noqa: N815
    kind: Literal["PodDisruptionBudget"]
    metadata: _Metadata
    spec: _BudgetSpec


class _TargetRef(_Strict):
    apiVersion: Literal["apps/v1"]  # noqa: N815
    kind: Literal["Deployment"]
    name: DnsLabel


class _MetricName(_Strict):
    name: str


class _MetricTarget(_Strict):
    type: Literal["AverageValue"]
    averageValue: Quantity  # noqa: N815


class _PodsMetric(_Strict):
    metric: _MetricName
    target: _MetricTarget


class _Metric(_Strict):
    type: Literal["Pods"]
    pods: _PodsMetric


class _ScaleDown(_Strict):
    stabilizationWindowSeconds: int = Field(ge=0, le=3600)  # noqa: N815


class _Behavior(_Strict):
    scaleDown: _ScaleDown  # noqa: N815


class _AutoscalerSpec(_Strict):
    scaleTargetRef: _TargetRef  # noqa: N815
    minReplicas: int = Field(ge=1)  # noqa: N815
    maxReplicas: int = Field(ge=1)  # noqa: N815
    metrics: list[_Metric] = Field(min_length=1)
    behavior: _Behavior


class _Autoscaler(_Strict):
    apiVersion: Literal["autoscaling/v2"]  # noqa: N815
    kind: Literal["HorizontalPodAutoscaler"]
    metadata: _Metadata
    spec: _AutoscalerSpec


class _Endpoint(_Strict):
    port: DnsLabel
    interval: Annotated[str, Field(pattern=r"^\d+[smh]$")]


class _MonitorSpec(_Strict):
    selector: _Selector
    endpoints: list[_Endpoint] = Field(min_length=1)


class _Monitor(_Strict):
    apiVersion: Literal["monitoring.coreos.com/v1"]  # noqa: N815
    kind: Literal["ServiceMonitor"]
    metadata: _Metadata
    spec: _MonitorSpec


class _PortName(_Strict):
    name: DnsLabel


class _BackendService(_Strict):
    name: DnsLabel
    port: _PortName


class _Backend(_Strict):
    service: _BackendService


class _IngressPath(_Strict):
    path: Path
    pathType: Literal["Prefix", "Exact"]  # noqa: N815
    backend: _Backend


class _IngressHttp(_Strict):
    paths: list[_IngressPath] = Field(min_length=1)


class _IngressRule(_Strict):
    host: DnsName
    http: _IngressHttp


class _Tls(_Strict):
    hosts: list[DnsName]
    secretName: DnsName  # noqa: N815


class _IngressSpec(_Strict):
    ingressClassName: DnsName  # noqa: N815
    tls: list[_Tls]
    rules: list[_IngressRule] = Field(min_length=1)


class _Ingress(_Strict):
    apiVersion: Literal["networking.k8s.io/v1"]  # noqa: N815
    kind: Literal["Ingress"]
    metadata: _Metadata
    spec: _IngressSpec


class _ModelFormat(_Strict):
    name: Literal["triton"]
    version: str


class _KserveModel(_Strict):
    modelFormat: _ModelFormat  # noqa: N815
    protocolVersion: Literal["v2"]  # noqa: N815
    runtime: DnsName
    runtimeVersion: str | None = None  # noqa: N815
    image: Image | None = None
    args: list[str] | None = None
    env: list[_Variable]
    storageUri: Annotated[str, Field(pattern=r"^(pvc|s3|gs|https)://.+")]  # noqa: N815
    lifecycle: _Lifecycle
    resources: _Resources
    securityContext: _ContainerSecurity  # noqa: N815


class _Predictor(_Strict):
    minReplicas: int = Field(ge=0)  # noqa: N815
    maxReplicas: int = Field(ge=1)  # noqa: N815
    terminationGracePeriodSeconds: int = Field(ge=1)  # noqa: N815
    securityContext: _PodSecurity  # noqa: N815
    model: _KserveModel


class _InferenceSpec(_Strict):
    predictor: _Predictor


class _InferenceService(_Strict):
    apiVersion: Literal["serving.kserve.io/v1beta1"]  # noqa: N815
    kind: Literal["InferenceService"]
    metadata: _Metadata
    spec: _InferenceSpec


_Object = Annotated[
    _Deployment | _Service | _Budget | _Autoscaler | _Monitor | _Ingress | _InferenceService,
    Field(discriminator="kind"),
]


class _Build(_Strict):
    context: str
    dockerfile: str


class _Device(_Strict):
    driver: Literal["nvidia"]
    count: int = Field(ge=1)
    capabilities: list[str]


class _Reservations(_Strict):
    devices: list[_Device]


class _ComposeResources(_Strict):
    reservations: _Reservations


class _ComposeDeploy(_Strict):
    resources: _ComposeResources


class _ComposeHook(_Strict):
    command: list[str]


class _ComposeService(_Strict):
    image: Image
    build: _Build
    ports: list[Annotated[str, Field(pattern=r"^127\.0\.0\.1:\d+:\d+$")]]
    environment: dict[str, str]
    user: str
    read_only: Literal[True]
    tmpfs: list[Path]
    shm_size: Annotated[str, Field(pattern=r"^\d+(b|k|m|g|kb|mb|gb)$")]
    cap_drop: list[Literal["ALL"]]
    security_opt: list[str]
    restart: Literal["no", "always", "on-failure", "unless-stopped"]
    stop_grace_period: Annotated[str, Field(pattern=r"^\d+s$")]
    pre_stop: list[_ComposeHook]
    deploy: _ComposeDeploy | None = None


class _Compose(_Strict):
    services: dict[str, _ComposeService]


class _Override(_Strict):
    resource: str


class _RuleResources(_Strict):
    overrides: dict[str, _Override]


class _RuleName(_Strict):
    as_: str = Field(alias="as")


class _Rule(_Strict):
    seriesQuery: str  # noqa: N815
    resources: _RuleResources
    name: _RuleName
    metricsQuery: str  # noqa: N815


class _Rules(_Strict):
    custom: list[_Rule]


class _AdapterValues(_Strict):
    rules: _Rules


def _agree(documents: list[Any]) -> str | None:
    """What schemas do not see: names that point from one document to another. A sentence, or None."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for document in documents:
        by_kind.setdefault(document["kind"], []).append(document)
    for deployment in by_kind.get("Deployment", []):
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        if not deployment["spec"]["selector"]["matchLabels"].items() <= labels.items():
            return "the Deployment's selector does not choose its own pods"
        pod = deployment["spec"]["template"]["spec"]
        for container in pod["containers"]:
            if not {m["name"] for m in container["volumeMounts"]} <= {v["name"] for v in pod["volumes"]}:
                return "a container mounts a volume that there is not"
            sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
            if sleep >= pod["terminationGracePeriodSeconds"]:
                return "the drain takes as long as the pod is given to end"
        for service in by_kind.get("Service", []):
            if not service["spec"]["selector"].items() <= labels.items():
                return "the Service chooses other pods than the Deployment's"
            names = {port["name"] for container in pod["containers"] for port in container["ports"]}
            if not {port["targetPort"] for port in service["spec"]["ports"]} <= names:
                return "the Service points to a port that no container names"
    services = {
        s["metadata"]["name"]: {p["name"] for p in s["spec"]["ports"]} for s in by_kind.get("Service", [])
    }
    for ingress in by_kind.get("Ingress", []):
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                to = path["backend"]["service"]
                if to["port"]["name"] not in services.get(to["name"], set()):
                    return f"an Ingress points to {to['name']}:{to['port']['name']}, which there is not"
    return None


def _dockerfile(text: str) -> str | None:
    lines = [
        line for line in text.replace("\\\n", "").splitlines() if line.strip() and not line.startswith("#")
    ]
    known = {"FROM", "RUN", "ENV", "COPY", "USER", "EXPOSE", "HEALTHCHECK", "CMD"}
    wrong = [line for line in lines if line.split()[0] not in known]
    if wrong:
        return f"{wrong[0]!r} is no instruction that we write"
    if not lines or not lines[0].startswith("FROM "):
        return "it does not begin with FROM"
    try:
        pydantic.TypeAdapter(Image).validate_python(lines[0].split()[1])
    except pydantic.ValidationError:
        return f"{lines[0]!r} does not pin a tag"
    if not any(line.startswith("USER ") and line.split()[1] not in {"0", "root"} for line in lines):
        return "it runs as root"
    return None


def check_deployment(name: str, text: str) -> None:
    """Raise ArtefactError when a deployment file, by its path in the package, is not what it has to be.

    Raises MissingCapability where there is no YAML parser.
    """
    problem = _dockerfile(text) if name.endswith("Dockerfile") else _yaml(name, text)
    if problem is not None:
        raise ArtefactError(
            f"{name} is not right: {problem}.",
            expected="Fields of its schema were expected.",
            do="Nothing was written.",
        )


def _yaml(name: str, text: str) -> str | None:
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as cause:
        raise MissingCapability(
            f"Manifests cannot be checked: {cause}.",
            expected="PyYAML was expected: nothing is written unchecked.",
            do=f"Run {how_to_get('serve')}.",
        ) from cause
    try:
        documents = list(yaml.safe_load_all(text))
    except yaml.YAMLError as cause:
        return str(cause)
    check: Callable[[Any], Any]
    if name.endswith("compose.yaml"):
        check = _Compose.model_validate
    elif name.endswith("values.yaml"):
        check = _AdapterValues.model_validate
    else:
        check = pydantic.TypeAdapter(_Object).validate_python
    try:
        for document in documents:
            check(document)
    except pydantic.ValidationError as cause:
        first = cause.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return _agree(documents) if all(isinstance(d, dict) and "kind" in d for d in documents) else None
