"""A process that opens ONNX files with onnxruntime, one after the other, and is started again when one ends
it.

python -m tests.engines.opener        # a path a line on stdin, what came of it a line on stdout
"""

from __future__ import annotations

import selectors
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from sparse_export import child
from sparse_export.errors import SparseExportError
from sparse_export.runtimes.onnxruntime import open_session

__all__ = ["Opener"]

_LIMIT_S = 60.0
RAN, REFUSED, ESCAPED, DIED = "ran", "refused", "escaped", "died"


class Opener:
    """Owns the process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def open(self, path: Path) -> tuple[str, str]:
        """What came of opening and running a file: RAN, REFUSED by an error of ours, ESCAPED by another, or
        DIED.
        """
        process = self._process = self._process or subprocess.Popen(
            [sys.executable, "-m", "tests.engines.opener"],
            cwd=Path(__file__).resolve().parents[2],
            env=child.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        print(path, file=process.stdin, flush=True)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            line = process.stdout.readline() if selector.select(_LIMIT_S) else ""
        if line:
            state, _, told = line.rstrip("\n").partition(" ")
            return state, told
        self.close()
        return DIED, str(process.returncode)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _opened(path: Path) -> str:
    try:
        with open_session(path, n_threads=1) as session:
            session.run(np.zeros((2, 16), dtype=np.float32))
    except SparseExportError as error:
        return f"{REFUSED} {type(error).__name__}"
    except Exception as error:  # noqa: BLE001 - which is what is looked for
        return f"{ESCAPED} {type(error).__name__}: {error}".replace("\n", " ")
    return RAN


if __name__ == "__main__":
    for word in sys.stdin:
        print(_opened(Path(word.rstrip("\n"))), flush=True)
