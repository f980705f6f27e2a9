"""Every rule by the node that it is for, and a graph walked by them."""

from __future__ import annotations

import onnx

from sparse_export.graph.channels.onnx_channels import Channels, Rule
from sparse_export.graph.channels.onnx_graph import Graph
from sparse_export.graph.channels.onnx_layers import conv, conv_transpose, gemm, matmul
from sparse_export.graph.channels.onnx_moves import (
    concat,
    gather,
    pad,
    reshape,
    resize,
    shape_of,
    sliced,
    split,
    transpose,
)
from sparse_export.graph.channels.onnx_values import (
    BROADCAST,
    ONE_TO_ONE,
    REDUCE,
    batch_norm,
    broadcast,
    global_pool,
    one_to_one,
    pool,
    reduce,
)


def _rule(node: onnx.NodeProto) -> Rule | None:
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type in ONE_TO_ONE:
        return one_to_one
    if node.op_type in BROADCAST:
        return broadcast
    if node.op_type in REDUCE:
        return reduce
    return _RULES.get(node.op_type)


_RULES: dict[str, Rule] = {
    "AveragePool": pool,
    "BatchNormalization": batch_norm,
    "Concat": concat,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Flatten": reshape,
    "Gather": gather,
    "Gemm": gemm,
    "GlobalAveragePool": global_pool,
    "GlobalMaxPool": global_pool,
    "MatMul": matmul,
    "MaxPool": pool,
    "Pad": pad,
    "Reshape": reshape,
    "Resize": resize,
    "Shape": shape_of,
    "Slice": sliced,
    "Split": split,
    "Squeeze": reshape,
    "Transpose": transpose,
    "Unsqueeze": reshape,
}


def channels_of(graph: Graph) -> Channels:
    """The channels of a graph, its nodes walked in order. What a rule does not understand stays as it is."""
    channels = Channels(graph=graph, shapes=graph.shapes())
    for node in graph.nodes:
        channels.visit(node, _rule(node))
    channels.end()
    return channels
