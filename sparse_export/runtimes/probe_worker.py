"""Opens and runs an ONNX file in a child process, which the file may end. The worker of `probe.py`."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from sparse_export.child import answer
from sparse_export.errors import ArtefactError, SparseExportError, UsageError
from sparse_export.runtimes import Session
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.signature import Array, Feeds, Signature, numpy_dtype

__all__ = ["probe"]

_BATCHES = (1, 32)  # as commands time them by default
_GRACE_S = 5  # the parent process waits that much less


def probe(request: dict[str, Any]) -> None:
    """Open the model of a request, and run it.

    Args:
        request: `model`, `inputs` (a file by name; some may be missing, and are zeros, or what is next to
            zero in their range), `signature`, `provider` and `limit_s`.

    Raises:
        SparseExportError: the model cannot be opened or run.
    """
    _limit_process(request["limit_s"], request.get("memory_bytes"))
    signature: Signature = pydantic.TypeAdapter(Signature).validate_python(request["signature"])
    feeds = _inputs(request, signature)
    path = Path(request["model"])
    with open_session(path, signature=signature, provider=request["provider"]) as session:
        _run(session, feeds, request)
        _run_noise(session, feeds)


def _limit_process(limit_s: float, memory_bytes: int | None) -> None:
    """Allow no core file and no more than so much memory, and end this process after the limit, in whatever
    code it then is.
    """
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if memory_bytes is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(math.ceil(limit_s) + _GRACE_S)


def _run(session: Session, feeds: Feeds, request: dict[str, Any]) -> None:
    """Run the inputs of the request."""
    try:
        session.run(feeds)
    except UsageError as cause:
        files = ", ".join(request["inputs"].values())
        raise ArtefactError(
            f"{request['model']} does not take {files or 'its declared inputs'}. {cause.what}",
            expected=cause.expected,
            do="Build the bundle again.",
        ) from cause


def _run_noise(session: Session, feeds: Feeds) -> None:
    """Run noise in other batches; neither the outputs matter nor whether the file takes the batches."""
    signature = session.signature
    for batch in _BATCHES:
        with contextlib.suppress(SparseExportError):
            noise = signature.draw(batch, 0) if signature.drawable else signature.repeated(feeds, batch)
            session.run(noise)


def _inputs(request: dict[str, Any], signature: Signature) -> dict[str, Array]:
    """Load the inputs of the request; zeros in place of those that it does not name."""
    found = {}
    sizes = signature.with_sizes(1)
    for one in signature.inputs:
        file = request["inputs"].get(one.name)
        if file is None:
            low = 0 if one.low is None else max(0, one.low)
            value = low if one.high is None else min(low, one.high)
            found[one.name] = np.full(one.sizes(sizes), value, dtype=numpy_dtype(one.dtype))
            continue
        try:
            array: Array = np.load(file, allow_pickle=False)
        except (ValueError, EOFError, OSError, MemoryError) as cause:
            raise ArtefactError(
                f"{file} cannot be read as a NumPy array: {cause}.",
                do="Build the bundle again.",
            ) from cause
        found[one.name] = array.astype(numpy_dtype(one.dtype)) if one.dtype == "bfloat16" else array
    return found


if __name__ == "__main__":
    sys.exit(answer(sys.argv[1:], probe))
