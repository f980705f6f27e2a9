"""Write the README of a package: what it holds, how to deploy it, what was left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from sparse_export.serving.workload import Workload

__all__ = ["readme"]


class _Model(Protocol):
    """What is said of a model."""

    @property
    def name(self) -> str: ...
    @property
    def runtime(self) -> str: ...
    @property
    def max_batch(self) -> int: ...
    @property
    def manifest_sha256(self) -> str: ...
    @property
    def golden(self) -> str: ...
    @property
    def task(self) -> str: ...
    @property
    def labels(self) -> str | None: ...
    @property
    def raw(self) -> str | None: ...


_CONTENTS = {
    "docker/Dockerfile": "the server with the models. Here: `{build}`",
    "docker/compose.yaml": (
        "runs that image on one machine: `docker compose -f docker/compose.yaml up --build`"
    ),
    "kubernetes/triton.yaml": "Deployment, Service, autoscaler, ServiceMonitor and Ingress: "
    "`kubectl apply -f kubernetes/triton.yaml`",
    "kubernetes/prometheus-adapter-values.yaml": (
        "makes the time that requests wait a metric for the autoscaler"
    ),
    "kubernetes/kserve.yaml": "InferenceService of KServe: `kubectl apply -f kubernetes/kserve.yaml`",
}


def _labels(model: _Model) -> str:
    return "none" if model.labels is None else f"[{Path(model.labels).name}]({model.labels})"


_PICTURES = """\
The models that end in `-file` take the bytes of a picture file, those in `-picture` the pixels, uint8
(1, height, width, channels) in RGB. Both prepare them as training did. The network's own model takes what is
prepared already: pixels that are not give wrong answers without an error.
"""
_NAMES = """\
Ask for `class_count` classes of an output with scores, and the server answers with `score:number:name`.
"""


def _asking(models: Sequence[_Model]) -> list[str]:
    """How a client asks the models."""
    first = models[0]
    ensembles = [model.name for model in models if model.runtime == "ensemble"]
    with_pictures = [name for name in ensembles if name.endswith(("-picture", "-file"))]
    pillow = " pillow" if with_pictures else ""
    lines = [
        "",
        "## Asking a model",
        "",
        f"With `pip install 'tritonclient[http,grpc]' numpy{pillow}`, and a server on this machine:",
        "",
        f"    python client/example.py --model {first.name} --golden {first.golden}",
        *(f"    python client/picture.py --model {name} photograph.png" for name in with_pictures),
    ]
    lines += ["", _PICTURES.rstrip()] if with_pictures else []
    lines += ["", *(f"{one.name} takes {one.raw}: it normalizes them itself." for one in models if one.raw)]
    lines += ["", _NAMES.rstrip()] if any(model.labels is not None for model in models) else []
    return lines


def readme(
    workload: Workload,
    models: Sequence[_Model],
    files: Iterable[str],
    left_out: Mapping[str, str],
    engines_left_out: Mapping[str, Sequence[str]],
) -> str:
    """Return the README.

    Args:
        workload: what is deployed.
        models: models of the repository.
        files: paths of the deployment files that were written.
        left_out: reason for each one that was not, by its path.
        engines_left_out: engines that are not served, each with the reason, by the name of their bundle.
    """
    build = f"docker build -f docker/Dockerfile -t {workload.image} ."
    lines = [
        f"# {workload.name}",
        "",
        (
            "A model repository of Triton and the files to deploy it, "
            "written by `sparse-export package`. Read "
            "the comments"
        ),
        "at the top of a file before you use it. `package.json` lists every file with its SHA-256.",
        "",
        "| model | runtime | task | names of its classes | largest batch | manifest of its bundle |",
        "|---|---|---|---|---|---|",
        *(
            f"| {m.name} | {m.runtime} | {m.task} | {_labels(m)} | {m.max_batch or 'not merged'} | "
            f"{m.manifest_sha256[:12]} |"
            for m in models
        ),
        "",
        "| file | is |",
        "|---|---|",
        "| `model_repository/` | the models |",
        "| `golden/` | inputs and their outputs for each bundle; `golden.json` says which file is which |",
        "| `client/` | a client that checks the golden output, and a load script |",
        *(f"| `{name}` | {_CONTENTS[name].format(build=build)} |" for name in files),
    ]
    lines += _asking(models)
    if workload.tensorrt is not None:
        version = workload.tensorrt
        lines += ["", f"The engines were built by TensorRT {version} and need an image with that version."]
    missing = [f"- `{name}`: {reason}." for name, reason in left_out.items()]
    missing += [f"- {name}, {one}." for name, reasons in engines_left_out.items() for one in reasons]
    lines += ["", "## Left out", "", *missing] if missing else []
    if workload.base_image is None and workload.has_python_models:
        packages = ", ".join(f"`{requirement}`" for requirement in workload.requirements)
        lines += [
            "",
            f"An image of your own needs these packages for the models of the Python backend: {packages}.",
        ]
    return "\n".join(lines) + "\n"
