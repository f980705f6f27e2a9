"""The files that bring a model repository into production: Docker, compose, Kubernetes, KServe."""

from __future__ import annotations

from sparse_export.serving.docker_files import compose, dockerfile
from sparse_export.serving.kserve_file import inference_service
from sparse_export.serving.kubernetes_files import adapter_values, objects
from sparse_export.serving.workload import Deployment

__all__ = ["Deployment", "deployment_files"]


def deployment_files(facts: Deployment) -> dict[str, str]:
    """Each file's content by its path in the package."""
    return {
        "docker/Dockerfile": dockerfile(facts),
        "docker/compose.yaml": compose(facts),
        "kubernetes/triton.yaml": objects(facts),
        "kubernetes/prometheus-adapter-values.yaml": adapter_values(),
        "kubernetes/kserve.yaml": inference_service(facts),
    }
