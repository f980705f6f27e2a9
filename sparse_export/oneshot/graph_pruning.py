"""Prunes the weights of an ONNX graph in one shot, each calibrated on what the pruned ones before it give."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto
from torch import Tensor

from sparse_export.errors import UsageError
from sparse_export.graph.passes.float16 import value_types, with_bfloat16_emulated
from sparse_export.oneshot.branches import with_taken_branches
from sparse_export.oneshot.calibrating import (
    DenseWalk,
    biases_of,
    calibrate,
    dense_segments,
    statistics_of_weight,
    stop_of,
    sums_of,
)
from sparse_export.oneshot.costs import Finished, costs_of
from sparse_export.oneshot.graph_state import State, bits_of, digest_of
from sparse_export.oneshot.graph_weights import weights_of_graph, with_uses_in
from sparse_export.oneshot.graph_work import GraphWork, too_large
from sparse_export.oneshot.layers import Method
from sparse_export.oneshot.links import links_of
from sparse_export.oneshot.norms import norms_of
from sparse_export.oneshot.parted import Parted, parted
from sparse_export.oneshot.recovery import NormsResult, Recovery, RecoveryResult
from sparse_export.oneshot.report import SparsifiedLayer
from sparse_export.oneshot.segments import Segment, plan_segments
from sparse_export.oneshot.unfolding import LARGEST_GRAM, InputStatistics, require_finite
from sparse_export.oneshot.walk import Walk
from sparse_export.oneshot.wiring import wiring_of
from sparse_export.signature import Feeds, Signature
from sparse_export.sparsity.pattern import NMPattern

__all__ = [
    "CALIBRATION_MEMORY",
    "NOT_ASKED_FOR",
    "PrunedGraph",
    "has_walk",
    "sparsify_graph",
    "squares_of_graph",
]

CALIBRATION_MEMORY = 3 * 2**29
"""Bytes of the values that a walk keeps in memory between two segments."""

NOT_ASKED_FOR = "error not measured: --errors was not given"


@dataclass(frozen=True, kw_only=True)
class PrunedGraph:
    """A graph after pruning.

    Attributes:
        graph: a new one; names and types are those of the one that it was made of.
        layers: every weight, in graph order.
        n_calibration: samples that were looked at; 0 without a walk.
        n_resumed: layers that an earlier process had finished.
        spilled_bytes: of values that did not fit into the memory for them, and went to disk.
        masks: of the weights that were pruned, bool of the stored shape, by name.
        beside: by the name of a weight the other stored tensors that were changed with it.
        norms: by name the statistics of batch norms that were re-estimated, after all else.
        recovery: whether a recovery helped; None where none was tried.
        settled: whether re-estimated batch norms helped; None where there are none.
    """

    graph: Parted
    layers: tuple[SparsifiedLayer, ...]
    n_calibration: int
    n_resumed: int
    spilled_bytes: int
    masks: dict[str, Tensor]
    beside: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    recovery: RecoveryResult | None = None
    settled: NormsResult | None = None

    @functools.cached_property
    def model(self) -> onnx.ModelProto:
        """The graph with its weights in it, made when it is first asked for."""
        return self.graph.whole()


def sparsify_graph(
    model: onnx.ModelProto | Parted,
    *,
    signature: Signature,
    batches: Sequence[Feeds] | None,
    pattern: NMPattern,
    method: Method,
    keep_dense: Sequence[str] = (),
    planned_dense: Mapping[str, str] | None = None,
    memory_bytes: int = CALIBRATION_MEMORY,
    state: Path | None = None,
    observer: Finished | None = None,
    provider: str = "cpu",
    n_threads: int | None = None,
    only: Collection[str] | None = None,
    allowed: Mapping[str, Tensor] | None = None,
    errors: bool = False,
    recovery: Recovery | None = None,
    norms: bool = False,
) -> PrunedGraph:
    """Bring the weights of a graph under an N:M pattern by one walk over it.

    `magnitude` needs no walk, and there is none unless errors are asked for.

    Args:
        model: with its weights read or beside it, nodes in topological order, and without functions of its
            own. It stays as it is.
        signature: of it.
        batches: calibration inputs; None for `magnitude` without any.
        pattern: N:M.
        method: how weights are chosen, and what values they get.
        keep_dense: shell patterns of weights, or of nodes that multiply by them.
        planned_dense: weights that a plan leaves dense, with its reasons; it decides about small layers too.
        memory_bytes: bound of the values that are kept in memory; others go to a temporary folder.
        state: a folder in which each layer is noted as it is finished. What an earlier call for the same
            graph, inputs and options finished is taken from there, to the same result. The caller removes it.
        observer: told of each layer as it is finished.
        provider: of onnxruntime, for the walk.
        n_threads: of onnxruntime inside an operator; None for one for each core.
        only: the weights that get the pattern, as far as they can; None for all that should.
        allowed: by name, bool of the stored shape, False where a zero stays one.
        errors: measure the error of each layer by `magnitude` too; the other methods always do.
        recovery: steps that bring layers back towards the dense network, which then runs beside the pruned
            one; each walk has half of the memory. None for none.
        norms: give each batch norm, when the walk comes to it, the mean and variance of what it meets. That
            needs inputs.

    Raises:
        UsageError: inputs do not fit or are NaN or infinite inside the network, no weight can take the
            pattern, a name is unknown, or a method or errors need inputs and there are none.
        ArtefactError: a weight is not finite, or onnxruntime cannot run the graph.
        MissingCapability: memory, or the provider, is missing.
        OutputError: the state, or values that do not fit into memory, cannot be written.
    """
    batches = () if batches is None else batches
    if not batches and method != "magnitude":
        raise UsageError(
            f"The method {method} looks at what each layer meets on real inputs, and there are none.",
            do="Give --inputs FILE.npz, beside --data too, whose samples are scored on; or choose --method "
            "magnitude.",
        )
    if not batches and errors:
        raise UsageError(
            "--errors was given, and there are no inputs to measure errors on.",
            do="Give real inputs, or leave --errors out.",
        )
    for feeds in batches:
        signature.require_feeds(feeds)
    why_no_error = ""
    sees_weights = bool(batches) and has_walk(method, errors=errors)
    if batches and not sees_weights:
        why_no_error = NOT_ASKED_FOR
        batches = batches if norms else ()
    pruned = parted(model)
    wiring = wiring_of(pruned.model)
    weights = weights_of_graph(
        *(pruned.model, wiring, pattern),
        keep_dense=keep_dense,
        planned_dense=planned_dense,
        only=only,
        read=pruned.read,
    )
    kept = None
    if state is not None:
        options = {
            "pattern": str(pattern),
            "method": method,
            "errors": why_no_error,
            "provider": provider,
            "pruned": [weight.name for weight in weights.pruned],
            "allowed": {name: bits_of(mask) for name, mask in (allowed or {}).items()},
            "recovery": [] if recovery is None else recovery.steps,
            "norms": norms,
        }
        kept = State(folder=state, digest=digest_of(pruned, batches, options))
        kept.open()
    walked, found = pruned, weights.pruned
    if batches:
        walked = _to_walk(pruned, batches, memory_bytes, provider)
        if walked is not pruned:
            wiring = wiring_of(walked.model)
            found = with_uses_in(found, walked.model, wiring, read=walked.read)
    links, dense_graph = {}, None
    if recovery is not None and sees_weights:
        linked = [one for one in found if not too_large(one)]
        links = links_of(walked.model, wiring, linked, sums=recovery.sums, read=walked.read)
        dense_graph = walked.copied()
    work = GraphWork(
        pruned,
        walked,
        found,
        method,
        kept,
        observer,
        has_inputs=sees_weights,
        why_no_error=why_no_error,
        costs=costs_of(walked.model, found, batches if sees_weights else (), method),
        allowed=allowed or {},
        recovery=recovery,
        links=links,
    )
    spilled = 0
    seen = [weight for weight in found if not weight.unseen] if sees_weights else []
    settled = norms_of(walked.model, wiring) if norms else ()
    for weight in found:
        if weight not in seen and weight.name not in work.layers:
            work.finish(weight, None)
    if settled or any(weight.name not in work.layers for weight in seen):
        stops = [stop_of(weight, links.get(weight.name)) for weight in seen]
        stops += [norm.stop for norm in settled]
        segments = plan_segments(wiring, stops, most=LARGEST_GRAM)
        with ExitStack() as stack:

            def walk_over(graph: Parted, parts: Sequence[Segment]) -> Walk:
                return stack.enter_context(
                    Walk(
                        graph.model,
                        wiring,
                        parts,
                        batches,
                        memory_bytes=memory_bytes if dense_graph is None else memory_bytes // 2,
                        provider=provider,
                        n_threads=n_threads,
                        read=graph.read,
                    )
                )

            walk, beside = walk_over(walked, segments), None
            if dense_graph is not None:
                beside = DenseWalk(
                    walk=walk_over(dense_graph, dense_segments(wiring, segments, seen, links)),
                    links=links,
                    biases=biases_of(dense_graph, links),
                )
            for segment in segments:
                here = [seen[index] for index in segment.stops if index < len(seen)]
                met = [settled[index - len(seen)] for index in segment.stops if index >= len(seen)]
                calibrate(walk, segment, here, work, beside, met)
                if not settled and all(weight.name in work.layers for weight in seen):
                    break
            spilled = walk.live.spilled_bytes + (0 if beside is None else beside.walk.live.spilled_bytes)
    dense = {name: _left_dense(pruned, name, why) for name, why in weights.dense.items()}
    return PrunedGraph(
        graph=pruned,
        layers=tuple(work.layers.get(name) or dense[name] for name in weights.names),
        n_calibration=sum(signature.n_samples(feeds) for feeds in batches),
        n_resumed=work.n_resumed,
        spilled_bytes=spilled,
        masks=work.masks,
        beside=work.beside,
        norms=work.norms,
    )


def has_walk(method: Method, *, errors: bool) -> bool:
    """Does a method look at inputs, or are errors asked for?"""
    return errors or method != "magnitude"


def squares_of_graph(
    model: onnx.ModelProto | Parted,
    *,
    signature: Signature,
    batches: Sequence[Feeds],
    pattern: NMPattern,
    only: Collection[str],
    memory_bytes: int = CALIBRATION_MEMORY,
    n_threads: int | None = None,
) -> dict[str, InputStatistics]:
    """Sum up the squares of what weights are multiplied by, by one walk over a graph that stays as it is.

    Args:
        model: as of `sparsify_graph`, as are signature, batches, memory_bytes and n_threads.
        pattern: that the weights could get.
        only: the weights.

    Returns:
        By name, without those whose inputs are not seen.

    Raises:
        UsageError: inputs do not fit or are NaN or infinite inside the network.
        ArtefactError: onnxruntime cannot run the graph.
    """
    for feeds in batches:
        signature.require_feeds(feeds)
    graph = parted(model)
    wiring = wiring_of(graph.model)
    weights = weights_of_graph(graph.model, wiring, pattern, only=only, read=graph.read).pruned
    seen = [weight for weight in weights if not weight.unseen]
    stops = [replace(stop_of(weight), size=weight.form.n_groups * weight.form.n_columns) for weight in seen]
    segments = plan_segments(wiring, stops, most=LARGEST_GRAM)
    found: dict[str, InputStatistics] = {}
    with Walk(
        *(graph.model, wiring, segments, batches),
        memory_bytes=memory_bytes,
        n_threads=n_threads,
        read=graph.read,
    ) as walk:
        for segment in segments:
            here = [seen[index] for index in segment.stops]
            sums = sums_of(walk, segment, here, lambda _: False)
            for weight in here:
                one = statistics_of_weight(weight, sums)
                if one is not None:
                    require_finite(weight.name, one)
                    found[weight.name] = one
    return found


def _to_walk(graph: Parted, batches: Sequence[Feeds], memory_bytes: int, provider: str) -> Parted:
    """The graph as it is walked: a copy where it has choices between branches with layers, or bfloat16, which
    onnxruntime does not compute in on the CPU.
    """
    model = with_taken_branches(
        graph.model, batches, memory_bytes=memory_bytes, provider=provider, read=graph.read
    )
    walked = graph if model is graph.model else Parted(model=model, values=dict(graph.values))
    if provider == "cpu" and TensorProto.BFLOAT16 in value_types(model):
        return parted(with_bfloat16_emulated(walked.whole()))
    return walked


def _left_dense(graph: Parted, name: str, reason: str) -> SparsifiedLayer:
    """The report of a weight that stays as it is; of one that is not stored by name the shape is ()."""
    stored = next((tensor for tensor in graph.model.graph.initializer if tensor.name == name), None)
    values: Any = None if stored is None else graph.read(stored)
    floats = values is not None and values.dtype.kind in "fV"
    return SparsifiedLayer(
        name=name,
        shape=() if values is None else tuple(values.shape),
        n_weights=0 if values is None else int(values.size),
        n_active=0 if values is None else int(np.count_nonzero(values)),
        pattern=None,
        reason=reason,
        magnitude=float(np.abs(values.astype(np.float64)).sum()) if floats else 0.0,
        kept_in_order=None,
        kept_share=None,
        error=None,
    )
