"""Facts that are read off a graph, against graphs small enough to count by hand."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparse_export.graph.example import example_of_shape
from sparse_export.graph.export import onnx_from_module
from sparse_export.graph.layers import count_parameters, graph_layers
from tests.graph.graphs import one_node
from tests.making_runs import network_and_masks


@pytest.mark.parametrize(
    ("model", "axis", "uses"),
    [
        (one_node("Conv", (4, 3, 3, 3), ("n", 3, 8, 8)), 1, 36),
        (one_node("Conv", (4, 3, 3, 3), ("n", 3, 8, 8), pads=[1, 1, 1, 1], strides=[2, 2]), 1, 16),
        (one_node("Conv", (4, 1, 3, 3), ("n", 4, 8, 8), group=4), 1, 36),
        (one_node("Conv", (4, 3, 5), (1, 3, 8)), 1, 4),
        (one_node("Conv", (4, 3, 5), (6, 3, 8)), 1, 4),
        (one_node("ConvTranspose", (3, 4, 2, 2), ("n", 3, 5, 5), strides=[2, 2]), 0, 25),
        (one_node("ConvTranspose", (4, 2, 3), ("n", 4, 5), group=2), 0, 5),
        (one_node("Gemm", (10, 6), ("n", 6), transB=1), 1, 1),
        (one_node("Gemm", (6, 10), ("n", 6)), 0, 1),
        (one_node("MatMul", (6, 10), ("n", 7, 6)), 0, 7),
        (one_node("MatMul", (7, 6, 10), ("n", 7, 3, 6)), 1, 3),
        (one_node("MatMul", (10, 6), ("n", 6, 5), weight_first=True), 1, 5),
        (one_node("MatMul", (6,), ("n", 7, 6)), 0, 7),
    ],
)
def test_reduction_axis_and_work_come_from_the_node(model: onnx.ModelProto, axis: int, uses: int) -> None:
    (layer,) = graph_layers(model)
    assert layer.reduction_axis == axis
    assert layer.macs == layer.n_weights * uses


def test_zero_weights_are_counted_and_do_no_work() -> None:
    (layer,) = graph_layers(one_node("Conv", (4, 3, 3, 3), ("n", 3, 8, 8), n_zeros=100))
    assert (layer.n_weights, layer.n_nonzero) == (108, 8)
    assert (layer.macs, layer.nonzero_macs) == (108 * 36, 8 * 36)


def test_work_is_unknown_where_the_picture_size_is_free() -> None:
    (layer,) = graph_layers(one_node("Conv", (4, 3, 3, 3), ("n", 3, "h", "w")))
    assert (layer.n_weights, layer.macs, layer.nonzero_macs) == (108, None, None)


def test_a_product_of_two_inputs_has_no_weight_and_does_no_work_by_weights() -> None:
    node = helper.make_node("MatMul", ["a", "b"], ["y"])
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in "ab"]
    graph = helper.make_graph(
        [node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])]
    )
    (layer,) = graph_layers(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
    assert (layer.n_weights, layer.macs, layer.constant, layer.eligible) == (0, 0, False, "no")
    assert [reason.code for reason in layer.reasons] == ["activations"]


def test_looking_at_a_graph_does_not_change_it() -> None:
    model = one_node("Conv", (4, 3, 3, 3), ("n", 3, 8, 8))
    before = model.SerializeToString(deterministic=True)
    graph_layers(model)
    assert model.SerializeToString(deterministic=True) == before


def test_layers_of_an_exported_network_agree_with_its_masks() -> None:
    module, masks = network_and_masks()
    layers = graph_layers(onnx_from_module(module, example_of_shape((1, 8, 8)), masks=masks))
    assert {layer.weight: layer.n_nonzero for layer in layers} == {
        name: int(mask.sum()) for name, mask in masks.items()
    }
    assert sum(layer.macs or 0 for layer in layers) == 64 * 144 + 64 * 4608 + 16 * 18432 + 16384 + 640


def test_parameters_are_counted_over_float_initializers_only() -> None:
    model = one_node("Gemm", (10, 6), ("n", 6), transB=1, n_zeros=11)
    model.graph.initializer.append(numpy_helper.from_array(np.arange(5), "integers"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, 1], dtype=np.float16), "halves"))
    assert count_parameters(model) == (62, 50)
