"""Small graphs to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def one_node(
    op: str,
    weight_shape: tuple[int, ...],
    input_shape: tuple[int | str, ...],
    *,
    weight_first: bool = False,
    n_zeros: int = 0,
    **attributes: Any,
) -> onnx.ModelProto:
    """A graph of one layer, whose first `n_zeros` weights are zero."""
    values = np.ones(weight_shape, dtype=np.float32)
    values.flat[:n_zeros] = 0
    names = ["w", "x"] if weight_first else ["x", "w"]
    graph = helper.make_graph(
        [helper.make_node(op, names, ["y"], name="layer", **attributes)],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, input_shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(values, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    """Write a model as `m.onnx`."""
    file = folder / "m.onnx"
    file.write_bytes(model.SerializeToString())
    return file
