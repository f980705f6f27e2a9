"""What a build would write, without building anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_export.artefact import read_run_info
from sparse_export.engine import door
from sparse_export.engine.options import EngineOptions, Precision, engine_file
from sparse_export.errors import SparseExportError

__all__ = ["BuildPlan", "PlannedFile", "planned_build"]


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


def planned_build(
    run: Path,
    out: Path | None,
    *,
    targets: Sequence[str],
    engines: Sequence[EngineOptions],
    form: str,
    precision: Precision = "fp32",
) -> BuildPlan:
    """What `build` would write. Raises UsageError or ArtefactError for a run that cannot be read."""
    info = read_run_info(run)
    name = info.model.name or "the network"
    bundle = out or run.absolute().with_name(f"{run.absolute().name}-bundle")
    files = [
        PlannedFile(
            file="model.onnx", how=f"{precision}, {form}" if form != "both" else f"{precision}, packed"
        )
    ]
    if form == "both":
        files.append(PlannedFile(file="model-dense.onnx", how=f"{precision}, dense"))
    files += [_planned_engine(one, precision) for one in engines if one.target in targets]
    return BuildPlan(run=str(run), bundle=str(bundle), model=name, precision=precision, files=tuple(files))


def _planned_engine(options: EngineOptions, precision: Precision) -> PlannedFile:
    parts = [f"profiles {', '.join(map(str, options.profiles))}"]
    if options.workspace_bytes is not None:
        parts.append(f"workspace {options.workspace_bytes >> 20} MiB")
    if options.optimization_level is not None:
        parts.append(f"optimization level {options.optimization_level}")
    if options.hardware != "none":
        parts.append(f"hardware compatibility {options.hardware}")
    if options.version_compatible:
        parts.append("version compatible")
    gpu = door.gpu()
    architectures = options.architectures
    if options.target == "tensorrt" and gpu is not None:
        architectures = (gpu.architecture,)
    problem = None
    try:
        version = door.version(options.target)
        if options.target == "tensorrt" and gpu is None:
            problem = "TensorRT builds on the GPU that the engine is for, and there is none here."
    except SparseExportError as cause:
        version, problem = "not here", f"{cause.what} {cause.do}"
    return PlannedFile(
        file=engine_file(options.target, precision, architectures),
        how=f"{options.target} {version}, {', '.join(parts)}",
        problem=problem,
    )
