"""Work in a process of its own: a JSON request goes in, a JSON result comes out, and a crash costs nothing
else.

`call` starts a worker module and `answer` is what that module does with its arguments. A process that lives
longer, and tells how far it is, is started by its owner with `environment` and `ending` from here.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparse_export.errors import SparseExportError
from sparse_export.files import temporary_folder, write_json
from sparse_export.telemetry import telemetry_environment

__all__ = ["ChildError", "ChildFailed", "answer", "call", "ending", "environment", "last_lines"]

_TAIL_LINES = 3


class ChildFailed(Exception):  # noqa: N818 - it is never shown: whoever calls raises an error of its own
    """The process gave no result.

    Attributes:
        how: what became of it, as a sentence about the process goes on, with the end of what it wrote to
            stderr.
        returncode: of the process, None where its time was up.
    """

    def __init__(self, how: str, *, returncode: int | None) -> None:
        self.how = how
        self.returncode = returncode
        super().__init__(how)


class ChildError(Exception):
    """An error of this package that the worker raised.

    Attributes:
        kind: name of its class.
        what, expected, do: its parts.
    """

    def __init__(self, *, kind: str, what: str, expected: str, do: str) -> None:
        self.kind = kind
        self.what = what
        self.expected = expected
        self.do = do
        super().__init__(what)

    def as_one_of(
        self, *kinds: type[SparseExportError], otherwise: type[SparseExportError]
    ) -> SparseExportError:
        """The same error, of its own class where that is among `kinds`."""
        cls = {one.__name__: one for one in kinds}.get(self.kind, otherwise)
        return cls(self.what, expected=self.expected, do=self.do)


def call(
    module: str,
    request: Mapping[str, Any],
    *,
    limit_s: float,
    links: Mapping[str, Path] | None = None,
    options: tuple[str, ...] = (),
) -> Any:
    """Run a worker module on a request, in a folder of its own that is removed afterwards.

    Args:
        module: full name; it ends with `sys.exit(answer(sys.argv[1:], work))`.
        request: JSON-able.
        limit_s: seconds after which the process is killed.
        links: files for the worker, by the name that they have in its folder.
        options: of the Python interpreter.

    Returns:
        What the worker returned.

    Raises:
        ChildError: the worker raised an error of this package.
        ChildFailed: it crashed, took too long, or ended without a result.
        OutputError: the folder cannot be made.
    """
    with temporary_folder() as work:
        for name, path in (links or {}).items():
            (work / name).symlink_to(path.absolute())
        write_json(work / "request.json", request)
        try:
            ended = subprocess.run(
                [sys.executable, *options, "-m", module, "request.json", "result.json"],
                cwd=work,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired as cause:
            raise ChildFailed(f"was not done after {limit_s:g} s", returncode=None) from cause
        file = work / "result.json"
        document = json.loads(file.read_bytes()) if not ended.returncode and file.is_file() else {}
    if "error" in document:
        raise ChildError(**document["error"])
    if "result" not in document:
        how = ending(ended.returncode) if ended.returncode else "ended without a result"
        tail = last_lines(ended.stderr.decode(errors="replace"), _TAIL_LINES)
        raise ChildFailed(f"{how}{': ' if tail else ''}{' '.join(tail)}", returncode=ended.returncode)
    return document["result"]


def answer(words: list[str], work: Callable[[dict[str, Any]], Any]) -> int:
    """What a worker does with its two arguments, the files of the request and of the result.

    Args:
        words: the arguments.
        work: the request -> a JSON-able result. An error of this package goes into the file of the result.

    Returns:
        The exit code 0, whatever is found out.
    """
    request = json.loads(Path(words[0]).read_bytes())
    try:
        document = {"result": work(request)}
    except SparseExportError as error:
        parts = {"what": error.what, "expected": error.expected, "do": error.do}
        document = {"error": {"kind": type(error).__name__, **parts}}
    write_json(Path(words[1]), document)
    return 0


def environment() -> dict[str, str]:
    """The environment of a child process: every module is found where this process has it, and telemetry is
    off.

    Whether this process has imported onnxruntime, which sets the same variables, changes nothing in it.
    """
    home = str(Path(__file__).resolve().parents[1])  # a checkout may run without being installed
    first = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [path for path in (*first, home, *sys.path) if path]
    return {**os.environ, **telemetry_environment(), "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def ending(returncode: int) -> str:
    """How a process that did not end with 0 did end, as a sentence about it goes on."""
    if returncode < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-returncode).name}"
        return f"was ended by signal {-returncode}"
    return f"ended with {returncode}, without a word"


def last_lines(text: str, n: int) -> list[str]:
    """The last lines of a log, without empty ones at its ends."""
    return text.strip().splitlines()[-n:]
