"""Measures whether a bundle still computes what its run did: accuracy, and difference from PyTorch."""

from __future__ import annotations

from sparse_export.evaluate.validation.gates import check_gates
from sparse_export.evaluate.validation.parity import golden_parity
from sparse_export.evaluate.validation.references import run_of_bundle
from sparse_export.evaluate.validation.result import (
    AgainstDense,
    Parity,
    RuntimeResult,
    Validation,
    write_results,
)
from sparse_export.evaluate.validation.validating import validate

__all__ = [
    "AgainstDense",
    "Parity",
    "RuntimeResult",
    "Validation",
    "check_gates",
    "golden_parity",
    "run_of_bundle",
    "validate",
    "write_results",
]
