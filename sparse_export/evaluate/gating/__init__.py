"""One verdict on a bundle that is to be deployed: every link of the chain from its weights to its speed."""

from __future__ import annotations

from sparse_export.evaluate.gating.gate import Gate, check_gate, gate, write_results

__all__ = ["Gate", "check_gate", "gate", "write_results"]
