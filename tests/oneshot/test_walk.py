"""A walk in segments gives what the whole graph gives, with whatever memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from sparse_export.errors import ArtefactError
from sparse_export.oneshot.live_values import LiveValues
from sparse_export.oneshot.segments import Stop, plan_segments
from sparse_export.oneshot.walk import Values, Walk
from sparse_export.oneshot.wiring import wiring_of
from sparse_export.signature import Array, Feeds
from tests.oneshot.graphs import drawn, model_from, outputs_of

BRANCHED = """(float[N,8] x, int64[K] picks) => (float[N,8] y, float[K,T] z, float[N,8] a) {
    a = Relu(x)
    b = MatMul(a, w0)
    c = MatMul(a, w1)
    size = Shape(x)
    d = Add(b, c)
    d2 = Reshape(d, size)
    e = MatMul(d2, w2)
    y = Add(e, a)
    t = Transpose(w1)
    f = MatMul(d2, t)
    z = Gather(f, picks)
}"""


def branched() -> onnx.ModelProto:
    return model_from(BRANCHED, **{f"w{i}": drawn(8, 8, seed=i) for i in range(3)})


def walked(
    model: onnx.ModelProto, batches: Sequence[Feeds], memory_bytes: int
) -> tuple[list[list[Array]], LiveValues]:
    """The outputs by batch, by a walk that stops at every matrix product."""
    wiring = wiring_of(model)
    stops = [
        Stop(nodes=frozenset([i]), values=(node.input[0],))
        for i, node in enumerate(model.graph.node)
        if node.op_type in ("MatMul", "Conv")
    ]
    segments = plan_segments(wiring, stops, to_outputs=True, most=1)
    outputs: list[list[Array]] = []

    def see(_batch: int, values: Values) -> None:
        arrays = [values[name] for name in wiring.outputs]
        outputs.append([array for array in arrays if not isinstance(array, list)])

    with Walk(model, wiring, segments, batches, memory_bytes=memory_bytes) as walk:
        for _ in segments[:-1]:
            walk.run(None)
        walk.run(see, wiring.outputs)
    return outputs, walk.live


@pytest.mark.parametrize("memory_bytes", [0, 300, 1 << 30])
def test_the_outputs_are_those_of_the_whole_graph(memory_bytes: int) -> None:
    model = branched()
    batches = [{"x": drawn(n, 8, seed=n), "picks": np.arange(n - 1)} for n in (3, 5, 3)]
    outputs, live = walked(model, batches, memory_bytes)
    for feeds, found in zip(batches, outputs, strict=True):
        for one, wanted in zip(found, outputs_of(model, feeds), strict=True):
            assert np.allclose(one, wanted, rtol=1e-5, atol=1e-5)
    assert (live.spilled_bytes > 0) == (memory_bytes < 1 << 30)
    assert live.most_bytes <= memory_bytes


def test_what_is_stored_is_read_when_a_segment_is_run() -> None:
    model = branched()
    wiring = wiring_of(model)
    segments = plan_segments(wiring, [Stop(nodes=frozenset([1]), values=("a",))], to_outputs=True)
    seen: list[Array] = []

    def see(_batch: int, values: Values) -> None:
        assert not isinstance(values["y"], list)
        seen.append(values["y"])

    feeds = {"x": drawn(3, 8), "picks": np.arange(2)}
    with Walk(model, wiring, segments, [feeds], memory_bytes=1 << 20) as walk:
        walk.run(None)
        model.graph.initializer[0].raw_data = bytes(4 * 64)
        walk.run(see, ["y"])
    assert np.allclose(seen[0], outputs_of(model, feeds)[0], atol=1e-6)


def test_sequences_and_texts_cross_from_one_segment_to_the_next() -> None:
    model = model_from(
        """(float[N,8] x, string[N] s) => (float[N,8] y, string[N] t) {
            parts = SplitToSequence <axis=1> (x, four)
            first = SequenceAt(parts, zero)
            a = MatMul(first, w0)
            b = ConcatFromSequence <axis=1> (parts)
            y = Add(a, b)
            t = Identity(s)
        }""",
        w0=drawn(4, 8),
        four=np.array(4),
        zero=np.array(0),
    )
    feeds = {"x": drawn(3, 8), "s": np.array(["a", "b", "c"], dtype=object)}
    (found,), live = walked(model, [feeds], 0)
    wanted = outputs_of(model, feeds)
    assert np.allclose(found[0], wanted[0], rtol=1e-5)
    assert list(found[1]) == list(wanted[1])
    assert live.most_bytes == feeds["x"].nbytes  # a sequence does not go to disk


def test_bytes_of_any_type_come_back_from_the_disk(tmp_path: Path) -> None:
    import ml_dtypes

    arrays = [
        np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3),
        np.array([[True, False]]),
        np.array(3.0),
        np.zeros((0, 4), np.int64),
        drawn(4, 6).T,
    ]
    live = LiveValues(-1, tmp_path, lambda _name: 0)
    for batch, array in enumerate(arrays):
        live.put("v", batch, array)
    for batch, array in enumerate(arrays):
        back = live.get("v", batch)
        assert not isinstance(back, list)
        assert (back.dtype, back.shape) == (array.dtype, array.shape) == (array.dtype, live.shape("v", batch))
        assert np.array_equal(back, array)
        live.drop("v", batch)
    assert not list(tmp_path.iterdir())


def test_what_is_read_last_goes_to_disk_first(tmp_path: Path) -> None:
    live = LiveValues(100, tmp_path, {"soon": 1, "late": 9}.__getitem__)
    live.put("late", 0, np.zeros(10, np.float32))
    live.put("soon", 0, np.zeros(10, np.float32))
    assert live.spilled_bytes == 0
    live.put("soon", 1, np.zeros(10, np.float32))
    assert (live.spilled_bytes, live.most_bytes) == (40, 80)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_graph_that_cannot_be_run_is_told_with_the_part_and_the_reason() -> None:
    model = model_from("(float[N,8] x) => (float[N,8] y) { a = Relu(x) y = Unheard(a) }")
    with pytest.raises(ArtefactError, match=r"cannot run the graph from a to y .*Unheard"):
        walked(model, [{"x": drawn(2, 8)}], 0)
    model = branched()
    with pytest.raises(ArtefactError, match=r"cannot run the graph from .*indices element out of"):
        walked(model, [{"x": drawn(2, 8), "picks": np.array([99])}], 0)
