"""Compares a dense bundle with a sparse one: accuracy, size and time, each with what it can be trusted to."""

from __future__ import annotations

from sparse_export.comparison.comparing import compare
from sparse_export.comparison.judging import judge
from sparse_export.comparison.result import Comparison, LatencyComparison, Side, check_gates, write_results

__all__ = ["Comparison", "LatencyComparison", "Side", "check_gates", "compare", "judge", "write_results"]
