"""Puts the channels of a graph in an order that loses less, before its weights are pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import Tensor

from sparse_export.errors import UsageError
from sparse_export.graph.passes.permute import PermutationReport
from sparse_export.graph.passes.permute_graph import permute_graph
from sparse_export.graph.stored_tensors import array_of
from sparse_export.oneshot.graph_pruning import CALIBRATION_MEMORY, squares_of_graph
from sparse_export.oneshot.graph_weights import GraphWeight, weights_of_graph
from sparse_export.oneshot.layers import Method, worth_of_weight
from sparse_export.oneshot.weights import kept_share
from sparse_export.oneshot.wiring import wiring_of
from sparse_export.signature import Feeds, Signature
from sparse_export.sparsity.pattern import NMPattern, largest_per_group
from sparse_export.sparsity.permute import find_permutation

__all__ = ["OrderedGraph", "ordered_graph"]

_COMPARED = 8  # samples that outputs in both orders are compared on
_SEED = 25


@dataclass(frozen=True, kw_only=True)
class OrderedGraph:
    """A graph in the order that was found.

    Attributes:
        model: a new one; the very same where nothing was moved.
        report: of the orders.
        in_order: by name of a weight the share of its sum of |w| that plain magnitude keeps in the first order.
    """

    model: onnx.ModelProto
    report: PermutationReport
    in_order: dict[str, float]


def ordered_graph(
    model: onnx.ModelProto,
    signature: Signature,
    *,
    calibration: Sequence[Feeds],
    held: Sequence[Feeds],
    pattern: NMPattern,
    method: Method,
    keep_dense: Sequence[str] = (),
    planned_dense: Mapping[str, str] | None = None,
    memory_bytes: int = CALIBRATION_MEMORY,
    seed: int = 0,
    n_threads: int | None = None,
) -> OrderedGraph:
    """Search orders of channels in which the pattern keeps more, and apply them.

    Args:
        model: as `sparsify_graph` takes it, as are the pattern and the options.
        signature: of it.
        calibration: inputs; for `magnitude` only outputs are compared on them.
        held: inputs to compare outputs on where there are no others.
        pattern: N:M.
        method: by which weights will be chosen: the search keeps |w| for `magnitude`, |w| times the norm of the
            input for the others.
        keep_dense: shell patterns of weights, or of nodes.
        planned_dense: weights that a plan leaves dense, with its reasons.
        memory_bytes: bound of the values that a walk keeps in memory.
        seed: of the search.
        n_threads: of onnxruntime.

    Raises:
        UsageError: no weight can take the pattern, or there is nothing to run the graph on.
        GateFailed: the outputs in both orders differ.
    """
    found = weights_of_graph(
        model, wiring_of(model), pattern, keep_dense=keep_dense, planned_dense=planned_dense
    ).pruned
    compared = [signature.part(feeds, 0, _COMPARED) for feeds in (*calibration, *held)[:1]]
    if not compared:
        compared = _drawn(signature)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = {one.name: torch.from_numpy(_floats(stored[one.name])) for one in found}
    scores: dict[str, Tensor] = {}
    if method != "magnitude":
        squares = squares_of_graph(
            model,
            signature=signature,
            batches=calibration,
            pattern=pattern,
            only=weights.keys(),
            memory_bytes=memory_bytes,
            n_threads=n_threads,
        )
        for one in found:
            if one.name in squares:
                worth = worth_of_weight(one.form.weight_of(weights[one.name]), squares[one.name])
                scores[one.name] = one.form.stored_of(worth)
    permuted = permute_graph(
        model,
        compared,
        {one.name: pattern for one in found},
        lambda rows, wanted: find_permutation(rows, wanted, seed=seed),
        scores=scores,
        sizes=signature.sizes,
    )
    in_order = {one.name: _kept_in_order(one, weights[one.name], pattern) for one in found}
    return OrderedGraph(model=permuted.model, report=permuted.report, in_order=in_order)


def _drawn(signature: Signature) -> list[dict[str, Any]]:
    if not signature.drawable:
        raise UsageError(
            "--permute compares outputs in both orders; the graph does not say which inputs it accepts.",
            do="Give real inputs by --inputs FILE.npz.",
        )
    return [signature.draw(_COMPARED, _SEED)]


def _floats(tensor: onnx.TensorProto) -> Any:
    return array_of(tensor).astype("float32")


def _kept_in_order(one: GraphWeight, stored: Tensor, pattern: NMPattern) -> float:
    weight = one.form.weight_of(stored)
    return kept_share(weight, largest_per_group(weight, one.cap.axis, pattern))
