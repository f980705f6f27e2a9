"""Train sparse networks by sparse momentum, export them as checked bundles, compare dense with sparse.

The names below are loaded when they are first used, so that `import sparse_export` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparse_export.version import __version__ as __version__

if TYPE_CHECKING:
    from sparse_export.building import build
    from sparse_export.errors import SparseExportError
    from sparse_export.evaluate.compare import compare
    from sparse_export.evaluate.validate import validate
    from sparse_export.formats.bundle import Bundle, open_bundle
    from sparse_export.formats.run import Run, open_run
    from sparse_export.oneshot import sparsify
    from sparse_export.train import SparseTraining

__all__ = [
    "Bundle",
    "Run",
    "SparseExportError",
    "SparseTraining",
    "build",
    "compare",
    "open_bundle",
    "open_run",
    "sparsify",
    "validate",
]

_HOME = {
    "Bundle": "sparse_export.formats.bundle",
    "Run": "sparse_export.formats.run",
    "SparseExportError": "sparse_export.errors",
    "SparseTraining": "sparse_export.train",
    "build": "sparse_export.building",
    "compare": "sparse_export.evaluate.compare",
    "open_bundle": "sparse_export.formats.bundle",
    "open_run": "sparse_export.formats.run",
    "sparsify": "sparse_export.oneshot",
    "validate": "sparse_export.evaluate.validate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
