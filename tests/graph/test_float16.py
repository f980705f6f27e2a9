"""Graphs in 16-bit floats: the same network, rounded, with float32 at its ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper, numpy_helper

from sparse_export.errors import GateFailed, UsageError
from sparse_export.graph.layers import graph_layers
from sparse_export.graph.passes.expand24 import expand
from sparse_export.graph.passes.float16 import HALF_TYPES, in_half, value_types, with_bfloat16_emulated
from sparse_export.graph.passes.format24 import packed_weights
from sparse_export.graph.passes.pack24 import pack
from sparse_export.runtimes.onnxruntime import open_session
from tests.engines.conftest import small_graph
from tests.oneshot.graphs import model_from, outputs_of

HALVES = ["fp16", "bf16"]
EPSILON = {"fp16": 2**-11, "bf16": 2**-8}


def _conv_graph(extra: list[onnx.NodeProto] | None = None, opset: int = 20) -> onnx.ModelProto:
    """A convolution, a pool, a shape computation and a Gemm."""
    generator = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {
        "w": generator.standard_normal((8, 4, 3, 3), dtype=np.float32),
        "b": generator.standard_normal(8, dtype=np.float32),
        "fc": generator.standard_normal((5, 32), dtype=np.float32),
        "shape": np.array([-1, 32], dtype=np.int64),
    }
    nodes = [
        helper.make_node("Conv", ["input", "w", "b"], ["c"], name="conv"),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Reshape", ["p", "shape"], ["v"]),
        *(extra or []),
        helper.make_node("Gemm", ["v", "fc"], ["output"], name="fc", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "conv",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 4, 6, 6])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", opset)])


def _run(model: onnx.ModelProto, x: np.ndarray, folder: Path) -> tuple[np.ndarray, str]:
    file = folder / "m.onnx"
    file.write_bytes(model.SerializeToString())
    with open_session(file) as session:
        return session.run(x), session.name


@pytest.mark.parametrize("precision", HALVES)
def test_inputs_and_outputs_stay_float32(precision: str) -> None:
    half = in_half(_conv_graph(), precision)  # type: ignore[arg-type]
    types = [value.type.tensor_type.elem_type for value in (*half.graph.input, *half.graph.output)]
    assert types == [TensorProto.FLOAT] * 2
    assert [value.name for value in (*half.graph.input, *half.graph.output)] == ["input", "output"]
    onnx.checker.check_model(half, full_check=True)


@pytest.mark.parametrize("precision", HALVES)
def test_the_outputs_are_those_of_the_network_within_rounding(precision: str, tmp_path: Path) -> None:
    model = _conv_graph()
    x = np.random.default_rng(1).standard_normal((3, 4, 6, 6), dtype=np.float32)
    wanted, _ = _run(model, x, tmp_path)
    found, name = _run(in_half(model, precision), x, tmp_path)  # type: ignore[arg-type]
    difference = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert 0 < difference < 4 * EPSILON[precision]
    assert name == ("onnxruntime-cpu" if precision == "fp16" else "onnxruntime-cpu-emulating-bfloat16")


@pytest.mark.parametrize("precision", HALVES)
def test_two_four_weights_stay_so_and_pack(precision: str) -> None:
    half = in_half(small_graph(), precision)  # type: ignore[arg-type]
    layers = graph_layers(half)
    assert [layer.pattern_holds for layer in layers] == [True, True]
    assert {layer.dtype for layer in layers} == {"float16" if precision == "fp16" else "bfloat16"}
    packed = pack(half)
    assert packed_weights(packed) == ("w1", "w2")
    assert expand(packed).SerializeToString(deterministic=True) == half.SerializeToString(deterministic=True)


@settings(max_examples=50)
@given(arrays.arrays(np.float32, (8, 4, 3, 3), elements=st.floats(-1e4, 1e4, width=32)))
def test_weights_are_rounded_to_nearest_and_zeros_stay(weight: np.ndarray) -> None:
    model = _conv_graph()
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    for precision, dtype in (("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)):
        half = in_half(model, precision)  # type: ignore[arg-type]
        found = numpy_helper.to_array(half.graph.initializer[0])
        assert (found == weight.astype(dtype)).all()
        assert (found[weight == 0] == 0).all()


@pytest.mark.parametrize("value", [1e5, -7e4])
def test_a_weight_that_float16_cannot_hold_fails_the_gate(value: float) -> None:
    model = _conv_graph()
    weight = np.zeros((8, 4, 3, 3), dtype=np.float32)
    weight[0, 0, 0, 0] = value
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    with pytest.raises(GateFailed, match=r"w holds .* which float16 cannot"):
        in_half(model, "fp16")
    in_half(model, "bf16")


LOWEST = float(np.finfo(np.float32).min)
TRIANGLE = np.tril(np.ones((4, 4), dtype=bool))


def _masked(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Scores (batch, 4, 4) that `nodes` make `masked` of, and their softmax."""
    graph = helper.make_graph(
        [*nodes, helper.make_node("Softmax", ["masked"], ["output"], axis=-1)],
        "masked",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 4, 4])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 4, 4])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


def _added(lowest: float) -> onnx.ModelProto:
    mask = np.where(TRIANGLE, np.float32(0), np.float32(lowest))
    return _masked([helper.make_node("Add", ["input", "mask"], ["masked"])], {"mask": mask})


def _chosen(lowest: float) -> onnx.ModelProto:
    node = helper.make_node("Where", ["seen", "input", "lowest"], ["masked"])
    return _masked([node], {"seen": TRIANGLE, "lowest": np.array(lowest, dtype=np.float32)})


def _chosen_from_two(lowest: float) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Constant", [], ["lowest"], value_float=lowest),
        helper.make_node("Where", ["seen", "zero", "lowest"], ["mask"]),
        helper.make_node("Unsqueeze", ["mask", "first"], ["wide"]),
        helper.make_node("Add", ["input", "wide"], ["masked"]),
    ]
    zero, first = np.zeros((), dtype=np.float32), np.zeros(1, dtype=np.int64)
    return _masked(nodes, {"seen": TRIANGLE, "zero": zero, "first": first})


def _multiplied(lowest: float) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Mul", ["hidden", "lowest"], ["mask"]),
        helper.make_node("Add", ["input", "mask"], ["masked"]),
    ]
    hidden = (~TRIANGLE).astype(np.float32)
    return _masked(nodes, {"hidden": hidden, "lowest": np.array(lowest, dtype=np.float32)})


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize(
    ("make", "lowest"),
    [
        *(
            (make, lowest)
            for make in (_added, _chosen, _chosen_from_two)
            for lowest in (LOWEST, -1e9, -np.inf)
        ),
        (_multiplied, LOWEST),
        (_multiplied, -1e9),
    ],
)
def test_a_masks_lowest_value_becomes_that_of_the_type(
    make: Callable[[float], onnx.ModelProto], lowest: float, precision: str, tmp_path: Path
) -> None:
    model = make(lowest)
    x = np.random.default_rng(1).standard_normal((3, 4, 4), dtype=np.float32)
    wanted, _ = _run(model, x, tmp_path)
    assert (wanted[:, ~TRIANGLE] == 0).all()
    half = in_half(model, precision)  # type: ignore[arg-type]
    found, _ = _run(half, x, tmp_path)
    assert (found[:, ~TRIANGLE] == 0).all()
    np.testing.assert_allclose(found, wanted, atol=8 * EPSILON[precision])
    held = [numpy_helper.to_array(tensor) for tensor in half.graph.initializer]
    held += [
        numpy_helper.to_array(a.t) for node in half.graph.node for a in node.attribute if a.HasField("t")
    ]
    least = min(float(values.min()) for values in held if values.dtype not in (bool, np.int64))
    assert np.isfinite(least) == np.isfinite(lowest)


def test_a_mask_that_is_used_as_a_weight_too_is_held_to_the_range() -> None:
    model = _added(LOWEST)
    model.graph.node.insert(0, helper.make_node("MatMul", ["input", "mask"], ["product"]))
    model.graph.node[1].input[0] = "product"
    with pytest.raises(GateFailed, match=r"mask holds 3\.403e\+38"):
        in_half(model, "fp16")


def test_a_bound_that_no_float16_reaches_is_its_largest() -> None:
    bounds = {"low": np.array(-1e9, dtype=np.float32), "high": np.array(1e9, dtype=np.float32)}
    half = in_half(_masked([helper.make_node("Clip", ["input", "low", "high"], ["masked"])], bounds), "fp16")
    assert [float(numpy_helper.to_array(tensor)) for tensor in half.graph.initializer] == [-65504, 65504]


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("as_node", [False, True])
def test_resize_keeps_its_scales_in_float32(precision: str, as_node: bool, tmp_path: Path) -> None:
    scales = np.array([1, 1, 1.7], dtype=np.float32)  # 1.7 is no 16-bit number
    constant = helper.make_node("Constant", [], ["scales"], value=numpy_helper.from_array(scales))
    nodes = [
        *([constant] if as_node else []),
        helper.make_node("Resize", ["input", "", "scales"], ["wide"], mode="nearest"),
        helper.make_node("ReduceMax", ["scales"], ["most"], keepdims=0),  # uses them as a value too
        helper.make_node("Mul", ["wide", "most"], ["masked"]),
    ]
    model = _masked(nodes, {} if as_node else {"scales": scales})
    del model.graph.output[0].type.tensor_type.shape.dim[2]
    model.graph.output[0].type.tensor_type.shape.dim.add().dim_value = 6
    x = np.random.default_rng(1).standard_normal((3, 4, 4), dtype=np.float32)
    wanted, _ = _run(model, x, tmp_path)
    half = in_half(model, precision)  # type: ignore[arg-type]
    found, _ = _run(half, x, tmp_path)
    np.testing.assert_allclose(found, wanted, atol=8 * EPSILON[precision])
    used = next(node for node in half.graph.node if node.op_type == "Resize").input[2]
    kept = next(tensor for tensor in half.graph.initializer if tensor.name == used)
    np.testing.assert_array_equal(numpy_helper.to_array(kept), scales)


def test_resize_by_scales_that_the_graph_computes_is_refused() -> None:
    extra = [helper.make_node("Resize", ["c", "", "v"], ["q"], name="resize")]
    with pytest.raises(UsageError, match="resize, which wants float32"):
        in_half(_conv_graph(extra), "fp16")


def test_the_graph_that_is_given_stays_as_it_is() -> None:
    model = _conv_graph()
    before = model.SerializeToString()
    in_half(model, "fp16")
    in_half(model, "bf16")
    assert model.SerializeToString() == before


def test_a_cast_to_float_becomes_one_to_half() -> None:
    extra = [helper.make_node("Cast", ["v"], ["v2"], to=TensorProto.FLOAT)]
    model = _conv_graph(extra)
    model.graph.node[-1].input[0] = "v2"
    half = in_half(model, "fp16")
    casts = [a.i for node in half.graph.node if node.op_type == "Cast" for a in node.attribute]
    assert casts == [TensorProto.FLOAT16, TensorProto.FLOAT16, TensorProto.FLOAT]


@pytest.mark.parametrize("precision", HALVES)
def test_constants_that_are_float_without_a_tensor_become_half(precision: str, tmp_path: Path) -> None:
    columns = helper.make_node("Constant", [], ["columns"], value_ints=[32])
    zeros = helper.make_node("ConstantOfShape", ["columns"], ["zeros"], name="zeros")
    one = helper.make_node("Constant", [], ["one"], value_float=0.25, name="one")
    more = helper.make_node("Constant", [], ["more"], value_floats=[0.5] * 32, name="more")
    sums = [
        helper.make_node("Add", [a, b], [c])
        for a, b, c in (("v", "zeros", "s"), ("s", "one", "t"), ("t", "more", "u"))
    ]
    model = _conv_graph([columns, zeros, one, more, *sums])
    next(node for node in model.graph.node if node.name == "fc").input[0] = "u"
    x = np.random.default_rng(1).standard_normal((3, 4, 6, 6), dtype=np.float32)
    wanted, _ = _run(model, x, tmp_path)
    half = in_half(model, precision)  # type: ignore[arg-type]
    found, _ = _run(half, x, tmp_path)
    assert np.abs(found - wanted).max() / np.abs(wanted).max() < 4 * EPSILON[precision]


def test_float_constants_are_rounded_and_integers_are_not() -> None:
    value = numpy_helper.from_array(np.array([0.1], dtype=np.float32))
    extra = [
        helper.make_node("Constant", [], ["k"], value=value),
        helper.make_node("Mul", ["v", "k"], ["v2"]),
    ]
    model = _conv_graph(extra)
    model.graph.node[-1].input[0] = "v2"
    half = in_half(model, "fp16")
    assert HALF_TYPES["fp16"] in value_types(half)
    assert {t.name: t.data_type for t in half.graph.initializer}["shape"] == TensorProto.INT64


@pytest.mark.parametrize(
    ("node", "said"),
    [
        (
            helper.make_node("QuantizeLinear", ["v", "s", "z"], ["q"], name="quant"),
            "quant, which wants float32",
        ),
        (
            helper.make_node(
                "If",
                ["k"],
                ["q"],
                name="branch",
                then_branch=helper.make_graph(
                    [helper.make_node("Resize", ["v", "", "s"], ["r"])], "t", [], []
                ),
                else_branch=helper.make_graph([], "e", [], []),
            ),
            "Resize, which wants float32",
        ),
    ],
)
def test_what_is_not_plain_is_refused(node: onnx.NodeProto, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        in_half(_conv_graph([node]), "fp16")


_CHOICE = """(float[N,8] x, bool more) => (float[N,8] y, float[N,8] z) {
    h = MatMul (x, w)
    y = If (more) <
        then_branch = then () => (float[N,8] then_y) {
            half = Constant <value = float[1] {0.5}> () scaled = Mul (h, half)
            steps = Range (zero, end, one) moved = Add (scaled, steps)
            then_y = If (more) <
                then_branch = deep () => (float[N,8] deep_y) { a = MatMul (x, w) deep_y = Add (a, moved) },
                else_branch = flat () => (float[N,8] flat_y) { flat_y = Identity (moved) }
            >
        },
        else_branch = other () => (float[N,8] other_y) { other_y = MatMul (h, v) }
    >
    n = Loop (three, more, h) <
        body = again (int64 i, bool on, float[N,8] was) => (bool goes, float[N,8] now) {
            goes = Identity (on) one_more = Add (was, x) now = Tanh (one_more)
        }
    >
    z = Identity (n)
}"""


def _choice() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {
        "w": rng.normal(size=(8, 8)).astype(np.float32),
        "v": rng.normal(size=(8, 8)).astype(np.float32),
        "zero": np.asarray(0, dtype=np.float32),
        "end": np.asarray(8, dtype=np.float32),
        "one": np.asarray(1, dtype=np.float32),
        "three": np.asarray(3, dtype=np.int64),
    }
    return model_from(_CHOICE, **weights)


@pytest.mark.parametrize("more", [True, False])
def test_branches_and_loops_compute_in_float16_too(more: bool) -> None:
    """With values and weights of the graph around, constants of their own, and an operator without the type."""
    model = _choice()
    half = in_half(model, "fp16")
    halves = {tensor.name for tensor in half.graph.initializer if tensor.data_type == TensorProto.FLOAT16}
    assert halves >= {"w", "v"}
    casts = [node for node in half.graph.node if node.op_type == "Cast"]
    assert len(casts) == 3, "one at each float input and output"
    feeds = {"x": np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32), "more": np.array(more)}
    for wanted, got in zip(outputs_of(model, feeds), outputs_of(half, feeds), strict=True):
        assert got.dtype == np.float32
        assert 0 < np.abs(got - wanted).max() < 2e-2


def test_bfloat16_is_refused_where_a_graph_branches() -> None:
    with pytest.raises(UsageError, match=r"subgraphs of .* Build it as fp16 or fp32\."):
        in_half(_choice(), "bf16")


def test_a_function_is_refused() -> None:
    with pytest.raises(UsageError, match="the function sparse24::Unpack24"):
        in_half(pack(small_graph()), "fp16")


def test_a_graph_that_the_checker_refuses_is_refused() -> None:
    extra = [helper.make_node("Add", ["c", "nowhere"], ["d"])]
    with pytest.raises(UsageError, match="cannot be float16"):
        in_half(_conv_graph(extra), "fp16")


def test_an_operator_without_the_type_runs_in_float32_between_casts(tmp_path: Path) -> None:
    """Range, as detectors make their grid by, and NonMaxSuppression behind them."""
    model = model_from(
        """(float[N,4] x) => (float[N,4] y, int64[K,3] kept) {
            r = Range (zero, end, one) y = Add (x, r)
            b = Unsqueeze (y, first) s = ReduceSum <keepdims = 0> (b, last) p = Unsqueeze (s, first)
            kept = NonMaxSuppression (b, p, most)
        }""",
        zero=np.array(0, np.float32),
        end=np.array(4, np.float32),
        one=np.array(1, np.float32),
        first=np.array([0]),
        last=np.array([2]),
        most=np.array([9]),
    )
    x = np.array([[0, 0, 1, 1], [0, 0, 3, 3], [8, 8, 2, 2]], np.float32)
    half = in_half(model, "fp16")
    found = []
    for name, one in (("whole", model), ("half", half)):
        onnx.save(one, tmp_path / name)
        with open_session(tmp_path / name) as session:
            found.append(session.run({"x": x}))
    np.testing.assert_array_equal(found[0]["y"], x + np.arange(4, dtype=np.float32))
    np.testing.assert_array_equal(found[1]["y"], found[0]["y"])
    np.testing.assert_array_equal(found[1]["kept"], found[0]["kept"])
    assert len(found[0]["kept"])


def test_sizes_and_steps_of_a_range_stay_exact() -> None:
    """3,001 is no float16, and 1 by steps of 0.1, rounded down to one, would be 11 values."""
    model = model_from(
        """(float[N] x) => (float[N] y, float[K] z) {
            n = Shape (x) number = Squeeze (n) end = Cast <to = 1> (number)
            places = Range (zero, end, one) big = Cast <to = 7> (places) odd = Mod (big, two)
            odds = Cast <to = 1> (odd) y = Add (x, odds)
            steps = Range (zero, one, step) z = Mul (steps, one)
        }""",
        zero=np.asarray(0, dtype=np.float32),
        one=np.asarray(1, dtype=np.float32),
        step=np.asarray(0.1, dtype=np.float32),
        two=np.array([2]),
    )
    half = in_half(model, "fp16")
    casts = [node.input[0] for node in half.graph.node if node.op_type == "Cast"]
    assert casts.count("number") == 1, "the size is cast to float32 alone"
    feeds = {"x": np.zeros(3001, np.float32)}
    wanted, found = outputs_of(model, feeds), outputs_of(half, feeds)
    np.testing.assert_array_equal(found[0][:2001], wanted[0][:2001])
    assert found[0].shape == wanted[0].shape
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-3)
    assert found[1].shape == (10,)


@pytest.mark.parametrize("opset", [17, 19])
def test_bfloat16_of_an_old_opset_is_refused(opset: int) -> None:
    with pytest.raises(UsageError, match=f"opset {opset}"):
        in_half(_conv_graph(opset=opset), "bf16")


def test_the_emulation_rounds_every_value_as_bfloat16_does(tmp_path: Path) -> None:
    """Against a loop over the nodes in NumPy, float32 sums, a rounding behind each."""
    model = small_graph()
    x = np.random.default_rng(2).standard_normal((5, 16), dtype=np.float32)

    def rounded(values: np.ndarray) -> np.ndarray:
        return values.astype(ml_dtypes.bfloat16).astype(np.float32)

    w1, w2 = (rounded(numpy_helper.to_array(tensor)) for tensor in model.graph.initializer)
    hidden = rounded(rounded(x) @ w1.T)
    wanted = rounded(rounded(np.maximum(hidden, 0)) @ w2.T)
    found, _ = _run(in_half(model, "bf16"), x, tmp_path)
    # Sums in another order may round to the neighbour.
    assert np.abs(found - wanted).max() <= 2**-7 * np.abs(wanted).max()
    assert (found == rounded(found)).all()


def test_the_emulation_has_float32_at_its_ends() -> None:
    emulated = with_bfloat16_emulated(in_half(_conv_graph(), "bf16"))
    onnx.checker.check_model(emulated, full_check=True)
    assert TensorProto.BFLOAT16 not in {tensor.data_type for tensor in emulated.graph.initializer}
