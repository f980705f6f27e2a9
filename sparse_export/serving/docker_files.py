"""The Docker image of a model repository, and a compose file that runs it."""

from __future__ import annotations

from sparse_export.serving.workload import DRAIN_S, GRACE_S, Deployment, arguments, warning
from sparse_export.telemetry import OFF, ONNXRUNTIME_VARIABLE

__all__ = ["compose", "dockerfile"]


def dockerfile(facts: Deployment) -> str:
    lines = [
        "# Build it in the package's folder: docker build -f docker/Dockerfile -t " + facts.image + " .",
        warning(facts) + f"FROM {facts.container.reference}",
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
    command = ", ".join(f'"{word}"' for word in ["tritonserver", *arguments("/models", facts)])
    lines += [
        "",
        "# onnxruntime is not to report to its maker.",
        f"ENV {ONNXRUNTIME_VARIABLE}={OFF}",
        "COPY --chown=1000:1000 model_repository /models",
        "USER 1000",
        "EXPOSE 8000 8001 8002",
        "HEALTHCHECK --interval=5s --start-period=60s CMD curl -fs http://127.0.0.1:8000/v2/health/ready",
        f"CMD [{command}]",
    ]
    return "\n".join(lines) + "\n"


def compose(facts: Deployment) -> str:
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
{warning(facts)}services:
  triton:
    image: {facts.image}
    build:
      context: ..
      dockerfile: docker/Dockerfile
    ports:
      - "127.0.0.1:8000:8000"
      - "127.0.0.1:8001:8001"
      - "127.0.0.1:8002:8002"
    environment:
      {ONNXRUNTIME_VARIABLE}: "${{{ONNXRUNTIME_VARIABLE}-{OFF}}}"
    user: "1000"
    read_only: true
    tmpfs:
      - /tmp
    shm_size: 1gb
    cap_drop: [ALL]
    security_opt:
      - no-new-privileges:true
    restart: unless-stopped
    stop_grace_period: {GRACE_S}s
    pre_stop:
      - command: ["sleep", "{DRAIN_S}"]
{gpu if facts.needs_gpu else ""}"""


def _escaped(version: str) -> str:
    return version.replace(".", "[.]")
