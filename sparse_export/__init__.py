"""Train sparse networks by sparse momentum, export them as checked bundles, compare dense with sparse.

The names below are loaded when they are first used, so that `import sparse_export` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sparse_export.artefact import Bundle, Run, open_bundle, open_run
    from sparse_export.building import build
    from sparse_export.comparison import compare
    from sparse_export.errors import SparseExportError
    from sparse_export.sparsifying import sparsify
    from sparse_export.train import SparseTraining
    from sparse_export.validation import validate

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
    "Bundle": "sparse_export.artefact",
    "Run": "sparse_export.artefact",
    "SparseExportError": "sparse_export.errors",
    "SparseTraining": "sparse_export.train",
    "build": "sparse_export.building",
    "compare": "sparse_export.comparison",
    "open_bundle": "sparse_export.artefact",
    "open_run": "sparse_export.artefact",
    "sparsify": "sparse_export.sparsifying",
    "validate": "sparse_export.validation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
