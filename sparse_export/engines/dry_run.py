"""The dry run of a build: the files it would write, and what would prevent it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_export.engines import tensorrt_import
from sparse_export.engines.options import EngineOptions, Precision, engine_file, profile_text
from sparse_export.engines.precision import CALIBRATED
from sparse_export.errors import MissingCapability, UsageError
from sparse_export.formats.bundle import ENGINE_MODEL_FILE
from sparse_export.formats.preparation import PREPROCESS_FILE, RawType
from sparse_export.formats.run import RunInfo
from sparse_export.signature import Signature

__all__ = ["DryRun", "DryRunFile", "describe_build", "require_timeable"]


@dataclass(frozen=True, kw_only=True)
class DryRunFile:
    """A file that a build would write.

    Attributes:
        file: path within the bundle.
        how: precision, versions and options, in words.
        problem: why it cannot be built here; None where it can.
    """

    file: str
    how: str
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a build of a run would write. str() formats it for people.

    Attributes:
        run: folder of the run.
        bundle: folder of the bundle.
        model: name of the network.
        precision: of the graph.
        files: one entry for each model file and engine.
    """

    run: str
    bundle: str
    model: str
    precision: str
    files: tuple[DryRunFile, ...]

    def __str__(self) -> str:
        width = max(len(one.file) for one in self.files)
        lines = [f"{self.model} of {self.run} as {self.precision} to {self.bundle}; no bundle was written"]
        for one in self.files:
            lines.append(f"{one.file:<{width}}  {one.how}")
            if one.problem is not None:
                lines.append(f"{'':<{width}}  ! {one.problem}")
        return "\n".join(lines)


def require_timeable(options: Collection[EngineOptions]) -> None:
    """Check that the layers of engines can be timed here.

    Args:
        options: of the engines to build.

    Raises:
        UsageError: no engine is to be built.
        MissingCapability: there is no CUDA device, or torch sees none.
    """
    if not options:
        raise UsageError(
            "Layers of engines are to be timed, and no engine is built.",
            do=f"Add --target {' or '.join(tensorrt_import.TARGETS)}, or leave --time-layers out.",
        )
    if tensorrt_import.gpu() is None:
        raise MissingCapability(
            "Layers of engines cannot be timed here: there is no CUDA device.",
            do="Build on the machine that the engine is for, or leave --time-layers out.",
        )
    import torch

    if not torch.cuda.is_available():
        raise MissingCapability(
            f"Layers of engines cannot be timed here: torch {torch.__version__} sees no CUDA device.",
            do="Install a torch built for CUDA, whose tensors engines run on, or leave --time-layers out.",
        )


def describe_build(
    run: Path,
    info: RunInfo,
    bundle: Path,
    *,
    engines: Sequence[EngineOptions],
    form: str,
    precision: Precision = "fp32",
    time_layers: bool = False,
    postprocess: Sequence[str] = (),
    preprocess: bool = False,
    fold: RawType | None = None,
) -> DryRun:
    """Describe what a build would write; a target that cannot be built here is listed with its problem.

    Args:
        run: folder of the run.
        info: of the run.
        bundle: folder of the bundle.
        engines: options of every target that is an engine.
        form: `dense`, `packed` or `both`, of the ONNX file.
        precision: of the graph.
        time_layers: each engine's layers are to be timed.
        postprocess: steps that are appended to the graph.
        preprocess: the graph before it is written too.
        fold: type of the raw samples that the graph takes; None for the network's own input.

    Raises:
        UsageError: a library does not build for a GPU that the options name, or a profile does not fit.
    """
    name = info.model.name or "the network"
    forms = {"model.onnx": form} if form != "both" else {"model.onnx": "packed", "model-dense.onnx": "dense"}
    raw = [] if fold is None else [f"raw samples in {fold}"]
    files = [
        DryRunFile(file=file, how=", ".join([precision, one, *raw, *postprocess]))
        for file, one in forms.items()
    ]
    if precision in CALIBRATED:
        how = ", ".join([f"{precision} between float16, for engines", *postprocess])
        files.append(DryRunFile(file=ENGINE_MODEL_FILE, how=how))
    if preprocess:
        files.append(DryRunFile(file=PREPROCESS_FILE, how="the network's input of raw samples"))
    files += [_describe_engine(one, info.signature, precision, time_layers) for one in engines]
    return DryRun(run=str(run), bundle=str(bundle), model=name, precision=precision, files=tuple(files))


def _describe_engine(
    options: EngineOptions, signature: Signature, precision: Precision, time_layers: bool
) -> DryRunFile:
    """Describe the file of one engine, and what would prevent it here."""
    profiles = [profile_text(one) for one in options.bounds(signature) if one]
    parts = [f"profiles {' and '.join(profiles)}" if profiles else "sizes all fixed"]
    if options.workspace_bytes is not None:
        parts.append(f"workspace {options.workspace_bytes >> 20} MiB")
    if options.optimization_level is not None:
        parts.append(f"optimization level {options.optimization_level}")
    if options.hardware != "none":
        parts.append(f"hardware compatibility {options.hardware}")
    if options.version_compatible:
        parts.append("version compatible")
    if time_layers:
        parts.append("each layer timed against an engine without sparse kernels")
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
    return DryRunFile(
        file=engine_file(options.target, precision, architectures),
        how=f"{options.target} {version}, {', '.join(parts)}",
        problem=problem,
    )
