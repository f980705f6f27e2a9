"""Deployment files pass the checks of their formats, and the checks find mistakes in them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from sparse_export.serving.deployment import deployment_files, files_left_out
from sparse_export.serving.workload import Workload
from tests.serving.manifest_checks import KUBERNETES, documents_problem, object_problem, problem

BASE_IMAGE = "registry.example.com/triton:1.0"
TENSORRT = "10.14.1.48"


def _files(
    *,
    base_image: str | None = BASE_IMAGE,
    image: str | None = "net-triton:0123456789ab",
    tensorrt: str | None = None,
    python: bool = True,
    host_code: bool = False,
) -> dict[str, str]:
    return deployment_files(_workload(base_image, image, tensorrt, python, host_code))


def _workload(
    base_image: str | None, image: str | None, tensorrt: str | None, python: bool, host_code: bool = False
) -> Workload:
    return Workload(
        name="net-triton",
        base_image=base_image,
        image=image,
        tensorrt=tensorrt,
        has_python_models=python,
        requirements=("numpy>=1.26", "onnxruntime==1.31.1"),
        loads_host_code=host_code,
        max_body_mb=64,
    )


@pytest.mark.parametrize(
    ("tensorrt", "python", "base_image"),
    list(itertools.product([None, TENSORRT], [True, False], [None, BASE_IMAGE])),
)
def test_every_file_passes(tensorrt: str | None, python: bool, base_image: str | None) -> None:
    files = _files(tensorrt=tensorrt, python=python, base_image=base_image)
    for name, text in files.items():
        for version in KUBERNETES:
            assert problem(name, text, kubernetes=version) is None, (name, version)
        assert "&id" not in text  # no YAML alias, which is hard to read
    assert ("nvidia.com/gpu" in files["kubernetes/triton.yaml"]) == (tensorrt is not None)
    assert ("pip install" in files.get("docker/Dockerfile", "")) == (python and base_image is not None)


def test_only_for_engines_that_hold_host_code_the_server_may_run_it() -> None:
    for host_code in (False, True):
        files = _files(tensorrt=TENSORRT, host_code=host_code)
        for name in ("docker/Dockerfile", "kubernetes/triton.yaml", "kubernetes/kserve.yaml"):
            assert problem(name, files[name]) is None
            assert ("--backend-config=tensorrt,version-compatible=true" in files[name]) == host_code, name


@pytest.mark.parametrize(
    ("base_image", "image", "python", "missing"),
    [
        (BASE_IMAGE, "net:1", True, set()),
        (None, "net:1", True, {"docker/Dockerfile", "docker/compose.yaml"}),
        (None, None, False, {"docker/Dockerfile", "docker/compose.yaml", "kubernetes/triton.yaml"}),
        (
            None,
            None,
            True,
            {"docker/Dockerfile", "docker/compose.yaml", "kubernetes/triton.yaml", "kubernetes/kserve.yaml"},
        ),
    ],
)
def test_files_that_need_an_image_that_there_is_not_are_left_out(
    base_image: str | None, image: str | None, python: bool, missing: set[str]
) -> None:
    workload = _workload(base_image, image, None, python)
    left_out = files_left_out(workload)
    assert set(left_out) == missing
    assert set(_files()) - set(deployment_files(workload)) == missing
    assert all("--base-image" in reason for reason in left_out.values())


@pytest.mark.parametrize(
    ("base_image", "python", "image"),
    [
        (BASE_IMAGE, True, "net-triton:0123456789ab"),
        (BASE_IMAGE, False, BASE_IMAGE),
        (None, False, None),
    ],
)
def test_kserve_runs_the_models_in_an_image_that_has_what_they_need(
    base_image: str | None, python: bool, image: str | None
) -> None:
    text = _files(base_image=base_image, python=python, tensorrt=TENSORRT)["kubernetes/kserve.yaml"]
    assert yaml.safe_load(text)["spec"]["predictor"]["model"].get("image") == image
    assert ("No image is named here" in text) == (image is None)


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
    ("kubernetes/triton.yaml", "containerPort: 8000", "containerPort: 80000"),
    ("kubernetes/triton.yaml", "runAsNonRoot: true", "runAsNonRoot: false"),
    ("kubernetes/triton.yaml", "runAsUser: 1000", "runAsUser: 0"),
    ("kubernetes/triton.yaml", "allowPrivilegeEscalation: false", "allowPrivilegeEscalation: true"),
    ("kubernetes/triton.yaml", "memory: 2Gi", "memory: 2 GB"),
    ("kubernetes/triton.yaml", "kind: Deployment", "kind: Deploymnet"),
    ("kubernetes/triton.yaml", "apiVersion: autoscaling/v2", "apiVersion: autoscaling/v1"),
    ("kubernetes/triton.yaml", "image: net-triton:0123456789ab", "image: net-triton:latest"),
    ("kubernetes/triton.yaml", "image: net-triton:0123456789ab", "image: net-triton"),
    ("kubernetes/triton.yaml", "- sleep\n              - '15'", "- sleep\n              - '60'"),
    ("kubernetes/triton.yaml", "targetPort: grpc", "targetPort: grcp"),
    ("kubernetes/triton.yaml", "mountPath: /dev/shm", "mountPath: dev/shm"),
    ("kubernetes/triton.yaml", "        - name: shm\n", "        - name: shmem\n"),
    ("kubernetes/triton.yaml", "  name: http\n", "  name: htpp\n"),
    ("kubernetes/triton.yaml", "spec:\n  replicas: 1", "spec:\n replicas: 1"),
    ("kubernetes/kserve.yaml", "protocolVersion: v2", "protocolVersion: v3"),
    ("kubernetes/kserve.yaml", "storageUri: pvc://", "storageUri: /"),
    ("docker/compose.yaml", "- 127.0.0.1:8000:8000", "- 8000:8000"),
    ("docker/compose.yaml", "stop_grace_period: 60s", "stop_grace_period: 60"),
    ("docker/Dockerfile", "USER 1000", "USER root"),
    ("docker/Dockerfile", "USER 1000\n", ""),
    ("docker/Dockerfile", "triton:1.0", "triton"),
    ("docker/Dockerfile", "triton:1.0", "triton:latest"),
    ("docker/Dockerfile", "COPY ", "COPPY "),
]


@pytest.mark.parametrize(
    ("name", "right", "wrong"), MISTAKES, ids=[f"{n}: {w.strip()}" for n, _, w in MISTAKES]
)
def test_a_mistake_is_found(name: str, right: str, wrong: str) -> None:
    text = _files()[name]
    assert right in text
    mistaken = text.replace(right, wrong, 1) if "\n" not in right else text.replace(right, wrong)
    assert problem(name, mistaken) is not None


# Fields that a file may lack, and maps whose keys are free.
OPTIONAL = {
    "labels",
    "annotations",
    "medium",
    "sizeLimit",
    "cpu",
    "nvidia.com/gpu",
    "deploy",
    "image",
    "args",
}
FREE_KEYS = {"labels", "annotations", "environment", "overrides", "services"}


def _fields(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if isinstance(value, dict):
        for key, below in value.items():
            yield (*path, key)
            yield from _fields(below, (*path, key))
    elif isinstance(value, list):
        for at, below in enumerate(value):
            yield from _fields(below, (*path, at))


def _mistaken(document: Any, path: tuple[str | int, ...]) -> Iterator[tuple[str, Any]]:
    """Yield the document with one field misspelt, absent, or of another type."""
    key, parent = path[-1], path[-2] if len(path) > 1 else None
    kinds = ["type"]
    if parent not in FREE_KEYS:
        kinds += ["misspelt"] if key in OPTIONAL else ["misspelt", "absent"]
    for kind in kinds:
        mistaken = copy.deepcopy(document)
        holder = mistaken
        for step in path[:-1]:
            holder = holder[step]
        value = holder.pop(key)
        if kind == "misspelt":
            holder[f"{key}x"] = value
        elif kind == "type":
            holder[key] = "text" if isinstance(value, (dict, list)) else {"a": [1]}
        yield kind, mistaken


@pytest.mark.parametrize("name", sorted(name for name in _files() if name.endswith(".yaml")))
def test_a_field_that_is_misspelt_absent_or_of_another_type_is_found(name: str) -> None:
    documents = list(yaml.safe_load_all(_files(tensorrt=TENSORRT, host_code=True)[name]))
    n_mistakes = 0
    for at, document in enumerate(documents):
        for path in _fields(document):
            for kind, mistaken in _mistaken(document, path):
                others = [*documents[:at], mistaken, *documents[at + 1 :]]
                found = (object_problem(mistaken) if "kind" in document else None) or documents_problem(
                    name, others
                )
                assert found is not None, (kind, path)
                n_mistakes += 1
    assert n_mistakes >= 20


def test_every_file_that_names_an_image_says_which_tensorrt_it_needs() -> None:
    for tensorrt in (None, TENSORRT):
        files = _files(tensorrt=tensorrt)
        for name in files.keys() - {"kubernetes/prometheus-adapter-values.yaml"}:
            assert (f"# The engines were built by TensorRT {TENSORRT}" in files[name]) == (
                tensorrt is not None
            ), name


def test_the_image_is_not_built_from_one_with_another_tensorrt() -> None:
    text = _files(tensorrt=TENSORRT)["docker/Dockerfile"]
    assert (
        r"dpkg-query --show --showformat='${Version}\n' 'libnvinfer1*' | grep -q '^10[.]14[.]1[.]48-'" in text
    )
