"""Makes 2:4 tensors and small graphs that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = tuple(np.dtype(one) for one in (np.float32, np.float16, ml_dtypes.bfloat16, np.int8))


def two_four(
    shape: Sequence[int], axis: int, dtype: Any = np.float32, *, seed: int = 0, density: float = 1.0
) -> Array:
    """A random tensor with at most two nonzeros in four along `axis`.

    density: share of those two that are kept.
    """
    rng = np.random.default_rng(seed)
    values = np.moveaxis(
        rng.integers(1, 100, size=shape) * rng.choice([-0.03125, 0.03125], size=shape), axis, -1
    )
    groups = np.ascontiguousarray(values).reshape(-1, 4)
    dead = np.argsort(rng.random(groups.shape), axis=1)[:, :2]
    np.put_along_axis(groups, dead, 0, axis=1)
    groups[rng.random(groups.shape) >= density] = 0
    dense = np.moveaxis(groups.reshape(values.shape), -1, axis)
    scale = 32 if np.dtype(dtype) == np.int8 else 1
    found: Array = np.ascontiguousarray(dense * scale).astype(dtype) + np.dtype(dtype).type(0)
    return found


def model_of(
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, Array],
    *,
    inputs: dict[str, Sequence[int | str]],
    output: str = "y",
    dtype: int = TensorProto.FLOAT,
    opset: int = 20,
    ir_version: int = 10,
) -> onnx.ModelProto:
    """A graph of these nodes; `weights` become initializers."""
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(output, dtype, ["rows", "columns"])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def gemm(weight: Array, **options: Any) -> onnx.ModelProto:
    """y = x w', w being (N, K)."""
    dtype = int(helper.np_dtype_to_tensor_dtype(weight.dtype))
    return model_of(
        [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)],
        {"w": weight},
        inputs={"x": ["n", weight.shape[1]]},
        dtype=dtype,
        **options,
    )


def convolutional(dtype: Any = np.float32, seed: int = 0) -> onnx.ModelProto:
    """Conv, grouped Conv, ConvTranspose, Gemm either way, MatMul, and a first layer that four does not
    divide.
    """
    weights = {
        "stem": np.asarray(np.random.default_rng(seed).standard_normal((8, 3, 3, 3)), dtype=dtype),
        "bias": np.ones(12, dtype=dtype),
        "conv": two_four((12, 8, 3, 3), 1, dtype, seed=seed),
        "grouped": two_four((12, 4, 1, 1), 1, dtype, seed=seed + 1),
        "up": two_four((12, 5, 2, 2), 0, dtype, seed=seed + 2),
        "fc": two_four((8, 20), 1, dtype, seed=seed + 3),
        "fc2": two_four((8, 7), 0, dtype, seed=seed + 4),
        "flat": np.array([-1, 20]),
    }
    nodes = [
        helper.make_node("Conv", ["x", "stem"], ["a"]),
        helper.make_node("Conv", ["a", "conv", "bias"], ["b"]),
        helper.make_node("Conv", ["b", "grouped"], ["c"], group=3),
        helper.make_node("ConvTranspose", ["c", "up"], ["d"], strides=[2, 2]),
        helper.make_node("MaxPool", ["d"], ["e"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Reshape", ["e", "flat"], ["f"]),
        helper.make_node("Gemm", ["f", "fc"], ["g"], transB=1),
        helper.make_node("MatMul", ["g", "fc2"], ["y"]),
    ]
    return model_of(
        nodes,
        weights,
        inputs={"x": ["n", 3, 6, 6]},
        dtype=int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype))),
    )


def quantized(seed: int = 0) -> onnx.ModelProto:
    """Quantised activations, and int8 weights behind DequantizeLinear per output channel, of a Conv and a
    Gemm.
    """
    rng = np.random.default_rng(seed)
    weights: dict[str, Array] = {
        "xs": np.array(0.05, dtype=np.float32),
        "xz": np.array(3, dtype=np.int8),
        "conv": two_four((8, 8, 3, 3), 1, np.int8, seed=seed),
        "conv_scale": rng.uniform(0.01, 0.02, 8).astype(np.float32),
        "zero": np.zeros(8, dtype=np.int8),
        "flat": np.array([-1, 32]),
        "fc": two_four((8, 32), 1, np.int8, seed=seed + 1),
        "fc_scale": rng.uniform(0.01, 0.02, 8).astype(np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["conv", "conv_scale", "zero"], ["conv_d"], axis=0),
        helper.make_node("Conv", ["xd", "conv_d"], ["a"]),
        helper.make_node("QuantizeLinear", ["a", "xs", "xz"], ["aq"]),
        helper.make_node("DequantizeLinear", ["aq", "xs", "xz"], ["ad"]),
        helper.make_node("Reshape", ["ad", "flat"], ["b"]),
        helper.make_node("DequantizeLinear", ["fc", "fc_scale"], ["fc_d"], axis=0),
        helper.make_node("Gemm", ["b", "fc_d"], ["y"], transB=1),
    ]
    return model_of(nodes, weights, inputs={"x": ["n", 8, 4, 4]})


def initializer(model: onnx.ModelProto, name: str) -> TensorProto:
    """The initializer of that name."""
    found: TensorProto = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    return found
