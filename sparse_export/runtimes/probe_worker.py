"""Opens and runs an ONNX file in a child process, which the file may end. The worker of `probe.py`."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from sparse_export.child import answer
from sparse_export.errors import ArtefactError, SparseExportError, UsageError
from sparse_export.runtimes import Session
from sparse_export.runtimes.onnxruntime import open_session

__all__ = ["probe"]

_BATCHES = (1, 32)  # as commands time them by default
_GRACE_S = 5  # the parent process waits that much less


def probe(request: dict[str, Any]) -> None:
    """Open the model of a request, and run it.

    Args:
        request: `model`, `input` (a file, or None for zeros), `input_shape` (of one sample), `provider` and
            `limit_s`.

    Raises:
        SparseExportError: the model cannot be opened or run.
    """
    _limit_process(request["limit_s"])
    x = _input(request)
    with open_session(Path(request["model"]), provider=request["provider"]) as session:
        _run(session, x, request)
        _run_noise(session, request)


def _limit_process(limit_s: float) -> None:
    """Allow no core file, and end this process after the limit, in whatever code it then is."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(math.ceil(limit_s) + _GRACE_S)


def _run(session: Session, x: np.ndarray, request: dict[str, Any]) -> None:
    """Run the input of the request."""
    try:
        session.run(x)
    except UsageError as cause:
        raise ArtefactError(
            f"{request['model']} does not take {request['input'] or 'its declared input'}. {cause.what}",
            expected=cause.expected,
            do="Build the bundle again.",
        ) from cause


def _run_noise(session: Session, request: dict[str, Any]) -> None:
    """Run noise in other batches; neither the outputs matter nor whether the file takes the batches."""
    for batch in _BATCHES:
        shape = (batch, *request["input_shape"])
        with contextlib.suppress(SparseExportError):
            session.run(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))


def _input(request: dict[str, Any]) -> np.ndarray:
    """Load the input of the request, or zeros where it names none."""
    if request["input"] is None:
        return np.zeros((1, *request["input_shape"]), dtype=np.float32)
    try:
        x: np.ndarray = np.load(request["input"], allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError) as cause:
        raise ArtefactError(
            f"{request['input']} cannot be read as a NumPy array: {cause}.",
            do="Build the bundle again.",
        ) from cause
    return x


if __name__ == "__main__":
    sys.exit(answer(sys.argv[1:], probe))
