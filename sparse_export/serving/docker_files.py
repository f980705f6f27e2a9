"""Write the Dockerfile of a model repository and a compose file that runs it."""

from __future__ import annotations

import json
from typing import Any

from sparse_export.serving.workload import (
    DRAIN_S,
    GRACE_S,
    Workload,
    server_arguments,
    tensorrt_comment,
    yaml_text,
)
from sparse_export.telemetry import OFF, ONNXRUNTIME_VARIABLE

__all__ = ["compose", "dockerfile"]


def dockerfile(workload: Workload) -> str:
    """Return the Dockerfile of a workload with a base image.

    Its build fails where the TensorRT of the base image is not that of the engines.
    """
    lines = [
        f"# Build it in the package's folder: docker build -f docker/Dockerfile -t {workload.image} .",
        f"FROM {workload.base_image}",
    ]
    if workload.tensorrt is not None:
        version = workload.tensorrt
        lines += [
            "",
            f"# The engines were built by TensorRT {version} and load in no other version, so check it here.",
            (
                "RUN dpkg-query --show --showformat='${Version}\\n' 'libnvinfer1*' "
                f"| grep -q '^{_escaped(version)}-'"
            ),
        ]
    if workload.has_python_models:
        words = " ".join(f"'{requirement}'" for requirement in workload.requirements)
        lines += [
            "",
            "# Packages of the models in the Python backend.",
            f"RUN pip install --no-cache-dir --break-system-packages {words}",
        ]
    command = json.dumps(["tritonserver", *server_arguments("/models", workload)])
    lines += [
        "",
        "# onnxruntime is not to report to its maker.",
        f"ENV {ONNXRUNTIME_VARIABLE}={OFF}",
        "COPY --chown=1000:1000 model_repository /models",
        "USER 1000",
        "EXPOSE 8000 8001 8002",
        "HEALTHCHECK --interval=5s --start-period=60s CMD curl -fs http://127.0.0.1:8000/v2/health/ready",
        f"CMD {command}",
    ]
    return "\n".join(lines) + "\n"


def compose(workload: Workload) -> str:
    """Return the compose file of a workload with a base image; it builds the image and runs it on one
    machine.
    """
    service: dict[str, Any] = {
        "image": workload.image,
        "build": {"context": "..", "dockerfile": "docker/Dockerfile"},
        "ports": [f"127.0.0.1:{port}:{port}" for port in (8000, 8001, 8002)],
        "environment": {ONNXRUNTIME_VARIABLE: f"${{{ONNXRUNTIME_VARIABLE}-{OFF}}}"},
        "user": "1000",
        "read_only": True,
        "tmpfs": ["/tmp"],
        "shm_size": "1gb",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "restart": "unless-stopped",
        "stop_grace_period": f"{GRACE_S}s",
        "pre_stop": [{"command": ["sleep", str(DRAIN_S)]}],
    }
    if workload.needs_gpu:
        device = {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    comments = [
        "docker compose -f docker/compose.yaml up --build, in the package's folder.",
        (
            "pre_stop needs Compose 2.30 or newer. Stop sending requests to the container before you stop "
            "it: Triton"
        ),
        "resets the connections that are still waiting when it ends.",
        *tensorrt_comment(workload),
    ]
    return yaml_text({"services": {"triton": service}}, comments)


def _escaped(version: str) -> str:
    return version.replace(".", "[.]")
