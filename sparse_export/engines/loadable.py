"""Whether an engine of a bundle may be loaded here: is it whole, known to this user, and for this machine?

An engine holds native code. Its manifest proves only that nothing was changed by accident, since whoever changes the
one can change the other; so the manifest's own digest has to be one that this user vouches for.
"""

from __future__ import annotations

from pathlib import Path

from sparse_export import trust
from sparse_export.engines import tensorrt_import
from sparse_export.engines.header import read_header, require_whole
from sparse_export.errors import ArtefactError, MissingCapability, SparseExportError, UsageError
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import BUNDLE_FILE, Bundle
from sparse_export.formats.engines import EngineInfo
from sparse_export.formats.listed import file_of

__all__ = ["engine_of", "problem_with", "require_genuine", "require_loadable"]


def engine_of(bundle: Bundle, target: str) -> EngineInfo:
    """The engine of a bundle for a target; of several the first. Raises UsageError when it has none."""
    for fact in bundle.info.engines:
        if fact.target == target:
            return fact
    has = ", ".join(fact.target for fact in bundle.info.engines) or "none"
    raise UsageError(
        f"{bundle.path} has no engine for {target}.",
        expected=f"One of its engines was expected: {has}.",
        do=f"Build it with --target {target}.",
    )


def require_loadable(bundle: Bundle, fact: EngineInfo, *, given: trust.Given = None) -> None:
    """Return when the engine may be loaded into this process.

    given: SHA-256 of the bundle's manifest, which vouches for it from now on.
    Raises ArtefactError (changed, of another library version, for another GPU), NotTrustedError, or
    MissingCapability (no library, no GPU). Nothing is deserialised.
    """
    require_genuine(bundle, fact, given=given)
    name = Path(fact.file).name
    _require_version(name, fact, tensorrt_import.version(fact.target))
    _require_gpu(name, fact)


def require_genuine(bundle: Bundle, fact: EngineInfo, *, given: trust.Given = None) -> None:
    """Return when the engine is the file that its manifest tells of, and this user vouches for that manifest.

    What can be said without the library or a GPU. given: as of `require_loadable`.
    Raises ArtefactError or NotTrustedError.
    """
    path = file_of(bundle, fact.file)
    header = read_header(path)
    require_whole(path, header)
    if header.target is not None and (header.target, header.version) != (fact.target, fact.version):
        raise ArtefactError(
            f"{path} is an engine of {header.target} {header.version}.",
            expected=f"The manifest tells of {fact.target} {fact.version}.",
            do="Build the bundle again.",
        )
    trust.require(sha256_file(bundle.path / BUNDLE_FILE), f"The engine {path}", given=given)


def problem_with(bundle: Bundle, fact: EngineInfo, *, given: trust.Given = None) -> SparseExportError | None:
    """Why `require_loadable` would refuse, None when it would not."""
    try:
        require_loadable(bundle, fact, given=given)
    except SparseExportError as cause:
        return cause
    return None


def _require_version(name: str, fact: EngineInfo, here: str) -> None:
    built, found = (
        tuple(int(part) for part in text.split(".") if part.isdigit()) for text in (fact.version, here)
    )
    if built == found or (fact.version_compatible and found >= built):
        return
    later = " or later" if fact.version_compatible else ""
    raise ArtefactError(
        f"{name} was built by {fact.target} {fact.version}, and {here} is here.",
        expected=f"{fact.version}{later} was expected: engines are bound to it.",
        do="Build it again here, or install that version.",
    )


def _require_gpu(name: str, fact: EngineInfo) -> None:
    gpu = tensorrt_import.gpu()
    if gpu is None:
        raise MissingCapability(
            f"{name} cannot run here: there is no CUDA device.",
            expected="An NVIDIA GPU with its driver was expected.",
            do="Use the ONNX file with onnxruntime-cpu, or go to a machine with a GPU.",
        )
    if _fits(fact, int(gpu.architecture[2:])):
        return
    if fact.target == "tensorrt-rtx" and not tensorrt_import.rtx_supports(gpu.architecture):
        raise MissingCapability(
            f"{name} cannot run here: TensorRT for RTX does not support this GPU, {gpu.name} ({gpu.architecture}).",
            expected="A GPU of compute capability 7.5, 8.0, 8.6, 8.9, or 12.0 or later was expected.",
            do="Build with --target tensorrt for this GPU, or run the ONNX file with onnxruntime.",
        )
    wanted = ", ".join(fact.architectures) or fact.architecture or "sm80, sm86, sm89, or sm120 or later"
    raise ArtefactError(
        f"{name} is not for this GPU, {gpu.name} ({gpu.architecture}).",
        expected=f"{wanted} was expected.",
        do=f"Build it again with --gpu-arch {gpu.architecture}."
        if fact.target == "tensorrt-rtx"
        else "Build it again here, or for this GPU.",
    )


def _fits(fact: EngineInfo, here: int) -> bool:
    if fact.target == "tensorrt-rtx":
        return tensorrt_import.rtx_runs_on(f"sm{here}", fact.architectures)
    if fact.hardware == "ampere-plus":
        return here >= 80
    return fact.architecture is not None and here == int(fact.architecture[2:])
