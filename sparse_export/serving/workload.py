"""What every deployment file of a model repository says alike: the server's arguments, its end, its share of a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparse_export.serving.containers import Container
from sparse_export.serving.settings import HOST_CODE
from sparse_export.telemetry import OFF, ONNXRUNTIME_VARIABLE

__all__ = [
    "DRAIN_S",
    "GRACE_S",
    "Deployment",
    "arguments",
    "environment",
    "pre_stop",
    "quoted",
    "resources",
    "warning",
]

DRAIN_S = 15
GRACE_S = 60
# No HTTP header or gRPC metadata can end with a line break: nobody can send this key.
_CLOSED = "model-repository,shared-memory,trace,logging:sparse-export=closed\\n"


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


def arguments(repository: str, facts: Deployment) -> list[str]:
    """Of `tritonserver`. repository: where the models lie for it."""
    return [
        f"--model-repository={repository}",
        "--model-control-mode=none",
        "--disable-auto-complete-config",
        "--allow-sagemaker=false",
        "--allow-vertex-ai=false",
        f"--exit-timeout-secs={GRACE_S - DRAIN_S - 5}",
        *([HOST_CODE] if facts.host_code else []),
        f"--http-restricted-api={_CLOSED}",
        f"--grpc-restricted-protocol={_CLOSED}",
    ]


def quoted(words: Sequence[str], indent: int) -> str:
    """YAML and JSON strings, one a line; `\\n` in a word is a line break in both."""
    return "\n".join(f'{" " * indent}- "{word}"' for word in words)


def warning(facts: Deployment) -> str:
    """A comment, where the engine may not load in this container."""
    return f"# WARNING: {facts.container.warning}\n" if facts.container.warning else ""


def environment() -> str:
    """Of a container, as YAML without indentation."""
    return f"""\
env:
  - name: {ONNXRUNTIME_VARIABLE}
    value: "{OFF}"
"""


def resources(facts: Deployment) -> str:
    """Of a container, as YAML without indentation."""
    gpu = "    nvidia.com/gpu: 1\n" if facts.needs_gpu else ""
    return f"""\
resources:
  requests:
    cpu: "1"
    memory: 2Gi
{gpu}  limits:
    memory: 4Gi
{gpu}"""


def pre_stop(comment: str = "") -> str:
    """The drain before a container's end, as YAML without indentation. comment: lines above the command."""
    return f"""\
lifecycle:
  preStop:
    exec:
{comment}      command: ["sleep", "{DRAIN_S}"]
"""
