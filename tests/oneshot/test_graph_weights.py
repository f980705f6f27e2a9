"""Which weights of a graph get the pattern, and the reasons of the others."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sparse_export.errors import UsageError
from sparse_export.oneshot.graph_weights import WeightsOfGraph, weights_of_graph
from sparse_export.oneshot.wiring import wiring_of
from sparse_export.sparsity.pattern import NMPattern
from tests.oneshot.graphs import drawn, model_from

TWO_FOUR = NMPattern(n=2, m=4)


def divided(model: onnx.ModelProto, **more: object) -> WeightsOfGraph:
    options: dict[str, object] = {"planned_dense": {}} | more
    return weights_of_graph(model, wiring_of(model), TWO_FOUR, **options)  # type: ignore[arg-type]


def names(weights: WeightsOfGraph) -> list[str]:
    return [weight.name for weight in weights.pruned]


def reason(text: str, **weights: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> str:
    """Why w of a graph stays dense, whose weight `other` gets the pattern."""
    found = divided(model_from(text, other=drawn(8, 8), last=drawn(8, 8), **weights))
    assert "other" in names(found)
    assert set(found.names) == {*names(found), *found.dense}
    return found.dense["w"]


TAIL = "o = MatMul(h, other) y = MatMul(o, last)"


def test_what_cannot_be_pruned_has_its_reason() -> None:
    start = "(float[N,8] x) => (float[N,8] y) { %s " + TAIL + "}"
    w = drawn(8, 8)
    assert "sums over 6 channels" in reason(
        "(float[N,6] x) => (float[N,8] y) { h = MatMul(x, w)" + TAIL + "}", w=drawn(6, 8)
    )
    assert reason(start % "v = MatMul(x, w) h = Add(x, v)", w=drawn(8)) == "it is a vector"
    assert "along different axes" in reason(start % "v = MatMul(x, w) h = Gemm <transB=1> (v, w)", w=w)
    assert "Gather" in reason(
        start % "k = ArgMax <axis=1, keepdims=0> (x) v = Gather(w, k) u = MatMul(x, w) h = Add(u, v)", w=w
    )
    assert "computes it by Mul" in reason(
        start % "v = Mul(w, s) h = MatMul(x, v)", w=w, s=np.array(2, np.float32)
    )
    assert "the outputs do not hang on it" in reason(start % "v = MatMul(x, w) h = Relu(x)", w=w)
    quantized = "v = DequantizeLinear(w, s) h = MatMul(x, v)"
    assert "quantized" in reason(start % quantized, w=np.ones((8, 8), np.int8), s=np.array(0.1, np.float32))
    depthwise = "(float[N,8,A] x) => (float[N,8] y) { c = Conv <group=8> (x, w) h = ReduceMax <axes=[2], keepdims=0> (c)"
    assert "sums over 1 channel," in reason(depthwise + TAIL + "}", w=drawn(8, 1, 3))


def test_a_weight_read_through_layout_and_casts_gets_the_pattern_and_one_of_two_layers_too() -> None:
    model = model_from(
        """(float[N,8] x) => (float[N,4] y) {
            t = Transpose(w) r = Reshape(t, size) a = MatMul(x, r) b = Gemm <transB=1> (a, w)
            c = Cast <to=1> (h) d = MatMul(b, c) y = MatMul(d, last)
        }""",
        w=drawn(8, 8),
        size=np.array([8, 8]),
        h=drawn(8, 8).astype(np.float16),
        last=drawn(8, 4),
    )
    found = divided(model)
    assert names(found) == ["w", "h"]
    assert [len(weight.uses) for weight in found.pruned] == [2, 1]


def test_the_layers_that_none_comes_after_give_the_outputs() -> None:
    model = model_from(
        """(float[N,8] x) => (float[N,8] y, float[N,8] z) {
            a = MatMul(x, w0) b = MatMul(a, w1) c = MatMul(a, w2) d = Relu(b) e = MatMul(d, w3)
            z = Add(c, a) y = Softmax(e)
        }""",
        **{f"w{i}": drawn(8, 8) for i in range(4)},
    )
    found = divided(model)
    assert names(found) == ["w0", "w1"]
    assert found.dense == dict.fromkeys(("w2", "w3"), "it gives the outputs")


def test_a_last_layer_as_wide_as_those_of_encoders_gets_the_pattern() -> None:
    """The weight is stored (I, O)."""
    for width in (255, 256):
        model = model_from(
            "(float[N,8] x) => (float[N,M] y) { a = MatMul(x, w0) b = MatMul(a, w1) y = Relu(b) }",
            w0=drawn(8, 8),
            w1=drawn(8, width),
        )
        assert ("w1" in names(divided(model, planned_dense={}))) == (width == 256)


TWO = "(float[N,8] x) => (float[N,8] y) { a = MatMul(x, w0) b = MatMul(a, w1) y = MatMul(b, w2) }"


def two() -> onnx.ModelProto:
    model = model_from(TWO, **{f"w{i}": drawn(8, 8) for i in range(3)})
    for node in model.graph.node:
        node.name = f"/layer/{node.output[0]}"
    return model


def test_layers_are_kept_dense_by_weight_by_node_and_by_a_plan() -> None:
    assert divided(two(), keep_dense=["w0"]).dense["w0"] == "it was named to stay dense"
    assert names(divided(two(), keep_dense=["/layer/[b]"])) == ["w0"]
    assert divided(two(), planned_dense={"w1": "it is slower"}).dense["w1"] == "it is slower"
    with pytest.raises(UsageError, match="'fc', which is no weight"):
        divided(two(), keep_dense=["fc"])
    with pytest.raises(UsageError, match="plan names fc"):
        divided(two(), planned_dense={"fc": "it is slower"})
    with pytest.raises(UsageError, match="has no weight for the pattern 2:4: w0: it was named"):
        divided(two(), keep_dense=["*"])


def test_the_smallest_layers_stay_dense_unless_a_plan_decides() -> None:
    text = "(float[N,8] x) => (float[N,8] y) { a = MatMul(x, s) b = MatMul(a, w) y = MatMul(b, last) }"
    model = model_from(text, s=drawn(8, 8), w=drawn(8, 1600), last=drawn(1600, 8))
    assert "among the smallest" in divided(model, planned_dense=None).dense["s"]
    assert names(divided(model)) == ["s", "w"]


def test_layers_inside_a_loop_are_not_seen_and_what_is_not_looked_into_is_told() -> None:
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "w"], ["next"]),
            helper.make_node("Identity", ["going"], ["on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, None),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    model = model_from(
        "(float[N,8] x) => (float[N,8] y) { a = MatMul(x, v) b = Identity(a) c = Einsum <equation='nk,ko->no'> (b, u)"
        " y = MatMul(c, last) }".replace("'", '"'),
        v=drawn(8, 8),
        w=drawn(8, 8),
        u=drawn(8, 8),
        last=drawn(8, 8),
        three=np.array(3),
    )
    model.graph.node[1].CopyFrom(helper.make_node("Loop", ["three", "", "a"], ["b"], name="loop", body=body))
    found = divided(model)
    unseen = {weight.name: weight.unseen for weight in found.pruned}
    assert unseen["v"] == ""
    assert "loop/body/next stands in a branch or loop" in unseen["w"]
    assert "Einsum has weights" in found.dense["u"]
