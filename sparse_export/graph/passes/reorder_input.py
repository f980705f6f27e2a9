"""Gives layers of an ONNX graph their input in an order of its channels under which their weights obey a
pattern.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from sparse_export.errors import GateFailed
from sparse_export.graph.channels.onnx_graph import Array, Graph
from sparse_export.graph.layer_uses import layer_weight
from sparse_export.graph.passes.gather_nodes import PICKING, picking

__all__ = ["gathered"]


def gathered(
    model: onnx.ModelProto, orders: Mapping[str, Array], *, live_only: int | None = None
) -> onnx.ModelProto:
    """Another graph of the same function in which each of these weights has its input channels in another
    order.

    orders: stored name of a weight -> int64 (I,), a permutation of its input channels.  live_only: leave out
    the groups of so many consecutive channels at the end that no weight is for; None for none. Raises
    GateFailed for a weight that is not that of Gemm, MatMul or ungrouped Conv nodes alone.
    """
    graph = Graph.of(model)
    shapes = graph.shapes()
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    for weight, order in orders.items():
        users = [node for node in graph.nodes if weight in node.input]
        axes = {found[1] for node in users if (found := _picked_by(node, initializers, weight)) is not None}
        if len(axes) != 1 or len(graph.readers(weight)) != len(users):
            raise _unfit(weight)
        axis = axes.pop()
        array = np.take(graph.arrays[weight], order, axis=axis)
        order = order[: _n_live(array, axis, live_only)]
        graph.arrays[weight] = np.take(array, np.arange(len(order)), axis=axis)
        index = graph.fresh_name(f"{weight}_order")
        graph.arrays[index] = np.asarray(order, np.int64)
        made: dict[str, str] = {}  # one choice for all layers that read the same
        for node in users:
            source = node.input[0]
            if source not in made:
                rank = len(shapes[source]) if source in shapes else 0
                if not rank:
                    raise _unfit(weight)
                names = [graph.fresh_name(f"{weight}_{step}_{len(made)}") for step in PICKING]
                added = picking(
                    source, index, axis=1 if node.op_type == "Conv" else -1, rank=rank, names=names
                )
                place = next(i for i, other in enumerate(graph.nodes) if other is node)
                graph.nodes[place:place] = added
                made[source] = added[-1].output[0]
            node.input[0] = made[source]
    return graph.assembled()


def _picked_by(
    node: onnx.NodeProto, initializers: Mapping[str, onnx.TensorProto], weight: str
) -> tuple[str, int] | None:
    """The weight of a layer that multiplies its input from the right, and its reduction axis."""
    found = layer_weight(node, initializers)
    if found is None or found[0] != weight or list(node.input).index(weight) != 1:
        raise _unfit(weight)
    plain = {"Gemm": ("transA", 0), "MatMul": ("", 0), "Conv": ("group", 1)}.get(node.op_type)
    given = {a.name: a.i for a in node.attribute}
    if plain is None or given.get(plain[0], plain[1]) != plain[1]:
        raise _unfit(weight)
    return found


def _n_live(array: Array, axis: int, group: int | None) -> int:
    n: int = array.shape[axis]
    if group is None:
        return n
    live = np.flatnonzero(np.moveaxis(array, axis, 0).reshape(n, -1).any(axis=1))
    n_live = int(live[-1]) + 1 if len(live) else 1
    return min(n, -(-n_live // group) * group)


def _unfit(weight: str) -> GateFailed:
    return GateFailed(
        f"The input of the layers that use {weight} cannot be put in another order in the exported graph.",
        expected="A weight of Gemm, MatMul or ungrouped Conv nodes alone was expected.",
        do="Build without gathering.",
    )
