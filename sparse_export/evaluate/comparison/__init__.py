"""Compares a dense bundle with a sparse one: accuracy, size and time, each with what it can be trusted to."""

from __future__ import annotations

from sparse_export.evaluate.comparison.comparing import compare
from sparse_export.evaluate.comparison.result import (
    Comparison,
    LatencyComparison,
    Side,
    check_gates,
    write_results,
)
from sparse_export.evaluate.comparison.verdict import judge

__all__ = ["Comparison", "LatencyComparison", "Side", "check_gates", "compare", "judge", "write_results"]
