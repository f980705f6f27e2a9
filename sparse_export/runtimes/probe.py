"""Probes the ONNX file of a bundle from elsewhere in a child process before this one opens it.

onnxruntime does not check what a file computes: one that divides the smallest int64 by -1 ends the process by
SIGFPE. A bundle that this user built or vouches for is opened at once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import signal
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sparse_export import child, trust
from sparse_export.errors import ArtefactError, MissingCapability, OutputError, SparseExportError
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import Bundle
from sparse_export.formats.listed import file_of
from sparse_export.formats.preparation import PREPROCESS_FILE
from sparse_export.signature import Signature

__all__ = ["require_preprocess_probed", "require_probed", "require_runnable"]

_WORKER = "sparse_export.runtimes.probe_worker"
_PICTURE_SIZE = 48  # height and width of noise
_LIMIT_S = {"cpu": 300.0, "cuda": 300.0, "tensorrt": 1800.0}  # TensorRT builds its engines first


def require_probed(
    bundle: Bundle,
    *,
    provider: str = "cpu",
    trusted: trust.TrustedDigests = None,
    limit_s: float | None = None,
) -> None:
    """Check that `model.onnx` of a bundle may be opened in this process.

    It may when this user vouches for the manifest, or when a child process has opened it and run it on the
    golden input, or on zeros where it has none, and on noise in batches of 1 and 32 where it takes them; once
    for each provider while this process lives. This catches accidents and simple attacks: a file that waits
    for an input or a batch of its own choosing passes. A trust store that cannot be used vouches for nothing
    here.

    Args:
        bundle: an opened bundle.
        provider: of onnxruntime: `cpu`, `cuda` or `tensorrt`.
        trusted: digests passed with --trust.
        limit_s: seconds that the child process gets; 300 by default, 1800 for TensorRT.

    Raises:
        ArtefactError: the manifest does not list the file, or it was changed; or the child process was ended
            by a signal, took too long, or could not run the file.
        MissingCapability: the provider is missing.
        OutputError: the child process has no room to write.
        SparseExportError: as the trust store raises.
    """
    model = bundle.onnx_path
    digest = bundle.manifest_sha256
    if not _is_vouched_for(digest, trusted):
        golden = {name: file for name, file in bundle.info.golden.inputs.items() if file in bundle.info.files}
        _probe(
            model.absolute(),
            digest,
            json.dumps(asdict(bundle.info.signature), sort_keys=True),
            tuple((name, str(file_of(bundle, file).absolute())) for name, file in golden.items()),
            provider,
            _LIMIT_S[provider] if limit_s is None else limit_s,
        )


def require_preprocess_probed(
    bundle: Bundle, *, trusted: trust.TrustedDigests = None, limit_s: float | None = None
) -> None:
    """As `require_probed`, for `preprocess.onnx` on the CPU; nothing where a bundle has none."""
    info, signature = bundle.info.preprocess, bundle.info.signature
    digest = bundle.manifest_sha256
    if info is None or _is_vouched_for(digest, trusted):
        return
    sizes = {
        one: _PICTURE_SIZE for one in info.input.shape if isinstance(one, str) and one != signature.batch
    }
    described = Signature(
        inputs=(info.input,), outputs=signature.inputs[:1], batch=signature.batch, sizes=sizes
    )
    _probe(
        file_of(bundle, PREPROCESS_FILE).absolute(),
        digest,
        json.dumps(asdict(described), sort_keys=True),
        ((info.input.name, str(file_of(bundle, info.golden_input).absolute())),),
        "cpu",
        _LIMIT_S["cpu"] if limit_s is None else limit_s,
    )


def require_runnable(model: Path, signature: Signature, *, limit_s: float = _LIMIT_S["cpu"]) -> None:
    """Check that an ONNX file may be opened in this process, as `require_probed` does for a bundle's.

    Args:
        model: any ONNX file.
        signature: of it.
        limit_s: seconds that the child process gets.

    Raises:
        ArtefactError: the child process was ended by a signal, took too long, or could not run the file.
        OutputError: the child process has no room to write.
    """
    described = json.dumps(asdict(signature), sort_keys=True)
    _probe(model.absolute(), sha256_file(model), described, (), "cpu", limit_s)


def _is_vouched_for(digest: str, trusted: trust.TrustedDigests) -> bool:
    """Does this user vouch for a manifest? A trust store that cannot be used changes nothing."""
    if digest in trust.digests(trusted):
        with contextlib.suppress(SparseExportError):  # one that cannot be stored holds for this command
            trust.remember(digest)
        return True
    try:
        return trust.is_trusted(digest)
    except SparseExportError:
        return False


@functools.lru_cache(maxsize=256)  # keeps no errors
def _probe(
    model: Path,
    manifest_sha256: str,
    signature: str,
    golden: tuple[tuple[str, str], ...],
    provider: str,
    limit_s: float,
) -> None:
    """Open and run a model in a child process. signature: as JSON, so that it can be a key."""
    request = {
        "model": str(model),
        "inputs": dict(golden),
        "signature": json.loads(signature),
        "provider": provider,
        "limit_s": limit_s,
        "memory_bytes": _memory_bytes() if provider == "cpu" else None,
    }
    try:
        child.call(_WORKER, request, limit_s=limit_s, options=("-S",))
    except child.ChildError as error:  # whatever is wrong with its input is a fault of the bundle
        raise error.as_one_of(MissingCapability, OutputError, otherwise=ArtefactError) from None
    except child.ChildFailed as failed:
        # SIGKILL: the kernel ends what takes too much memory. None: its time was up.
        large = failed.returncode in (None, -signal.SIGKILL)
        raise _failed(model, manifest_sha256, failed.how, large=large) from None


def _memory_bytes() -> int | None:
    """Three quarters of the memory that is free, which a probe may take; None where that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if free is None else int(free) * 1024 * 3 // 4


def _failed(model: Path, manifest_sha256: str, how: str, *, large: bool) -> ArtefactError:
    """The error of a probe that ended without a result. large: the file may only be too large."""
    vouch = f"If you trust it and it is only large, pass --trust {manifest_sha256}: it is not probed then."
    return ArtefactError(
        f"{model} comes from elsewhere, and the process that probed it with {_onnxruntime()} {how}.",
        do=f"Build it again from its run, or ask whoever made it.{f' {vouch}' if large else ''}",
    )


def _onnxruntime() -> str:
    """Name and version of the installed onnxruntime."""
    for name in ("onnxruntime-gpu", "onnxruntime"):
        try:
            return f"onnxruntime {version(name)}"
        except PackageNotFoundError:
            continue
    return "onnxruntime"
