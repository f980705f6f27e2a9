"""Weights of a graph pruned in one shot: as the torch network would be, whoever made the graph, to the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from sparse_export.errors import ArtefactError, UsageError
from sparse_export.graph.example import example_of_shape
from sparse_export.graph.export import onnx_from_module
from sparse_export.graph.model import open_model, signature_of
from sparse_export.graph.passes.float16 import in_half
from sparse_export.graph.promises import broken_patterns
from sparse_export.graph.stored_tensors import array_of
from sparse_export.oneshot import calibrating, graph_pruning, graph_statistics, unfolding
from sparse_export.oneshot.costs import LayerDone
from sparse_export.oneshot.graph_pruning import PrunedGraph, sparsify_graph
from sparse_export.oneshot.graph_state import bits_of
from sparse_export.oneshot.layers import Method, prune_weight
from sparse_export.oneshot.report import SparsifiedLayer
from sparse_export.signature import Array, Feeds, class_signature
from sparse_export.sparsity.caps import Cap
from sparse_export.sparsity.pattern import NMPattern
from tests.oneshot.graphs import drawn, model_from, outputs_of
from tests.oneshot.hooked import input_statistics

TWO_FOUR = NMPattern(n=2, m=4)
METHODS: tuple[Method, ...] = ("magnitude", "activation", "reconstruction")


def pruned(
    model: onnx.ModelProto, batches: Sequence[Feeds] | None, method: Method = "reconstruction", **more: Any
) -> PrunedGraph:
    more.setdefault("planned_dense", {})
    more.setdefault("signature", signature_of(model))
    return sparsify_graph(model, batches=batches, pattern=TWO_FOUR, method=method, **more)


def weight(model: onnx.ModelProto, name: str) -> Array:
    return np.asarray(next(array_of(one) for one in model.graph.initializer if one.name == name))


def layer(done: PrunedGraph, name: str) -> SparsifiedLayer:
    return next(one for one in done.layers if one.name == name)


def check(done: PrunedGraph, before: onnx.ModelProto) -> None:
    """The layers are those of the graph, and keep what the report says."""
    sparse = [one for one in done.layers if one.pattern]
    assert sparse
    assert broken_patterns(done.model, {one.name: TWO_FOUR for one in sparse}) == ()
    for one in sparse:
        values = weight(done.model, one.name)
        assert values.dtype == weight(before, one.name).dtype
        assert np.count_nonzero(values) <= one.n_active == one.n_weights // 2
    changed = {one.name for one in sparse}
    for old, new in zip(before.graph.initializer, done.model.graph.initializer, strict=True):
        assert (old.name, old.data_type, old.dims) == (new.name, new.data_type, new.dims)
        assert (array_of(old).tobytes() == array_of(new).tobytes()) == (old.name not in changed)
    assert list(done.model.graph.node) == list(before.graph.node)


class Network(nn.Module):
    """Convolutions of several kinds, a branch, a layer that is used twice in a row, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.left = nn.Conv2d(16, 16, 1)
        self.right = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=2)
        self.first = nn.Linear(16, 24)
        self.again = nn.Linear(24, 24)
        self.last = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.down(torch.relu(self.stem(x)))).relu()
        x = torch.relu(self.left(x) + self.right(x)).mean((2, 3))
        x = self.again(torch.relu(self.first(x)))
        answer: Tensor = self.last(torch.relu(self.again(torch.relu(x))))
        return answer


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    network = Network().eval()
    with torch.no_grad():
        network.norm.weight.copy_(torch.linspace(0.5, 2, 16))
    return network


@pytest.fixture(scope="module")
def exported(network: Network) -> onnx.ModelProto:
    return onnx_from_module(network, example_of_shape((3, 12, 12)), masks={}, fold=False)


NAMES = ("down.weight", "left.weight", "right.weight", "first.weight", "again.weight")


@pytest.mark.parametrize("method", METHODS)
def test_a_graph_is_pruned_as_the_network_is_that_it_was_exported_from(
    method: Method, network: Network, exported: onnx.ModelProto
) -> None:
    """Layer after layer, each calibrated on one whole pass of the network pruned so far."""
    batches = [torch.from_numpy(drawn(n, 3, 12, 12, seed=n)) for n in (9, 7)]
    copy = Network().eval()
    copy.load_state_dict(network.state_dict())
    wanted = {}
    with torch.no_grad():
        for name in NAMES:
            parameter = copy.get_parameter(name)
            statistics = input_statistics(copy, batches, [name], gram=True)[name]
            wanted[name] = prune_weight(parameter.detach(), Cap(pattern=TWO_FOUR, axis=1), method, statistics)
            parameter.copy_(wanted[name].weight)
    done = pruned(
        exported,
        [{"input": batch.numpy()} for batch in batches],
        method,
        signature=class_signature((3, 12, 12), 8),
        errors=True,
    )
    check(done, exported)
    assert {one.name for one in done.layers if one.pattern} == set(NAMES)
    assert layer(done, "stem.weight").reason.startswith("it sums over 3 channels")
    assert layer(done, "last.weight").reason == "it gives the outputs"
    assert done.n_calibration == 16
    for name, other in wanted.items():
        found = weight(done.model, name)
        mine = found if found.shape == tuple(other.weight.shape) else found.T  # a Gemm may store it turned
        assert np.array_equal(mine != 0, (other.weight != 0).numpy())
        assert np.allclose(mine, other.weight.numpy(), rtol=1e-4, atol=1e-5)
        assert layer(done, name).error == pytest.approx(other.error, rel=1e-3, abs=1e-6)


def test_without_inputs_magnitude_prunes_and_the_others_refuse(exported: onnx.ModelProto) -> None:
    signature = class_signature((3, 12, 12), 8)
    done = pruned(exported, None, "magnitude", signature=signature)
    check(done, exported)
    assert {one.error for one in done.layers} == {None}
    with pytest.raises(UsageError, match="activation looks at what each layer meets"):
        pruned(exported, None, "activation", signature=signature)
    with pytest.raises(UsageError, match="no inputs to measure errors on"):
        pruned(exported, None, "magnitude", signature=signature, errors=True)


def test_magnitude_walks_for_errors_alone_and_keeps_the_same_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batches = chain(), [{"x": drawn(9, 16)}]
    walked = pruned(model, batches, "magnitude", errors=True)
    monkeypatch.setattr(graph_pruning, "Walk", None)
    plain = pruned(model, batches, "magnitude")
    assert plain.model == walked.model
    assert (walked.n_calibration, plain.n_calibration) == (9, 0)
    assert all(one.error for one in walked.layers if one.pattern)
    why = "error not measured: --errors was not given"
    assert {(one.error, one.reason) for one in plain.layers if one.pattern} == {(None, why)}


CHAIN = """(float[N,16] x) => (float[N,16] y) {
    a = MatMul(x, w0) a2 = Relu(a)
    b = MatMul(a2, w1) b2 = Relu(b)
    c = MatMul(b2, w2) c2 = Relu(c)
    d = MatMul(c2, w3) d2 = Relu(d)
    y = MatMul(d2, w4)
}"""


def chain(dtype: Any = np.float32) -> onnx.ModelProto:
    return model_from(CHAIN, **{f"w{i}": drawn(16, 16, seed=i).astype(dtype) for i in range(5)})


class KilledError(Exception):
    pass


@pytest.mark.parametrize("n_before", [1, 3, 4])
def test_what_a_killed_process_finished_is_gone_on_from_to_the_same_bits(
    n_before: int, tmp_path: Path
) -> None:
    model, batches = chain(), [{"x": drawn(n, 16, seed=n)} for n in (20, 30)]
    whole = pruned(model, batches)

    def kill(done: LayerDone) -> None:
        assert done.n_layers == 4
        if done.number == n_before:
            raise KilledError

    with pytest.raises(KilledError):
        pruned(model, batches, state=tmp_path, observer=kill)
    seen: list[str] = []
    again = pruned(model, batches, state=tmp_path, observer=lambda one: seen.append(one.layer.name))
    assert again.n_resumed == n_before
    assert seen == ["w0", "w1", "w2", "w3"]
    assert again.model == whole.model
    assert again.layers == whole.layers
    assert all(torch.equal(again.masks[name], whole.masks[name]) for name in seen)


def test_a_finished_layer_whose_values_were_changed_is_made_again(tmp_path: Path) -> None:
    model, batches = chain(), [{"x": drawn(20, 16)}]
    whole = pruned(model, batches, state=tmp_path)
    changed = max(tmp_path.iterdir())
    content = bytearray(changed.read_bytes())
    content[-40] ^= 1  # among the values
    changed.write_bytes(content)
    again = pruned(model, batches, state=tmp_path)
    assert again.model == whole.model
    assert again.n_resumed == len(list(tmp_path.iterdir())) - 1


def test_a_finished_layer_costs_no_statistics_and_a_finished_graph_no_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = chain(), [{"x": drawn(20, 16)}]
    whole = pruned(model, batches, state=tmp_path)
    max(tmp_path.iterdir()).unlink()
    asked: list[str] = []
    genuine = graph_statistics.inputs_of

    def noted(factor: Any, value: Array) -> Any:
        asked.append(factor.value)
        return genuine(factor, value)

    monkeypatch.setattr(calibrating, "inputs_of", noted)
    assert pruned(model, batches, state=tmp_path).model == whole.model
    assert asked == ["c2"]
    monkeypatch.setattr(graph_pruning, "Walk", None)
    assert pruned(model, batches, state=tmp_path).layers == whole.layers


@pytest.mark.parametrize("other", ["a weight", "inputs", "pattern", "a damaged file"])
def test_a_state_of_something_else_is_not_taken(other: str, tmp_path: Path) -> None:
    model, batches = chain(), [{"x": drawn(20, 16)}]
    pruned(model, batches, state=tmp_path)
    if other == "a weight":
        model.graph.initializer[4].CopyFrom(numpy_helper.from_array(drawn(16, 16, seed=9), "w4"))
    elif other == "inputs":
        batches = [{"x": drawn(20, 16, seed=1)}]
    elif other == "a damaged file":
        for file in tmp_path.iterdir():
            file.write_bytes(file.read_bytes()[:-1])
    pattern = NMPattern(n=1, m=4) if other == "pattern" else TWO_FOUR
    again = sparsify_graph(
        model,
        signature=signature_of(model),
        batches=batches,
        pattern=pattern,
        method="reconstruction",
        planned_dense={},
        state=tmp_path,
    )
    assert again.n_resumed == 0


def test_weights_of_half_precision_are_rounded_to_their_type() -> None:
    text = CHAIN.replace("float[", "float16[")
    model = model_from(text, **{f"w{i}": drawn(16, 16, seed=i).astype(np.float16) for i in range(5)})
    batches = [{"x": drawn(40, 16).astype(np.float16)}]
    done = pruned(model, batches)
    check(done, model)
    wide = pruned(chain(), [{"x": drawn(40, 16)}])
    for name in ("w0", "w1"):
        assert np.allclose(weight(done.model, name), weight(wide.model, name), atol=0.05)


def test_a_network_in_bfloat16_is_walked_rounded_and_stays_one() -> None:
    single = chain()
    single.opset_import[0].version = 20
    model = in_half(single, "bf16")
    done = pruned(model, [{"x": drawn(40, 16)}])
    check(done, model)
    wide = pruned(chain(), [{"x": drawn(40, 16)}])
    assert {one.data_type for one in done.model.graph.initializer} == {TensorProto.BFLOAT16}
    assert np.allclose(weight(done.model, "w0").astype(np.float32), weight(wide.model, "w0"), atol=0.1)
    assert layer(done, "w3").error == pytest.approx(layer(wide, "w3").error, abs=0.02)


def test_a_gram_matrix_that_is_too_large_leaves_the_weight_to_activation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unfolding, "LARGEST_GRAM", 15**2)
    model, batches = chain(), [{"x": drawn(20, 16)}]
    done = pruned(model, batches)
    by_activation = pruned(model, batches, "activation")
    assert done.model == by_activation.model
    assert layer(done, "w0").error is None
    assert layer(done, "w0").reason.startswith("pruned by activation, error not measured: the Gram matrix")
    assert layer(by_activation, "w0").reason.startswith("error not measured: the Gram matrix")


def test_little_memory_gives_the_same_weights() -> None:
    model, batches = chain(), [{"x": drawn(n, 16, seed=n)} for n in (20, 30)]
    spilled = pruned(model, batches, memory_bytes=100)
    assert spilled.spilled_bytes > 0
    assert spilled.model == pruned(model, batches).model


TIED = """(float[N,16] x) => (float[N,8] y) {
    a = MatMul(x, w) b = Gemm(a, w) c = Relu(b) y = MatMul(c, v)
}"""


def test_a_weight_of_two_layers_is_calibrated_on_the_inputs_of_both() -> None:
    model, x = model_from(TIED, w=drawn(16, 16), v=drawn(16, 8)), drawn(30, 16, seed=1)
    done = pruned(model, [{"x": x}])
    rows = torch.from_numpy(np.concatenate([x, x @ drawn(16, 16)]))
    sums = unfolding.InputSums(gram=True)
    sums.add(rows[None])
    wanted = prune_weight(
        torch.from_numpy(drawn(16, 16)).T, Cap(pattern=TWO_FOUR, axis=1), "reconstruction", sums.statistics()
    )
    assert np.allclose(weight(done.model, "w"), wanted.weight.T.numpy(), rtol=1e-4, atol=1e-5)
    assert layer(done, "w").error == pytest.approx(wanted.error, rel=1e-4)


def with_choice(condition: str) -> onnx.ModelProto:
    """An If of two branches with a layer each, whose inner values have the same names."""
    model = model_from(
        f"""(float[N,16] x, int64 rate) => (float[N,4] y) {{
            a = Relu(x)
            {condition}
            b = Identity(a)
            y = MatMul(b, v)
        }}""",
        w0=drawn(16, 16),
        w1=drawn(16, 16, seed=1),
        v=drawn(16, 4),
        eight=np.array(8),
        zero=np.array(0.0, np.float32),
    )
    branches = [
        helper.make_graph(
            [helper.make_node("MatMul", ["a", f"w{i}"], ["p"]), helper.make_node(end, ["p"], ["q"])],
            f"branch{i}",
            [],
            [helper.make_tensor_value_info("q", TensorProto.FLOAT, None)],
        )
        for i, end in enumerate(("Neg", "Abs"))
    ]
    at = next(i for i, node in enumerate(model.graph.node) if node.op_type == "Identity")
    model.graph.node[at].CopyFrom(
        helper.make_node("If", ["c"], ["b"], name="choice", then_branch=branches[0], else_branch=branches[1])
    )
    return model


def test_the_branch_that_is_always_taken_is_calibrated_and_the_other_goes_by_magnitude() -> None:
    model = with_choice("c = Greater(rate, eight)")
    batches: list[Feeds] = [{"x": drawn(30, 16, seed=n), "rate": np.array(16)} for n in (1, 2)]
    done = pruned(model, batches)
    check(done, model)
    assert layer(done, "w0").error is not None
    assert layer(done, "w1").reason == (
        "pruned by magnitude, error not measured: no branch that multiplies by it is taken on the calibration "
        "inputs"
    )
    plain = model_from(
        "(float[N,16] x) => (float[N,4] y) { a = Relu(x) b = MatMul(a, w0) y = MatMul(b, v) }",
        w0=drawn(16, 16),
        v=drawn(16, 4),
    )
    inputs = [{"x": feeds["x"]} for feeds in batches]
    assert np.array_equal(weight(done.model, "w0"), weight(pruned(plain, inputs).model, "w0"))


def test_a_file_with_its_weights_in_constants_of_branches_is_pruned_like_any_other(tmp_path: Path) -> None:
    model = with_choice("c = Greater(rate, eight)")
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    choice = next(node for node in model.graph.node if node.op_type == "If")
    for name, branch in (("w1", "then_branch"), ("w0", "else_branch")):
        found = next(one for one in choice.attribute if one.name == branch)
        constant = helper.make_node("Constant", [], ["w"], value=stored[name])
        body = [constant, *found.g.node]
        body[1].input[1] = "w"
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in body]
        del found.g.node[:]
        found.g.node.extend(copies)
        model.graph.initializer.remove(stored[name])
    onnx.save(model, tmp_path / "model.onnx")
    opened = open_model(tmp_path / "model.onnx")
    done = pruned(opened, [{"x": drawn(30, 16, seed=1), "rate": np.array(16)}])
    check(done, opened)
    (taken,) = (one for one in done.layers if one.error is not None)
    assert taken.magnitude == pytest.approx(np.abs(array_of(stored["w1"])).sum(), rel=1e-6)


@pytest.mark.parametrize(
    "condition",
    ["c = Greater(rate, eight)", "m = MatMul(x, w0) s = ReduceMax <keepdims=0> (m) c = Greater(s, zero)"],
)
def test_a_choice_that_may_change_leaves_its_layers_to_magnitude(condition: str) -> None:
    model = with_choice(condition)
    batches = [{"x": drawn(30, 16), "rate": np.array(rate)} for rate in (4, 16)]
    done = pruned(model, batches)
    assert "stands in a branch or loop" in layer(done, "w1").reason
    assert layer(done, "w1").error is None
    assert layer(done, "v").reason == "it gives the outputs"
    check(done, model)


def test_inputs_that_are_not_the_networks_are_refused() -> None:
    model = chain()
    with pytest.raises(UsageError, match=r"x has shape \(3, 4\)"):
        pruned(model, [{"x": drawn(3, 4)}])


def test_values_that_are_no_numbers_are_told_with_the_weight_that_meets_them() -> None:
    model = chain()
    model.graph.node[1].op_type = "Log"
    with pytest.raises(UsageError, match="inputs of w1 are NaN or infinite"):
        pruned(model, [{"x": drawn(20, 16)}])
    broken = drawn(16, 16)
    broken[3, 4] = np.inf
    model.graph.initializer[2].CopyFrom(numpy_helper.from_array(broken, "w2"))
    with pytest.raises(ArtefactError, match="weight w2 holds NaN or infinity"):
        pruned(model, None, "magnitude")


def test_the_outputs_stay_closer_the_more_a_method_looks_at() -> None:
    model = chain()
    mixed = drawn(16, 16, seed=7) * np.geomspace(1, 0.01, 16, dtype=np.float32)
    batches = [{"x": drawn(200, 16, seed=8) @ mixed}]
    test = {"x": drawn(100, 16, seed=9) @ mixed}
    (dense,) = outputs_of(model, test)
    errors = []
    for method in METHODS:
        done = pruned(model, batches, method)
        errors.append(np.linalg.norm(outputs_of(done.model, test)[0] - dense) / np.linalg.norm(dense))
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_the_digest_of_values_does_not_depend_on_their_strides(dtype: torch.dtype) -> None:
    whole = torch.arange(32).reshape(4, 8).to(dtype)
    odd = whole[:, :1]  # one entry along the last axis, with a stride of 8
    assert bits_of(odd) == bits_of(odd.clone())
    assert bits_of(whole.t()) == bits_of(whole.t().clone(memory_format=torch.contiguous_format))
    assert bits_of(whole.t()) != bits_of(whole) or dtype is torch.bool
    assert bits_of(whole[:1, :1]) == bits_of(whole[:1, :1].clone())
