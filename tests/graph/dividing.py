"""A network with a division of whole numbers in it, which an onnxruntime does as the processor does it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["divides", "with_division"]


def divides(path: Path, divisor: int) -> Path:
    """Write x (batch, 4) -> y (batch, 3), which divides the smallest int64 on the way; 0 raises, -1 ends a
    process.
    """
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(np.ones((4, 3), dtype=np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with_division(model, divisor)
    onnx.save(model, path)
    return path


def with_division(model: onnx.ModelProto, divisor: int) -> None:
    """Add nothing to the only output, after a division of the smallest int64 by a number that no optimiser
    knows.
    """
    graph = model.graph
    given, output = graph.input[0].name, graph.output[0].name
    for node in graph.node:
        for at, name in enumerate(node.output):
            if name == output:
                node.output[at] = "before"
    nodes = (
        helper.make_node("Shape", [given], ["div_sizes"]),
        helper.make_node("ReduceMin", ["div_sizes"], ["div_size"], keepdims=0),
        helper.make_node("Mul", ["div_size", "div_zero"], ["div_nothing"]),
        helper.make_node("Add", ["div_nothing", "div_divisor"], ["div_by"]),
        helper.make_node("Div", ["div_least", "div_by"], ["div_quotient"]),
        helper.make_node("Cast", ["div_quotient"], ["div_float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["div_float", "div_float_zero"], ["div_added"]),
        helper.make_node("Add", ["before", "div_added"], [output]),
    )
    values = {
        "div_zero": np.int64(0),
        "div_divisor": np.int64(divisor),
        "div_least": np.int64(-(2**63)),
        "div_float_zero": np.float32(0),
    }
    graph.node.extend(nodes)
    graph.initializer.extend(numpy_helper.from_array(np.array(value), name) for name, value in values.items())
