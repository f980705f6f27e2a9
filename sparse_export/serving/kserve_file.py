"""Write a model repository as an InferenceService of KServe."""

from __future__ import annotations

from typing import Any

from sparse_export.serving.settings import HOST_CODE
from sparse_export.serving.workload import (
    GRACE_S,
    Workload,
    environment,
    pre_stop,
    resources,
    tensorrt_comment,
    yaml_text,
)

__all__ = ["inference_service"]

_PYTHON_COMMENT = "Models of the Python backend need their packages in the image: see `image`, below."
_RUNTIME_COMMENT = "No image is named here: set `image` under `model` unless the runtime's has that TensorRT."


def inference_service(workload: Workload) -> str:
    """Return the InferenceService (serving.kserve.io/v1beta1) that runs KServe's Triton runtime.

    Models of the Python backend need packages, so they run in the workload's image. Others run in the base
    image, or where none was given in the image of the runtime.
    """
    image = workload.image if workload.has_python_models else workload.base_image
    model: dict[str, Any] = {
        "modelFormat": {"name": "triton", "version": "2"},
        "protocolVersion": "v2",
        "runtime": "kserve-tritonserver",
    }
    if image is not None:
        model["image"] = image  # without a runtimeVersion, which would replace its tag
    if workload.loads_host_code:
        model["args"] = [HOST_CODE]  # added to the arguments of the runtime
    model |= {
        "storageUri": f"pvc://models/{workload.name}",
        "env": environment(),
        "lifecycle": pre_stop(),
        "resources": resources(workload),
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    predictor = {
        "minReplicas": 1,
        "maxReplicas": 8,
        "terminationGracePeriodSeconds": GRACE_S,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "model": model,
    }
    comments = [
        (
            "kubectl apply -f kubernetes/kserve.yaml. First copy "
            "model_repository/ to the storage, and name that "
            "under"
        ),
        "storageUri.",
        *([_PYTHON_COMMENT] if workload.has_python_models else []),
        *tensorrt_comment(workload),
        *([_RUNTIME_COMMENT] if workload.needs_gpu and image is None else []),
    ]
    document = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": workload.name},
        "spec": {"predictor": predictor},
    }
    return yaml_text(document, comments)
