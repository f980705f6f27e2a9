"""Q/DQ graphs: calibrated, symmetric, and every zero of a weight still a zero."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparse_export.engines.build import build_engine
from sparse_export.engines.options import EngineOptions, Precision
from sparse_export.engines.precision import TOLERANCE, convert_precision
from sparse_export.errors import GateFailed, UsageError
from sparse_export.graph.layers import graph_layers
from sparse_export.graph.passes.expand24 import expand
from sparse_export.graph.passes.format24 import packed_weights
from sparse_export.graph.passes.pack24 import pack
from sparse_export.graph.passes.quantize import quantized, require_zeros_kept
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.signature import Feeds
from tests.engines.conftest import SMALL, small_graph

CALIBRATED: tuple[Precision, ...] = ("int8", "fp8")


def _samples(n: int = 4) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(7)
    return [{"input": generator.standard_normal((32, 16), dtype=np.float32)} for _ in range(n)]


def _quantized(precision: Precision, model: onnx.ModelProto | None = None) -> onnx.ModelProto:
    return convert_precision(model or small_graph(), precision, _samples())


def _outputs(model: onnx.ModelProto, x: np.ndarray, folder: Path) -> np.ndarray:
    file = folder / "m.onnx"
    file.write_bytes(model.SerializeToString())
    with open_session(file) as session:
        return session.run(x)


@pytest.mark.parametrize("precision", CALIBRATED)
def test_the_outputs_are_near_those_of_the_network(precision: Precision, tmp_path: Path) -> None:
    x = _samples()[0]["input"]
    wanted = _outputs(small_graph(), x, tmp_path)
    found = _outputs(_quantized(precision), x, tmp_path)
    difference = float(np.abs(found - wanted).max() / wanted.std())
    assert 0 < difference < TOLERANCE[precision] / 2


@pytest.mark.parametrize("precision", CALIBRATED)
def test_every_zero_stays_and_so_does_two_four(precision: Precision) -> None:
    before, after = (graph_layers(model) for model in (small_graph(), _quantized(precision)))
    assert [layer.pattern_holds for layer in after] == [True, True]
    assert all(new.n_nonzero <= old.n_nonzero for new, old in zip(after, before, strict=True))
    assert [layer.weight for layer in after] == ["w1", "w2"]


def test_zero_points_are_nought_and_weights_have_a_scale_for_each_output() -> None:
    model = _quantized("int8")
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = {"w1": 32, "w2": 8}
    seen = set()
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert not tensors[node.input[2]].any()
            if node.input[0] in weights:
                seen.add(node.input[0])
                assert tensors[node.input[1]].shape == (weights[node.input[0]],)
                assert tensors[node.input[0]].dtype == np.int8
    assert seen == set(weights)


def test_only_what_goes_into_a_product_is_quantized() -> None:
    model = _quantized("int8")
    makers = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in makers:
            assert makers[node.input[0]].op_type == "Relu"


def test_int8_is_unproven_and_never_eligible_by_the_graph_alone() -> None:
    assert {layer.eligible for layer in graph_layers(_quantized("int8"))} == {"unproven"}


def test_the_weights_pack_and_come_back() -> None:
    model = _quantized("int8")
    packed = pack(model)
    assert packed_weights(packed) == ("w1", "w2")
    assert expand(packed).SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", *CALIBRATED])
def test_an_engine_is_built_at_every_precision(precision: Precision, rtx: None, tmp_path: Path) -> None:
    model = convert_precision(small_graph(), precision, _samples())
    options = EngineOptions(target="tensorrt-rtx", architectures=("sm89",))
    built = build_engine(model, tmp_path / "x", options, SMALL)
    assert built.build_s > 0


def test_two_calibrations_give_the_same_graph() -> None:
    first, second = (_quantized("int8").SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def _with_names_like_the_quantizers() -> onnx.ModelProto:
    """A weight `w`, and tensors with the names that onnxruntime gives what it makes of `w` and of the
    input.
    """
    generator = np.random.default_rng(0)
    scales = {
        "w_scale": generator.uniform(0.5, 2, 16),
        "w_zero_point": generator.uniform(0.5, 2, 16),
        "w_quantized": generator.standard_normal((16, 16)),
        "input_scale": generator.uniform(0.5, 2, 16),
        "w_DequantizeLinear_Output": generator.uniform(0.5, 2, 16),
        "w": generator.standard_normal((16, 16)),
    }
    nodes = [
        helper.make_node("MatMul", ["input", "w"], ["a"], name="w_QuantizeLinear"),
        helper.make_node("Mul", ["a", "w_scale"], ["b"]),
        helper.make_node("Mul", ["b", "w_zero_point"], ["c"]),
        helper.make_node("Mul", ["c", "input_scale"], ["d"]),
        helper.make_node("Mul", ["d", "w_DequantizeLinear_Output"], ["e"]),
        helper.make_node("Gemm", ["e", "w_quantized"], ["output"], name="second"),
    ]
    graph = helper.make_graph(
        nodes,
        "names",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 16])],
        [numpy_helper.from_array(values.astype(np.float32), name) for name, values in scales.items()],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    model.graph.value_info.add(name="w").type.tensor_type.elem_type = TensorProto.FLOAT  # as exports tell it
    return model


@pytest.mark.parametrize("precision", CALIBRATED)
def test_names_that_the_quantizer_makes_may_be_taken(precision: Precision, tmp_path: Path) -> None:
    model, x = _with_names_like_the_quantizers(), _samples()[0]["input"]
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    small = _quantized(precision, model)
    after = {tensor.name: numpy_helper.to_array(tensor) for tensor in small.graph.initializer}
    for name in ("w_scale", "w_zero_point", "input_scale", "w_DequantizeLinear_Output"):
        np.testing.assert_array_equal(after[name], before[name])
    assert [layer.weight for layer in graph_layers(small)] == ["w", "w_quantized"]
    assert len({node.name for node in small.graph.node if node.name}) == sum(
        bool(n.name) for n in small.graph.node
    )
    wanted, found = (_outputs(one, x, tmp_path) for one in (model, small))
    assert 0 < np.abs(found - wanted).max() / wanted.std() < TOLERANCE[precision] / 2


@pytest.mark.parametrize("precision", CALIBRATED)
def test_graphs_of_an_older_opset_are_converted(precision: Precision, tmp_path: Path) -> None:
    """Opset 11 has no scale for each channel, and none before 19 has fp8."""
    model, x = small_graph(), _samples()[0]["input"]
    model.opset_import[0].version, model.ir_version = 11, 6
    wanted, found = (_outputs(one, x, tmp_path) for one in (model, _quantized(precision, model)))
    assert 0 < np.abs(found - wanted).max() / wanted.std() < TOLERANCE[precision] / 2


@pytest.mark.parametrize("samples", [[], [{"input": np.zeros((0, 16), dtype=np.float32)}]])
def test_without_samples_there_is_nothing_to_calibrate_on(samples: list[Feeds]) -> None:
    with pytest.raises(UsageError, match="calibrate"):
        quantized(small_graph(), samples, "int8")


_TOKENS = """
<ir_version: 10, opset_import: ["" : 20]>
tokens (int64[batch, sequence] ids, float[batch, sequence, 16] position) => (float[batch, sequence, 8] y)
<float[4, 16] table, float[16, 8] w>
{
    words = Gather (table, ids)
    h = Add (words, position)
    y = MatMul (h, w)
}
"""


@pytest.mark.parametrize("precision", CALIBRATED)
def test_two_inputs_one_of_integers_are_calibrated_on_in_any_length(
    precision: Precision, tmp_path: Path
) -> None:
    model, generator = onnx.parser.parse_model(_TOKENS), np.random.default_rng(0)
    del model.graph.initializer[:]
    for name, shape in (("table", (4, 16)), ("w", (16, 8))):
        values = generator.standard_normal(shape, dtype=np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    samples: list[Feeds] = [
        {
            "ids": generator.integers(0, 4, (8, length)),
            "position": generator.standard_normal((8, length, 16), dtype=np.float32),
        }
        for length in (5, 9)
    ]
    small = convert_precision(model, precision, samples)
    assert [one.name for one in small.graph.input] == ["ids", "position"]
    found = []
    for number, one in enumerate((model, small)):
        onnx.save(one, tmp_path / f"{number}.onnx")
        with open_session(tmp_path / f"{number}.onnx") as session:
            found.append(session.run(samples[1])["y"])
    difference = float(np.abs(found[1] - found[0]).max() / found[0].std())
    assert 0 < difference < TOLERANCE[precision] / 2


def test_a_graph_without_products_has_nothing_to_quantize() -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["input"], ["output"])],
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 16])],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    with pytest.raises(UsageError, match="nothing to quantize"):
        quantized(model, _samples(), "int8")


# ---- the gate


def _changed(name: str, change: object) -> onnx.ModelProto:
    model = _quantized("int8")
    for tensor in model.graph.initializer:
        if tensor.name == name:
            array = numpy_helper.to_array(tensor).copy()
            assert callable(change)
            change(array)
            tensor.CopyFrom(numpy_helper.from_array(array, name))
    return model


def test_a_zero_that_is_lost_fails_the_gate() -> None:
    def fill(array: np.ndarray) -> None:
        array[array == 0] = 1

    with pytest.raises(GateFailed, match=r"of first has .* nonzeros, which were"):
        require_zeros_kept(small_graph(), _changed("w1", fill))


def test_a_pattern_that_is_lost_fails_the_gate() -> None:
    def move(array: np.ndarray) -> None:
        array[0, :4] = 1
        array[0, 4:8] = 0

    with pytest.raises(GateFailed, match="no longer 2:4"):
        require_zeros_kept(small_graph(), _changed("w1", move))


def test_a_zero_point_other_than_nought_fails_the_gate() -> None:
    def shift(array: np.ndarray) -> None:
        array[...] = 3

    with pytest.raises(GateFailed, match="zero point w1_zero_point is not 0"):
        require_zeros_kept(small_graph(), _changed("w1_zero_point", shift))


def test_a_layer_that_is_gone_fails_the_gate() -> None:
    model = _quantized("int8")
    for node in model.graph.node:
        if node.name == "second":
            node.name = "other"
    with pytest.raises(GateFailed, match="second is not in the quantized graph"):
        require_zeros_kept(small_graph(), model)
