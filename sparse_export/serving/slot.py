"""A bundle that `serve` serves: its models in the repository, and what the server has loaded of them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from sparse_export.errors import MissingCapability, UnknownNameError
from sparse_export.runtimes.probe import require_preprocess_probed, require_probed
from sparse_export.serving.picture_models import PictureModels, write_picture_models
from sparse_export.serving.process import WorkFolder
from sparse_export.serving.repository import (
    RUNTIMES,
    Runtime,
    Served,
    largest_batch,
    require_served,
    why_not_served,
    write_config,
    write_version,
)
from sparse_export.serving.serve_options import ServeOptions
from sparse_export.serving.server_files import ServerFiles

__all__ = [
    "Loaded",
    "Slot",
    "choose_runtime",
    "emptied",
    "require_files_probed",
    "write_model",
    "write_models_around",
]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model that the server has loaded, and whose golden output is right.

    Attributes:
        name: on the server.
        version: on the server.
        runtime: that runs it.
        manifest_sha256: of its bundle.
        largest_difference: of its float outputs from the golden ones; None where it has none to compare.
        compared: names of the outputs that were compared; not those whose length depends on the values of the
            inputs.
    """

    name: str
    version: int
    runtime: str
    manifest_sha256: str
    largest_difference: float | None
    compared: tuple[str, ...]

    def __str__(self) -> str:
        answer = "golden answer right" if self.compared else "answers, with no output that can be compared"
        difference = self.largest_difference
        by = "" if difference is None else f", largest difference {difference:.3g}"
        return f"{self.name} version {self.version} by {self.runtime}: {answer}{by}"


def choose_runtime(served: Served, server: ServerFiles, requested: str) -> Runtime:
    """The requested runtime, or for `auto` the first that both the server and the bundle have."""
    if requested == "auto":
        for runtime in RUNTIMES:
            if why_not_served(served, runtime) is None and runtime in server.backends:
                return runtime
    for runtime in RUNTIMES:
        if runtime == requested:
            if runtime not in server.backends:
                raise MissingCapability(
                    f"{server.binary} has no backend {requested!r}; it has "
                    f"{', '.join(sorted(server.backends)) or 'none'}.",
                    do="Use --runtime auto, or NVIDIA's container, which has them all.",
                )
            require_served(served, runtime)
            return runtime
    if requested != "auto":
        raise UnknownNameError("runtime", requested, ["auto", *RUNTIMES])
    raise MissingCapability(
        f"{server.binary} has no backend that serves {served.bundle.path}.", do="Install NVIDIA's build."
    )


def require_files_probed(served: Served, runtime: Runtime, options: ServeOptions) -> None:
    """Probe the ONNX file: one that ends its process would end the server, with all its models."""
    if runtime != "tensorrt":
        require_probed(served.bundle, trusted=options.trust, limit_s=options.start_timeout_s)
    require_preprocess_probed(served.bundle, trusted=options.trust, limit_s=options.start_timeout_s)


def _preprocessing_runtime(runtime: Runtime, server: ServerFiles) -> Runtime:
    """The network's own, or for an engine another: TensorRT does not scale pictures as training did."""
    if runtime != "tensorrt":
        return runtime
    return "onnxruntime" if "onnxruntime" in server.backends else "python"


@dataclass(kw_only=True)
class Slot:
    """A model in the repository: the bundle that its newest version came from."""

    path: Path
    served: Served
    runtime: Runtime
    pictures: PictureModels | None = None
    version: int = 1

    @property
    def model_names(self) -> tuple[str, ...]:
        """Of all its models on the server."""
        return (self.name, *(() if self.pictures is None else self.pictures.names))

    @property
    def name(self) -> str:
        """Of the model on the server."""
        return self.served.name

    @property
    def needs_host_code(self) -> bool:
        """Must the server's TensorRT backend be allowed to run code that an engine holds?"""
        return self.runtime == "tensorrt" and self.served.holds_host_code


def write_model(folder: WorkFolder, target: Path, slot: Slot, options: ServeOptions, *, version: int) -> None:
    """Write a whole model elsewhere, and move it to `target` in one step."""
    stage = emptied(folder.staging / "model")
    stage.mkdir()
    write_version(stage / str(version), slot.served, slot.runtime, options.settings, str(folder.activity))
    write_config(stage, target.name, slot.served, slot.runtime, options.settings)
    stage.rename(target)


def write_models_around(folder: WorkFolder, slot: Slot, server: ServerFiles, options: ServeOptions) -> None:
    """Write the models that make the network's input of raw samples, where the bundle has them."""
    if slot.pictures is not None:
        write_picture_models(
            folder.repository,
            slot.served,
            slot.pictures,
            _preprocessing_runtime(slot.runtime, server),
            options.settings,
            max_batch=largest_batch(slot.served, slot.runtime, options.settings),
            activity=str(folder.activity),
        )


def emptied(place: Path) -> Path:
    """A path to write to, after removing what a failed attempt left there."""
    shutil.rmtree(place, ignore_errors=True)
    return place
