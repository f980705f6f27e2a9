"""The order of a walk: nothing is run twice, nothing is read before it is made or after it is dropped."""

from __future__ import annotations

import random

import onnx
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from sparse_export.oneshot.segments import Segment, Stop, plan_segments, segment_for
from sparse_export.oneshot.wiring import Wiring, wiring_of
from tests.many import many


def wired(nodes: list[tuple[str, list[str], list[str]]], outputs: list[str]) -> Wiring:
    """A graph with the input x, and stored tensors w0, w1, …"""
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
    graph = helper.make_graph(
        [helper.make_node(kind, reads, makes, name=makes[0]) for kind, reads, makes in nodes],
        "network",
        values,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [helper.make_tensor(f"w{i}", TensorProto.FLOAT, [1], [1.0]) for i in range(20)],
    )
    return wiring_of(onnx.ModelProto(ir_version=8, graph=graph))


def stop(wiring: Wiring, weight: str, size: int = 0) -> Stop:
    nodes = [i for i, reads in enumerate(wiring.reads) if weight in reads]
    return Stop(nodes=frozenset(nodes), values=tuple(wiring.reads[i][0] for i in nodes), size=size)


def made_by(wiring: Wiring, segment: Segment) -> list[list[str]]:
    return [list(wiring.makes[node]) for node in segment.nodes]


def check(wiring: Wiring, stops: list[Stop], segments: tuple[Segment, ...], *, to_outputs: bool) -> None:
    """Walk with sets of names in place of arrays."""
    live: set[str] = set()
    run: set[int] = set()
    pruned: set[int] = set()
    constant = wiring.constant_beside(node for one in stops for node in one.nodes)
    for number, segment in enumerate(segments):
        assert set(segment.reads) <= live | wiring.inputs
        known = live | wiring.inputs | wiring.stored
        for node in segment.nodes:
            assert set(wiring.reads[node]) <= known
            known |= set(wiring.makes[node])
            if not segment.preview and node not in constant:
                assert node not in run
                run.add(node)
                assert all(index in pruned for index, one in enumerate(stops) if node in one.nodes)
        assert set(segment.fetches) <= known
        reached = set(segment.fetches) | live | wiring.inputs | wiring.stored
        for index in segment.stops:
            assert set(stops[index].values) <= reached
            pruned.add(index)
        if to_outputs and number == len(segments) - 1:
            assert set(wiring.outputs) <= reached
        assert set(segment.drops) <= live
        live = (live - set(segment.drops)) | set(segment.keeps)
    assert pruned == set(range(len(stops)))
    assert not live


def test_weights_of_one_value_share_a_segment_and_the_next_waits_for_them() -> None:
    wiring = wired(
        [
            ("Relu", ["x"], ["a"]),
            ("MatMul", ["a", "w0"], ["q"]),
            ("MatMul", ["a", "w1"], ["k"]),
            ("Add", ["q", "k"], ["s"]),
            ("MatMul", ["s", "w2"], ["y"]),
        ],
        ["y"],
    )
    stops = [stop(wiring, f"w{i}") for i in range(3)]
    segments = plan_segments(wiring, stops)
    assert [segment.stops for segment in segments] == [(0, 1), (2,)]
    assert [made_by(wiring, segment) for segment in segments] == [[["a"]], [["q"], ["k"], ["s"]]]
    assert (segments[0].keeps, segments[1].drops) == (("a",), ("a",))
    check(wiring, stops, segments, to_outputs=False)


def test_statistics_that_are_large_together_come_one_after_the_other() -> None:
    wiring = wired(
        [("MatMul", ["x", f"w{i}"], [f"y{i}"]) for i in range(3)] + [("Sum", ["y0", "y1", "y2"], ["y"])],
        ["y"],
    )
    stops = [stop(wiring, f"w{i}", size=4) for i in range(3)]
    found = [segment.stops for segment in plan_segments(wiring, stops, most=8)]
    assert found == [(0, 1), (2,)]
    assert [segment.stops for segment in plan_segments(wiring, stops, most=1)] == [(0,), (1,), (2,)]


def test_a_weight_that_is_used_twice_in_a_row_is_seen_in_a_preview() -> None:
    wiring = wired(
        [
            ("MatMul", ["x", "w0"], ["a"]),
            ("MatMul", ["a", "w1"], ["b"]),
            ("MatMul", ["b", "w0"], ["c"]),
            ("MatMul", ["c", "w1"], ["d"]),
            ("MatMul", ["d", "w2"], ["y"]),
        ],
        ["y"],
    )
    stops = [stop(wiring, f"w{i}") for i in range(3)]
    segments = plan_segments(wiring, stops, to_outputs=True)
    assert [(segment.stops, segment.preview) for segment in segments] == [
        ((0,), True),
        ((1,), True),
        ((2,), False),
        ((), False),
    ]
    assert made_by(wiring, segments[1]) == [["a"], ["b"], ["c"]]
    check(wiring, stops, segments, to_outputs=True)


def test_sizes_are_read_early_so_that_the_value_need_not_live() -> None:
    wiring = wired(
        [
            ("Relu", ["x"], ["a"]),
            ("MatMul", ["a", "w0"], ["b"]),
            ("Shape", ["a"], ["size"]),
            ("MatMul", ["b", "w1"], ["c"]),
            ("Reshape", ["c", "size"], ["d"]),
            ("MatMul", ["d", "w2"], ["y"]),
        ],
        ["y"],
    )
    stops = [stop(wiring, f"w{i}") for i in range(3)]
    segments = plan_segments(wiring, stops)
    assert ["size"] in made_by(wiring, segments[0])
    assert "a" in segments[1].drops
    check(wiring, stops, segments, to_outputs=False)


def test_what_only_stored_tensors_need_is_in_every_segment_that_needs_it() -> None:
    wiring = wired(
        [
            ("Neg", ["w9"], ["n"]),
            ("Add", ["x", "n"], ["a"]),
            ("MatMul", ["a", "w0"], ["b"]),
            ("Add", ["b", "n"], ["c"]),
            ("MatMul", ["c", "w1"], ["y"]),
        ],
        ["y"],
    )
    segments = plan_segments(wiring, [stop(wiring, "w0"), stop(wiring, "w1")])
    assert all(["n"] in made_by(wiring, segment) for segment in segments)
    assert all("n" not in (*segment.reads, *segment.fetches) for segment in segments)


def test_a_weight_that_multiplies_what_is_stored_is_calibrated_on_that() -> None:
    wiring = wired(
        [
            ("Neg", ["w9"], ["n"]),
            ("MatMul", ["n", "w0"], ["p"]),
            ("MatMul", ["x", "w0"], ["q"]),
            ("Add", ["p", "q"], ["y"]),
            ("MatMul", ["y", "w1"], ["z"]),
        ],
        ["z"],
    )
    stops = [stop(wiring, "w0"), stop(wiring, "w1")]
    segments = plan_segments(wiring, stops, to_outputs=True)
    assert segments[0].fetches == ("n",)
    check(wiring, stops, segments, to_outputs=True)


def test_the_segment_of_one_value_is_all_that_it_needs() -> None:
    wiring = wired(
        [("Neg", ["x"], ["a"]), ("Neg", ["x"], ["b"]), ("Abs", ["b"], ["c"]), ("Add", ["a", "c"], ["y"])],
        ["y"],
    )
    segment = segment_for(wiring, "c")
    assert made_by(wiring, segment) == [["b"], ["c"]]
    assert (segment.reads, segment.fetches) == (("x",), ("c",))


@many(300, every_day=60, deadline=None)
@given(seed=st.integers(0, 2**32), n_nodes=st.integers(1, 30), to_outputs=st.booleans())
def test_any_graph_is_walked_in_order_and_once(seed: int, n_nodes: int, to_outputs: bool) -> None:
    """Weights may be used several times, in a row or side by side."""
    draw = random.Random(seed)
    values, nodes, used = ["x", "w19"], [], set()
    for index in range(n_nodes):
        source, weight = draw.choice(values), draw.randrange(6)
        kind = draw.choice(["MatMul", "Add", "Relu", "Shape"])
        reads = {"MatMul": [source, f"w{weight}"], "Add": [source, draw.choice(values)]}.get(kind, [source])
        if kind == "MatMul":
            used.add(weight)
        nodes.append((kind, reads, [f"v{index}"]))
        values.append(f"v{index}")
    wiring = wired(nodes, [f"v{n_nodes - 1}"])
    stops = [stop(wiring, f"w{weight}", size=draw.randrange(3)) for weight in sorted(used)]
    segments = plan_segments(wiring, stops, to_outputs=to_outputs, most=3)
    check(wiring, stops, segments, to_outputs=to_outputs)
