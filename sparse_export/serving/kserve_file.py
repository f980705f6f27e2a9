"""A model repository as an InferenceService of KServe."""

from __future__ import annotations

from textwrap import indent

from sparse_export.serving.settings import HOST_CODE
from sparse_export.serving.workload import (
    GRACE_S,
    Deployment,
    environment,
    pre_stop,
    quoted,
    resources,
    warning,
)

__all__ = ["inference_service"]


def inference_service(facts: Deployment) -> str:
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
    arguments = f"      args:\n{quoted([HOST_CODE], 8)}\n" if facts.host_code else ""
    return f"""\
# kubectl apply -f kubernetes/kserve.yaml. Copy model_repository/ to the storage first, and name that under storageUri.
{python}{warning(facts)}apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {facts.name}
spec:
  predictor:
    minReplicas: 1
    maxReplicas: 8
    terminationGracePeriodSeconds: {GRACE_S}
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
{indent(environment() + pre_stop() + resources(facts), " " * 6)}      securityContext:
        allowPrivilegeEscalation: false
        capabilities:
          drop: ["ALL"]
"""
