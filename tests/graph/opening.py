"""Opens ONNX files, each in a process of its own, and tells what that took: seconds of a core and memory.

python -m tests.graph.opening FILE...    a JSON object a line
"""

from __future__ import annotations

import json
import os
import resource
import sys
import warnings
from pathlib import Path

import onnxscript.optimizer

from sparse_export.errors import SparseExportError
from sparse_export.graph import layers  # noqa: F401 - loaded once, before the clock runs
from sparse_export.graph.ends import signature_of
from sparse_export.graph.model import open_model
from sparse_export.inspect import inspect

_LIMIT_S = 60


def _inspected(file: Path) -> str:
    found = inspect(file)
    found.shown().draw()
    return f"{len(found.graph)} layers"


def _with_signature(file: Path) -> str:
    """As `sparsify` opens a file."""
    return str(signature_of(open_model(file)))[:100]


def _outcome(use: str, file: Path) -> str:
    warnings.simplefilter("ignore")
    try:
        return {"inspect": _inspected, "signature": _with_signature}[use](file)
    except SparseExportError as error:
        return f"{type(error).__name__}: {error}"[:500]
    except BaseException as error:  # noqa: BLE001 - it is what is looked for
        return f"raised {type(error).__name__}: {error}"[:500]


def opened(use: str, file: Path) -> dict[str, object]:
    """Open a file in a fork of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (_LIMIT_S, _LIMIT_S))
        os.write(writing, _outcome(use, file).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        outcome = pipe.read().decode() or "was ended"
    _, _, usage = os.wait4(child, 0)
    return {
        "use": use,
        "file": file.name,
        "seconds": usage.ru_utime + usage.ru_stime,
        "bytes": usage.ru_maxrss * 1024,
        "outcome": outcome,
    }


if __name__ == "__main__":
    assert onnxscript.optimizer is not None
    for name in sys.argv[1:]:
        for use in ("inspect", "signature"):
            print(json.dumps(opened(use, Path(name))), flush=True)
