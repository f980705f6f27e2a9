"""A comparison in one sentence."""

from __future__ import annotations

from sparse_export.evaluate.comparison import Comparison, LatencyComparison
from sparse_export.evaluate.verdict import times_text
from sparse_export.tasks.scores import better_text, difference_text, value_text

__all__ = ["verdict"]


def verdict(comparison: Comparison) -> str:
    """Speed, score and size of sparse against dense, and a gate that failed, as one sentence."""
    parts = [_speed(comparison), _score(comparison), _size(comparison)]
    kinds = [side.precision for side in (comparison.dense, comparison.sparse)]
    unlike = f" in {kinds[1]}, against dense {kinds[0]}," if kinds[0] != kinds[1] else ""
    density = f"At density {comparison.sparse.density:.3g} of its sparse layers"  # others stay dense
    text = f"{density} the sparse network{unlike} {_listed(parts)}"
    if "[" in "".join(parts):
        text += ", with 95 % intervals in brackets"
    failed = [clause for clause in (comparison.gate_failed, comparison.speedup_missed) if clause]
    if failed:
        text += f", which fails what was required: {' '.join(failed).rstrip('.')}"
    return f"{text}."


def _listed(parts: list[str]) -> str:
    known = [part for part in parts if part]
    return f"{', '.join(known[:-1])} and {known[-1]}" if len(known) > 1 else "".join(known)


def _speed(comparison: Comparison) -> str:
    """The outcomes grouped, those of one kind together."""
    words = {
        "speed-up": "is faster",
        "slow-down": "is slower",
        "no difference": "is not faster",
        "not told apart": "is not told apart in speed from the dense one",
    }
    parts = []
    for outcome, what in words.items():
        at = [one for one in comparison.latency if one.outcome == outcome]
        if at:
            parts.append(f"{what} at {_batches(at)}")
    return " but ".join(parts) + f" with {comparison.runtime}" if parts else ""


def _batches(at: list[LatencyComparison]) -> str:
    return ", ".join(f"batch {one.batch} ({times_text(one.ratio)})" for one in at)


def _score(comparison: Comparison) -> str:
    dense, sparse = comparison.dense.score, comparison.sparse.score
    if dense is None or sparse is None:
        return "has a score that was not measured against the dense one"
    text = f"has {value_text(sparse)} {sparse.name} against {value_text(dense)}"
    if not sparse.is_share:
        text = f"has {sparse.name} {value_text(sparse)} against {value_text(dense)}, {better_text(sparse)}"
    if comparison.difference is not None:
        return f"{text} ({difference_text(comparison.difference, is_share=sparse.is_share)})"
    return f"{text} as recorded"


def _size(comparison: Comparison) -> str:
    dense, sparse = comparison.dense.size_bytes, comparison.sparse.size_bytes
    return f"takes {sparse / dense:.2f} of the bytes" if dense else ""
