"""Small graphs of several named inputs and outputs, with their signatures and bundles."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sparse_export.signature import Signature, TensorInfo, numpy_dtype

WORDS = Signature(
    inputs=(
        TensorInfo(name="input_ids", dtype="int64", shape=("batch", "sequence"), low=0, high=31),
        TensorInfo(name="attention_mask", dtype="int64", shape=("batch", "sequence"), low=0, high=1),
    ),
    outputs=(
        TensorInfo(name="hidden", dtype="float32", shape=("batch", "sequence", 8)),
        TensorInfo(name="best", dtype="int64", shape=("batch", "sequence")),
    ),
    sizes={"sequence": 12},
)
PICTURES = Signature(
    inputs=(TensorInfo(name="pictures", dtype="float32", shape=("n", 6, 5, 4)),),
    outputs=(TensorInfo(name="scores", dtype="float32", shape=("n", 3)),),
    batch="n",
)
SPOKEN = Signature(
    inputs=(
        TensorInfo(name="sound", dtype="float32", shape=("batch", "samples")),
        TensorInfo(name="state", dtype="float32", shape=(2, "batch", 4)),
    ),
    outputs=(
        TensorInfo(name="level", dtype="float32", shape=("batch", 1)),
        TensorInfo(name="next_state", dtype="float32", shape=(2, "batch", 4)),
    ),
    sizes={"samples": 16},
)


def model_of(
    signature: Signature, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]
) -> onnx.ModelProto:
    """A graph of nodes between the inputs and outputs of a signature."""
    inputs, outputs = (
        [
            helper.make_tensor_value_info(
                one.name, helper.np_dtype_to_tensor_dtype(numpy_dtype(one.dtype)), one.shape
            )
            for one in ends
        ]
        for ends in (signature.inputs, signature.outputs)
    )
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "named", inputs, outputs, stored)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    onnx.checker.check_model(model)
    return model


def words_graph() -> onnx.ModelProto:
    """An embedding, one head of attention under a mask, and a layer of 2:4 weights: `WORDS`."""
    generator = np.random.default_rng(3)
    node = helper.make_node
    nodes: list[onnx.NodeProto] = [
        node("Gather", ["table", "input_ids"], ["x"]),
        node("MatMul", ["x", "w_q"], ["q"]),
        node("Transpose", ["x"], ["k"], perm=[0, 2, 1]),
        node("MatMul", ["q", "k"], ["raw"]),
        node("Cast", ["attention_mask"], ["kept"], to=TensorProto.FLOAT),
        node("Sub", ["kept", "one"], ["away"]),
        node("Mul", ["away", "large"], ["low"]),
        node("Unsqueeze", ["low", "axis_1"], ["bias"]),
        node("Add", ["raw", "bias"], ["masked"]),
        node("Softmax", ["masked"], ["shares"], axis=-1),
        node("MatMul", ["shares", "x"], ["seen"]),
        node("MatMul", ["seen", "w_o"], ["hidden"], name="output_layer"),
        node("ArgMax", ["hidden"], ["best"], axis=-1, keepdims=0),
    ]
    w_o = generator.standard_normal((8, 8), dtype=np.float32)
    w_o[2::4] = w_o[3::4] = 0
    constants: dict[str, np.ndarray] = {
        "table": generator.standard_normal((32, 8), dtype=np.float32),
        "w_q": generator.standard_normal((8, 8), dtype=np.float32),
        "w_o": w_o,
        "one": np.array(1, np.float32),
        "large": np.array(1e4, np.float32),
        "axis_1": np.array([1], np.int64),
    }
    return model_of(WORDS, nodes, constants)


def pictures_graph() -> onnx.ModelProto:
    """A classifier of pictures with their channels last: `PICTURES`."""
    generator = np.random.default_rng(4)
    nodes = [
        helper.make_node("Transpose", ["pictures"], ["x"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["x", "kernel"], ["y"]),
        helper.make_node("GlobalAveragePool", ["y"], ["z"]),
        helper.make_node("Flatten", ["z"], ["scores"]),
    ]
    return model_of(PICTURES, nodes, {"kernel": generator.standard_normal((3, 4, 3, 3), dtype=np.float32)})


def spoken_graph() -> onnx.ModelProto:
    """The mean of a sound, and a state with the batch on its second axis: `SPOKEN`."""
    node = helper.make_node
    nodes = [
        node("ReduceMean", ["sound", "last"], ["mean"], keepdims=1),
        node("Mul", ["state", "half"], ["old"]),
        node("Add", ["old", "mean"], ["next_state"]),
        node("ReduceSum", ["next_state", "others"], ["flat"], keepdims=0),
        node("Unsqueeze", ["flat", "last_of_one"], ["level"]),
    ]
    constants: dict[str, np.ndarray] = {
        "last": np.array([1], np.int64),
        "half": np.array(0.5, np.float32),
        "others": np.array([0, 2], np.int64),
        "last_of_one": np.array([1], np.int64),
    }
    return model_of(SPOKEN, nodes, constants)
