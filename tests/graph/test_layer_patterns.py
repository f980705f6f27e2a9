"""Which layers are 2:4, whether hardware can use it, and why not: each way a weight can reach its layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from sparse_export.errors import ArtefactError, GateFailed
from sparse_export.formats.layers import GraphLayer
from sparse_export.formats.run import LayerInfo
from sparse_export.graph.evaluation_limits import MAX_NODES
from sparse_export.graph.example import example_of_shape
from sparse_export.graph.export import onnx_from_module
from sparse_export.graph.layer_uses import layer_weight
from sparse_export.graph.layers import graph_layers
from sparse_export.graph.promises import broken_patterns, promised_patterns, require_patterns
from sparse_export.sparsity.pattern import NMPattern, groups_over, largest_per_group, obeys

Array = np.ndarray[Any, Any]
TWO_FOUR = NMPattern(n=2, m=4)


def two_four(
    shape: Sequence[int], axis: int, dtype: Any = np.float16, *, pattern: NMPattern = TWO_FOUR
) -> Array:
    """Random weights that obey the pattern along `axis`, exactly N nonzeros a group."""
    values = torch.from_numpy(np.random.default_rng(7).uniform(0.5, 1.5, tuple(shape)).astype(np.float32))
    kept = (values * largest_per_group(values, axis, pattern)).numpy()
    return kept.astype(dtype)


def dense(shape: Sequence[int], dtype: Any = np.float16) -> Array:
    return np.random.default_rng(8).uniform(0.5, 1.5, tuple(shape)).astype(dtype)


def onnx_type(dtype: Any) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def model_of(
    nodes: Sequence[onnx.NodeProto],
    tensors: dict[str, Array],
    *,
    x: Sequence[int | str] = ("n", 32),
    dtype: Any = np.float16,
    opset: int = 21,
    ir_version: int = 10,
    functions: Sequence[onnx.FunctionProto] = (),
    extra_inputs: Sequence[onnx.ValueInfoProto] = (),
    output: str = "y",
    check: bool = True,
) -> onnx.ModelProto:
    """A graph of input `x` and output `y`, valid unless `check` is off."""
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("x", onnx_type(dtype), x), *extra_inputs],
        [helper.make_tensor_value_info(output, onnx_type(dtype), [])],
        [numpy_helper.from_array(values, name) for name, values in tensors.items()],
    )
    graph.output[0].type.tensor_type.ClearField("shape")
    domains = {function.domain for function in functions}
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(name, 1) for name in domains)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, functions=functions)
    if check:
        graph.output[0].type.tensor_type.shape.dim.add()
        model.graph.output[0].type.tensor_type.shape.dim.add()
        onnx.checker.check_model(model)
    return model


def matmul(name: str = "w") -> onnx.NodeProto:
    return helper.make_node("MatMul", ["x", name], ["y"], name="layer")


def one(model: onnx.ModelProto) -> GraphLayer:
    (layer,) = graph_layers(model)
    return layer


def codes(layer: GraphLayer) -> list[str]:
    return [reason.code for reason in layer.reasons]


# -- how the weight reaches its node ------------------------------------------------------------------------


def test_a_plain_half_precision_weight_can_be_used() -> None:
    layer = one(model_of([matmul()], {"w": two_four((32, 48), 0)}))
    assert (layer.eligible, layer.reasons, layer.pattern_holds) == ("yes", (), True)
    assert (layer.weight, layer.shape, layer.reduction_axis, layer.stored_axis) == ("w", (32, 48), 0, 0)
    assert (layer.n_groups, layer.n_groups_over, layer.obeys) == (8 * 48, 0, ("2:4",))
    assert (layer.dtype, layer.through, layer.n_nonzero, layer.macs) == ("float16", (), 16 * 48, 32 * 48)


@pytest.mark.parametrize(
    ("dtype", "eligible", "code"),
    [
        (np.float16, "yes", None),
        (ml_dtypes.bfloat16, "yes", None),
        (np.float32, "no", "float32"),
        (np.float64, "no", "other-type"),
        (np.int32, "no", "other-type"),
    ],
)
def test_the_type_decides_whether_hardware_knows_the_pattern(dtype: Any, eligible: str, code: str) -> None:
    layer = one(model_of([matmul()], {"w": two_four((32, 32), 0, dtype)}, dtype=dtype))
    assert layer.pattern_holds
    assert (layer.eligible, codes(layer)) == (eligible, [code] if code else [])


@pytest.mark.parametrize("opset", [13, 21, 26])
def test_a_stored_transpose_is_looked_through(opset: int) -> None:
    nodes = [
        helper.make_node("Cast", ["stored"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Transpose", ["half"], ["w"], perm=[1, 0]),
        matmul(),
    ]
    layer = one(model_of(nodes, {"stored": two_four((48, 32), 1, np.float32)}, opset=opset))
    assert (layer.weight, layer.through, layer.dtype) == ("stored", ("Transpose", "Cast"), "float16")
    assert (layer.shape, layer.reduction_axis, layer.stored_axis) == ((32, 48), 0, 1)
    assert (layer.pattern_holds, layer.eligible) == (True, "yes")


def test_a_transpose_of_four_axes_is_followed_to_the_stored_axis() -> None:
    nodes = [
        helper.make_node("Transpose", ["krsc"], ["w"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["x", "w"], ["y"]),
    ]
    layer = one(model_of(nodes, {"krsc": two_four((32, 3, 3, 16), 3)}, x=("n", 16, 8, 8)))
    assert (layer.shape, layer.reduction_axis, layer.stored_axis) == ((32, 16, 3, 3), 1, 3)
    assert (layer.eligible, layer.obeys) == ("yes", ("2:4",))


def test_reshapes_and_identities_are_looked_through_but_their_axis_is_not_told() -> None:
    nodes = [
        helper.make_node("Identity", ["stored"], ["same"]),
        helper.make_node("Reshape", ["same", "to"], ["w"]),
        matmul(),
    ]
    tensors = {"stored": two_four((32, 48), 0).reshape(8, 4, 48), "to": np.array([32, -1])}
    layer = one(model_of(nodes, tensors))
    assert (layer.through, layer.weight, layer.stored_axis) == (("Reshape", "Identity"), "stored", None)
    assert layer.eligible == "yes"


def test_a_weight_in_a_constant_node_is_found() -> None:
    constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(two_four((32, 16), 0)))
    layer = one(model_of([constant, matmul()], {}))
    assert (layer.weight, layer.eligible, layer.n_groups) == ("w", "yes", 128)


def masked_matmul(weight: Array, mask: Array, *, swapped: bool = False) -> onnx.ModelProto:
    product = ["cast", "raw"] if swapped else ["raw", "cast"]
    nodes = [
        helper.make_node("Cast", ["mask"], ["cast"], to=onnx_type(weight.dtype)),
        helper.make_node("Mul", product, ["w"]),
        matmul(),
    ]
    return model_of(nodes, {"raw": weight, "mask": mask}, dtype=weight.dtype)


@pytest.mark.parametrize("swapped", [False, True])
def test_zeros_that_a_mask_makes_in_the_graph_are_named(swapped: bool) -> None:
    mask = two_four((32, 16), 0) != 0
    layer = one(masked_matmul(dense((32, 16)), mask, swapped=swapped))
    assert (layer.weight, layer.through, layer.stored_axis) == ("raw", ("Mul",), 0)
    assert (layer.pattern_holds, layer.n_nonzero, layer.eligible) == (True, 256, "unproven")
    (reason,) = layer.reasons
    assert reason.code == "masked-in-graph"
    assert reason.text == (
        "The zeros come from a Mul with the mask cast in the graph; the stored weight is dense; fold it."
    )


def test_a_mask_that_takes_nothing_away_is_only_a_computation() -> None:
    layer = one(masked_matmul(two_four((32, 16), 0), np.ones((32, 16), dtype=bool)))
    assert (layer.weight, codes(layer), layer.eligible) == ("raw", ["computed"], "unproven")


def test_a_factor_that_makes_the_smallest_weight_vanish_is_no_mask() -> None:
    weight = dense((32, 16))
    weight[3, 5] = 1e-7
    nodes = [helper.make_node("Mul", ["raw", "factor"], ["w"]), matmul()]
    layer = one(model_of(nodes, {"raw": weight, "factor": np.full((1, 1), 0.1, np.float16)}))
    assert (layer.n_nonzero, codes(layer)) == (511, ["groups-over", "computed"])


def test_a_signalling_nan_is_a_nonzero() -> None:
    weight = np.zeros((32, 16), np.float16)
    weight.view(np.uint16)[0, 0] = 0x7D01
    assert one(model_of([matmul()], {"w": weight})).n_nonzero == 1


def test_zeros_that_a_where_makes_are_named() -> None:
    nodes = [helper.make_node("Where", ["mask", "raw", "zero"], ["w"]), matmul()]
    tensors = {"mask": two_four((32, 16), 0) != 0, "raw": dense((32, 16)), "zero": np.float16(0)}
    layer = one(model_of(nodes, {name: np.asarray(value) for name, value in tensors.items()}))
    assert (layer.weight, layer.through, codes(layer)) == ("raw", ("Where",), ["masked-in-graph"])
    assert "Where with the mask mask" in layer.reasons[0].text


class Masked(nn.Module):
    """Multiplies its weight by a mask whenever it is called, as modelopt's layers do."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(dense((16, 32), np.float32)))
        self.register_buffer("mask", torch.from_numpy(two_four((16, 32), 1)) != 0)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.mask)


@pytest.mark.parametrize("optimize", [False, True])
def test_a_mask_in_the_forward_of_a_torch_module_is_found_in_its_export(optimize: bool) -> None:
    program = torch.onnx.export(
        Masked().eval(), (torch.zeros(2, 32),), dynamo=True, optimize=optimize, verbose=False
    )
    assert program is not None
    (layer,) = [layer for layer in graph_layers(program.model_proto) if layer.constant]
    assert (layer.pattern_holds, layer.n_nonzero, layer.dtype) == (True, 256, "float32")
    if "Mul" in layer.through:  # the exporter may learn to fold it, as it does for small weights
        assert (codes(layer), layer.weight) == (["float32", "masked-in-graph"], "weight")
    else:
        assert optimize


def quantized(
    *,
    dtype: Any = np.int8,
    activations: bool = True,
    zero_point: int = 0,
    stored_float: bool = False,
    float_type: Any = np.float16,
) -> onnx.ModelProto:
    """A MatMul (32, 32) behind Q/DQ, per tensor, weight 2:4 where it is stored as whole numbers."""
    weight = two_four((32, 32), 0, np.float32)
    scale = np.asarray(0.5, dtype=float_type)
    zero = np.asarray(zero_point).astype(dtype)
    stored = weight.astype(float_type) if stored_float else np.ceil(weight).astype(dtype)
    nodes = []
    if stored_float:
        nodes.append(helper.make_node("QuantizeLinear", ["stored", "scale", "zero"], ["q"]))
    nodes.append(
        helper.make_node("DequantizeLinear", ["q" if stored_float else "stored", "scale", "zero"], ["w"])
    )
    if activations:
        nodes.append(helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]))
        nodes.append(helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]))
    nodes.append(helper.make_node("MatMul", ["xd" if activations else "x", "w"], ["y"], name="layer"))
    return model_of(nodes, {"stored": stored, "scale": scale, "zero": zero}, dtype=float_type)


@pytest.mark.parametrize("opset", [10, 13, 17, 18])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_quantized_weights_of_older_opsets_are_read_like_those_of_now(opset: int, dtype: Any) -> None:
    model = quantized(dtype=dtype, float_type=np.float32)
    wanted = one(model)
    model.opset_import[0].version = opset
    onnx.checker.check_model(model)
    assert one(model) == wanted
    assert wanted.pattern_holds


def test_channels_may_have_scales_of_their_own_since_opset_13() -> None:
    stored, scale = two_four((32, 32), 0, np.float32).astype(np.int8), np.full(32, 0.5, dtype=np.float32)
    dequantize = helper.make_node("DequantizeLinear", ["stored", "scale"], ["w"], axis=1)
    model = model_of([dequantize, matmul()], {"stored": stored, "scale": scale}, dtype=np.float32, opset=13)
    assert one(model).n_nonzero == np.count_nonzero(stored)
    assert one(model).through == ("DequantizeLinear",)


def test_the_quantizing_operators_of_onnxruntime_are_those_of_onnx() -> None:
    model = quantized(float_type=np.float32)
    wanted = one(model)
    for node in model.graph.node:
        if node.op_type != "MatMul":
            node.domain = "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert one(model) == wanted


@pytest.mark.parametrize("stored_float", [False, True])
def test_int8_by_q_and_dq_is_unproven(stored_float: bool) -> None:
    layer = one(quantized(stored_float=stored_float))
    assert (layer.dtype, layer.pattern_holds, layer.eligible) == ("int8", True, "unproven")
    assert codes(layer) == ["int8"]
    wanted = ("DequantizeLinear", "QuantizeLinear") if stored_float else ("DequantizeLinear",)
    assert (layer.through, layer.weight, layer.stored_axis) == (wanted, "stored", 0)


def test_float8_can_be_used_and_its_channels_count_in_thirty_twos() -> None:
    assert one(quantized(dtype=ml_dtypes.float8_e4m3fn)).eligible == "yes"
    assert one(quantized(dtype=ml_dtypes.float8_e4m3fn)).dtype == "float8_e4m3fn"


def test_a_weight_that_alone_is_quantized_is_multiplied_as_float() -> None:
    layer = one(quantized(activations=False))
    assert (layer.dtype, codes(layer), layer.eligible) == ("float16", ["weight-only"], "unproven")


def test_zeros_stored_as_a_zero_point_are_not_seen_by_hardware() -> None:
    stored = np.where(two_four((32, 32), 0) != 0, 9, 3).astype(np.int8)
    model = quantized(zero_point=3)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(stored, "stored"))
    layer = one(model)
    assert (layer.pattern_holds, layer.eligible) == (True, "no")
    assert codes(layer) == ["int8", "zero-point"]


def unpack24() -> onnx.FunctionProto:
    """values (G, 2), meta (G / 2) uint8, shape -> the dense weight."""
    consts = {
        "shifts": np.array([[0, 2, 4, 6]], dtype=np.uint8),
        "three": np.array(3, dtype=np.uint8),
        "last": np.array([1]),
        "pairs": np.array([-1, 2]),
        "zero": np.array(0, dtype=np.int8),
        "four": np.array([4]),
        "first": np.array([0]),
        "one": np.array([1]),
    }
    make = helper.make_node
    nodes = [
        *(make("Constant", [], [name], value=numpy_helper.from_array(v)) for name, v in consts.items()),
        make("Unsqueeze", ["meta", "last"], ["column"]),
        make("BitShift", ["column", "shifts"], ["shifted"], direction="RIGHT"),
        make("BitwiseAnd", ["shifted", "three"], ["bits"]),
        make("Cast", ["bits"], ["wide"], to=TensorProto.INT32),
        make("Reshape", ["wide", "pairs"], ["indices"]),
        make("Shape", ["values"], ["size"]),
        make("Slice", ["size", "first", "one"], ["n_groups"]),
        make("Concat", ["n_groups", "four"], ["room"], axis=0),
        make("Expand", ["zero", "room"], ["empty"]),
        make("CastLike", ["empty", "values"], ["zeros"]),
        make("ScatterElements", ["zeros", "indices", "values"], ["groups"], axis=1),
        make("Reshape", ["groups", "shape"], ["dense"]),
    ]
    return helper.make_function(
        "sparse24", "Unpack24", ["values", "meta", "shape"], ["dense"], nodes, [helper.make_opsetid("", 21)]
    )


def packed(weight_ON: Array) -> dict[str, Array]:
    """A 2:4 weight with its reduction axis last, two nonzeros in every group, as Unpack24 takes it."""
    groups = weight_ON.reshape(-1, 4)
    index = np.array([np.flatnonzero(group) for group in groups])
    nibbles = (index[:, 0] | index[:, 1] << 2).astype(np.uint8)
    return {
        "values": np.take_along_axis(groups, index, 1),
        "meta": nibbles[0::2] | nibbles[1::2] << 4,
        "shape": np.array(weight_ON.shape),
    }


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_a_packed_weight_is_unpacked_and_judged_as_the_dense_one(dtype: Any) -> None:
    weight = two_four((48, 32), 1, dtype)
    nodes = [
        helper.make_node("Unpack24", ["values", "meta", "shape"], ["unpacked"], domain="sparse24"),
        helper.make_node("Transpose", ["unpacked"], ["w"], perm=[1, 0]),
        matmul(),
    ]
    layer = one(model_of(nodes, packed(weight), functions=[unpack24()], dtype=dtype))
    assert (layer.through, layer.weight, layer.stored_axis) == (("Transpose", "Unpack24"), "values", None)
    assert (layer.shape, layer.n_nonzero, layer.macs) == ((32, 48), 48 * 16, 32 * 48)
    plain = one(model_of([matmul()], {"w": weight.T.copy()}, dtype=dtype))
    assert (layer.eligible, layer.reasons, layer.obeys) == (plain.eligible, plain.reasons, plain.obeys)


def test_packed_int8_behind_dequantization_is_unpacked_too() -> None:
    weight = np.ceil(two_four((32, 32), 1, np.float32)).astype(np.int8)
    nodes = [
        helper.make_node("Unpack24", ["values", "meta", "shape"], ["q"], domain="sparse24"),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["d"]),
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "scale"], ["xd"]),
        helper.make_node("Gemm", ["xd", "d"], ["y"], transB=1),
    ]
    tensors = {**packed(weight), "scale": np.asarray(np.float16(0.5)), "zero": np.asarray(np.int8(0))}
    layer = one(model_of(nodes, tensors, functions=[unpack24()]))
    assert (layer.dtype, codes(layer), layer.pattern_holds) == ("int8", ["int8"], True)
    assert layer.through == ("DequantizeLinear", "Unpack24")


def test_a_sparse_initializer_is_filled_up() -> None:
    weight = two_four((32, 16), 0)
    model = model_of([matmul()], {}, check=False)
    places = np.flatnonzero(weight)
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(
            numpy_helper.from_array(weight.ravel()[places], "w"),
            numpy_helper.from_array(places, "places"),
            weight.shape,
        )
    )
    layer = one(model)
    assert (layer.n_nonzero, layer.pattern_holds, layer.eligible) == (256, True, "no")
    assert codes(layer) == ["sparse-initializer"]


# -- the axis -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "shape", "axis", "x", "attributes"),
    [
        ("Gemm", (48, 32), 1, ("n", 32), {"transB": 1}),
        ("Gemm", (32, 48), 0, ("n", 32), {}),
        ("MatMul", (32, 48), 0, ("n", 7, 32), {}),
        ("MatMul", (5, 32, 48), 1, ("n", 5, 7, 32), {}),
        ("Conv", (48, 32, 3, 3), 1, ("n", 32, 8, 8), {}),
        ("Conv", (48, 32, 3), 1, ("n", 32, 8), {}),
        ("Conv", (48, 16, 3, 3), 1, ("n", 32, 8, 8), {"group": 2}),
        ("ConvTranspose", (32, 48, 2, 2), 0, ("n", 32, 8, 8), {}),
        ("ConvTranspose", (32, 24, 2, 2), 0, ("n", 32, 8, 8), {"group": 2}),
    ],
)
def test_the_pattern_is_looked_for_along_the_axis_that_is_summed(
    op: str, shape: tuple[int, ...], axis: int, x: Any, attributes: dict[str, Any]
) -> None:
    for along in range(len(shape)):
        if shape[along] % 4:
            continue
        node = helper.make_node(op, ["x", "w"], ["y"], **attributes)
        layer = one(model_of([node], {"w": two_four(shape, along)}, x=x))
        assert layer.reduction_axis == axis
        assert layer.pattern_holds == (along == axis), along
        assert ("groups-over" in codes(layer)) == (along != axis)


def test_a_weight_on_the_left_is_found_and_no_kernel_is_known_for_it() -> None:
    nodes = [helper.make_node("MatMul", ["w", "x"], ["y"])]
    layer = one(model_of(nodes, {"w": two_four((48, 32), 1)}, x=("n", 32, 5)))
    assert (layer.reduction_axis, layer.pattern_holds, codes(layer)) == (1, True, ["kernel-unknown"])
    nodes = [helper.make_node("Gemm", ["w", "x"], ["y"], transA=1)]
    layer = one(model_of(nodes, {"w": two_four((32, 48), 0)}, x=(32, "n")))
    assert (layer.reduction_axis, layer.pattern_holds, layer.eligible) == (0, True, "unproven")


def test_groups_of_four_do_not_reach_from_one_channel_group_into_the_next() -> None:
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], group=4)
    layer = one(model_of([node], {"w": np.zeros((24, 8, 2, 2), np.float16)}, x=("n", 24, 8, 8)))
    assert (layer.n_groups, layer.pattern_holds) == (None, False)
    assert "has 6 entries" in layer.reasons[0].text


@pytest.mark.parametrize(
    ("op", "shape", "x", "attributes", "wanted"),
    [
        ("Conv", (64, 3, 7, 7), ("n", 3, 9, 9), {}, ["indivisible"]),
        ("Conv", (32, 1, 3, 3), ("n", 32, 9, 9), {"group": 32}, ["depthwise"]),
        ("Conv", (64, 32, 3, 3), ("n", 64, 9, 9), {"group": 2}, ["grouped"]),
        ("Conv", (64, 4, 3, 3), ("n", 64, 9, 9), {"group": 16}, ["unaligned", "grouped"]),
        ("Conv", (64, 32, 3, 3, 3), ("n", 32, 9, 9, 9), {}, ["kernel-unknown"]),
        ("ConvTranspose", (32, 64, 3, 3), ("n", 32, 9, 9), {}, ["kernel-unknown"]),
        ("MatMul", (3, 32, 64), ("n", 3, 5, 32), {}, ["kernel-unknown"]),
        ("MatMul", (1, 32, 64), ("n", 3, 5, 32), {}, []),
        ("MatMul", (32,), ("n", 32), {}, ["vector"]),
        ("MatMul", (32, 10), ("n", 32), {}, ["unaligned"]),
        ("MatMul", (20, 32), ("n", 20), {}, ["unaligned"]),
        ("MatMul", (0, 32), ("n", 0), {}, ["empty"]),
        ("MatMul", (32, 0), ("n", 32), {}, ["empty"]),
    ],
)
def test_what_the_shape_says_against_it_is_told(
    op: str, shape: tuple[int, ...], x: Any, attributes: dict[str, Any], wanted: list[str]
) -> None:
    model = model_of(
        [helper.make_node(op, ["x", "w"], ["y"], **attributes)], {"w": np.zeros(shape, np.float16)}, x=x
    )
    assert codes(one(model)) == wanted


def loop_over(weight: Array, axis: int, m: int, n: int) -> tuple[int, int]:
    """Groups over n, and groups; one entry after the other."""
    over = total = 0
    others = [range(length) for i, length in enumerate(weight.shape) if i != axis]
    for place in itertools.product(*others):
        for start in range(0, weight.shape[axis], m):
            count = 0
            for i in range(start, start + m):
                index = (*place[:axis], i, *place[axis:])
                count += bool(weight[index] != 0)
            total += 1
            over += count > n
    return over, total


@st.composite
def small_layers(draw: st.DrawFn) -> tuple[str, Array, int, dict[str, Any]]:
    op = draw(st.sampled_from(["Conv", "ConvTranspose", "Gemm", "MatMul"]))
    a, b = draw(st.integers(1, 9)), draw(st.integers(1, 17))
    k = draw(st.integers(1, 2))
    turned = draw(st.integers(0, 1))
    shape, axis = {
        "Conv": ((a, b, k), 1),
        "ConvTranspose": ((b, a, k), 0),
        "Gemm": ((a, b), 1) if turned else ((b, a), 0),
        "MatMul": ((k, b, a), 1),
    }[op]
    chance = draw(st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0]))
    mask = np.random.default_rng(draw(st.integers(0, 2**32))).random(shape) < chance
    values = np.where(mask, draw(st.sampled_from([1.0, -2.0, np.nan])), draw(st.sampled_from([0.0, -0.0])))
    return op, values.astype(np.float16), axis, {"transB": turned} if op == "Gemm" else {}


@given(small_layers())
def test_the_verdict_is_that_of_a_slow_loop(made: tuple[str, Array, int, dict[str, Any]]) -> None:
    op, weight, axis, attributes = made
    model = model_of([helper.make_node(op, ["x", "w"], ["y"], **attributes)], {"w": weight}, check=False)
    layer = one(model)
    length = weight.shape[axis]
    assert layer.reduction_axis == axis
    if length % 4:
        assert (layer.n_groups, layer.n_groups_over, layer.pattern_holds) == (None, None, False)
        assert "indivisible" in codes(layer)
    else:
        over, total = loop_over(weight, axis, 4, 2)
        assert (layer.n_groups_over, layer.n_groups, layer.pattern_holds) == (over, total, over == 0)
        assert over == int(groups_over(torch.from_numpy(weight), axis, TWO_FOUR))
        assert ("groups-over" in codes(layer)) == (over > 0)
    # What is told to be obeyed is, it is the tightest, and all that is obeyed follows from what is told.
    told = [tuple(map(int, text.split(":"))) for text in layer.obeys]
    for n, m in told:
        assert loop_over(weight, axis, m, n)[0] == 0
        assert n == 1 or loop_over(weight, axis, m, n - 1)[0] > 0
    for m in (2, 4, 8, 16):
        for n in range(1, m):
            if length % m == 0 and loop_over(weight, axis, m, n)[0] == 0:
                assert (
                    any(m % small == 0 and few * (m // small) <= n for few, small in told) or (n, m) in told
                )


# -- what is no weight, is not known, or stands elsewhere ---------------------------------------------------


def test_a_weight_that_is_an_input_is_not_constant() -> None:
    weight = helper.make_tensor_value_info("w", TensorProto.FLOAT16, [32, 32, 3, 3])
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    layer = one(model_of([node], {}, x=("n", 32, 8, 8), extra_inputs=[weight]))
    assert (layer.constant, layer.eligible, codes(layer)) == (False, "no", ["not-constant"])


def test_a_weight_that_depends_on_an_input_is_not_constant() -> None:
    nodes = [helper.make_node("Mul", ["stored", "x"], ["w"]), helper.make_node("Conv", ["x", "w"], ["y"])]
    layer = one(model_of(nodes, {"stored": dense((32, 32, 3, 3))}, x=(32, 32, 3, 3)))
    assert codes(layer) == ["not-constant"]


@pytest.mark.parametrize(("ir_version", "wanted"), [(3, []), (10, ["overridable"])])
def test_an_initializer_that_is_an_input_may_be_overridden_since_ir_version_4(
    ir_version: int, wanted: list[str]
) -> None:
    listed = helper.make_tensor_value_info("w", TensorProto.FLOAT16, [32, 32])
    model = model_of(
        [matmul()], {"w": two_four((32, 32), 0)}, extra_inputs=[listed], ir_version=ir_version, opset=13
    )
    assert codes(one(model)) == wanted


def test_a_weight_of_two_layers_names_the_other_and_stays_eligible() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="first"),
        helper.make_node("MatMul", ["h", "w"], ["y"], name="second"),
    ]
    first, second = graph_layers(model_of(nodes, {"w": two_four((32, 32), 0)}))
    assert (codes(first), first.eligible, codes(second)) == (["shared"], "yes", ["shared"])
    assert "used by second too" in first.reasons[0].text
    assert "used by first too" in second.reasons[0].text


def test_a_weight_of_two_layers_of_one_name_is_shared_all_the_same() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["g"], name="layer"),
        helper.make_node("MatMul", ["g", "other"], ["h"], name="layer#2"),
        helper.make_node("MatMul", ["h", "w"], ["y"], name="layer"),
    ]
    tensors = {"w": two_four((32, 32), 0), "other": two_four((32, 32), 0)}
    found = {
        layer.node: [reason.text for reason in layer.reasons]
        for layer in graph_layers(model_of(nodes, tensors))
    }
    assert found == {
        "layer": ["w is used by layer#3 too."],
        "layer#2": [],
        "layer#3": ["w is used by layer too."],
    }


def test_a_weight_that_is_an_embedding_too_is_shared() -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["h"], name="lookup"),
        helper.make_node("Transpose", ["table"], ["w"], perm=[1, 0]),
        helper.make_node("MatMul", ["h", "w"], ["y"], name="head"),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])
    layer = one(model_of(nodes, {"table": two_four((48, 32), 1)}, extra_inputs=[ids]))
    assert (codes(layer), layer.eligible) == (["shared"], "yes")
    assert "lookup" in layer.reasons[0].text


def test_layers_in_branches_and_loops_are_found_with_their_path() -> None:
    half = TensorProto.FLOAT16
    inner = numpy_helper.from_array(two_four((32, 32), 1), "inner")
    then = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["o"], name="outer_weight")],
        "then",
        [],
        [helper.make_tensor_value_info("o", half, ["a", "b"])],
    )
    other = helper.make_graph(
        [helper.make_node("MatMul", ["x", "inner"], ["p"], name="own_weight")],
        "else",
        [],
        [helper.make_tensor_value_info("p", half, ["a", "b"])],
        [inner],
    )
    nodes = [helper.make_node("If", ["c"], ["y"], name="if", then_branch=then, else_branch=other)]
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    layers = graph_layers(model_of(nodes, {"w": two_four((32, 32), 0)}, extra_inputs=[condition]))
    found = {layer.node: (layer.weight, layer.pattern_holds, layer.macs) for layer in layers}
    assert found == {
        "if/then_branch/outer_weight": ("w", True, None),
        "if/else_branch/own_weight": ("inner", False, None),
    }
    assert {layer.node: layer.eligible for layer in layers} == {
        "if/then_branch/outer_weight": "unproven",
        "if/else_branch/own_weight": "no",
    }


def test_the_carried_value_of_a_loop_hides_the_weight_of_the_same_name_outside() -> None:
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["o"], name="layer"),
            helper.make_node("Identity", ["c"], ["c2"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("w", TensorProto.FLOAT16, [32, 32]),
        ],
        [
            helper.make_tensor_value_info("c2", TensorProto.BOOL, []),
            helper.make_tensor_value_info("o", TensorProto.FLOAT16, [32, 32]),
        ],
    )
    nodes = [helper.make_node("Loop", ["trips", "", "w"], ["y"], body=body, name="loop")]
    tensors = {"trips": np.array(3), "w": two_four((32, 32), 0)}
    layer = one(model_of(nodes, tensors, x=(32, 32), check=False))
    assert (layer.node, codes(layer)) == ("loop/body/layer", ["activations"])


def linear_function(opset: int = 21) -> onnx.FunctionProto:
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"], name="mm"),
    ]
    return helper.make_function("mine", "Linear", ["x", "w"], ["y"], nodes, [helper.make_opsetid("", opset)])


def test_a_layer_inside_a_function_of_the_model_is_looked_into() -> None:
    call = helper.make_node("Linear", ["x", "weight"], ["y"], domain="mine")
    layer = one(model_of([call], {"weight": two_four((48, 32), 1)}, functions=[linear_function()]))
    assert (layer.op_type, layer.weight, layer.shape, layer.macs) == ("MatMul", "weight", (32, 48), 32 * 48)
    assert (layer.eligible, layer.stored_axis) == ("yes", 1)


def test_a_function_of_another_opset_is_named_as_not_looked_into() -> None:
    call = helper.make_node("Linear", ["x", "weight"], ["y"], domain="mine", name="call")
    model = model_of(
        [call], {"weight": two_four((48, 32), 1)}, functions=[linear_function(opset=18)], check=False
    )
    layer = one(model)
    assert (layer.node, layer.op_type, codes(layer)) == ("call", "mine::Linear", ["not-looked-into"])
    assert layer.eligible == "unproven"


def test_functions_that_grow_without_bound_are_named_as_not_looked_into() -> None:
    """Twelve functions of ten calls each of the one below: 10^12 nodes."""
    functions = [
        helper.make_function(
            "mine",
            "F0",
            ["x"],
            ["y"],
            [helper.make_node("Identity", ["x"], ["y"])],
            [helper.make_opsetid("", 21)],
        )
    ]
    for level in range(1, 13):
        names = ["x", *(f"t{i}" for i in range(9)), "y"]
        nodes = [
            helper.make_node(f"F{level - 1}", [a], [b], domain="mine") for a, b in itertools.pairwise(names)
        ]
        functions.append(
            helper.make_function("mine", f"F{level}", ["x"], ["y"], nodes, [helper.make_opsetid("mine", 1)])
        )
    call = helper.make_node("F12", ["x"], ["y"], domain="mine", name="bomb")
    layer = one(model_of([call], {}, functions=functions, check=False))
    assert (layer.node, codes(layer)) == ("bomb", ["not-looked-into"])


def test_a_function_that_calls_itself_is_refused() -> None:
    again = helper.make_node("Again", ["x"], ["y"], domain="mine")
    function = helper.make_function(
        "mine", "Again", ["x"], ["y"], [again], [helper.make_opsetid("", 21), helper.make_opsetid("mine", 1)]
    )
    with pytest.raises(ArtefactError, match="calls itself"):
        graph_layers(model_of([again], {}, functions=[function], check=False))


def test_two_functions_of_one_name_are_refused() -> None:
    call = helper.make_node("Linear", ["x", "weight"], ["y"], domain="mine")
    model = model_of([call], {"weight": dense((48, 32))}, functions=[linear_function()] * 2, check=False)
    with pytest.raises(ArtefactError, match="The model's functions are invalid"):
        graph_layers(model)


@pytest.mark.parametrize(
    ("op", "domain"), [("MatMulNBits", "com.microsoft"), ("Einsum", ""), ("FusedMatMul", "com.microsoft")]
)
def test_other_operators_with_weights_are_named(op: str, domain: str) -> None:
    node = helper.make_node(op, ["x", "w"], ["y"], domain=domain, name="other")
    layer = one(model_of([node], {"w": dense((32, 32))}, check=False))
    quantized = ["quantized"] if op == "MatMulNBits" else []
    assert (layer.node, codes(layer), layer.macs) == ("other", ["not-looked-into", *quantized], None)
    assert layer.eligible == "unproven"
    assert op in layer.op_type


@pytest.mark.parametrize(
    ("dtype", "expected"), [(np.uint8, ["other-type", "quantized"]), (ml_dtypes.float8_e4m3fn, ["quantized"])]
)
def test_a_weight_that_is_quantized_already_says_so(dtype: Any, expected: list[str]) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["stored", "scale", "zero"], ["w"]),
        helper.make_node("MatMul", ["d", "w"], ["y"], name="layer"),
    ]
    tensors = {
        "stored": two_four((32, 32), 0, np.float32).astype(dtype),
        "scale": np.array(0.5, dtype=np.float16),
        "zero": np.zeros((), dtype),
    }
    assert codes(one(model_of(nodes, tensors, opset=21))) == expected


def test_an_integer_product_is_quantized_and_not_looked_into() -> None:
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"], name="layer")
    layer = one(model_of([node], {"w": np.ones((32, 32), np.int8)}, dtype=np.int8, check=False))
    assert (codes(layer), layer.eligible) == (["not-looked-into", "quantized"], "unproven")


def test_nodes_without_weights_are_left_out() -> None:
    nodes = [helper.make_node("Add", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    assert graph_layers(model_of(nodes, {"w": dense((32, 32))})) == ()


# -- anybody's graph ----------------------------------------------------------------------------------------


def too_large(nodes: Sequence[onnx.NodeProto], tensors: dict[str, Array]) -> GraphLayer:
    return one(model_of([*nodes, matmul()], tensors, check=False))


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [
        ("Expand", {"a": np.ones((1, 1), np.float16), "b": np.array([2**20, 2**20])}, {}),
        ("ConstantOfShape", {"b": np.array([2**40, 4])}, {}),
        ("Tile", {"a": np.ones((4, 4), np.float16), "b": np.array([2**20, 2**20])}, {}),
        ("Range", {"a": np.array(0), "b": np.array(2**60), "c": np.array(1)}, {}),
        ("Pad", {"a": np.ones((4, 4), np.float16), "b": np.array([0, 0, 2**20, 2**20])}, {}),
        ("Gather", {"a": np.ones((2, 2**14), np.float16), "b": np.zeros(2**15, np.int64)}, {"axis": 0}),
        ("Add", {"a": np.ones((2**15, 1), np.float16), "b": np.ones((1, 2**15), np.float16)}, {}),
    ],
)
def test_a_small_graph_cannot_make_a_giant_tensor(
    op: str, inputs: dict[str, Array], attributes: dict[str, Any]
) -> None:
    layer = too_large([helper.make_node(op, list(inputs), ["w"], **attributes)], inputs)
    assert (codes(layer), layer.eligible, layer.constant) == (["not-evaluated"], "unproven", True)
    assert "more than 268,435,456" in layer.reasons[0].text


def test_a_giant_sparse_initializer_is_not_filled_up() -> None:
    model = model_of([matmul()], {}, check=False)
    values, places = (
        numpy_helper.from_array(np.ones(1, np.float16), "w"),
        numpy_helper.from_array(np.array([5]), "p"),
    )
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, (2**20, 2**20)))
    assert codes(one(model)) == ["not-evaluated"]


def test_a_long_chain_of_constants_is_not_followed_for_ever() -> None:
    names = ["stored", *(f"t{i}" for i in range(300)), "w"]
    nodes = [helper.make_node("Neg", [a], [b]) for a, b in itertools.pairwise(names)]
    layer = too_large(nodes, {"stored": dense((32, 16))})
    assert codes(layer) == ["not-evaluated"]
    assert f"more than {MAX_NODES} nodes" in layer.reasons[0].text


def test_an_operator_that_is_not_known_leaves_the_weight_unevaluated() -> None:
    turned = helper.make_node("Einsum", ["a"], ["w"], equation="ij->ji", name="turned")
    model = model_of([turned, matmul()], {"a": dense((32, 32))})
    found = {layer.node: codes(layer) for layer in graph_layers(model)}
    assert found == {"turned": ["not-looked-into"], "layer": ["not-evaluated"]}


def test_a_weight_of_random_numbers_is_not_constant() -> None:
    random = helper.make_node("RandomNormal", [], ["w"], shape=[32, 32])
    assert codes(one(model_of([random, matmul()], {}, check=False))) == ["activations"]


def test_a_joined_weight_is_evaluated() -> None:
    """As query, key and value put together in the graph."""
    nodes = [helper.make_node("Concat", ["q", "k", "v"], ["w"], axis=1), matmul()]
    tensors = {name: two_four((32, 16), 0) for name in "qkv"}
    layer = one(model_of(nodes, tensors))
    assert (layer.shape, layer.pattern_holds, codes(layer)) == ((32, 48), True, ["computed"])


def wrong(node: onnx.NodeProto, **tensors: Array) -> onnx.ModelProto:
    return model_of([node], tensors or {"w": dense((32, 32, 3, 3))}, x=("n", 32, 8, 8), check=False)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (wrong(helper.make_node("Conv", ["x", "w"], ["y"], group=0)), "0 groups for 32 channels"),
        (wrong(helper.make_node("Conv", ["x", "w"], ["y"], group=-4)), "-4 groups"),
        (wrong(helper.make_node("Conv", ["x", "w"], ["y"], group=5)), "5 groups for 32 channels"),
        (
            wrong(helper.make_node("Conv", ["x", "w"], ["y"], group="two")),
            "attribute group .* is of type STRING",
        ),
        (wrong(helper.make_node("Gemm", ["x", "w"], ["y"], transB=[1]), w=dense((4, 4))), "is of type INTS"),
        (wrong(helper.make_node("Conv", ["x", "w"], ["y"]), w=dense((32, 32))), "weight of 2 axes"),
        (wrong(helper.make_node("MatMul", ["x", "w"], ["y"]), w=dense(())), "weight of 0 axes"),
        (wrong(helper.make_node("Gemm", ["x", "w"], ["y"])), "weight of 4 axes"),
        (wrong(helper.make_node("Conv", ["x"], ["y"])), r"has the inputs \['x'\]"),
        (wrong(helper.make_node("Conv", ["x", ""], ["y"])), "has the inputs"),
    ],
)
def test_a_layer_that_cannot_be_meant_is_an_error_that_names_it(model: onnx.ModelProto, message: str) -> None:
    with pytest.raises(ArtefactError, match=message):
        graph_layers(model)


@pytest.mark.parametrize(
    ("node", "tensors"),
    [
        (helper.make_node("Transpose", ["a"], ["w"], perm=[0, 0]), {"a": dense((4, 4))}),
        (helper.make_node("Transpose", ["a"], ["w"], perm=[0, 7]), {"a": dense((4, 4))}),
        (helper.make_node("Reshape", ["a", "b"], ["w"]), {"a": dense((4, 4)), "b": np.array([5, 5])}),
        (helper.make_node("Mul", ["a", "b"], ["w"]), {"a": dense((4, 4)), "b": dense((3, 3))}),
        (helper.make_node("Cast", ["a"], ["w"], to=12345), {"a": dense((4, 4))}),
        (helper.make_node("Constant", [], ["w"]), {}),
        (helper.make_node("Range", ["a", "b", "c"], ["w"]), dict.fromkeys("abc", np.array(0))),
        (helper.make_node("Expand", ["a", "b"], ["w"]), {"a": dense((4, 4)), "b": np.array([-3, 4])}),
        (helper.make_node("Expand", ["a"], ["w"]), {"a": dense((4, 4))}),
        (helper.make_node("Gather", ["a", "b"], ["w"], axis=9), {"a": dense((4, 4)), "b": np.array([0])}),
        (helper.make_node("Gather", ["a", "b"], ["w"]), {"a": dense((4, 4)), "b": np.array([99])}),
        (
            helper.make_node("ScatterElements", ["a", "b", "c"], ["w"]),
            {"a": dense((4, 4)), "b": np.full((4, 4), 9), "c": dense((4, 4))},
        ),
    ],
)
def test_a_node_that_cannot_be_computed_costs_its_own_layer_and_is_named(
    node: onnx.NodeProto, tensors: dict[str, Array]
) -> None:
    other = helper.make_node("MatMul", ["y", "sound"], ["z"], name="other")
    model = model_of([node, matmul(), other], tensors | {"sound": two_four((32, 32), 0)}, check=False)
    layer, sound = graph_layers(model)
    assert (codes(layer), layer.eligible, sound.eligible) == (["not-evaluated"], "unproven", "yes")
    assert f"computed by the {node.op_type} w, which fails" in layer.reasons[0].text


def test_a_tensor_whose_data_does_not_fill_its_shape_is_an_error_that_names_it() -> None:
    model = model_of([matmul()], {"w": dense((32, 32))})
    model.graph.initializer[0].dims[0] = 10**12
    with pytest.raises(ArtefactError, match="The tensor w cannot be read"):
        graph_layers(model)


def test_a_tensor_whose_data_was_not_read_is_an_error(tmp_path: Any) -> None:
    model = model_of([matmul()], {"w": dense((32, 32))})
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    with pytest.raises(ArtefactError, match="beside the model and was not read"):
        graph_layers(onnx.load(tmp_path / "m.onnx", load_external_data=False))
    assert one(onnx.load(tmp_path / "m.onnx")).n_nonzero == 1024


def test_two_nodes_that_make_the_same_value_do_not_send_us_in_a_circle() -> None:
    nodes = [
        helper.make_node("Identity", ["stored"], ["w"]),
        helper.make_node("Neg", ["w"], ["w"]),
        matmul(),
    ]
    assert one(model_of(nodes, {"stored": dense((32, 32))}, check=False)).through == ("Identity",)


def test_nodes_that_nothing_uses_and_missing_shapes_do_not_matter() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["unused"], name="idle"),
        helper.make_node("Mystery", ["x"], ["h"], domain="somebody"),
        helper.make_node("MatMul", ["h", "w"], ["y"], name="layer"),
    ]
    layers = graph_layers(model_of(nodes, {"w": two_four((32, 16), 0)}, check=False))
    assert [(layer.node, layer.pattern_holds) for layer in layers] == [("idle", True), ("layer", True)]
    assert layers[1].macs is None


# -- the gate -----------------------------------------------------------------------------------------------


def test_promises_that_are_kept_pass() -> None:
    model = model_of([matmul()], {"w": two_four((32, 16), 0)})
    for promised in ({"w": TWO_FOUR}, {"w": NMPattern(n=4, m=8)}, {}):
        assert broken_patterns(model, promised) == ()
        require_patterns(model, promised)


def test_the_first_weights_that_break_their_promise_are_named() -> None:
    names = [f"w{i}" for i in range(8)]
    values = ["x", *(f"h{i}" for i in range(7)), "y"]
    nodes = [helper.make_node("MatMul", [values[i], name], [values[i + 1]]) for i, name in enumerate(names)]
    tensors = {name: two_four((32, 32), int(i > 0)) for i, name in enumerate(names)}
    with pytest.raises(GateFailed, match="7 of 8 weights") as caught:
        require_patterns(model_of(nodes, tensors), dict.fromkeys(names, TWO_FOUR))
    assert "w1, promised 2:4: " in caught.value.what
    assert "of 256 groups have more than 2 nonzeros" in caught.value.what
    assert "w0" not in caught.value.what
    assert "w6" not in caught.value.what
    assert caught.value.what.endswith("and 2 more.")
    assert caught.value.exit_code == 3


def test_one_group_over_breaks_the_promise() -> None:
    weight = two_four((32, 16), 0)
    zero = np.flatnonzero(weight[:4, 3] == 0)[0]
    weight[zero, 3] = 1e-7  # the smallest number of the type is no zero
    assert weight[zero, 3] != 0
    with pytest.raises(GateFailed, match="1 of 128 groups have more than 2 nonzeros"):
        require_patterns(model_of([matmul()], {"w": weight}), {"w": TWO_FOUR})


@pytest.mark.parametrize(
    ("name", "pattern", "why"),
    [
        ("absent", TWO_FOUR, "not the weight of a layer"),
        ("w", NMPattern(n=2, m=5), "5 does not divide the 32 entries"),
        ("w", NMPattern(n=1, m=4), "128 of 128 groups have more than 1 nonzeros"),
    ],
)
def test_a_promise_that_cannot_be_kept_is_broken(name: str, pattern: NMPattern, why: str) -> None:
    with pytest.raises(GateFailed, match=why):
        require_patterns(model_of([matmul()], {"w": two_four((32, 16), 0)}), {name: pattern})


def test_a_promise_of_a_weight_that_is_not_known_is_broken() -> None:
    weight = helper.make_tensor_value_info("w", TensorProto.FLOAT16, [32, 32])
    with pytest.raises(GateFailed, match="its values are not known"):
        require_patterns(model_of([matmul()], {}, extra_inputs=[weight]), {"w": TWO_FOUR})


def test_a_shared_weight_has_to_keep_its_promise_in_every_layer() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Gemm", ["h", "w"], ["y"], transB=1, name="second"),
    ]
    with pytest.raises(GateFailed, match=r"w, promised 2:4: .* more than 2 nonzeros, in second"):
        require_patterns(model_of(nodes, {"w": two_four((32, 32), 0)}), {"w": TWO_FOUR})


def test_promises_are_read_off_the_layers() -> None:
    layers = [
        LayerInfo(name=name, shape=(4, 4), n_weights=16, n_active=8, masked=True, pattern=pattern)
        for name, pattern in (("a", "2:4"), ("b", None), ("c", "1:8"))
    ]
    assert promised_patterns(layers) == {"a": TWO_FOUR, "c": NMPattern(n=1, m=8)}
    with pytest.raises(ArtefactError, match="The promised pattern of a layer is invalid"):
        promised_patterns(
            [LayerInfo(name="a", shape=(4,), n_weights=4, n_active=2, masked=True, pattern="4:2")]
        )


# -- whole networks -----------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.short = nn.Conv2d(n_in, n_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.short(x))


class Residual(nn.Module):
    """A ResNet in small, with a linear layer on sequences, which the exporter stores transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block = Block(16, 32)
        self.mix = nn.Linear(32, 32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(self.stem(x)).flatten(2).transpose(1, 2)
        logits: Tensor = self.fc(torch.relu(self.mix(y)).mean(1))
        return logits


@pytest.fixture(scope="module")
def residual() -> tuple[dict[str, Tensor], onnx.ModelProto]:
    torch.manual_seed(0)
    module = Residual().eval()
    masks = {
        name: largest_per_group(parameter.detach(), 1, TWO_FOUR)
        for name, parameter in module.named_parameters()
        if parameter.dim() > 1 and parameter.shape[1] % 4 == 0
    }
    assert len(masks) == 5
    return masks, onnx_from_module(module, example_of_shape((3, 8, 8)), masks=masks)


def test_every_layer_of_a_small_residual_network_is_2_to_4_but_the_stem(residual: Any) -> None:
    masks, model = residual
    layers = {layer.weight: layer for layer in graph_layers(model)}
    assert {name for name, layer in layers.items() if layer.pattern_holds} == set(masks)
    assert codes(layers["stem.weight"]) == ["indivisible", "float32"]
    for name in masks:
        assert codes(layers[name]) == ["float32"], name
        assert layers[name].n_nonzero * 2 == layers[name].n_weights


def test_a_linear_layer_on_sequences_is_stored_transposed_under_its_own_name(residual: Any) -> None:
    _, model = residual
    layer = next(layer for layer in graph_layers(model) if layer.weight == "mix.weight")
    assert (layer.op_type, layer.reduction_axis, layer.pattern_holds) == ("MatMul", 0, True)


def test_the_promises_of_a_network_are_held_against_its_graph(residual: Any) -> None:
    masks, model = residual
    require_patterns(model, dict.fromkeys(masks, TWO_FOUR))
    spoilt = onnx.ModelProto()
    spoilt.CopyFrom(model)
    tensor = next(t for t in spoilt.graph.initializer if t.name == "mix.weight")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).T.copy(), tensor.name))
    with pytest.raises(GateFailed, match=r"mix\.weight, promised 2:4"):
        require_patterns(spoilt, dict.fromkeys(masks, TWO_FOUR))


def test_in_half_precision_the_same_network_can_be_used(residual: Any) -> None:
    masks, model = residual
    half = onnx.ModelProto()
    half.CopyFrom(model)
    for tensor in half.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    found = {layer.weight: (layer.eligible, codes(layer)) for layer in graph_layers(half)}
    assert found.pop("fc.weight") == ("unproven", ["unaligned"])
    assert found.pop("stem.weight") == ("no", ["indivisible"])
    assert found == {name: ("yes", []) for name in masks if name != "fc.weight"}


def test_a_zero_that_hardware_sees_is_a_zero_for_onnxruntime() -> None:
    """The masked weight that we evaluate is the one that another runtime multiplies by."""
    mask = two_four((32, 16), 0) != 0
    model = masked_matmul(dense((32, 16), np.float32), mask)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    effective = session.run(None, {"x": np.eye(32, dtype=np.float32)})[0]
    assert int(np.count_nonzero(effective)) == one(model).n_nonzero
    assert obeys(torch.from_numpy(effective), 0, TWO_FOUR)


def test_weights_that_are_used_as_stored_are_found_by_the_short_way_too() -> None:
    model = model_of([helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)], {"w": two_four((48, 32), 1)})
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    layer = one(model)
    assert layer_weight(model.graph.node[0], stored) == (layer.weight, layer.reduction_axis)
