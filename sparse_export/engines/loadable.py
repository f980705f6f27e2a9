"""Checks whether an engine of a bundle may be loaded here: is it whole, trusted, and for this machine?

An engine holds native code. Its manifest proves only that nothing was changed by accident, since whoever
changes the engine can change the manifest; so this user has to vouch for the manifest's own digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparse_export import trust
from sparse_export.engines import tensorrt_import
from sparse_export.engines.header import read_header, require_whole
from sparse_export.errors import ArtefactError, MissingCapability, SparseExportError, UsageError
from sparse_export.formats.bundle import Bundle
from sparse_export.formats.engines import EngineInfo
from sparse_export.formats.listed import file_of

__all__ = ["engine_of", "problem_with", "require_all_genuine", "require_genuine", "require_loadable"]


def engine_of(bundle: Bundle, target: str) -> EngineInfo:
    """Find the engine of a bundle for a target; of several the first.

    Args:
        bundle: an opened bundle.
        target: `tensorrt` or `tensorrt-rtx`.

    Raises:
        UsageError: the bundle has none.
    """
    for engine in bundle.info.engines:
        if engine.target == target:
            return engine
    has = ", ".join(engine.target for engine in bundle.info.engines) or "none"
    raise UsageError(
        f"{bundle.path} has no engine for {target}; its engines: {has}.",
        do=f"Build it with --target {target}.",
    )


def require_loadable(bundle: Bundle, engine: EngineInfo, *, trusted: trust.TrustedDigests = None) -> None:
    """Check that an engine may be loaded into this process. Nothing is deserialised.

    Args:
        bundle: an opened bundle.
        engine: its record of the engine.
        trusted: digests passed with --trust; that of the bundle's manifest is remembered.

    Raises:
        ArtefactError: the file was changed, or is for another library version or another GPU.
        NotTrustedError: this user does not vouch for the manifest.
        MissingCapability: the library or a GPU is missing.
    """
    require_genuine(bundle, engine, trusted=trusted)
    name = Path(engine.file).name
    _require_version(name, engine, tensorrt_import.version(engine.target))
    _require_gpu(name, engine)


def require_genuine(bundle: Bundle, engine: EngineInfo, *, trusted: trust.TrustedDigests = None) -> None:
    """Check that an engine is the file of its manifest, and that this user vouches for the manifest.

    These are the checks that need neither the library nor a GPU.

    Args:
        bundle: an opened bundle.
        engine: its record of the engine.
        trusted: digests passed with --trust.

    Raises:
        ArtefactError: the file was changed.
        NotTrustedError: this user does not vouch for the manifest.
    """
    require_all_genuine([(bundle, engine)], trusted=trusted)


def require_all_genuine(
    engines: Sequence[tuple[Bundle, EngineInfo]], *, trusted: trust.TrustedDigests = None
) -> None:
    """As `require_genuine`, for several: the error names all the digests that are needed.

    Args:
        engines: opened bundles, each with its record of an engine.
        trusted: digests passed with --trust.

    Raises:
        ArtefactError: a file was changed.
        NotTrustedError: this user does not vouch for one or more of the manifests.
    """
    trust.require_all([_genuine(bundle, engine) for bundle, engine in engines], trusted=trusted)


def _genuine(bundle: Bundle, engine: EngineInfo) -> trust.RunsCode:
    """The engine, once it is the file of its manifest. Raises ArtefactError."""
    path = file_of(bundle, engine.file)
    header = read_header(path)
    require_whole(path, header)
    if header.target is not None and (header.target, header.version) != (engine.target, engine.version):
        raise ArtefactError(
            f"{path} is an engine of {header.target} {header.version}, "
            f"and of {engine.target} {engine.version} by its manifest.",
            do="Build the bundle again.",
        )
    return trust.RunsCode(sha256=bundle.manifest_sha256, what=f"The engine {path}")


def problem_with(
    bundle: Bundle, engine: EngineInfo, *, trusted: trust.TrustedDigests = None
) -> SparseExportError | None:
    """Return the error that `require_loadable` would raise, None when there is none.

    Args:
        bundle: an opened bundle.
        engine: its record of the engine.
        trusted: digests passed with --trust.
    """
    try:
        require_loadable(bundle, engine, trusted=trusted)
    except SparseExportError as cause:
        return cause
    return None


def _require_version(name: str, engine: EngineInfo, here: str) -> None:
    """Raise ArtefactError where the installed version cannot load an engine."""
    built, found = (
        tuple(int(part) for part in text.split(".") if part.isdigit()) for text in (engine.version, here)
    )
    if built == found or (engine.version_compatible and found >= built):
        return
    later = " or later" if engine.version_compatible else ""
    raise ArtefactError(
        f"{name} was built by {engine.target} {engine.version}, and {here} is here.",
        do=f"Build it again here, or install {engine.version}{later}: engines are bound to their version.",
    )


def _require_gpu(name: str, engine: EngineInfo) -> None:
    """Raise MissingCapability or ArtefactError where an engine does not run on the GPU of this machine."""
    gpu = tensorrt_import.gpu()
    if gpu is None:
        raise MissingCapability(
            f"{name} cannot run here: there is no CUDA device.",
            do="Use the ONNX file with onnxruntime-cpu, or a machine with an NVIDIA GPU and its driver.",
        )
    if _fits(engine, int(gpu.architecture[2:])):
        return
    if engine.target == "tensorrt-rtx" and not tensorrt_import.rtx_supports(gpu.architecture):
        raise MissingCapability(
            f"{name} cannot run here: TensorRT for RTX does not support this GPU, "
            f"{gpu.name} ({gpu.architecture}).",
            expected="It supports compute capability 7.5, 8.0, 8.6, 8.9, and 12.0 or later.",
            do="Build with --target tensorrt for this GPU, or run the ONNX file with onnxruntime.",
        )
    wanted = ", ".join(engine.architectures) or engine.architecture or "sm80, sm86, sm89, or sm120 or later"
    raise ArtefactError(
        f"{name} is not for this GPU, {gpu.name} ({gpu.architecture}), but for {wanted}.",
        do=f"Build it again with --gpu-arch {gpu.architecture}."
        if engine.target == "tensorrt-rtx"
        else "Build it again here, or for this GPU.",
    )


def _fits(engine: EngineInfo, here: int) -> bool:
    """Does an engine run on this compute capability, as in 89?"""
    if engine.target == "tensorrt-rtx":
        return tensorrt_import.rtx_runs_on(f"sm{here}", engine.architectures)
    if engine.hardware == "ampere-plus":
        return here >= 80
    return engine.architecture is not None and here == int(engine.architecture[2:])
