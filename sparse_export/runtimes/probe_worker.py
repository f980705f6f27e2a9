"""Opens an ONNX file and runs it once, in a process of its own, which it may end.

    python -m sparse_export.runtimes.probe_worker REQUEST.json RESULT.json

REQUEST.json: as `trial.py` writes it.  RESULT.json: written when it did not end the process; `error`, with the `kind`
that was raised, where it could not be run.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from sparse_export.errors import ArtefactError, SparseExportError, UsageError
from sparse_export.files import write_json
from sparse_export.runtimes import Session
from sparse_export.runtimes.onnxruntime import open_session

__all__ = ["main"]

_BATCHES = (1, 32)  # as commands time them by default
_GRACE_S = 5  # whoever asks waits that much less


def main(words: list[str]) -> int:
    """Try what a request names; 0 whatever is found out."""
    request = json.loads(Path(words[0]).read_bytes())
    _bound(request["limit_s"])
    try:
        x = _input(request)
        with open_session(Path(request["model"]), provider=request["provider"]) as session:
            _run(session, x, request)
            _run_others(session, request)
    except SparseExportError as error:
        told = {"what": error.what, "expected": error.expected, "do": error.do}
        write_json(Path(words[1]), {"kind": type(error).__name__, "error": told})
    else:
        write_json(Path(words[1]), {})
    return 0


def _bound(limit_s: float) -> None:
    """No core file, and an end by the clock also where nobody waits any more, in whatever code it then is."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(math.ceil(limit_s) + _GRACE_S)


def _run(session: Session, x: np.ndarray, request: dict[str, Any]) -> None:
    try:
        session.run(x)
    except UsageError as cause:
        raise ArtefactError(
            f"{request['model']} does not take {request['input'] or 'its declared input'}. {cause.what}",
            expected=cause.expected,
            do="Build the bundle again.",
        ) from cause


def _run_others(session: Session, request: dict[str, Any]) -> None:
    """Noise in other batches: what they answer does not matter, nor whether the file takes them."""
    for batch in _BATCHES:
        shape = (batch, *request["input_shape"])
        with contextlib.suppress(SparseExportError):
            session.run(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))


def _input(request: dict[str, Any]) -> np.ndarray:
    if request["input"] is None:
        return np.zeros((1, *request["input_shape"]), dtype=np.float32)
    try:
        x: np.ndarray = np.load(request["input"], allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError) as cause:
        raise ArtefactError(
            f"{request['input']} cannot be read: {cause}.",
            expected="A NumPy array was expected.",
            do="Rebuild it.",
        ) from cause
    return x


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
