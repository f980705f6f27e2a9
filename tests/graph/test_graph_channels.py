"""Which channels of an ONNX graph may change places, and that any permutation of those keeps what it computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from sparse_export.errors import GateFailed, UnknownNameError, UsageError
from sparse_export.graph.channels.graph_groups import find_graph_channels
from sparse_export.graph.channels.graph_proof import difference_by_orders, reordered_graph
from sparse_export.graph.channels.groups import find_channels
from sparse_export.graph.channels.orders import orders_of
from sparse_export.graph.channels.spaces import Channels, Member, Space
from sparse_export.graph.example import example_of_shape
from sparse_export.graph.export import onnx_from_module
from sparse_export.graph.model import prepared
from sparse_export.graph.passes.compact import compact
from sparse_export.graph.passes.permute import movable_weights
from sparse_export.graph.passes.permute_graph import permute_graph, reduction_axes, stored_weights
from sparse_export.sparsity.pattern import NMPattern
from sparse_export.sparsity.permute import find_permutation
from tests.graph import networks as nets
from tests.graph.random_graphs import random_feeds, random_graph
from tests.graph.test_compact import graph, node, normal, run
from tests.making_runs import stir_batch_norm
from tests.many import many

Array = np.ndarray[Any, Any]
TWO_FOUR = NMPattern(n=2, m=4)


def random_orders(model: onnx.ModelProto, channels: Channels, seed: int = 0) -> dict[str, Tensor]:
    """A random permutation of every free space."""
    generator = torch.Generator().manual_seed(seed)
    return orders_of(
        stored_weights(model),
        [(space, torch.randperm(space.width, generator=generator)) for space in channels.free],
    )


def pictures(*shape: int) -> list[dict[str, Array]]:
    return [
        {"x": np.random.default_rng(seed).standard_normal((n, *shape)).astype(np.float32)}
        for seed, n in enumerate((1, 4))
    ]


def same_function(model: onnx.ModelProto, feeds: list[dict[str, Array]]) -> Channels:
    """Permute every free space at random, and prove it."""
    channels = find_graph_channels(model)
    found = difference_by_orders(model, random_orders(model, channels), feeds)
    assert found.ok, found
    return channels


def reason_of(channels: Channels, name: str, axis: int) -> str:
    return next(
        space.reason for space in channels.spaces for m in space.members if (m.name, m.axis) == (name, axis)
    )


def free_members(channels: Channels) -> list[set[str]]:
    return [{f"{m.name}[{m.axis}]" for m in space.members} for space in channels.free]


@pytest.mark.timeout(3600)  # about two minutes of CPU time
@many(1200, every_day=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_orders_and_compaction_leave_the_outputs_of_random_graphs_equal(seed: int) -> None:
    model = prepared(random_graph(seed))
    feeds = [random_feeds(model, n, n) for n in (1, 3)]
    ordered = reordered_graph(model, random_orders(model, find_graph_channels(model), seed))
    for one in feeds:
        wanted = outputs(model, one)
        for other in (ordered, compact(model).model, compact(ordered).model):
            for a, b in zip(wanted, outputs(other, one), strict=True):
                np.testing.assert_allclose(b, a, rtol=0, atol=1e-4 * max(1e-3, float(np.abs(a).max())))


def outputs(model: onnx.ModelProto, feeds: dict[str, Array]) -> list[Array]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: list[Array] = session.run(None, feeds)
    return found


def test_random_graphs_have_all_that_is_asked_of_them() -> None:
    """Several inputs and outputs, dead channels that compaction finds, and channels that may move."""
    models = [prepared(random_graph(seed)) for seed in range(40)]
    assert {len(model.graph.input) for model in models} == {1, 2}
    assert {len(model.graph.output) for model in models} == {1, 2, 3}
    assert sum(compact(model).n_removed > 0 for model in models) > 10
    assert sum(bool(find_graph_channels(model).free) for model in models) > 30


# -- the proof


def two_layers(w1: Array, w2: Array) -> onnx.ModelProto:
    nodes = [
        node("Gemm", "x w1 b1", "h", transB=1),
        node("Relu", "h", "a"),
        node("Gemm", "a w2", "y", transB=1),
    ]
    return graph(nodes, {"w1": w1, "b1": normal(len(w1), seed=3), "w2": w2}, ("n", w1.shape[1]))


def test_two_channels_swapped_in_one_member_alone_fail_the_proof() -> None:
    model = two_layers(normal(8, 4), normal(3, 8))
    (space,) = find_graph_channels(model).free
    assert {m.name for m in space.members} == {"w1", "b1", "w2"}
    swap = torch.tensor([1, 0, *range(2, 8)])
    tensors = stored_weights(model)
    assert difference_by_orders(model, orders_of(tensors, [(space, swap)]), pictures(4)).ok
    for member in space.members:
        alone = Space(name="one", width=8, members=(member,), free=True, reason="")
        found = difference_by_orders(model, orders_of(tensors, [(alone, swap)]), pictures(4))
        assert not found.ok and found.largest > 100 * found.allowed, member


def test_channels_that_are_alike_do_not_hide_a_wrong_order() -> None:
    """With own weights the outputs are the same in any order; with redrawn ones they are not."""
    model = two_layers(np.ones((8, 4)), np.zeros((3, 8)))
    alone = Space(
        name="one",
        width=8,
        members=(Member(name="w2", axis=1, groups=1, slots=torch.arange(8)[:, None], reads=True),),
        free=True,
        reason="",
    )
    orders = orders_of(stored_weights(model), [(alone, torch.arange(8).flip(0))])
    assert not difference_by_orders(model, orders, pictures(4)).ok


def test_a_wrong_group_is_refused_and_named() -> None:
    model = two_layers(normal(8, 4), normal(3, 8))
    (space,) = find_graph_channels(model).free
    wrong = Space(
        name=space.name,
        width=8,
        members=tuple(m for m in space.members if m.name != "b1"),
        free=True,
        reason="",
    )
    before = model.SerializeToString(deterministic=True)
    with pytest.raises(GateFailed, match=r"outputs differ by .* of the largest"):
        permute_graph(
            model, pictures(4), {"w2": TWO_FOUR}, find_permutation, channels=Channels(spaces=(wrong,))
        )
    assert model.SerializeToString(deterministic=True) == before


def test_a_graph_that_onnxruntime_does_not_run_cannot_be_proven() -> None:
    model = two_layers(normal(8, 4), normal(3, 8))
    with pytest.raises(GateFailed, match="cannot be checked: onnxruntime ends with"):
        permute_graph(model, [{"x": np.zeros((1, 5), np.float32)}], {"w2": TWO_FOUR}, find_permutation)


def test_outputs_that_are_not_finite_cannot_be_proven() -> None:
    model = two_layers(normal(8, 4), normal(3, 8))
    feeds = [{"x": np.full((1, 4), np.inf, np.float32)}]
    with pytest.raises(GateFailed, match="its output y is not finite"):
        permute_graph(model, feeds, {"w2": TWO_FOUR}, find_permutation)


def test_a_better_order_is_found_and_applied() -> None:
    w2 = np.tile([5.0, 5, 5, 5, 0.1, 0.1, 0.1, 0.1], (3, 1)) * np.sign(normal(3, 8))
    model = two_layers(normal(8, 4), w2)
    done = permute_graph(model, pictures(4), {"w2": TWO_FOUR}, find_permutation)
    (layer,) = done.report.layers
    assert layer.kept_before is not None and layer.kept_after is not None
    assert layer.kept_before == pytest.approx(0.5) and layer.kept_after == pytest.approx(5 / 5.1)
    for feeds in pictures(4):
        for a, b in zip(run(model, feeds["x"]), run(done.model, feeds["x"]), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)
    moved = {t.name: numpy_helper.to_array(t) for t in done.model.graph.initializer}
    assert sorted(map(tuple, moved["w1"])) == sorted(map(tuple, normal(8, 4).astype(np.float32)))


def test_names_and_inputs_are_checked() -> None:
    model = two_layers(normal(8, 4), normal(3, 8))
    with pytest.raises(UnknownNameError, match="w3"):
        permute_graph(model, pictures(4), {"w3": TWO_FOUR}, find_permutation)
    with pytest.raises(UsageError, match="no inputs"):
        permute_graph(model, [], {"w2": TWO_FOUR}, find_permutation)
    bad = two_layers(normal(8, 4), np.full((3, 8), np.nan))
    with pytest.raises(GateFailed, match="w2 holds NaN"):
        permute_graph(bad, pictures(4), {"w2": TWO_FOUR}, find_permutation)


# -- what moves


def test_a_norm_that_is_written_out_moves_with_its_layers() -> None:
    """The scale meets the deviation first, which has no channels."""
    nodes = [
        node("MatMul", "x w1", "h"),
        node("ReduceMean", "h last", "mean"),
        node("Sub", "h mean", "c"),
        node("Mul", "c c", "cc"),
        node("ReduceMean", "cc last", "var"),
        node("Sqrt", "var", "std"),
        node("Reciprocal", "std", "inv"),
        node("Mul", "inv scale", "factor"),
        node("Mul", "c factor", "n"),
        node("MatMul", "n w2", "y"),
    ]
    arrays = {"w1": normal(4, 8), "w2": normal(8, 3), "scale": normal(8), "last": np.array([-1])}
    model = graph(nodes, arrays, ("n", 4))
    assert free_members(same_function(model, pictures(4))) == [{"w1[1]", "scale[0]", "w2[0]"}]


def test_a_map_that_is_joined_twice_moves_in_both_places() -> None:
    nodes = [
        node("Conv", "x w1", "h"),
        node("Concat", "h h", "c", axis=1),
        node("Conv", "c w2", "y"),
    ]
    model = graph(nodes, {"w1": normal(8, 3, 1, 1), "w2": normal(4, 16, 1, 1)}, ("n", 3, 5, 5))
    channels = same_function(model, pictures(3, 5, 5))
    weight = stored_weights(model)["w2"]
    assert movable_weights(channels, "w2", weight, 1, TWO_FOUR) == weight.numel()
    done = permute_graph(model, pictures(3, 5, 5), {"w2": TWO_FOUR}, find_permutation)
    (layer,) = done.report.layers
    assert layer.kept_after is not None and layer.kept_before is not None
    assert layer.kept_after > layer.kept_before


def test_flattened_maps_move_in_blocks_only() -> None:
    nodes = [node("Conv", "x w1", "h"), node("Flatten", "h", "f"), node("Gemm", "f w2", "y", transB=1)]
    model = graph(nodes, {"w1": normal(8, 3, 1, 1), "w2": normal(4, 32)}, ("n", 3, 2, 2))
    channels = same_function(model, pictures(3, 2, 2))
    assert len(channels.free) == 1
    assert movable_weights(channels, "w2", stored_weights(model)["w2"], 1, TWO_FOUR) == 0


def test_padding_beside_channels_pins_none_of_them() -> None:
    """Zeros are zeros in any order, as the tokens are that fill up a window."""
    nodes = [
        node("MatMul", "x w1", "h"),
        node("Pad", "h pads", "p"),
        node("MatMul", "p w2", "y"),
    ]
    arrays = {"w1": normal(4, 8), "w2": normal(8, 3), "pads": np.array([0, 0, 0, 0, 2, 0])}
    channels = same_function(graph(nodes, arrays, ("n", 5, 4)), pictures(5, 4))
    assert free_members(channels) == [{"w1[1]", "w2[0]"}]


def test_a_tied_table_moves_as_one() -> None:
    nodes = [
        node("Gather", "table ids", "h"),
        node("MatMul", "h w", "m"),
        node("Add", "h m", "r"),
        node("Transpose", "table", "t", perm=[1, 0]),
        node("MatMul", "r t", "y"),
    ]
    made = helper.make_graph(
        nodes,
        "tied",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "tokens"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(a.astype(np.float32), k)
            for k, a in {"table": normal(11, 8), "w": normal(8, 8)}.items()
        ],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert free_members(same_function(model, [{"ids": np.array([[1, 2, 3], [4, 5, 10]])}])) == [
        {"table[1]", "w[0]", "w[1]"}
    ]


def test_units_of_a_recurrent_layer_move_with_all_their_gates() -> None:
    nodes = [
        node("LSTM", "x w r b", "h4", hidden_size=8),
        node("Squeeze", "h4 one", "h"),
        node("MatMul", "h w2", "y"),
    ]
    arrays = {
        "w": normal(1, 32, 4),
        "r": normal(1, 32, 8),
        "b": normal(1, 64),
        "w2": normal(8, 3),
        "one": np.array([1]),
    }
    model = graph(nodes, arrays, (5, "n", 4))
    feeds = [{"x": np.random.default_rng(0).standard_normal((5, 3, 4)).astype(np.float32)}]
    channels = same_function(model, feeds)
    assert free_members(channels) == [{"w[1]", "r[1]", "r[2]", "b[1]", "w2[0]"}]
    assert movable_weights(channels, "w2", stored_weights(model)["w2"], 0, TWO_FOUR) == 24


def test_what_is_not_known_pins_what_it_reads_by_its_name() -> None:
    nodes = [node("Conv", "x w1", "h"), node("LRN", "h", "l", size=3), node("Conv", "l w2", "y")]
    model = graph(nodes, {"w1": normal(8, 3, 1, 1), "w2": normal(4, 8, 1, 1)}, ("n", 3, 5, 5))
    channels = find_graph_channels(model)
    assert not channels.free
    assert reason_of(channels, "w1", 0) == "LRN LRN_l is not a known operation"


def test_control_flow_pins_what_it_reads() -> None:
    name = "h"
    branch = helper.make_graph(
        [helper.make_node("Identity", [name], ["b"])],
        "branch",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)],
    )
    nodes = [
        node("Conv", "x w1", "h"),
        helper.make_node("If", ["yes"], ["i"], name="choice", then_branch=branch, else_branch=branch),
        node("Conv", "i w2", "y"),
    ]
    arrays = {"w1": normal(8, 3, 1, 1), "w2": normal(4, 8, 1, 1), "yes": np.array(True)}
    channels = find_graph_channels(graph(nodes, arrays, ("n", 3, 5, 5)))
    assert not channels.free
    assert "If choice" in reason_of(channels, "w1", 0)


def test_large_maps_are_followed_without_their_pixels() -> None:
    nodes = [node("Conv", "x w1", "h"), node("Conv", "h w2", "y")]
    model = graph(nodes, {"w1": normal(8, 3, 1, 1), "w2": normal(4, 8, 1, 1)}, (1, 3, 1 << 14, 1 << 14))
    assert free_members(find_graph_channels(model)) == [{"w1[0]", "w2[1]"}]


def test_more_values_that_differ_than_can_be_followed_stay() -> None:
    """Flattened, each pixel of each map is a channel of its own."""
    nodes = [
        node("Conv", "x w1", "h"),
        node("Conv", "h w2", "g"),
        node("Reshape", "g flat", "f"),
        node("CumSum", "f axis", "y"),
    ]
    arrays = {
        "w1": normal(8, 3, 1, 1),
        "w2": normal(4, 8, 1, 1),
        "flat": np.array([1, -1]),
        "axis": np.array(1),
    }
    channels = find_graph_channels(graph(nodes, arrays, (1, 3, 4096, 4096)))
    assert free_members(channels) == [{"w1[0]", "w2[1]"}]
    assert "67,108,864 values that differ" in reason_of(channels, "w2", 0)


def test_outputs_and_inputs_stay() -> None:
    nodes = [node("Conv", "x w1", "h"), node("Conv", "h w2", "y")]
    model = graph(nodes, {"w1": normal(8, 3, 1, 1), "w2": normal(4, 8, 1, 1)}, ("n", 3, 5, 5), ("y", "h"))
    channels = find_graph_channels(model)
    assert not channels.free
    assert reason_of(channels, "w2", 1) == "an output of the network"


def test_a_number_that_holds_at_one_size_only_ties_nothing_wrongly() -> None:
    """At 8 places the free axis looks like the channels; at another size it does not."""
    nodes = [
        node("MatMul", "x w1", "h"),
        node("Transpose", "h", "t", perm=[0, 2, 1]),
        node("MatMul", "h t", "s"),
        node("Softmax", "s", "p", axis=-1),
        node("MatMul", "p h", "o"),
        node("MatMul", "o w2", "y"),
    ]
    model = graph(nodes, {"w1": normal(4, 8), "w2": normal(8, 3)}, ("n", "places", 4))
    for places in (8, 5):
        channels = find_graph_channels(model, {"places": places})
        assert free_members(channels) == [{"w1[1]", "w2[0]"}]
    assert same_function(model, pictures(8, 4)).free


@pytest.mark.parametrize("older", [7, 12])
def test_graphs_of_older_opsets(older: int) -> None:
    nodes = [
        node("Conv", "x w1", "h"),
        node("ReduceMean", "h", "m", axes=[2, 3], keepdims=0),
        node("Softmax", "m", "s"),
        node("Gemm", "s w2 b", "y", transB=1),
    ]
    model = graph(nodes, {"w1": normal(8, 3, 1, 1), "w2": normal(4, 8), "b": normal(4)}, ("n", 3, 5, 5))
    model.opset_import[0].version = older
    assert free_members(same_function(model, pictures(3, 5, 5))) == [{"w1[0]", "w2[1]"}]


# -- beside the same networks in torch

_NETWORKS: list[type[nn.Module]] = [
    value
    for value in vars(nets).values()
    if isinstance(value, type) and issubclass(value, nets.Framed) and value is not nets.Framed
]


@pytest.mark.parametrize("make", _NETWORKS, ids=lambda make: make.__name__)
def test_no_weight_that_moves_in_torch_stays_in_the_graph(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network = make().eval()
    stir_batch_norm(network)
    found = find_channels(network, torch.randn(2, 3, 6, 6))
    if found.untraced:
        pytest.skip(found.untraced)
    try:
        model = prepared(onnx_from_module(network, example_of_shape((3, 6, 6)), masks={}, fold=False))
    except UsageError as cause:
        pytest.skip(str(cause))
    feeds = [{model.graph.input[0].name: one["x"]} for one in pictures(3, 6, 6)]
    channels = same_function(model, feeds)
    stored = stored_weights(model)
    axes = reduction_axes(model, stored)
    for name, axis in axes.items():
        if axis is None or name not in dict(network.named_parameters()):
            continue
        wanted = movable_weights(found, name, stored[name], axis, TWO_FOUR)
        assert movable_weights(channels, name, stored[name], axis, TWO_FOUR) >= wanted, name
