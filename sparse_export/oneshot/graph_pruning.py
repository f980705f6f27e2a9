"""Prunes the weights of an ONNX graph in one shot, each calibrated on what the pruned ones before it give."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

from sparse_export.errors import ArtefactError, UsageError
from sparse_export.graph.constants import array_of
from sparse_export.graph.passes.float16 import value_types, with_bfloat16_emulated
from sparse_export.oneshot.branches import with_taken_branches
from sparse_export.oneshot.costs import Finished, LayerDone, costs_of
from sparse_export.oneshot.graph_state import FinishedWeight, State, bits_of, digest_of
from sparse_export.oneshot.graph_statistics import Factor, inputs_of
from sparse_export.oneshot.graph_weights import GraphWeight, weights_of_graph, with_uses_in
from sparse_export.oneshot.layers import Method, prune_weight
from sparse_export.oneshot.report import SparsifiedLayer
from sparse_export.oneshot.segments import Segment, Stop, plan_segments
from sparse_export.oneshot.unfolding import (
    LARGEST_GRAM,
    InputStatistics,
    InputSums,
    gram_too_large,
    joined,
    require_finite,
)
from sparse_export.oneshot.walk import Values, Walk
from sparse_export.oneshot.weights import kept_share
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
        model: a new one; names and types are those of the one that it was made of.
        layers: every weight, in graph order.
        n_calibration: samples that were looked at; 0 without a walk.
        n_resumed: layers that an earlier process had finished.
        spilled_bytes: of values that did not fit into the memory for them, and went to disk.
        masks: of the weights that were pruned, bool of the stored shape, by name.
    """

    model: onnx.ModelProto
    layers: tuple[SparsifiedLayer, ...]
    n_calibration: int
    n_resumed: int
    spilled_bytes: int
    masks: dict[str, Tensor]


def sparsify_graph(
    model: onnx.ModelProto,
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
) -> PrunedGraph:
    """Bring the weights of a graph under an N:M pattern by one walk over it.

    `magnitude` needs no walk, and there is none unless errors are asked for.

    Args:
        model: with its weights read, nodes in topological order, and without functions of its own. It stays
            as it is.
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
    if batches and not has_walk(method, errors=errors):
        batches, why_no_error = (), NOT_ASKED_FOR
    pruned = onnx.ModelProto()
    pruned.CopyFrom(model)
    wiring = wiring_of(pruned)
    weights = weights_of_graph(
        pruned, wiring, pattern, keep_dense=keep_dense, planned_dense=planned_dense, only=only
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
        }
        kept = State(folder=state, digest=digest_of(model, batches, options))
        kept.open()
    walked, found = pruned, weights.pruned
    if batches:
        walked = _to_walk(pruned, batches, memory_bytes, provider)
        if walked is not pruned:
            wiring = wiring_of(walked)
            found = with_uses_in(found, walked, wiring)
    work = _Work(
        pruned,
        walked,
        found,
        method,
        kept,
        observer,
        has_inputs=bool(batches),
        why_no_error=why_no_error,
        costs=costs_of(walked, found, batches, method),
        allowed=allowed or {},
    )
    spilled = 0
    seen = [weight for weight in found if not weight.unseen] if batches else []
    for weight in found:
        if weight not in seen and weight.name not in work.layers:
            work.finish(weight, None)
    if any(weight.name not in work.layers for weight in seen):
        segments = plan_segments(wiring, [_stop(weight) for weight in seen], most=LARGEST_GRAM)
        with Walk(
            walked,
            wiring,
            segments,
            batches,
            memory_bytes=memory_bytes,
            provider=provider,
            n_threads=n_threads,
        ) as walk:
            for segment in segments:
                _calibrate(walk, segment, [seen[index] for index in segment.stops], work)
                if all(weight.name in work.layers for weight in seen):
                    break
            spilled = walk.live.spilled_bytes
    dense = {name: _left_dense(pruned, name, why) for name, why in weights.dense.items()}
    return PrunedGraph(
        model=pruned,
        layers=tuple(work.layers.get(name) or dense[name] for name in weights.names),
        n_calibration=sum(signature.n_samples(feeds) for feeds in batches),
        n_resumed=work.n_resumed,
        spilled_bytes=spilled,
        masks=work.masks,
    )


def has_walk(method: Method, *, errors: bool) -> bool:
    """Does a method look at inputs, or are errors asked for?"""
    return errors or method != "magnitude"


def squares_of_graph(
    model: onnx.ModelProto,
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
    wiring = wiring_of(model)
    weights = weights_of_graph(model, wiring, pattern, only=only).pruned
    seen = [weight for weight in weights if not weight.unseen]
    stops = [replace(_stop(weight), size=weight.form.n_groups * weight.form.n_columns) for weight in seen]
    segments = plan_segments(wiring, stops, most=LARGEST_GRAM)
    found: dict[str, InputStatistics] = {}
    with Walk(
        model, wiring, segments, batches, memory_bytes=memory_bytes, provider="cpu", n_threads=n_threads
    ) as walk:
        for segment in segments:
            here = [seen[index] for index in segment.stops]
            sums = _sums(walk, segment, here, lambda _: False)
            for weight in here:
                one = _of_weight(weight, sums)
                if one is not None:
                    require_finite(weight.name, one)
                    found[weight.name] = one
    return found


def _to_walk(
    model: onnx.ModelProto, batches: Sequence[Feeds], memory_bytes: int, provider: str
) -> onnx.ModelProto:
    """The model as it is walked: a copy where it has choices between branches with layers, or bfloat16, which
    onnxruntime does not compute in on the CPU.
    """
    walked = with_taken_branches(model, batches, memory_bytes=memory_bytes, provider=provider)
    if provider == "cpu" and TensorProto.BFLOAT16 in value_types(walked):
        return with_bfloat16_emulated(walked)
    return walked


def _stop(weight: GraphWeight) -> Stop:
    gram = not _too_large(weight)
    return Stop(
        nodes=frozenset(use.node for use in weight.uses),
        values=tuple(dict.fromkeys(use.factor.value for use in weight.uses)),
        shares=frozenset(use.factor for use in weight.uses),
        size=weight.form.n_groups * weight.form.n_columns ** (2 if gram else 1),
    )


def _too_large(weight: GraphWeight) -> str:
    return gram_too_large(weight.form.n_groups, weight.form.n_columns)


def _calibrate(walk: Walk, segment: Segment, weights: Sequence[GraphWeight], work: _Work) -> None:
    """Run a segment, and prune the weights whose inputs it makes."""
    todo = [weight for weight in weights if weight.name not in work.layers]
    if segment.preview and not todo:
        walk.skip()
        return
    sums = _sums(walk, segment, todo, lambda weight: not _too_large(weight))
    for weight in todo:
        work.finish(weight, _of_weight(weight, sums))


def _sums(
    walk: Walk, segment: Segment, weights: Sequence[GraphWeight], has_gram: Callable[[GraphWeight], bool]
) -> dict[Factor, InputStatistics | None]:
    """Run a segment, and sum up what the weights are multiplied by."""
    sums: dict[Factor, InputSums] = {}
    for weight in weights:
        for use in weight.uses:
            sums.setdefault(use.factor, InputSums(gram=has_gram(weight)))

    def see(_batch: int, values: Values) -> None:
        for factor, one in sums.items():
            value = values[factor.value]
            assert not isinstance(value, list), "nothing multiplies by a sequence"
            for inputs in inputs_of(factor, value):
                one.add(inputs)

    walk.run(see, list(dict.fromkeys(factor.value for factor in sums)))
    return {factor: one.statistics() for factor, one in sums.items()}


def _of_weight(weight: GraphWeight, sums: Mapping[Factor, InputStatistics | None]) -> InputStatistics | None:
    return joined([part for use in weight.uses if (part := sums[use.factor]) is not None])


class _Work:
    """The graph on its way, and what was found out on it."""

    def __init__(
        self,
        pruned: onnx.ModelProto,
        walked: onnx.ModelProto,
        weights: Sequence[GraphWeight],
        method: Method,
        state: State | None,
        observer: Finished | None,
        *,
        has_inputs: bool,
        why_no_error: str,
        costs: Mapping[str, float],
        allowed: Mapping[str, Tensor],
    ) -> None:
        self._models = [pruned] if walked is pruned else [pruned, walked]
        self._stored = [{t.name: t for t in one.graph.initializer} for one in self._models]
        self._numbers = {weight.name: i for i, weight in enumerate(weights)}
        self._method, self._state, self._observer = method, state, observer
        self._costs, self._cost_done = costs, 0.0
        self._has_inputs, self._why_no_error, self._allowed = has_inputs, why_no_error, allowed
        self.masks: dict[str, Tensor] = {}
        self.layers: dict[str, SparsifiedLayer] = {}
        for weight in weights:
            _require_finite_weight(self._stored[0][weight.name])
        for weight in weights:
            earlier = None if state is None else state.load(self._numbers[weight.name], weight.name)
            if earlier is not None and tuple(earlier.weight.shape) == weight.form.stored:
                self._set(earlier, resumed=True)
        self.n_resumed = len(self.layers)

    def finish(self, weight: GraphWeight, statistics: InputStatistics | None) -> None:
        """Prune a weight and store it. statistics: of its inputs, None where they are not seen."""
        stored = _tensor(self._stored[0][weight.name])
        method, reason = self._method_for(weight, statistics)
        if statistics is not None:
            require_finite(weight.name, statistics)
        before = weight.form.weight_of(stored)
        allowed = self._allowed.get(weight.name)
        after = prune_weight(
            before,
            weight.cap,
            method,
            statistics,
            allowed=None if allowed is None else weight.form.weight_of(allowed),
        )
        layer = SparsifiedLayer(
            name=weight.name,
            shape=tuple(stored.shape),
            n_weights=stored.numel(),
            n_active=int(after.mask.sum()),
            pattern=str(weight.cap.pattern),
            reason=reason,
            magnitude=float(stored.double().abs().sum()),
            kept_in_order=None,
            kept_share=kept_share(before, after.mask),
            error=after.error,
        )
        finished = FinishedWeight(
            weight=weight.form.stored_of(after.weight), mask=weight.form.stored_of(after.mask), layer=layer
        )
        if self._state is not None:
            self._state.save(self._numbers[weight.name], finished)
        self._set(finished)

    def _method_for(self, weight: GraphWeight, statistics: InputStatistics | None) -> tuple[Method, str]:
        """The method that the inputs of a weight allow, and a note where it is another, or no error is known."""
        if not self._has_inputs:
            return self._method, self._why_no_error
        if statistics is None:
            why = weight.unseen or "nothing reached it"
            return "magnitude", f"{_instead('magnitude', self._method)}: {why}"
        too_large = _too_large(weight)
        if not too_large:
            return self._method, ""
        method: Method = "activation" if self._method == "reconstruction" else self._method
        return method, f"{_instead(method, self._method)}: {too_large}"

    def _set(self, finished: FinishedWeight, *, resumed: bool = False) -> None:
        for stored in self._stored:
            _fill(stored[finished.layer.name], finished.weight)
        self.masks[finished.layer.name] = finished.mask
        self.layers[finished.layer.name] = finished.layer
        self._cost_done += self._costs[finished.layer.name]
        if self._observer is not None:
            n_done, n_all = len(self.layers), len(self._numbers)
            share = 1.0 if n_done == n_all else self._cost_done / sum(self._costs.values())
            self._observer(
                LayerDone(layer=finished.layer, number=n_done, n_layers=n_all, share=share, resumed=resumed)
            )


def _instead(method: Method, asked: Method) -> str:
    return "error not measured" if method == asked else f"pruned by {method}, error not measured"


def _tensor(stored: TensorProto) -> Tensor:
    array = array_of(stored)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _fill(stored: TensorProto, weight: Tensor) -> None:
    """Give a stored tensor the values of a weight, rounded to its type."""
    if stored.data_type == TensorProto.BFLOAT16:
        array = weight.bfloat16().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    else:
        wide = weight.float() if weight.dtype == torch.bfloat16 else weight
        array = wide.numpy().astype(onnx.helper.tensor_dtype_to_np_dtype(stored.data_type), copy=False)
    note = stored.doc_string
    stored.CopyFrom(numpy_helper.from_array(array, stored.name))
    if note:
        stored.doc_string = note


def _require_finite_weight(stored: TensorProto) -> None:
    if not bool(np.isfinite(array_of(stored)).all()):
        raise ArtefactError(
            f"The weight {stored.name} holds NaN or infinity.",
            expected="Finite weights were expected.",
            do="Look at the training that it comes from, which may have diverged; or leave it dense with "
            "--keep-dense.",
        )


def _left_dense(model: onnx.ModelProto, name: str, reason: str) -> SparsifiedLayer:
    """The report of a weight that stays as it is; of one that is not stored by name the shape is ()."""
    stored = next((tensor for tensor in model.graph.initializer if tensor.name == name), None)
    values: Any = None if stored is None else array_of(stored)
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
