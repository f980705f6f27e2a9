"""Prunes a graph with and without what may help, and keeps what is closer to the dense network on other samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from sparse_export.errors import UsageError
from sparse_export.oneshot.graph_pruning import PrunedGraph, sparsify_graph
from sparse_export.oneshot.held_back import HeldBack
from sparse_export.oneshot.norms import norms_of
from sparse_export.oneshot.parted import Parted, parted
from sparse_export.oneshot.recovery import CHANNELS, NormsResult, Recovery, RecoveryResult
from sparse_export.oneshot.sensitivity import change_of_outputs
from sparse_export.oneshot.switchable import SwitchableSession
from sparse_export.oneshot.wiring import wiring_of
from sparse_export.signature import Array, Feeds, Signature
from sparse_export.tasks.samples import BatchSamples

__all__ = ["changed_arrays", "kept_of", "n_held_of", "sparsify_recovering", "split"]

_SHARE = 5  # one in so many samples decides
_MOST = 64  # of them


def sparsify_recovering(
    model: onnx.ModelProto | Parted,
    *,
    signature: Signature,
    batches: Sequence[Feeds] | None,
    recovery: Recovery | None,
    norms: bool = False,
    **options: Any,
) -> PrunedGraph:
    """Prune a graph by one walk, and by another one for each thing that may help; keep what changes the outputs less.

    Args:
        model: as of `sparsify_graph`, as are signature and options.
        batches: calibration inputs. With a recovery or norms weights are calibrated on four fifths of the samples,
            and the others decide.
        recovery: the steps; None for none.
        norms: re-estimate batch norms in a walk, beside the recovery where that was kept. In a graph that has none
            with statistics of their own, bias and scale of each channel are corrected instead, unless there is a
            recovery.

    Raises:
        UsageError: there are fewer than five samples to decide by.
        SparseExportError: as `sparsify_graph`.
    """
    if recovery is None and not norms:
        return sparsify_graph(model, signature=signature, batches=batches, **options)
    asked = "--norms" if recovery is None else "--recover"
    if not batches:
        raise UsageError(
            f"{asked} compares the network with the dense one, and there are no samples for that.",
            do=f"Give real inputs, or leave {asked} out.",
        )
    dense = parted(model)
    if norms and not norms_of(dense.model, wiring_of(dense.model)):
        recovery, norms = recovery or CHANNELS, False
    rest, check = split(batches, signature, asked)

    def walk(steps: Recovery | None, *, with_norms: bool = False) -> PrunedGraph:
        own = {**options, "errors": True} if recovery is not None else options
        return sparsify_graph(
            dense, signature=signature, batches=rest, recovery=steps, norms=with_norms, **own
        )

    held = _held(check, signature)
    found, steps = walk(None), None
    if recovery is not None:
        other = walk(recovery)
        without, changed = _changes(dense, signature, held, (found, other), options.get("n_threads"))
        kept = changed < without
        result = RecoveryResult(
            steps=recovery.steps,
            kept=kept,
            change_without=without,
            change_with=changed,
            n_samples=len(held),
        )
        found, steps = replace(other if kept else found, recovery=result), recovery if kept else None
    if norms:
        other = walk(steps, with_norms=True)
        without, changed = _changes(dense, signature, held, (found, other), options.get("n_threads"))
        settled = NormsResult(
            n_norms=len(other.norms) // 2,
            kept=changed < without,
            change_without=without,
            change_with=changed,
            n_samples=len(held),
        )
        found = replace(other if settled.kept else found, recovery=found.recovery, settled=settled)
    return found


def _held(check: Sequence[Feeds], signature: Signature) -> HeldBack:
    samples = BatchSamples(parts=tuple(check), signature=signature)
    return HeldBack(samples=samples, targets=None, task=None, words="calibration samples")


def _changes(
    dense: Parted, signature: Signature, held: HeldBack, pair: tuple[PrunedGraph, PrunedGraph], n_threads: Any
) -> tuple[float, float]:
    """How much the outputs of both change from those of the dense graph."""
    switched = changed_arrays(pair[0], dense) | changed_arrays(pair[1], dense)
    with SwitchableSession(
        dense, signature, switched, n_values=held.samples.n_values, n_threads=n_threads
    ) as session:
        weights = {
            str(number): session.values(changed_arrays(one, one.graph)) for number, one in enumerate(pair)
        }
        changes = change_of_outputs(session, held, weights)
    return changes["0"], changes["1"]


def kept_of(recovery: Recovery | None, first: PrunedGraph) -> Recovery | None:
    """The recovery where it helped on the first walk; None otherwise."""
    return recovery if first.recovery is not None and first.recovery.kept else None


def changed_arrays(pruned: PrunedGraph, graph: Parted) -> dict[str, Array]:
    """What a graph stores under the names of all tensors that pruning changed."""
    names = {*pruned.masks, *pruned.norms, *(name for beside in pruned.beside.values() for name in beside)}
    return {one.name: graph.read(one) for one in graph.model.graph.initializer if one.name in names}


def n_held_of(n: int, option: str) -> int:
    """How many samples decide whether something helps, the last ones of all.

    Args:
        n: calibration samples.
        option: that asks for it.

    Raises:
        UsageError: they are too few.
    """
    if n < _SHARE:
        raise UsageError(
            f"{n} samples are too few for {option}: one in {_SHARE} decides whether it helps.",
            do=f"Give {_SHARE} or more samples, or leave {option} out.",
        )
    return min(_MOST, n // _SHARE)


def split(batches: Sequence[Feeds], signature: Signature, option: str) -> tuple[list[Feeds], list[Feeds]]:
    """Four fifths of the samples, and the others, 64 at most, which decide whether something helps.

    Args:
        batches: calibration inputs.
        signature: of the network.
        option: that asks for it.

    Raises:
        UsageError: they are too few.
    """
    sizes = [signature.n_samples(feeds) for feeds in batches]
    n_check = n_held_of(len(batches) if signature.batch is None else int(np.sum(sizes)), option)
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
