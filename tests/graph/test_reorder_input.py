"""A graph whose layers get their input in another order computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from sparse_export.errors import GateFailed
from sparse_export.graph.channels.onnx_graph import Array
from sparse_export.graph.passes.reorder_input import gathered


def model_of(
    nodes: list[onnx.NodeProto], arrays: dict[str, Array], shape: list[int | str]
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def gemm(w_OI: Array) -> onnx.ModelProto:
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)
    return model_of([node], {"w": w_OI, "b": normal(len(w_OI), seed=1)}, ["batch", w_OI.shape[1]])


def matmul(w_OI: Array) -> onnx.ModelProto:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return model_of([node], {"w": np.ascontiguousarray(w_OI.T)}, ["batch", 3, w_OI.shape[1]])


def convolution(w_OI: Array) -> onnx.ModelProto:
    node = helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=[1, 1])
    return model_of([node], {"w": w_OI[:, :, None, None]}, ["batch", w_OI.shape[1], 4, 4])


KINDS = [gemm, matmul, convolution]


def input_of(model: onnx.ModelProto) -> Array:
    dims = model.graph.input[0].type.tensor_type.shape.dim
    return normal(*[dim.dim_value or 2 for dim in dims], seed=5)


def output(model: onnx.ModelProto, x: Array) -> Array:
    found: Any = ReferenceEvaluator(model).run(None, {"x": x})
    array: Array = found[0]
    return array


def stored(model: onnx.ModelProto, name: str) -> Array:
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_function_stays_and_the_columns_have_the_order(
    kind: Callable[[Array], onnx.ModelProto], seed: int
) -> None:
    model = kind(normal(5, 12))
    order = np.random.default_rng(seed).permutation(12)
    before = model.SerializeToString()
    found = gathered(model, {"w": order})
    assert model.SerializeToString() == before
    x = input_of(model)
    np.testing.assert_allclose(output(found, x), output(model, x), rtol=1e-5, atol=1e-6)
    axis = 0 if kind is matmul else 1
    np.testing.assert_array_equal(stored(found, "w"), stored(model, "w").take(order, axis))


@pytest.mark.parametrize("kind", KINDS)
def test_whole_groups_that_no_weight_is_for_can_be_left_out(kind: Callable[[Array], onnx.ModelProto]) -> None:
    w_OI = normal(5, 12)
    w_OI[:, [0, 3, 4, 5, 6, 7]] = 0
    model = kind(w_OI)
    order = np.array([1, 2, 8, 9, 10, 11, 0, 3, 4, 5, 6, 7])
    x = input_of(model)
    found = gathered(model, {"w": order}, live_only=4)
    assert stored(found, "w").shape[0 if kind is matmul else 1] == 8
    np.testing.assert_allclose(output(found, x), output(model, x), rtol=1e-5, atol=1e-6)
    assert stored(gathered(model, {"w": order}), "w").shape == stored(model, "w").shape


def test_of_nothing_but_zeros_a_group_stays() -> None:
    model = gemm(np.zeros((5, 12), np.float32))
    found = gathered(model, {"w": np.arange(12)}, live_only=4)
    assert stored(found, "w").shape == (5, 4)
    np.testing.assert_array_equal(output(found, input_of(model)), output(model, input_of(model)))


def test_layers_that_share_a_weight_share_the_choice() -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["a"], transB=1),
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Gemm", ["x", "w"], ["b"], transB=1),
        helper.make_node("Gemm", ["r", "w"], ["c"], transB=1),
        helper.make_node("Sum", ["a", "b", "c"], ["y"]),
    ]
    model = model_of(nodes, {"w": normal(5, 8)}, ["batch", 8])
    found = gathered(model, {"w": np.arange(8)[::-1].copy()})
    assert sum(node.op_type == "Gather" for node in found.graph.node) == 2
    x = input_of(model)
    np.testing.assert_allclose(output(found, x), output(model, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "nodes",
    [
        [helper.make_node("Gemm", ["x", "w"], ["y"], transA=1)],
        [helper.make_node("MatMul", ["w", "x"], ["y"])],
        [helper.make_node("Add", ["x", "w"], ["y"])],
        [helper.make_node("Gemm", ["x", "w"], ["z"]), helper.make_node("Mul", ["z", "w"], ["y"])],
    ],
)
def test_other_uses_of_a_weight_are_refused(nodes: list[onnx.NodeProto]) -> None:
    model = model_of(nodes, {"w": normal(8, 8)}, [8, 8])
    with pytest.raises(GateFailed, match="cannot be put in another order"):
        gathered(model, {"w": np.arange(8)})
