"""How far a call is that prunes layer after layer, by the multiply-adds that each of them takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx

from sparse_export.graph.concrete import Shape, free_sizes, inferred_at
from sparse_export.oneshot.graph_weights import GraphWeight
from sparse_export.oneshot.layers import Method
from sparse_export.oneshot.report import SparsifiedLayer
from sparse_export.oneshot.unfolding import gram_too_large
from sparse_export.oneshot.weights import solving_cost
from sparse_export.signature import Feeds

__all__ = ["Finished", "LayerDone", "costs_of"]

_FACTORS_OF_GRAM = 2  # K³: a matrix is factored, inverted and factored again, in float64


@dataclass(frozen=True, kw_only=True)
class LayerDone:
    """A layer as it is finished.

    Attributes:
        layer: what was made of it.
        number: layers that are finished by now.
        n_layers: that there will be.
        share: of the multiply-adds of all of them, above 0 and at most 1.
        resumed: an earlier process had finished it.
    """

    layer: SparsifiedLayer
    number: int
    n_layers: int
    share: float
    resumed: bool = False


Finished = Callable[[LayerDone], None]
"""Gets each layer as it is finished."""


def costs_of(
    model: onnx.ModelProto, weights: Sequence[GraphWeight], batches: Sequence[Feeds], method: Method
) -> dict[str, float]:
    """Estimate what pruning each weight takes, in multiply-adds.

    Args:
        model: the graph that the weights are walked in.
        weights: that get the pattern.
        batches: calibration inputs; none where there is no walk.
        method: how the weights are chosen.

    Returns:
        By name of the weight, above 0. What is not known of the sizes of values makes it less, not wrong.
    """
    shapes = _shapes_of_batch(model, batches[0]) if batches else {}
    return {weight.name: _cost(model, weight, shapes, len(batches), method) for weight in weights}


def _cost(
    model: onnx.ModelProto,
    weight: GraphWeight,
    shapes: Mapping[str, Shape],
    n_batches: int,
    method: Method,
) -> float:
    n_outputs, n_columns, n_groups = weight.form.shape[0], weight.form.n_columns, weight.form.n_groups
    cost = float(n_outputs * n_columns)
    if not n_batches or weight.unseen:
        return cost
    has_gram = not gram_too_large(n_groups, n_columns)
    for use in weight.uses:
        shape = shapes.get(model.graph.node[use.node].output[0], ())
        n_inputs = n_batches * math.prod(size or 1 for size in shape) / n_outputs
        cost += n_inputs * n_columns * n_outputs  # of the layer itself
        cost += n_groups * n_inputs * (n_columns**2 / 2 if has_gram else n_columns)
    if has_gram and method == "reconstruction":
        cost += n_groups * _FACTORS_OF_GRAM * n_columns**3
        cost += solving_cost(n_outputs, n_columns, weight.cap.pattern)
    return cost + (n_outputs * n_columns**2 if has_gram else 0)


def _shapes_of_batch(model: onnx.ModelProto, feeds: Feeds) -> dict[str, Shape]:
    sizes = {
        name: int(feeds[places[0][0]].shape[places[0][1]])
        for name, places in free_sizes(model).items()
        if places[0][0] in feeds
    }
    return inferred_at(model, sizes)
