"""Write the files that deploy a model repository: Docker, compose, Kubernetes, KServe."""

from __future__ import annotations

from sparse_export.serving.docker_files import compose, dockerfile
from sparse_export.serving.kserve_file import inference_service
from sparse_export.serving.kubernetes_files import adapter_values, kubernetes_objects
from sparse_export.serving.workload import Workload

__all__ = ["deployment_files", "files_left_out"]

_WRITERS = {
    "docker/Dockerfile": dockerfile,
    "docker/compose.yaml": compose,
    "kubernetes/triton.yaml": kubernetes_objects,
    "kubernetes/kserve.yaml": inference_service,
}
_NO_BASE_IMAGE = "it needs a base image; give one with --base-image"
_NO_IMAGE = "it needs an image; give --base-image, or with --image one of your own that holds the models"


def deployment_files(workload: Workload) -> dict[str, str]:
    """Return the content of each deployment file by its path in the package.

    Files that need an image which the workload has not are left out, see `files_left_out`.
    """
    left_out = files_left_out(workload)
    files = {name: write(workload) for name, write in _WRITERS.items() if name not in left_out}
    return {**files, "kubernetes/prometheus-adapter-values.yaml": adapter_values()}


def files_left_out(workload: Workload) -> dict[str, str]:
    """Return the reason for each deployment file that cannot be written, by its path in the package."""
    left_out: dict[str, str] = {}
    if workload.base_image is None:
        left_out |= {"docker/Dockerfile": _NO_BASE_IMAGE, "docker/compose.yaml": _NO_BASE_IMAGE}
    if workload.image is None:
        left_out["kubernetes/triton.yaml"] = _NO_IMAGE
        if workload.has_python_models:
            left_out["kubernetes/kserve.yaml"] = _NO_IMAGE
    return left_out
