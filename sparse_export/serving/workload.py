"""What the deployment files of a model repository share: server arguments, shutdown, resources, YAML
output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from sparse_export.serving.settings import HOST_CODE
from sparse_export.telemetry import OFF, ONNXRUNTIME_VARIABLE

__all__ = [
    "DRAIN_S",
    "GRACE_S",
    "Workload",
    "environment",
    "pre_stop",
    "resources",
    "server_arguments",
    "tensorrt_comment",
    "yaml_text",
]

DRAIN_S = 15
GRACE_S = 60
# No HTTP header or gRPC metadata can end with a line break: nobody can send this key.
_CLOSED = "model-repository,shared-memory,trace,logging:sparse-export=closed\n"
_WIDTH = 1000  # never break a string over lines


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The values that deployment files are written from.

    Attributes:
        name: name of the workload, a DNS label.
        base_image: image that the Dockerfile begins from, or None where the user gave none.
        image: image that holds the server and the models; None where there is no way to get one.
        tensorrt: version of TensorRT that built the engines, or None without engines.
        has_python_models: whether a model runs in Triton's Python backend.
        requirements: packages that those models need, in pip's syntax.
        loads_host_code: whether an engine is version compatible, so that it holds code for the host.
        max_body_mb: size limit of a request at the ingress.
    """

    name: str
    base_image: str | None
    image: str | None
    tensorrt: str | None
    has_python_models: bool
    requirements: tuple[str, ...]
    loads_host_code: bool
    max_body_mb: int

    @property
    def needs_gpu(self) -> bool:
        """Whether a model is a TensorRT engine."""
        return self.tensorrt is not None


def server_arguments(repository: str, workload: Workload) -> list[str]:
    """Return the arguments of `tritonserver`.

    Args:
        repository: folder of the models inside the container.
        workload: what is served.
    """
    return [
        f"--model-repository={repository}",
        "--model-control-mode=none",
        "--disable-auto-complete-config",
        "--allow-sagemaker=false",
        "--allow-vertex-ai=false",
        f"--exit-timeout-secs={GRACE_S - DRAIN_S - 5}",
        *([HOST_CODE] if workload.loads_host_code else []),
        f"--http-restricted-api={_CLOSED}",
        f"--grpc-restricted-protocol={_CLOSED}",
    ]


def tensorrt_comment(workload: Workload) -> list[str]:
    """Return a comment line that says which TensorRT the image needs, or nothing without engines."""
    if workload.tensorrt is None:
        return []
    return [f"The engines were built by TensorRT {workload.tensorrt}: the image needs that version."]


def environment() -> list[dict[str, str]]:
    """Return the `env` of a Kubernetes container: onnxruntime reports nothing to its maker."""
    return [{"name": ONNXRUNTIME_VARIABLE, "value": OFF}]


def resources(workload: Workload) -> dict[str, Any]:
    """Return the `resources` of a Kubernetes container."""
    gpu = {"nvidia.com/gpu": 1} if workload.needs_gpu else {}
    return {"requests": {"cpu": "1", "memory": "2Gi", **gpu}, "limits": {"memory": "4Gi", **gpu}}


def pre_stop() -> dict[str, Any]:
    """Return the `lifecycle` of a Kubernetes container: it drains before it is stopped."""
    return {"preStop": {"exec": {"command": ["sleep", str(DRAIN_S)]}}}


def yaml_text(document: Mapping[str, Any], comments: list[str]) -> str:
    """Return one YAML document.

    Args:
        document: content, in the order to write.
        comments: lines to put above it, without `#`.
    """
    dumped: str = yaml.safe_dump(dict(document), sort_keys=False, width=_WIDTH)
    return "".join(f"# {line}\n" for line in comments) + dumped
