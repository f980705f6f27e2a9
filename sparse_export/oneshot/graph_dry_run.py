"""What each layer of a graph changes by itself, without anything written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparse_export.oneshot.choice import Sensitivities
from sparse_export.oneshot.choosing import sensitivities_of
from sparse_export.oneshot.costs import Finished
from sparse_export.oneshot.graph_choice import Bound
from sparse_export.oneshot.graph_inputs import Scoring, held_back, split_inputs
from sparse_export.oneshot.graph_pruning import CALIBRATION_MEMORY
from sparse_export.oneshot.graph_source import GraphSource
from sparse_export.oneshot.layers import Method
from sparse_export.oneshot.recovering import sparsify_recovering
from sparse_export.oneshot.recovery import Recovery
from sparse_export.sparsity.pattern import NMPattern

__all__ = ["graph_sensitivities"]


def graph_sensitivities(
    source: GraphSource,
    *,
    pattern: NMPattern,
    method: Method,
    inputs: Path | None,
    calibration_samples: int,
    bound: Bound,
    keep_dense: Sequence[str] = (),
    memory_bytes: int = CALIBRATION_MEMORY,
    seed: int = 0,
    n_threads: int | None = None,
    observer: Finished | None = None,
    scoring: Scoring | None = None,
    recovery: Recovery | None = None,
) -> Sensitivities:
    """Measure what each layer of a graph changes if it alone is sparse; nothing is written.

    Args:
        source: the network.
        pattern: as of `sparsify_source`, as are all others.

    Raises:
        SparseExportError: likewise.
    """
    signature, split = split_inputs(source, inputs, calibration_samples, seed, scoring, bound)
    held, _ = held_back(signature, split, scoring, bound, inputs, seed)
    pruned = sparsify_recovering(
        source.model,
        recovery=recovery,
        signature=signature,
        batches=split.calibration or None,
        pattern=pattern,
        method=method,
        keep_dense=keep_dense,
        memory_bytes=memory_bytes,
        observer=observer,
        n_threads=n_threads,
    )
    return sensitivities_of(source.model, signature, pruned, held, timings=bound.timings, n_threads=n_threads)
