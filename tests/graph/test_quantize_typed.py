"""Graphs for engines: products read and write quantized values, and everything else is float16."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from sparse_export.errors import UsageError
from sparse_export.graph.layers import graph_layers
from sparse_export.graph.passes.calibrate import METHODS, RangeMethod, largest_magnitudes
from sparse_export.graph.passes.quantize import Quantized
from sparse_export.graph.passes.quantize_placement import place_pairs
from sparse_export.graph.passes.quantize_typed import quantized_for_engines
from sparse_export.graph.quantized_ends import quantized_ends
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.signature import Feeds
from tests.engines.conftest import small_graph

BOTH: tuple[Quantized, ...] = ("int8", "fp8")

_BLOCK = """
<ir_version: 10, opset_import: ["" : 20]>
block (float[batch, 8, 6, 6] x) => (float[batch, 4] y)
<float[8, 8, 3, 3] w1, float[8, 8, 3, 3] w2, float[8, 8, 1, 1] w3, float[8] b, float[4, 8] w4>
{
    [stem] c0 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1, b)
    r0 = Relu (c0)
    p0 = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r0)
    [main] c1 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (p0, w2, b)
    [side] c2 = Conv <kernel_shape = [1, 1]> (p0, w3, b)
    sum = Add (c1, c2)
    r1 = Relu (sum)
    mean = GlobalAveragePool (r1)
    flat = Flatten (mean)
    [head] y = Gemm <transB = 1> (flat, w4)
}
"""

_TRANSFORMER = """
<ir_version: 10, opset_import: ["" : 20]>
block (float[batch, 5, 8] x) => (float[batch, 5, 8] y)
<float[8] g, float[8, 16] w1, float[16] b1, float[16, 8] w2, float[8] b2, float[8, 8] w3>
{
    n = LayerNormalization (x, g)
    [up] m1 = MatMul (n, w1)
    a1 = Add (m1, b1)
    u = Gelu (a1)
    [down] m2 = MatMul (u, w2)
    a2 = Add (b2, m2)
    s = Add (x, a2)
    n2 = LayerNormalization (s, g)
    [query] q = MatMul (n2, w3)
    p = Softmax (q)
    y = Add (p, s)
}
"""


def _model(text: str) -> onnx.ModelProto:
    """With 2:4 weights along the reduction axis."""
    model, generator = onnx.parser.parse_model(text), np.random.default_rng(0)
    shapes = {
        one.name: tuple(dim.dim_value for dim in one.type.tensor_type.shape.dim)
        for one in model.graph.value_info
    }
    del model.graph.value_info[:]
    del model.graph.initializer[:]
    for name, shape in shapes.items():
        values = generator.standard_normal(shape, dtype=np.float32)
        if len(shape) > 1:
            is_right_of_matmul = len(shape) == 2 and name != "w4"
            moved = np.moveaxis(values, 0 if is_right_of_matmul else 1, 0)
            moved[2::4] = moved[3::4] = 0
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
    return model


def _samples(model: onnx.ModelProto, n: int = 2) -> list[Feeds]:
    generator = np.random.default_rng(7)
    (one,) = model.graph.input
    shape = (16, *(dim.dim_value for dim in one.type.tensor_type.shape.dim[1:]))
    return [{one.name: generator.standard_normal(shape, dtype=np.float32)} for _ in range(n)]


def _makers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def _quantized_values(model: onnx.ModelProto) -> set[str]:
    return {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}


def _output(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], folder: Path) -> np.ndarray:
    onnx.save(model, folder / "m.onnx")
    with open_session(folder / "m.onnx") as session:
        return session.run(feeds)[model.graph.output[0].name]


def _types(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    return {one.name: one.type.tensor_type.elem_type for one in graph.value_info}


@pytest.mark.parametrize("precision", BOTH)
@pytest.mark.parametrize("text", [_BLOCK, _TRANSFORMER])
def test_it_computes_what_the_network_does(text: str, precision: Quantized, tmp_path: Path) -> None:
    model = _model(text)
    (feeds, *_) = samples = _samples(model)
    small = quantized_for_engines(model, samples, precision)
    wanted, found = (_output(one, feeds, tmp_path) for one in (model, small))
    off = np.sqrt(np.mean(np.square(found - wanted))) / wanted.std()
    assert 0 < off < (0.05 if precision == "int8" else 0.1)


@pytest.mark.parametrize("text", [_BLOCK, _TRANSFORMER])
def test_no_value_between_the_ends_is_float32(text: str) -> None:
    model = _model(text)
    types = _types(quantized_for_engines(model, _samples(model), "int8"))
    assert TensorProto.FLOAT not in types.values()
    assert {TensorProto.INT8, TensorProto.FLOAT16} <= set(types.values())


@pytest.mark.parametrize("precision", BOTH)
@pytest.mark.parametrize("text", [_BLOCK, _TRANSFORMER])
def test_zeros_and_the_pattern_stay(text: str, precision: Quantized) -> None:
    model = _model(text)
    small = quantized_for_engines(model, _samples(model), precision)
    before, after = graph_layers(model), graph_layers(small)
    assert all(layer.pattern_holds for layer in before)
    assert all(layer.pattern_holds for layer in after)
    assert [layer.weight for layer in after] == [layer.weight for layer in before]
    assert all(new.n_nonzero <= old.n_nonzero for new, old in zip(after, before, strict=True))


def test_products_of_a_residual_block_read_and_write_int8_but_for_the_scores() -> None:
    model = _model(_BLOCK)
    small = quantized_for_engines(model, _samples(model), "int8")
    ends = {one.node: one for one in quantized_ends(small)}
    assert [name for name, one in ends.items() if one.holds] == ["stem", "main", "side"]
    assert ends["head"].reads
    assert not ends["head"].writes
    assert _makers(small)["y"].input[0] == ends["head"].broken_by


def test_a_pair_stands_behind_what_is_fused_and_not_within() -> None:
    """The sum is fused with the larger convolution; the other one is quantized before it."""
    model = _model(_BLOCK)
    placed = place_pairs(model.graph)
    assert placed.uses.keys() == {"x", "r0", "p0", "c2", "r1", "flat"}
    assert {"c0", "c1", "sum"}.isdisjoint(placed.uses)


def test_what_only_moves_values_has_one_scale_on_both_sides() -> None:
    model = _model(_BLOCK)
    placed = place_pairs(model.graph)
    assert placed.classes["r0"] == placed.classes["p0"]
    assert placed.classes["r1"] != placed.classes["flat"]  # a mean is between them
    small = quantized_for_engines(model, _samples(model), "int8")
    scales = {n.input[0]: n.input[1] for n in small.graph.node if n.op_type == "QuantizeLinear"}
    assert scales["r0"] == scales["p0"] != scales["r1"]


def test_before_softmax_gelu_and_a_normalization_the_pair_stands_behind_the_bias() -> None:
    placed = place_pairs(_model(_TRANSFORMER).graph)
    assert placed.uses.keys() == {"n", "a1", "u", "a2", "n2", "q"}
    small = quantized_for_engines(_model(_TRANSFORMER), _samples(_model(_TRANSFORMER)), "int8")
    assert all(one.holds for one in quantized_ends(small))


def test_a_concat_of_quantized_values_is_quantized_with_one_scale() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[batch, 8, 4, 4] x) => (float[batch, 8, 4, 4] y)
    <float[4, 8, 1, 1] w1, float[4, 8, 1, 1] w2, float[8, 8, 1, 1] w3>
    {
        a = Conv (x, w1)
        s = Sigmoid (a)
        swish = Mul (a, s)
        b = Conv (x, w2)
        both = Concat <axis = 1> (swish, b)
        y = Conv (both, w3)
    }
    """
    placed = place_pairs(_model(text).graph)
    assert placed.uses.keys() == {"x", "swish", "b", "both"}
    assert placed.classes["swish"] == placed.classes["b"] == placed.classes["both"] != placed.classes["x"]


def test_scales_are_float16_and_those_of_weights_by_output_channel() -> None:
    model = _model(_BLOCK)
    small = quantized_for_engines(model, _samples(model), "int8")
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in small.graph.initializer}
    for node in small.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert tensors[node.input[1]].dtype == np.float16
            assert not tensors[node.input[2]].any()
            if node.input[0] in tensors:
                assert tensors[node.input[1]].shape == (tensors[node.input[0]].shape[0],)


def test_weights_in_constant_nodes_and_old_opsets_are_quantized_too(tmp_path: Path) -> None:
    model = _model(_BLOCK)
    tensors = list(model.graph.initializer)
    del model.graph.initializer[:]
    for tensor in reversed(tensors):
        node = onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
        model.graph.node.insert(0, node)
    del model.opset_import[:]
    model.opset_import.extend([onnx.helper.make_opsetid("", 13)])
    model.ir_version = 8
    samples = _samples(model)
    for precision in BOTH:
        small = quantized_for_engines(model, samples, precision)
        wanted, found = (_output(one, samples[0], tmp_path) for one in (model, small))
        assert np.abs(found - wanted).max() < 0.5 * wanted.std()


def test_a_weight_that_others_read_too_stays_as_it_is_for_them(tmp_path: Path) -> None:
    model = _model(_TRANSFORMER)
    model.graph.node.append(onnx.helper.make_node("ReduceSum", ["w3"], ["z"], keepdims=0))
    model.graph.output.append(onnx.helper.make_tensor_value_info("z", TensorProto.FLOAT, []))
    small = quantized_for_engines(model, _samples(model), "int8")
    tensors = {tensor.name: tensor.data_type for tensor in small.graph.initializer}
    assert (tensors["w1"], tensors["w3"]) == (TensorProto.INT8, TensorProto.FLOAT16)


def test_a_graph_without_products_and_no_samples_are_refused() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[b, 4] x) => (float[b, 4] y) { y = Relu (x) }'
    )
    with pytest.raises(UsageError, match="nothing to quantize"):
        quantized_for_engines(model, _samples(model), "int8")
    with pytest.raises(UsageError, match="calibrate"):
        quantized_for_engines(small_graph(), [], "int8")


# ---- ranges


@pytest.mark.parametrize("method", METHODS)
def test_ranges_are_measured_at_the_values_that_are_named(method: RangeMethod) -> None:
    model = _model(_BLOCK)
    samples = _samples(model)
    found = largest_magnitudes(model, {"x", "r0"}, samples, method)
    assert found.keys() == {"x", "r0"}
    largest = max(np.abs(feeds["x"]).max() for feeds in samples)
    if method == "max":
        assert found["x"] == pytest.approx(largest)
    else:
        assert 0 < found["x"] <= largest * 1.01


def test_a_value_far_out_is_left_outside_by_a_percentile() -> None:
    model = _model(_TRANSFORMER)
    (feeds,) = _samples(model, 1)
    x = np.tile(feeds["x"], (32, 1, 1)).astype(np.float32)
    x[0, 0, 0] = 1000.0
    assert largest_magnitudes(model, {"x"}, [{"x": x}], "max")["x"] == 1000.0
    assert largest_magnitudes(model, {"x"}, [{"x": x}], "percentile")["x"] < 10.0
