"""A graph without its dead channels computes what the whole one does."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from sparse_export import models
from sparse_export.errors import ArtefactError, GateFailed
from sparse_export.graph.ends import signature_of
from sparse_export.graph.example import example_of_shape
from sparse_export.graph.export import onnx_from_module
from sparse_export.graph.passes.compact import Compacted, compact
from sparse_export.runtimes.parity import require_same_output
from tests.making_runs import stir_batch_norm
from tests.many import many

Array = np.ndarray[Any, Any]
Node = onnx.NodeProto


def run(model: onnx.ModelProto, x: Array) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: list[Array] = session.run(None, {model.graph.input[0].name: x})
    return found


def graph(
    nodes: list[Node],
    arrays: dict[str, Array],
    input_shape: tuple[int | str, ...],
    outputs: tuple[str, ...] = ("y",),
) -> onnx.ModelProto:
    """A model with input x. Integer arrays are int64."""
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, input_shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [
            numpy_helper.from_array(a.astype(np.float32) if a.dtype.kind == "f" else a, name)
            for name, a in arrays.items()
        ],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def node(op: str, inputs: str, output: str, **attributes: Any) -> Node:
    return helper.make_node(op, inputs.split(), output.split(), name=f"{op}_{output}", **attributes)


def shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


def assert_same_function(
    before: onnx.ModelProto, after: onnx.ModelProto, shape: tuple[int, ...], scale: float = 1.0
) -> None:
    for seed, n in enumerate((1, 5)):
        x = scale * np.random.default_rng(seed).standard_normal((n, *shape)).astype(np.float32)
        for wanted, found in zip(run(before, x), run(after, x), strict=True):
            assert wanted.shape == found.shape
            np.testing.assert_allclose(
                found, wanted, rtol=0, atol=2e-5 * max(float(np.abs(wanted).max()), 1e-3)
            )


def checked(model: onnx.ModelProto, shape: tuple[int, ...], *, inputs: bool = True) -> Compacted:
    """Compact, and hold the result against the whole graph; twice is once."""
    content = model.SerializeToString(deterministic=True)
    found = compact(model, inputs=inputs)
    assert model.SerializeToString(deterministic=True) == content
    assert_same_function(model, found.model, shape)
    assert all(0 not in dims for dims in shapes(found.model).values())
    assert compact(found.model, inputs=inputs).model is found.model
    assert found.n_weights_after <= found.n_weights_before
    return found


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def rows_gone(w: Array, *rows: int) -> Array:
    w = w.copy()
    w[list(rows)] = 0
    return w


def columns_gone(w: Array, *columns: int) -> Array:
    w = w.copy()
    w[:, list(columns)] = 0
    return w


# -- chains


def chain(w1: Array, w2: Array, *between: Node, **arrays: Array) -> onnx.ModelProto:
    """Gemm, whatever is between (h to a), Gemm."""
    nodes = [
        node("Gemm", "x w1 b1", "h", transB=1),
        *(between or (node("Relu", "h", "a"),)),
        node("Gemm", "a w2 b2", "y", transB=1),
    ]
    values = {"w1": w1, "b1": normal(len(w1), seed=8), "w2": w2, "b2": normal(len(w2), seed=9)}
    return graph(nodes, values | arrays, ("n", w1.shape[1]))


def test_a_channel_that_nobody_reads_goes() -> None:
    found = checked(chain(normal(6, 4), columns_gone(normal(3, 6), 1, 4)), (4,))
    assert shapes(found.model) == {"w1": (4, 4), "b1": (4,), "w2": (3, 4), "b2": (3,)}
    assert found.n_removed == 2
    assert [(layer.before, layer.after) for layer in found.layers] == [((6, 4), (4, 4)), ((3, 6), (3, 4))]


_BETWEEN: list[tuple[list[Node], dict[str, Array]]] = [
    ([node("Relu", "h", "a")], {}),
    ([node("Sigmoid", "h", "a")], {}),
    ([node("LeakyRelu", "h", "a", alpha=0.3)], {}),
    ([node("Clip", "h low high", "a")], {"low": np.array(-0.2), "high": np.array(0.4)}),
    ([node("Add", "h c", "a")], {"c": normal(6)}),
    ([node("Mul", "c h", "a")], {"c": normal(1, 6)}),
    ([node("Sub", "c h", "a")], {"c": np.array(2.5)}),
    ([node("Div", "h c", "a")], {"c": normal(6) + 3}),
    ([node("Relu", "h", "r"), node("Add", "r h", "a")], {}),
    (
        [node("BatchNormalization", "h s b m v", "a")],
        {"s": normal(6), "b": normal(6, seed=1), "m": normal(6, seed=2), "v": normal(6, seed=3) ** 2 + 0.1},
    ),
    ([node("Erf", "h", "a")], {}),
    ([node("Gelu", "h", "a")], {}),
    ([node("PRelu", "h c", "a")], {"c": normal(6)}),
]


@pytest.mark.parametrize(("between", "arrays"), _BETWEEN, ids=[pair[0][-1].op_type for pair in _BETWEEN])
def test_a_channel_without_weights_is_a_constant_that_goes_into_the_next_bias(
    between: list[Node], arrays: dict[str, Array]
) -> None:
    model = chain(rows_gone(normal(6, 4), 0, 3), normal(3, 6), *between, **arrays)
    found = checked(model, (4,))
    assert [layer.after for layer in found.layers] == [(4, 4), (3, 4)]


def test_alpha_and_beta_of_a_gemm_are_kept_in_mind() -> None:
    nodes = [
        node("Gemm", "x w1 b1", "h", alpha=0.5, beta=2.0),
        node("Relu", "h", "a"),
        node("Gemm", "a w2 b2", "y", alpha=-3.0, beta=0.25),
    ]
    arrays = {
        "w1": columns_gone(normal(4, 6), 2),
        "b1": normal(1, 6),
        "w2": normal(6, 3),
        "b2": normal(3),
    }
    assert checked(graph(nodes, arrays, ("n", 4)), (4,)).n_removed == 1


def test_a_gemm_without_bias_gets_one() -> None:
    nodes = [node("Gemm", "x w1 b1", "h"), node("Exp", "h", "a"), node("Gemm", "a w2", "y")]
    arrays = {"w1": columns_gone(normal(4, 6), 2), "b1": normal(6), "w2": normal(6, 3)}
    assert checked(graph(nodes, arrays, ("n", 4)), (4,)).n_removed == 1


def test_a_matmul_gets_an_addition_behind_it() -> None:
    nodes = [
        node("MatMul", "x w1", "h"),
        node("Add", "h b1", "s"),
        node("MatMul", "s w2", "y"),
    ]
    arrays = {"w1": columns_gone(normal(4, 6), 2, 5), "b1": normal(6), "w2": normal(6, 3)}
    found = checked(graph(nodes, arrays, ("n", 7, 4)), (7, 4))
    assert found.n_removed == 2
    assert [n.op_type for n in found.model.graph.node] == ["MatMul", "Add", "MatMul", "Add"]


def test_what_is_dead_because_of_the_dead_goes_too() -> None:
    nodes = [node("Gemm", f"a{i} w{i}", f"h{i}") for i in range(4)]
    relus = [node("Relu", f"h{i}", f"a{i + 1}") for i in range(3)]
    order = [nodes[0], *(n for pair in zip(relus, nodes[1:], strict=True) for n in pair)]
    order[0].input[0], order[-1].output[0] = "x", "y"
    w = [np.diag(np.arange(1.0, 7.0)) for _ in range(4)]
    w[3][2:] = 0  # of a diagonal chain only two channels reach the output
    found = checked(graph(order, {f"w{i}": w[i] for i in range(4)}, ("n", 6)), (6,))
    assert [layer.after for layer in found.layers] == [(6, 2), (2, 2), (2, 2), (2, 6)]


def test_of_a_layer_without_any_weight_one_channel_stays() -> None:
    found = checked(chain(np.zeros((6, 4)), normal(3, 6)), (4,))
    assert [layer.after for layer in found.layers] == [(1, 4), (3, 1)]
    assert "one channel has to stay" in found.layers[0].why


def test_of_a_layer_that_nobody_reads_one_channel_stays() -> None:
    found = checked(chain(normal(6, 4), np.zeros((3, 6))), (4,))
    assert [layer.after for layer in found.layers] == [(1, 4), (3, 1)]


def test_where_nothing_can_go_the_very_same_graph_comes_back() -> None:
    model = chain(normal(6, 4), normal(3, 6))
    found = compact(model)
    assert found.model is model
    assert (found.n_removed, found.n_inputs_dropped) == (0, 0)
    assert {layer.why for layer in found.layers} == {"every channel left has weights"}


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda tensor: tensor.dims.append(7), "The tensor w1 cannot be read"),
        (lambda tensor: setattr(tensor, "data_type", 99), "The tensor w1 cannot be read"),
        (
            lambda tensor: setattr(tensor, "data_location", TensorProto.EXTERNAL),
            "w1 lies in a file beside the model",
        ),
    ],
    ids=["shape", "type", "not loaded"],
)
def test_a_weight_that_cannot_be_read_is_told(damage: Callable[[TensorProto], None], told: str) -> None:
    model = chain(normal(6, 4), normal(3, 6))
    damage(next(tensor for tensor in model.graph.initializer if tensor.name == "w1"))
    with pytest.raises(ArtefactError, match=told):
        compact(model)


def test_channels_of_an_output_stay() -> None:
    model = chain(rows_gone(normal(6, 4), 1), rows_gone(columns_gone(normal(3, 6), 2), 0))
    model.graph.output.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, None))
    found = checked(model, (4,))
    assert found.model is model
    assert "an output of the network" in found.layers[0].why


def test_a_graph_whose_shape_is_asked_keeps_its_channels() -> None:
    between = [
        node("Relu", "h", "r"),
        node("Shape", "h", "s"),
        node("ConstantOfShape", "s", "z"),
        node("Add", "r z", "a"),
    ]
    model = chain(normal(6, 4), columns_gone(normal(3, 6), 1), *between)
    assert checked(model, (4,)).model is model


@pytest.mark.parametrize("op", ["Softmax", "LayerNormalization", "CumSum"])
def test_operations_that_mix_channels_keep_them_all(op: str) -> None:
    inputs = {"Softmax": "h", "LayerNormalization": "h c", "CumSum": "h c"}[op]
    c = np.array(1) if op == "CumSum" else normal(6)
    model = chain(rows_gone(normal(6, 4), 2), columns_gone(normal(3, 6), 1), node(op, inputs, "a"), c=c)
    assert checked(model, (4,), inputs=False).model is model


def test_a_weight_that_two_layers_share_loses_only_what_both_can_spare() -> None:
    w = normal(5, 5)
    w[:, [1, 3]] = 0
    w[[1, 2]] = 0
    nodes = [
        node("Gemm", "x w0", "h0"),
        node("Gemm", "h0 w", "h1", transB=1),
        node("Relu", "h1", "a"),
        node("Gemm", "a w", "h2", transB=1),
        node("Relu", "h2", "b"),
        node("Gemm", "b w3", "y"),
    ]
    found = checked(graph(nodes, {"w0": normal(4, 5), "w": w, "w3": normal(5, 2)}, ("n", 4)), (4,))
    assert shapes(found.model)["w"] == (4, 4)


def test_a_constant_that_is_read_in_two_ways_is_not_cut() -> None:
    nodes = [
        node("Gemm", "x w1", "h"),
        node("Add", "h c", "a"),
        node("Gemm", "a w2", "z"),
        node("ReduceMax", "c", "top", keepdims=0),
        node("Mul", "z top", "y"),
    ]
    arrays = {"w1": normal(4, 6), "c": np.arange(6.0), "w2": rows_gone(normal(6, 3), 5)}
    model = graph(nodes, arrays, ("n", 4))
    assert checked(model, (4,)).model is model


def test_a_constant_inside_a_branch_is_not_cut() -> None:
    inner = helper.make_graph(
        [helper.make_node("Identity", ["h"], ["o"])],
        "inner",
        [],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)],
    )
    between = [
        node("If", "always", "i", then_branch=inner, else_branch=inner),
        node("ReduceSum", "i", "t", keepdims=1),
        node("Add", "h t", "a"),
    ]
    model = chain(normal(6, 4), columns_gone(normal(3, 6), 1), *between, always=np.array(True))
    assert checked(model, (4,)).model is model


# -- pictures


def pictures(
    nodes: list[Node], arrays: dict[str, Array], n_in: int = 3, size: int = 6
) -> tuple[onnx.ModelProto, tuple[int, ...]]:
    return graph(nodes, arrays, ("n", n_in, size, size)), (n_in, size, size)


@pytest.mark.parametrize("bias", [0.0, 0.7])
@pytest.mark.parametrize("pads", [[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]])
def test_a_constant_channel_goes_unless_padding_makes_its_border_differ(bias: float, pads: list[int]) -> None:
    b1 = normal(4)
    b1[2] = bias
    arrays = {"w1": rows_gone(normal(4, 3, 3, 3), 2), "b1": b1, "w2": normal(5, 4, 3, 3), "b2": normal(5)}
    nodes = [
        node("Conv", "x w1 b1", "h"),
        node("Relu", "h", "a"),
        node("Conv", "a w2 b2", "y", pads=pads),
    ]
    found = checked(*pictures(nodes, arrays))
    assert found.n_removed == (0 if bias and any(pads) else 1)
    if bias and any(pads):
        assert "Conv Conv_y pads it" in found.layers[0].why


def test_same_padding_counts_as_padding() -> None:
    arrays = {"w1": rows_gone(normal(4, 3, 3, 3), 2), "b1": np.ones(4), "w2": normal(5, 4, 3, 3)}
    nodes = [node("Conv", "x w1 b1", "h"), node("Conv", "h w2", "y", auto_pad="SAME_UPPER")]
    assert checked(*pictures(nodes, arrays)).n_removed == 0


_POOLS = [
    (node("MaxPool", "h", "a", kernel_shape=[2, 2], pads=[1, 1, 1, 1]), True),
    (node("AveragePool", "h", "a", kernel_shape=[2, 2], pads=[1, 1, 1, 1]), True),
    (node("AveragePool", "h", "a", kernel_shape=[2, 2], pads=[1, 1, 1, 1], count_include_pad=1), False),
    (node("AveragePool", "h", "a", kernel_shape=[2, 2], count_include_pad=1), True),
    (node("Pad", "h p", "a"), False),
    (node("Pad", "h p", "a", mode="reflect"), True),
]


@pytest.mark.parametrize(("pool", "constant"), _POOLS)
def test_pooling_keeps_a_constant_unless_zeros_are_mixed_in(pool: Node, constant: bool) -> None:
    arrays = {"w1": rows_gone(normal(4, 3, 3, 3), 2), "b1": np.ones(4), "w2": normal(5, 4, 2, 2)}
    if pool.op_type == "Pad":
        arrays["p"] = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    nodes = [node("Conv", "x w1 b1", "h"), pool, node("Conv", "a w2", "y")]
    assert checked(*pictures(nodes, arrays)).n_removed == int(constant)


@pytest.mark.parametrize("shape", [[-1, 64], [0, 64], [0, -1]])
def test_a_channel_goes_through_flattening_as_a_block(shape: list[int]) -> None:
    w2 = normal(3, 64)
    w2[:, 16:32] = 0  # channel 1 of 4
    w2[:, 50] = 0  # part of channel 3, which stays
    nodes = [
        node("Conv", "x w1", "h"),
        node("Reshape", "h s", "f"),
        node("Gemm", "f w2", "y", transB=1),
    ]
    arrays = {"w1": normal(4, 3, 3, 3), "s": np.array(shape), "w2": w2}
    found = checked(*pictures(nodes, arrays))
    assert [layer.after for layer in found.layers] == [(3, 3, 3, 3), (3, 48)]
    assert "1 input not read: Gemm Gemm_y reads what goes with it" in found.layers[1].why


def test_a_constant_channel_goes_through_flattening_into_the_bias() -> None:
    nodes = [
        node("Conv", "x w1 b1", "h"),
        node("Sigmoid", "h", "a"),
        node("Flatten", "a", "f"),
        node("Gemm", "f w2 b2", "y", transB=1),
    ]
    arrays = {
        "w1": rows_gone(normal(4, 3, 3, 3), 1),
        "b1": normal(4),
        "w2": normal(3, 64),
        "b2": normal(3),
    }
    assert [layer.after for layer in checked(*pictures(nodes, arrays)).layers] == [(3, 3, 3, 3), (3, 48)]


def test_channels_last_are_flattened_right() -> None:
    w2 = normal(3, 64)
    w2[:, 2::4] = 0
    nodes = [
        node("Conv", "x w1", "h"),
        node("Transpose", "h", "t", perm=[0, 2, 3, 1]),
        node("Reshape", "t s", "f"),
        node("Gemm", "f w2", "y", transB=1),
    ]
    arrays = {"w1": normal(4, 3, 3, 3), "s": np.array([-1, 64]), "w2": w2}
    assert [layer.after for layer in checked(*pictures(nodes, arrays)).layers] == [(3, 3, 3, 3), (3, 48)]


def residual(w1: Array, w2: Array, w3: Array) -> tuple[onnx.ModelProto, tuple[int, ...]]:
    nodes = [
        node("Conv", "x w1", "h"),
        node("Conv", "h w2", "g", pads=[1, 1, 1, 1]),
        node("Add", "h g", "a"),
        node("Conv", "a w3", "y"),
    ]
    return pictures(nodes, {"w1": w1, "w2": w2, "w3": w3})


def test_a_channel_of_a_residual_stays_while_one_side_of_it_lives() -> None:
    model, shape = residual(normal(4, 3, 3, 3), rows_gone(normal(4, 4, 3, 3), 1), normal(2, 4, 1, 1))
    found = checked(model, shape)
    assert found.model is model
    assert "1 output without weights: Conv Conv_g reads what goes with it" in found.layers[1].why


def test_a_channel_of_a_residual_goes_when_no_reader_wants_it() -> None:
    model, shape = residual(
        normal(4, 3, 3, 3), columns_gone(normal(4, 4, 3, 3), 1, 2), columns_gone(normal(2, 4, 1, 1), 1)
    )
    assert [layer.after for layer in checked(model, shape).layers] == [
        (3, 3, 3, 3),
        (3, 3, 3, 3),
        (2, 3, 1, 1),
    ]


def test_a_channel_of_a_residual_goes_when_both_sides_are_zero() -> None:
    model, shape = residual(
        rows_gone(normal(4, 3, 3, 3), 1), rows_gone(normal(4, 4, 3, 3), 1), normal(2, 4, 1, 1)
    )
    assert checked(model, shape).n_removed == 2


def test_concatenated_channels_are_told_apart() -> None:
    nodes = [
        node("Conv", "x w1", "h"),
        node("Conv", "x w2", "g"),
        node("Concat", "h g c", "a", axis=1),
        node("Conv", "a w3", "y"),
    ]
    nodes.insert(2, node("Identity", "h", "unread"))
    w3 = columns_gone(normal(2, 7, 1, 1), 1, 4)
    arrays = {"w1": normal(4, 3, 3, 3), "w2": normal(3, 3, 3, 3), "w3": w3}
    nodes[3].input[:] = ["h", "g"]
    found = checked(*pictures(nodes, arrays))
    assert [layer.after for layer in found.layers] == [(3, 3, 3, 3), (2, 3, 3, 3), (2, 5, 1, 1)]


def test_split_channels_are_told_apart() -> None:
    nodes = [
        node("Conv", "x w1", "h"),
        node("Split", "h", "p q", axis=1, num_outputs=2),
        node("Conv", "p w2", "u"),
        node("Conv", "q w3", "v"),
        node("Add", "u v", "y"),
    ]
    arrays = {
        "w1": normal(6, 3, 3, 3),
        "w2": columns_gone(normal(2, 3, 1, 1), 0, 2),
        "w3": columns_gone(normal(2, 3, 1, 1), 1),
    }
    found = checked(*pictures(nodes, arrays))
    assert [layer.after for layer in found.layers] == [(3, 3, 3, 3), (2, 1, 1, 1), (2, 2, 1, 1)]


def test_sliced_channels_keep_their_place() -> None:
    nodes = [
        node("Conv", "x w1", "h"),
        node("Slice", "h s e i", "p"),
        node("Conv", "p w2", "u"),
        node("Conv", "h w3", "v"),
        node("Add", "u v", "y"),
    ]
    w3 = columns_gone(normal(2, 6, 1, 1), 0, 3, 5)
    arrays = {
        "w1": normal(6, 3, 3, 3),
        "w2": columns_gone(normal(2, 3, 1, 1), 1),
        "w3": w3,
        "s": np.array([2]),
        "e": np.array([-1]),
        "i": np.array([1]),
    }
    found = checked(*pictures(nodes, arrays))
    assert [layer.after for layer in found.layers] == [(3, 3, 3, 3), (2, 2, 1, 1), (2, 3, 1, 1)]


def test_a_depthwise_convolution_loses_groups() -> None:
    nodes = [
        node("Conv", "x w1", "h"),
        node("Conv", "h w2 b2", "g", group=4, pads=[1, 1, 1, 1]),
        node("Relu", "g", "a"),
        node("Conv", "a w3", "y"),
    ]
    arrays = {
        "w1": normal(4, 3, 3, 3),
        "w2": rows_gone(normal(8, 1, 3, 3), 2, 3),
        "b2": normal(8),
        "w3": columns_gone(normal(2, 8, 1, 1), 6, 7),
    }
    found = checked(*pictures(nodes, arrays))
    assert [layer.after for layer in found.layers] == [(2, 3, 3, 3), (4, 1, 3, 3), (2, 4, 1, 1)]


def test_a_grouped_convolution_loses_whole_groups_only() -> None:
    nodes = [
        node("Conv", "x w1", "h"),
        node("Conv", "h w2", "g", group=2),
        node("Conv", "g w3", "y"),
    ]

    def found(*dead: int) -> list[tuple[int, ...]]:
        arrays = {
            "w1": normal(4, 3, 3, 3),
            "w2": normal(6, 2, 2, 2),
            "w3": columns_gone(normal(2, 6, 1, 1), *dead),
        }
        return [layer.after for layer in checked(*pictures(nodes, arrays)).layers]

    assert found(0, 1) == [(4, 3, 3, 3), (6, 2, 2, 2), (2, 6, 1, 1)]
    assert found(0, 1, 2) == [(2, 3, 3, 3), (3, 2, 2, 2), (2, 3, 1, 1)]


def test_shuffled_channels_go_where_all_groups_can_spare_them() -> None:
    nodes = [
        node("Conv", "x w1", "h"),
        node("Reshape", "h s1", "r"),
        node("Transpose", "r", "t", perm=[0, 2, 1, 3, 4]),
        node("Reshape", "t s2", "a"),
        node("Conv", "a w2", "y"),
    ]
    arrays = {
        "w1": normal(6, 3, 3, 3),
        "s1": np.array([-1, 2, 3, 4, 4]),
        "s2": np.array([-1, 6, 4, 4]),
        "w2": columns_gone(normal(2, 6, 1, 1), 2, 3),  # channel 1 of both groups
    }
    found = checked(*pictures(nodes, arrays))
    assert [layer.after for layer in found.layers] == [(4, 3, 3, 3), (2, 4, 1, 1)]


def test_a_transposed_convolution_takes_no_constant_but_zero() -> None:
    nodes = [node("Conv", "x w1 b1", "h"), node("ConvTranspose", "h w2", "y")]
    b1 = normal(4)
    b1[3] = 0
    w2 = normal(4, 2, 2, 2)
    w2[1] = 0
    arrays = {"w1": rows_gone(normal(4, 3, 3, 3), 2, 3), "b1": b1, "w2": w2}
    found = checked(*pictures(nodes, arrays))
    assert [layer.after for layer in found.layers] == [(2, 3, 3, 3), (2, 2, 2, 2)]


def test_a_squeeze_without_axes_keeps_its_channels() -> None:
    nodes = [
        node("Conv", "x w1", "h"),
        node("GlobalAveragePool", "h", "p"),
        node("Squeeze", "p", "f"),
        node("Gemm", "f w2", "y", transB=1),
    ]
    arrays = {"w1": normal(4, 3, 3, 3), "w2": columns_gone(normal(3, 4), 1, 2, 3)}
    model = graph(nodes, arrays, (5, 3, 6, 6))
    found = compact(model)
    x = normal(5, 3, 6, 6).astype(np.float32)
    np.testing.assert_allclose(run(found.model, x)[0], run(model, x)[0], rtol=1e-5, atol=1e-6)


# -- inputs


def wide(n_out: int) -> onnx.ModelProto:
    w1 = normal(n_out, 400)
    w1[:, ::2] = 0
    return graph(
        [node("Gemm", "x w1 b1", "h", transB=1), node("Relu", "h", "a"), node("Gemm", "a w2", "y")],
        {"w1": w1, "b1": normal(n_out), "w2": normal(n_out, 3)},
        ("n", 400),
    )


def test_inputs_that_nobody_reads_are_left_out_where_that_pays() -> None:
    found = checked(wide(120), (400,))
    assert shapes(found.model)["w1"] == (120, 200)
    assert found.n_inputs_dropped == 200
    assert [d.dim_value for d in found.model.graph.input[0].type.tensor_type.shape.dim] == [0, 400]


def test_inputs_are_not_picked_where_that_costs_more_than_it_saves() -> None:
    model = wide(20)
    found = checked(model, (400,))
    assert found.model is model
    assert "200 inputs not read: nothing before Gemm Gemm_h can lose channels" in found.layers[0].why


def test_inputs_stay_where_the_caller_wants_them() -> None:
    model = wide(120)
    assert checked(model, (400,), inputs=False).model is model


def test_inputs_of_tokens_and_pictures_are_picked_too() -> None:
    tokens = graph([node("MatMul", "x w", "y")], {"w": rows_gone(normal(64, 200), *range(40))}, ("n", 5, 64))
    assert shapes(checked(tokens, (5, 64)).model)["w"] == (24, 200)
    w = columns_gone(normal(64, 16, 3, 3), *range(10))
    found = checked(*pictures([node("Conv", "x w", "y", pads=[1, 1, 1, 1])], {"w": w}, n_in=16))
    assert shapes(found.model)["w"] == (64, 6, 3, 3)


# -- networks, and anything at random


def kill(module: nn.Module, seed: int = 0, share: float = 0.4) -> None:
    """Zero whole rows and columns of every weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter[torch.rand(len(parameter), generator=generator) < share] = 0
                parameter[:, torch.rand(parameter.shape[1], generator=generator) < share * 0.7] = 0


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("digits-cnn", (1, 8, 8)),
        pytest.param("lenet5", (1, 28, 28), marks=pytest.mark.slow),
        pytest.param("resnet18", (3, 32, 32), marks=(pytest.mark.slow, pytest.mark.full)),
    ],
)
def test_known_networks_shrink_and_compute_the_same(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module = models.create(name).eval()
    stir_batch_norm(module)
    kill(module)
    with torch.no_grad():  # an answer that depends on the input
        next(reversed([p for p in module.parameters() if p.dim() == 2])).normal_(std=0.1)
    model = onnx_from_module(module, example_of_shape(shape), masks={})
    found = compact(model)
    assert found.n_weights_after < 0.6 * found.n_weights_before
    assert require_same_output(model, found.model, signature_of(model)) < 1e-4
    assert compact(found.model).model is found.model


class Mixture(nn.Module):
    """Branches of all kinds after one another, chosen by bits."""

    def __init__(self, kinds: list[int], padding: int) -> None:
        super().__init__()
        self.kinds = kinds
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.parts = nn.ModuleList(self._part(kind, padding) for kind in kinds)
        self.head = nn.Linear(8 * 36, 5)

    @staticmethod
    def _part(kind: int, padding: int) -> nn.Module:
        if kind == 4:
            return nn.Conv2d(8, 8, 3, padding=1, groups=8)
        if kind == 5:
            return nn.Conv2d(8, 8, 3, padding=1, groups=2)
        if kind == 6:
            return nn.BatchNorm2d(8)
        return nn.Conv2d(8, 8, 1, padding=0) if not padding else nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for kind, part in zip(self.kinds, self.parts, strict=True):
            y = part(x)
            if kind == 0:
                x = torch.relu(y)
            elif kind == 1:
                x = x + y
            elif kind == 2:
                x = torch.cat([x[:, 2:6], torch.sigmoid(y[:, :4])], 1)
            elif kind == 3:
                x = y * torch.sigmoid(x.mean((2, 3), keepdim=True))
            elif kind == 7:
                x = nn.functional.avg_pool2d(y, 3, stride=1, padding=1)
            elif kind == 8:
                x = y.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
            elif kind == 9:
                a, b = nn.functional.max_pool2d(y, 3, stride=1, padding=1).chunk(2, 1)
                x = torch.cat([a + 0.5, nn.functional.leaky_relu(b)], 1)
            else:
                x = nn.functional.hardtanh(y, -0.5, 2.0)
        logits: Tensor = self.head(x.flatten(1))
        return logits


@pytest.mark.slow  # torch's exporter takes a second or two for each
@many(12, every_day=3, deadline=None)
@given(
    kinds=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    padding=st.integers(0, 1),
    seed=st.integers(0, 1000),
    share=st.sampled_from([0.2, 0.5, 0.8, 1.0]),
)
def test_networks_of_all_kinds_of_branches_compute_the_same(
    kinds: list[int], padding: int, seed: int, share: float
) -> None:
    torch.manual_seed(seed)
    module = Mixture(kinds, padding).eval()
    stir_batch_norm(module)
    kill(module, seed, share)
    with torch.no_grad():
        module.head.weight.add_(0.1 * torch.randn(5, 1))  # else all is dead at once
        module.head.weight[:, torch.rand(8 * 36) < 0.3] = 0
    checked(onnx_from_module(module, example_of_shape((3, 6, 6)), masks={}), (3, 6, 6))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_chains_of_gemms_keep_exactly_what_an_obvious_count_keeps(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(2, 6), min_size=3, max_size=5))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    density = data.draw(st.sampled_from([0.15, 0.3, 0.6]))
    w = [rng.standard_normal((o, i)) * (rng.random((o, i)) < density) for i, o in itertools.pairwise(sizes)]
    nodes, arrays = [], {}
    for k, weight in enumerate(w):
        last = k == len(w) - 1
        nodes.append(node("Gemm", f"{f'a{k}' if k else 'x'} w{k}", "y" if last else f"h{k}", transB=1))
        if not last:
            nodes.append(node("Relu", f"h{k}", f"a{k + 1}"))
        arrays[f"w{k}"] = weight
    model = graph(nodes, arrays, ("n", sizes[0]))
    found = checked(model, (sizes[0],), inputs=False)
    live = [np.ones(n, bool) for n in sizes]
    for _ in range(20):  # zero biases: a channel without inputs is 0
        for k in range(1, len(sizes) - 1):
            fed = (w[k - 1][:, live[k - 1]] != 0).any(axis=1)
            live[k] &= fed & (w[k][live[k + 1]] != 0).any(axis=0)
    wanted = [max(1, int(part.sum())) for part in live]
    if all(part.any() for part in live):
        assert [layer.after[0] for layer in found.layers] == wanted[1:]


# -- groups that leave whole


def test_of_a_group_either_all_inputs_leave_or_none() -> None:
    w2 = columns_gone(normal(3, 12), 0, 1, 2, 3, 5, 6, 10)
    model = chain(normal(12, 4), w2)
    found = compact(model, together={"w2": np.arange(12) // 4})
    assert shapes(found.model)["w2"] == (3, 8)
    assert found.kept["w2"].tolist() == [*range(4, 12)]
    assert_same_function(model, found.model, (4,))
    assert shapes(compact(model).model)["w2"] == (3, 5)
    # Groups need not be neighbours: here only the columns 0, 2 and 5 leave, though 1, 3, 6 and 10 are dead as
    # well.
    spread = compact(model, together={"w2": np.array([0, 1, 0, 1, 1, 0, 2, 2, 2, 3, 3, 3])})
    assert spread.kept["w2"].tolist() == [1, 3, 4, *range(6, 12)]
    assert_same_function(model, spread.model, (4,))


def test_inputs_that_have_to_stay_are_left_out_by_whole_groups_or_not_at_all() -> None:
    w = columns_gone(normal(200, 64), *range(37))
    model = graph([node("Gemm", "x w", "y", transB=1)], {"w": w}, ("n", 64))
    found = compact(model, together={"w": np.arange(64) // 4})
    assert shapes(found.model)["w"] == (200, 28)
    assert found.kept["w"].tolist() == [*range(36, 64)]
    assert_same_function(model, found.model, (64,))
    assert compact(model, unpicked={"w"}).model is model


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), m=st.sampled_from([2, 4]), density=st.sampled_from([0.05, 0.15, 0.3]))
def test_what_obeys_a_pattern_obeys_it_when_channels_went(seed: int, m: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    w1, w2 = (rng.standard_normal(shape) * (rng.random(shape) < density) for shape in ((16, 8), (5, 16)))
    kept = np.argsort(np.abs(w2).reshape(5, -1, m), axis=2) >= m // 2
    w2 = w2 * kept.reshape(5, 16)
    model = chain(w1, w2)
    found = compact(model, together={"w2": np.arange(16) // m})
    assert_same_function(model, found.model, (8,))
    left = numpy_helper.to_array(next(t for t in found.model.graph.initializer if t.name == "w2"))
    assert left.shape[1] % m == 0
    assert (np.count_nonzero(left.reshape(len(left), -1, m), axis=2) <= m - m // 2).all()
    np.testing.assert_array_equal(left, w2[:, found.kept["w2"]].astype(np.float32))
    assert w2[:, np.setdiff1d(np.arange(16), found.kept["w2"])].any() <= (w1 == 0).all(axis=1).any()


def test_a_graph_that_computes_something_else_fails_the_gate() -> None:
    model = chain(normal(6, 4), normal(3, 6))
    other = chain(normal(6, 4), normal(3, 6) * 1.001)
    with pytest.raises(GateFailed, match=r"The compacted graph differs from the whole one in \w+ by 0\.001"):
        require_same_output(model, other, signature_of(model))
    assert require_same_output(model, model, signature_of(model)) == 0.0
