"""Prunes a graph with and without recovery, and keeps what is closer to the dense network on other samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from sparse_export.errors import UsageError
from sparse_export.oneshot.graph_pruning import PrunedGraph, sparsify_graph
from sparse_export.oneshot.held_back import HeldBack
from sparse_export.oneshot.parted import Parted, parted
from sparse_export.oneshot.recovery import Recovery, RecoveryResult
from sparse_export.oneshot.sensitivity import change_of_outputs
from sparse_export.oneshot.switchable import SwitchableSession
from sparse_export.signature import Array, Feeds, Signature
from sparse_export.tasks.samples import BatchSamples

__all__ = ["changed_arrays", "kept_of", "sparsify_recovering"]

_SHARE = 5  # one in so many samples decides
_MOST = 64  # of them


def sparsify_recovering(
    model: onnx.ModelProto | Parted,
    *,
    signature: Signature,
    batches: Sequence[Feeds] | None,
    recovery: Recovery | None,
    **options: Any,
) -> PrunedGraph:
    """Prune a graph by one walk, and with a recovery by another; keep what changes the outputs less.

    Args:
        model: as of `sparsify_graph`, as are signature and options.
        batches: calibration inputs. With a recovery weights are calibrated on four fifths of the samples, and
            the others decide.
        recovery: the steps; None for none.

    Raises:
        UsageError: there are fewer than five samples to recover by.
        SparseExportError: as `sparsify_graph`.
    """
    if recovery is None:
        return sparsify_graph(model, signature=signature, batches=batches, **options)
    if not batches:
        raise UsageError(
            "--recover was given, and there are no samples to hold the network against the dense one on.",
            do="Give real inputs, or leave --recover out.",
        )
    rest, check = _split(batches, signature)
    options = {**options, "errors": True}
    dense = parted(model)
    plain = sparsify_graph(dense, signature=signature, batches=rest, **options)
    other = sparsify_graph(dense, signature=signature, batches=rest, recovery=recovery, **options)
    samples = BatchSamples(parts=tuple(check), signature=signature)
    held = HeldBack(samples=samples, targets=None, task=None, words="calibration samples")
    switched = changed_arrays(other, dense) | changed_arrays(plain, dense)
    with SwitchableSession(
        dense, signature, switched, n_values=samples.n_values, n_threads=options.get("n_threads")
    ) as session:
        changes = change_of_outputs(
            session,
            held,
            {
                name: session.values(changed_arrays(one, one.graph))
                for name, one in (("plain", plain), ("other", other))
            },
        )
    kept = changes["other"] < changes["plain"]
    result = RecoveryResult(
        steps=recovery.steps,
        kept=kept,
        change_without=changes["plain"],
        change_with=changes["other"],
        n_samples=len(samples),
    )
    return replace(other if kept else plain, recovery=result)


def kept_of(recovery: Recovery | None, first: PrunedGraph) -> Recovery | None:
    """The recovery where it helped on the first walk; None otherwise."""
    return recovery if first.recovery is not None and first.recovery.kept else None


def changed_arrays(pruned: PrunedGraph, graph: Parted) -> dict[str, Array]:
    """What a graph stores under the names of all tensors that pruning changed."""
    names = set(pruned.masks) | {name for beside in pruned.beside.values() for name in beside}
    return {one.name: graph.read(one) for one in graph.model.graph.initializer if one.name in names}


def _split(batches: Sequence[Feeds], signature: Signature) -> tuple[list[Feeds], list[Feeds]]:
    """Four fifths of the samples, and the others, 64 at most."""
    sizes = [signature.n_samples(feeds) for feeds in batches]
    n_check = min(_MOST, int(np.sum(sizes)) // _SHARE)
    if not n_check or (signature.batch is None and len(batches) < _SHARE):
        raise UsageError(
            f"{sum(sizes)} samples are too few to recover by: one in {_SHARE} decides whether it helps.",
            do=f"Give {_SHARE} or more samples, or leave --recover out.",
        )
    rest: list[Feeds] = []
    check: list[Feeds] = []
    for feeds, n in zip(reversed(batches), reversed(sizes), strict=True):
        back = min(n, n_check)
        if signature.batch is None:
            (check if n_check > 0 else rest).append(feeds)
        else:
            if back:
                check.append(signature.part(feeds, n - back, n))
            if back < n:
                rest.append(signature.part(feeds, 0, n - back))
        n_check -= back
    return rest[::-1], check[::-1]
