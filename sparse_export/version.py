"""The version of the package, and those of what it runs on."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

__version__ = "0.2.0"


def now() -> str:
    """The time, UTC, as ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def command_line() -> tuple[str, ...]:
    """The words this process was started with, program name shortened."""
    program = Path(sys.argv[0])
    return ("sparse-export" if program.name == "__main__.py" else program.name, *sys.argv[1:])


_LIBRARIES = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "numpy")
_ENGINES = ("tensorrt-cu13", "tensorrt-rtx-cu13", "tensorrt", "tensorrt-rtx")


def library_versions() -> dict[str, str]:
    """Versions of ourselves, Python and the libraries that decide a result; imports none of them."""
    found = {"sparse-export": __version__, "python": platform.python_version()}
    for name in (*_LIBRARIES, *_ENGINES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
