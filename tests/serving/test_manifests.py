"""Deployment files that are emitted pass the check; each mistake in one is found."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from sparse_export.errors import ArtefactError
from sparse_export.serving.containers import container_for
from sparse_export.serving.deployment import Deployment, deployment_files
from sparse_export.serving.manifests import check_deployment


def _files(*, tensorrt: str | None = None, python: bool = True, host_code: bool = False) -> dict[str, str]:
    return deployment_files(
        Deployment(
            name="net-triton",
            image="net-triton:0123456789ab",
            container=container_for(tensorrt),
            python_models=python,
            requirements=("numpy>=1.26", "onnxruntime==1.31.1"),
            needs_gpu=tensorrt is not None,
            host_code=host_code,
            max_body_mb=64,
        )
    )


@pytest.mark.parametrize(
    ("tensorrt", "python"),
    list(itertools.product([None, "10.14.1.48", "11.2.0.10", "unknown"], [True, False])),
)
def test_every_file_that_is_emitted_passes(tensorrt: str | None, python: bool) -> None:
    files = _files(tensorrt=tensorrt, python=python)
    for name, text in files.items():
        check_deployment(name, text)
    assert ("nvidia.com/gpu" in files["kubernetes/triton.yaml"]) == (tensorrt is not None)
    assert ("pip install" in files["docker/Dockerfile"]) == python


def test_only_for_engines_that_hold_host_code_the_server_may_run_it() -> None:
    for host_code in (False, True):
        files = _files(tensorrt="10.14.1.48", host_code=host_code)
        for name in ("docker/Dockerfile", "kubernetes/triton.yaml", "kubernetes/kserve.yaml"):
            check_deployment(name, files[name])
            assert ("--backend-config=tensorrt,version-compatible=true" in files[name]) == host_code, name


def test_in_every_container_onnxruntime_reports_nothing_to_its_maker() -> None:
    files = _files()
    for name in ("kubernetes/triton.yaml", "kubernetes/kserve.yaml"):
        variables = [variable for part in yaml.safe_load_all(files[name]) for variable in _variables(part)]
        assert variables == [{"name": "ORT_DISABLE_TELEMETRY", "value": "1"}], name
    compose = yaml.safe_load(files["docker/compose.yaml"])
    # Compose takes the value of whoever starts it, where there is one, be it empty.
    assert compose["services"]["triton"]["environment"] == {
        "ORT_DISABLE_TELEMETRY": "${ORT_DISABLE_TELEMETRY-1}"
    }
    lines = files["docker/Dockerfile"].splitlines()
    assert lines.index("ENV ORT_DISABLE_TELEMETRY=1") < next(
        at for at, line in enumerate(lines) if line.startswith("CMD")
    )


def _variables(part: Any) -> Iterator[Any]:
    """What stands under `env`, anywhere in a YAML document."""
    if isinstance(part, dict):
        yield from part.get("env", [])
        for value in part.values():
            yield from _variables(value)
    elif isinstance(part, list):
        for value in part:
            yield from _variables(value)


MISTAKES = [
    ("kubernetes/triton.yaml", "readinessProbe:", "readynessProbe:"),
    ("kubernetes/triton.yaml", "containerPort: 8000", "containerPort: 80000"),
    ("kubernetes/triton.yaml", "runAsNonRoot: true", "runAsNonRoot: false"),
    ("kubernetes/triton.yaml", "runAsUser: 1000", "runAsUser: 0"),
    ("kubernetes/triton.yaml", "allowPrivilegeEscalation: false", "allowPrivilegeEscalation: true"),
    ("kubernetes/triton.yaml", "memory: 2Gi", "memory: 2 GB"),
    ("kubernetes/triton.yaml", "kind: Deployment", "kind: Deploymnet"),
    ("kubernetes/triton.yaml", "apiVersion: autoscaling/v2", "apiVersion: autoscaling/v1"),
    ("kubernetes/triton.yaml", "image: net-triton:0123456789ab", "image: net-triton:latest"),
    ("kubernetes/triton.yaml", "image: net-triton:0123456789ab", "image: net-triton"),
    ("kubernetes/triton.yaml", "      lifecycle:", "      lifecycles:"),
    ("kubernetes/triton.yaml", 'command: ["sleep", "15"]', 'command: ["sleep", "60"]'),
    ("kubernetes/triton.yaml", "targetPort: grpc", "targetPort: grcp"),
    ("kubernetes/triton.yaml", "mountPath: /dev/shm", "mountPath: dev/shm"),
    ("kubernetes/triton.yaml", "            - name: shm", "            - name: shmem"),
    ("kubernetes/triton.yaml", "  name: http\n", "  name: htpp\n"),
    ("kubernetes/triton.yaml", "maxReplicas: 8", "maxReplicas: eight"),
    ("kubernetes/triton.yaml", "spec:\n  replicas: 1", "spec:\n replicas: 1"),
    ("kubernetes/kserve.yaml", "protocolVersion: v2", "protocolVersion: v3"),
    ("kubernetes/kserve.yaml", "storageUri: pvc://", "storageUri: /"),
    ("kubernetes/kserve.yaml", "modelFormat:", "modelformat:"),
    ("kubernetes/prometheus-adapter-values.yaml", "metricsQuery:", "metricQuery:"),
    ("docker/compose.yaml", '"127.0.0.1:8000:8000"', '"8000:8000"'),
    ("docker/compose.yaml", "read_only: true", "readonly: true"),
    ("docker/compose.yaml", "stop_grace_period: 60s", "stop_grace_period: 60"),
    ("docker/Dockerfile", "USER 1000", "USER root"),
    ("docker/compose.yaml", "ORT_DISABLE_TELEMETRY: ", "- ORT_DISABLE_TELEMETRY="),
    ("kubernetes/triton.yaml", 'value: "1"', "value: 1"),
    ("kubernetes/kserve.yaml", "env:", "environment:"),
    ("docker/Dockerfile", "USER 1000\n", ""),
    ("docker/Dockerfile", ":26.07-py3", ""),
    ("docker/Dockerfile", ":26.07-py3", ":latest"),
    ("docker/Dockerfile", "COPY ", "COPPY "),
]


@pytest.mark.parametrize(
    ("name", "right", "wrong"), MISTAKES, ids=[f"{n}: {w.strip()}" for n, _, w in MISTAKES]
)
def test_a_mistake_is_found(name: str, right: str, wrong: str) -> None:
    text = _files()[name]
    assert right in text
    with pytest.raises(ArtefactError, match=name):
        check_deployment(
            name, text.replace(right, wrong, 1) if "\n" not in right else text.replace(right, wrong)
        )


@pytest.mark.parametrize(
    ("tensorrt", "tag"),
    [("10.14.1.48", "25.12-py3"), ("10.14.1.48.post1", "25.12-py3"), ("10.9.0.34", "25.04-py3")],
)
def test_the_container_is_the_one_of_the_engines_tensorrt(tensorrt: str, tag: str) -> None:
    container = container_for(tensorrt)
    assert (container.tag, container.warning) == (tag, "")


@pytest.mark.parametrize("tensorrt", ["11.2.0.10", "8.6.1.6", "unknown"])
def test_a_tensorrt_that_no_known_container_has_is_warned_of_in_every_file(tensorrt: str) -> None:
    container = container_for(tensorrt)
    assert tensorrt in container.warning
    files = _files(tensorrt=tensorrt)
    for name in (
        "docker/Dockerfile",
        "docker/compose.yaml",
        "kubernetes/triton.yaml",
        "kubernetes/kserve.yaml",
    ):
        assert f"# WARNING: {container.warning}" in files[name]


def test_the_image_is_not_built_in_a_container_with_another_tensorrt() -> None:
    text = _files(tensorrt="10.14.1.48")["docker/Dockerfile"]
    assert (
        r"dpkg-query --show --showformat='${Version}\n' 'libnvinfer1*' | grep -q '^10[.]14[.]1[.]48-'" in text
    )
