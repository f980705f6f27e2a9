"""What a build would write, or refuse, without building anything."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_export.engines import tensorrt_import
from sparse_export.engines.options import EngineOptions, Precision, engine_file
from sparse_export.errors import MissingCapability, UsageError
from sparse_export.formats.run import RunInfo

__all__ = ["BuildPlan", "PlannedFile", "planned_build", "require_timeable"]


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """A file that a build would write. how: in words.  problem: why it could not be made here, None if it could."""

    file: str
    how: str
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """What would be built of a run. str() gives it for people."""

    run: str
    bundle: str
    model: str
    precision: str
    files: tuple[PlannedFile, ...]

    def __str__(self) -> str:
        width = max(len(one.file) for one in self.files)
        lines = [f"{self.model} of {self.run} as {self.precision} to {self.bundle}; nothing was written"]
        for one in self.files:
            lines.append(f"{one.file:<{width}}  {one.how}")
            if one.problem is not None:
                lines.append(f"{'':<{width}}  ! {one.problem}")
        return "\n".join(lines)


def require_timeable(options: Collection[EngineOptions]) -> None:
    """Raise UsageError where no engine is to be built, MissingCapability where none can be run here."""
    if not options:
        raise UsageError(
            "Layers of engines were to be timed, and no engine is built.",
            expected="A target that is an engine was expected.",
            do=f"Add --target {' or '.join(tensorrt_import.TARGETS)}, or leave --time-layers out.",
        )
    if tensorrt_import.gpu() is None:
        raise MissingCapability(
            "Layers of engines cannot be timed here: there is no CUDA device.",
            expected="An NVIDIA GPU with its driver was expected, the one that the engine is for.",
            do="Build on that machine, or leave --time-layers out.",
        )
    import torch

    if not torch.cuda.is_available():
        raise MissingCapability(
            f"Layers of engines cannot be timed here: torch {torch.__version__} sees no CUDA device.",
            expected="A torch built for CUDA was expected, on whose tensors engines run.",
            do="Install that torch, or leave --time-layers out.",
        )


def planned_build(
    run: Path,
    info: RunInfo,
    bundle: Path,
    *,
    engines: Sequence[EngineOptions],
    form: str,
    precision: Precision = "fp32",
    time_layers: bool = False,
) -> BuildPlan:
    """What `build` would write. A target that cannot be built here is told of with its file.

    info: of the run.  engines: of every target that is one.  Raises UsageError for a GPU that a library does not build
    for.
    """
    name = info.model.name or "the network"
    files = [
        PlannedFile(
            file="model.onnx", how=f"{precision}, {form}" if form != "both" else f"{precision}, packed"
        )
    ]
    if form == "both":
        files.append(PlannedFile(file="model-dense.onnx", how=f"{precision}, dense"))
    files += [_planned_engine(one, precision, time_layers) for one in engines]
    return BuildPlan(run=str(run), bundle=str(bundle), model=name, precision=precision, files=tuple(files))


def _planned_engine(options: EngineOptions, precision: Precision, time_layers: bool) -> PlannedFile:
    parts = [f"profiles {', '.join(map(str, options.profiles))}"]
    if options.workspace_bytes is not None:
        parts.append(f"workspace {options.workspace_bytes >> 20} MiB")
    if options.optimization_level is not None:
        parts.append(f"optimization level {options.optimization_level}")
    if options.hardware != "none":
        parts.append(f"hardware compatibility {options.hardware}")
    if options.version_compatible:
        parts.append("version compatible")
    if time_layers:
        parts.append("each layer timed against a twin without sparse kernels")
    gpu = tensorrt_import.gpu()
    architectures = options.architectures
    if options.target == "tensorrt" and gpu is not None:
        architectures = (gpu.architecture,)
    problem = None
    try:
        version = tensorrt_import.version(options.target)
        if options.architectures:
            tensorrt_import.require_architectures(options.architectures)
        if options.target == "tensorrt" and gpu is None:
            problem = "TensorRT builds on the GPU that the engine is for, and there is none here."
    except MissingCapability as cause:
        version, problem = "not here", f"{cause.what} {cause.do}"
    return PlannedFile(
        file=engine_file(options.target, precision, architectures),
        how=f"{options.target} {version}, {', '.join(parts)}",
        problem=problem,
    )
