"""What layers would keep if they were 2:4: against weights of which it is known, and every mask tried."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, fields
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper, numpy_helper

from sparse_export.formats.layers import GraphLayer
from sparse_export.graph import weight_counts
from sparse_export.graph.example import example_of_shape
from sparse_export.graph.export import onnx_from_module
from sparse_export.graph.if_pruned import LayerIfPruned, totals_if_pruned
from sparse_export.graph.layers import graph_layers, layers_if_pruned
from sparse_export.graph.weight_counts import count_weight
from tests.making_runs import network_and_masks

Array = np.ndarray[Any, Any]
KEPT = 7 / 10  # of 1, 2, 3, 4


def ramp(shape: tuple[int, ...], axis: int, dtype: Any = np.float16) -> Array:
    """1, -2, 3, -4, 1, … along one axis, the same along the others: along them half is kept."""
    line = np.resize([1, -2, 3, -4], shape[axis])
    return np.broadcast_to(np.moveaxis(line.reshape(-1, *[1] * (len(shape) - 1)), 0, axis), shape).astype(
        dtype
    )


def model_of(
    nodes: list[onnx.NodeProto],
    tensors: dict[str, Array],
    x: tuple[int | str, ...],
    dtype: int = TensorProto.FLOAT16,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("x", dtype, x)],
        [helper.make_tensor_value_info("y", dtype, None)],
        [numpy_helper.from_array(values, name) for name, values in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def one(
    op: str, weight: Array, x: tuple[int | str, ...], *, left: bool = False, **attributes: Any
) -> LayerIfPruned:
    names = ["w", "x"] if left else ["x", "w"]
    dtype = helper.np_dtype_to_tensor_dtype(weight.dtype)
    node = helper.make_node(op, names, ["y"], name="layer", **attributes)
    ((layer,), _) = layers_if_pruned(model_of([node], {"w": weight}, x, dtype))
    return layer


def codes(layer: LayerIfPruned) -> list[str]:
    return [reason.code for reason in layer.reasons_if_pruned]


# -- the share, against every mask --------------------------------------------------------------------------


def best_share(values: Array, axis: int) -> float:
    """Every mask of two out of four, group by group."""
    kept = total = 0.0
    for group in np.moveaxis(np.abs(values.astype(np.float64)), axis, -1).reshape(-1, 4):
        kept += max(math.fsum(pair) for pair in itertools.combinations(group.tolist(), 2))
        total += math.fsum(group.tolist())
    return kept / total if total else 1.0


@st.composite
def weights(draw: st.DrawFn) -> tuple[Array, int]:
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    axis = draw(st.integers(0, len(shape) - 1))
    shape[axis] *= 4
    dtype = draw(st.sampled_from([np.float32, np.float64, np.float16, np.int8, np.int32]))
    entries = st.integers(-100, 100) if np.dtype(dtype).kind == "i" else st.floats(-100, 100, width=16)
    return draw(arrays.arrays(dtype, tuple(shape), elements=entries)), axis


@given(weights())
def test_the_share_is_that_of_the_best_mask(given_: tuple[Array, int]) -> None:
    values, axis = given_
    before = values.copy()
    found = count_weight(values, axis, values.shape[axis])
    assert found.is_finite
    assert found.share_kept == pytest.approx(best_share(values, axis), rel=1e-12)
    assert found.kept + found.dropped == pytest.approx(np.abs(values.astype(np.float64)).sum(), rel=1e-12)
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_large_weight_is_worked_out_in_pieces_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch, axis: int
) -> None:
    values = np.random.default_rng(3).normal(size=(8, 12, 20)).astype(np.float32)
    turned = np.asfortranarray(values)[::-1]
    whole = [count_weight(weight, axis, weight.shape[axis]) for weight in (values, turned)]
    monkeypatch.setattr(weight_counts, "_PIECE", 50)
    pieces = [count_weight(weight, axis, weight.shape[axis]) for weight in (values, turned)]
    for found, wanted in zip(pieces, whole, strict=True):
        assert (found.kept, found.dropped) == pytest.approx((wanted.kept, wanted.dropped), rel=1e-12)
        assert found.share_kept == pytest.approx(best_share(values, axis), rel=1e-12)


def test_the_extremes_of_a_type_are_not_lost() -> None:
    for values in (
        np.array([-128, -128, 127, 1], dtype=np.int8),
        np.array([-(2**31), 2**31 - 1, 1, 0], dtype=np.int32),
        np.array([65504, 65504, -65504, 6e-8], dtype=np.float16),
        np.array([3e38, -3e38, 3e38, 3e38], dtype=np.float32),
        np.array([1, -2, 3, 4], dtype=ml_dtypes.bfloat16),
        np.array([1, -2, 3, 4], dtype=ml_dtypes.float8_e4m3fn),
    ):
        found = count_weight(values, 0, 4)
        assert found.is_finite
        assert found.share_kept == best_share(values, 0)


# -- layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        one("Gemm", ramp((5, 8), 1), ("n", 8), transB=1),
        one("Gemm", ramp((8, 5), 0), ("n", 8)),
        one("Gemm", ramp((8, 5), 0), (8, 3), left=True, transA=1),
        one("MatMul", ramp((8, 5), 0), ("n", 8)),
        one("MatMul", ramp((2, 8, 5), 1), ("n", 2, 3, 8)),
        one("MatMul", ramp((5, 8), 1), ("n", 8, 3), left=True),
        one("MatMul", ramp((*[1] * 62, 8, 5), 62), (1, 8)),  # as many axes as a NumPy array can have
        one("Conv", ramp((6, 8, 3, 3), 1), ("n", 8, 9, 9)),
        one("Conv", ramp((6, 4, 3, 3), 1), ("n", 8, 9, 9), group=2),
        one("Conv", ramp((6, 8, 5), 1), ("n", 8, 9)),
        one("ConvTranspose", ramp((8, 6, 2, 2), 0), ("n", 8, 5, 5)),
        one("ConvTranspose", ramp((8, 3, 2, 2), 0), ("n", 8, 5, 5), group=2),
    ],
)
def test_the_two_largest_of_four_are_looked_for_along_the_axis_that_is_summed(layer: LayerIfPruned) -> None:
    assert layer.would_keep == KEPT
    assert layer.magnitude == 2.5 * layer.n_weights


def test_a_quantized_weight_counts_as_what_it_stands_for() -> None:
    quantized = ramp((8, 5), 0, np.int8) * np.array([1, 1, 1, 1, 8, 8, 8, 8], dtype=np.int8)[:, None]
    scale = np.array([1, 1, 1, 1, 100], dtype=np.float32)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["q", "scales", "zeros"], ["w"], axis=1),
        helper.make_node("MatMul", ["xd", "w"], ["y"], name="layer"),
    ]
    tensors: dict[str, Array] = {
        "q": quantized,
        "scales": scale,
        "zeros": np.zeros(5, dtype=np.int8),
        "s": np.ones((), dtype=np.float32),
        "z": np.zeros((), dtype=np.int8),
    }
    ((layer,), _) = layers_if_pruned(model_of(nodes, tensors, ("n", 8), TensorProto.FLOAT))
    assert (layer.dtype, layer.would_keep, layer.magnitude) == ("int8", KEPT, 10 * 104 + 80 * 104)
    assert (layer.eligible, layer.eligible_if_pruned) == ("no", "unproven")
    assert codes(layer) == ["int8", "unaligned", "small"]


def test_a_weight_with_other_groups_for_each_of_its_two_layers_has_a_share_for_each() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="first"),
        helper.make_node("Gemm", ["h", "w"], ["y"], name="second", transB=1),
    ]
    (first, second), _ = layers_if_pruned(model_of(nodes, {"w": ramp((8, 8), 0)}, (1, 8)))
    assert (first.would_keep, second.would_keep) == (KEPT, 0.5)
    assert codes(first)[-1] == codes(second)[-1] == "shared"
    totals = totals_if_pruned((first, second))
    assert totals.would_keep == pytest.approx((KEPT + 0.5) / 2)


def test_a_2_to_4_layer_keeps_all() -> None:
    values = np.random.default_rng(5).normal(size=(300, 512)).astype(np.float32)
    values[:, 1::4] = values[:, 2::4] = 0
    layer = one("Gemm", values.astype(np.float16), ("n", 512), transB=1)
    assert (layer.pattern_holds, layer.would_keep) == (True, 1.0)


def test_a_weight_of_zeros_loses_nothing() -> None:
    layer = one("MatMul", np.zeros((8, 5), dtype=np.float16), ("n", 8))
    assert (layer.would_keep, layer.magnitude) == (1.0, 0.0)
    assert totals_if_pruned((layer,)).would_keep == 1.0


@pytest.mark.parametrize(
    ("layer", "code"),
    [
        (one("Conv", ramp((6, 3, 3, 3), 1), ("n", 3, 9, 9)), "indivisible"),
        (one("Conv", ramp((8, 6, 3, 3), 1), ("n", 12, 9, 9), group=2), "indivisible"),
        (one("ConvTranspose", ramp((12, 3, 2, 2), 0), ("n", 12, 5, 5), group=2), "indivisible"),
        (one("Conv", ramp((8, 1, 3, 3), 0), ("n", 8, 9, 9), group=8), "depthwise"),
        (one("MatMul", np.zeros((0, 5), dtype=np.float16), ("n", 0)), "empty"),
        (one("MatMul", np.zeros((8, 0), dtype=np.float16), ("n", 8)), "empty"),
        (one("MatMul", ramp((8, 5), 0) * np.float16("nan"), ("n", 8)), "not-finite"),
        (one("MatMul", ramp((8, 5), 0) * np.float16("inf"), ("n", 8)), "not-finite"),
        (one("MatMul", ramp((8, 5), 0, np.float64) * 4e307, ("n", 8)), "not-finite"),
    ],
)
def test_where_no_share_is_known_a_reason_says_why(layer: LayerIfPruned, code: str) -> None:
    assert (layer.would_keep, layer.magnitude, layer.could_be_24) == (None, None, False)
    assert code in codes(layer)
    assert totals_if_pruned((layer,)).would_keep is None


def test_a_layer_without_a_known_weight_has_no_share_and_its_own_reason() -> None:
    nodes = [helper.make_node("MatMul", ["x", "x"], ["y"], name="layer")]
    ((layer,), _) = layers_if_pruned(model_of(nodes, {}, (4, 4)))
    assert (layer.would_keep, layer.eligible_if_pruned, codes(layer)) == (None, "no", ["activations"])
    assert totals_if_pruned((layer,)).n_layers == 0


# -- could hardware use it then? ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "eligible", "wanted", "could"),
    [
        (one("MatMul", ramp((256, 256), 0), ("n", 256)), "yes", [], True),
        (one("MatMul", ramp((256, 240), 0), ("n", 256)), "yes", ["small"], True),
        (one("MatMul", ramp((240, 256), 0), ("n", 240)), "yes", ["small"], True),
        (one("MatMul", ramp((260, 256), 0), ("n", 260)), "unproven", ["unaligned"], True),
        (one("MatMul", ramp((256, 256), 0, np.float32), ("n", 256)), "no", ["float32"], True),
        (one("MatMul", ramp((256, 256), 0, np.float64), ("n", 256)), "no", ["other-type"], True),
        (one("MatMul", ramp((256,), 0), ("n", 256)), "no", ["vector"], False),
        (one("Conv", ramp((512, 256, 1, 1), 1), ("n", 512, 3, 3), group=2), "no", ["grouped"], False),
        (
            one("ConvTranspose", ramp((256, 256, 1, 1), 0), ("n", 256, 3, 3)),
            "unproven",
            ["kernel-unknown"],
            True,
        ),
    ],
)
def test_the_rules_of_eligibility_hold_as_if_the_groups_were_mended(
    layer: LayerIfPruned, eligible: str, wanted: list[str], could: bool
) -> None:
    assert "groups-over" in [reason.code for reason in layer.reasons]
    assert layer.eligible == "no"
    assert (layer.eligible_if_pruned, codes(layer), layer.could_be_24) == (eligible, wanted, could)


def test_what_is_missing_is_told_of_a_float32_layer() -> None:
    layer = one("MatMul", ramp((8, 256), 0, np.float32), ("n", 8))
    texts = {reason.code: reason.text for reason in layer.reasons_if_pruned}
    assert texts["float32"] == "Needs float16, bfloat16 or int8."
    assert texts["small"] == "8 inputs and 256 outputs; sparse kernels seldom win below 256."
    assert totals_if_pruned((layer,)).missing == ("float16, bfloat16 or int8",)


# -- together -----------------------------------------------------------------------------------------------


def test_the_totals_are_those_of_the_layers_that_could_be_2_to_4() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "stem"], ["h"], name="a"),
        helper.make_node("Conv", ["h", "grouped"], ["i"], name="b", group=2),
        helper.make_node("Conv", ["i", "wide"], ["y"], name="c"),
    ]
    tensors = {
        "stem": ramp((16, 3, 1, 1), 1, np.float32),
        "grouped": ramp((16, 8, 1, 1), 1, np.float32),
        "wide": ramp((4, 16, 1, 1), 1, np.float32),
    }
    totals = totals_if_pruned(
        layers_if_pruned(model_of(nodes, tensors, ("n", 3, 2, 2), TensorProto.FLOAT))[0]
    )
    share = 64 / (48 + 128 + 64)
    assert (totals.n_layers, totals.n_small, totals.n_unproven) == (1, 1, 0)
    assert (totals.macs_share, totals.weights_share, totals.would_keep) == (share, share, KEPT)
    free = totals_if_pruned(
        layers_if_pruned(model_of(nodes, tensors, ("n", 3, "h", "w"), TensorProto.FLOAT))[0]
    )
    assert (free.macs_share, free.weights_share, free.would_keep) == (None, share, KEPT)


def test_magnitudes_that_only_together_are_too_large_for_float64_have_a_share() -> None:
    layer = one("MatMul", ramp((8, 1), 0, np.float64) * 8e306, (1, 8))
    assert layer.magnitude is not None and math.isinf(2 * layer.magnitude)
    assert totals_if_pruned((layer, layer)).would_keep == pytest.approx(KEPT, rel=1e-12)


@pytest.fixture(scope="module")
def exported() -> onnx.ModelProto:
    module, masks = network_and_masks()
    return onnx_from_module(module, example_of_shape((1, 8, 8)), masks=masks)


def test_an_exported_network_would_keep_what_its_best_masks_keep(exported: onnx.ModelProto) -> None:
    layers, _ = layers_if_pruned(exported)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in exported.graph.initializer}
    assert layers[0].would_keep is None
    assert len(layers) == 5
    for layer in layers[1:]:
        best = best_share(stored[layer.weight], 1)
        assert layer.would_keep == pytest.approx(best, rel=1e-9)
        assert 0.5 < best < 1


def test_the_layer_that_bundles_hold_has_none_of_it(exported: onnx.ModelProto) -> None:
    names = [field.name for field in fields(GraphLayer)]
    assert names[-2:] == ["eligible", "reasons"]
    for plain, more in zip(graph_layers(exported), layers_if_pruned(exported)[0], strict=True):
        assert type(plain) is GraphLayer
        told = asdict(more)
        assert list(told) == [*names, "would_keep", "magnitude", "eligible_if_pruned", "reasons_if_pruned"]
        assert {name: told[name] for name in names} == asdict(plain)
