"""Has a bundle from elsewhere opened and run by another process before this one opens its ONNX file.

onnxruntime computes what a file says without looking: one that divides the smallest int64 by -1 ends the process by
SIGFPE. What this user built or vouches for is opened at once.
"""

from __future__ import annotations

import contextlib
import functools
import signal
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sparse_export import child, trust
from sparse_export.errors import ArtefactError, MissingCapability, OutputError, SparseExportError
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import BUNDLE_FILE, GOLDEN_INPUT, Bundle
from sparse_export.formats.listed import file_of

__all__ = ["require_tried"]

_WORKER = "sparse_export.runtimes.probe_worker"
_LIMIT_S = {"cpu": 300.0, "cuda": 300.0, "tensorrt": 1800.0}  # TensorRT builds its engines first


def require_tried(
    bundle: Bundle, *, provider: str = "cpu", given: trust.Given = None, limit_s: float | None = None
) -> None:
    """Return when `model.onnx` of a bundle whose files were checked may be opened in this process.

    That is when this user vouches for its manifest, or when a process of its own has opened it and run it on the
    golden input, or on zeros where it has none, and on noise in batches of 1 and 32 where it takes them; once for
    each provider while this process lives. That catches accidents and blunt attacks: a file that waits for an input or
    a batch of its own choosing passes it. A trust store that cannot be used vouches for nothing here.
    given: digests that the user passed with --trust.  limit_s: seconds that the other process gets.

    Raises ArtefactError (the manifest does not list the file, or it was changed; that process was ended by a signal, took too long, or could not run the file),
    MissingCapability, OutputError, or what the trust store raises.
    """
    model = bundle.onnx_path
    digest = sha256_file(bundle.path / BUNDLE_FILE)
    if not _is_vouched_for(digest, given):
        listed = GOLDEN_INPUT in bundle.info.files
        _try(
            model.absolute(),
            digest,
            bundle.info.model.input_shape,
            file_of(bundle, GOLDEN_INPUT).absolute() if listed else None,
            provider,
            _LIMIT_S[provider] if limit_s is None else limit_s,
        )


def _is_vouched_for(digest: str, given: trust.Given) -> bool:
    if digest in trust.digests(given):
        with contextlib.suppress(SparseExportError):  # one that cannot be remembered holds for this command
            trust.remember(digest)
        return True
    try:
        return trust.is_trusted(digest)
    except SparseExportError:
        return False


@functools.lru_cache(maxsize=256)  # keeps no errors
def _try(
    model: Path,
    manifest_sha256: str,
    input_shape: tuple[int, ...],
    golden: Path | None,
    provider: str,
    limit_s: float,
) -> None:
    request = {
        "model": str(model),
        "input": None if golden is None else str(golden),
        "input_shape": input_shape,
        "provider": provider,
        "limit_s": limit_s,
    }
    try:
        child.call(_WORKER, request, limit_s=limit_s, options=("-S",))
    except child.ChildError as error:  # whatever it says of its input is a fault of the bundle
        raise error.as_one_of(MissingCapability, OutputError, otherwise=ArtefactError) from None
    except child.ChildFailed as failed:
        # As the kernel ends what takes too much memory; None where its time was up.
        large = failed.returncode in (None, -signal.SIGKILL)
        raise _failed(model, manifest_sha256, failed.how, large=large) from None


def _failed(model: Path, manifest_sha256: str, how: str, *, large: bool) -> ArtefactError:
    vouch = f"If you trust it and it is only large, pass --trust {manifest_sha256}: no other process tries it then."
    return ArtefactError(
        f"{model} comes from elsewhere, and the process that tried it with {_onnxruntime()} {how}.",
        expected="A file that can be opened and run was expected.",
        do=f"Build it anew from its run, or ask whoever made it.{f' {vouch}' if large else ''}",
    )


def _onnxruntime() -> str:
    for name in ("onnxruntime-gpu", "onnxruntime"):
        try:
            return f"onnxruntime {version(name)}"
        except PackageNotFoundError:
            continue
    return "onnxruntime"
