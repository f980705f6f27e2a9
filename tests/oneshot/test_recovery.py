"""Bringing a pruned network back towards the dense one without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import sparse_export as se
from sparse_export.cli.sparsify import command
from sparse_export.errors import UsageError
from sparse_export.formats.run import open_run
from sparse_export.graph.example import example_of_shape
from sparse_export.graph.export import onnx_from_module
from sparse_export.graph.model import open_model, signature_of
from sparse_export.graph.stored_tensors import array_of
from sparse_export.oneshot import calibrating, layer_sensitivities, segments
from sparse_export.oneshot.costs import LayerDone
from sparse_export.oneshot.graph_pruning import PrunedGraph, sparsify_graph
from sparse_export.oneshot.graph_statistics import inputs_of
from sparse_export.oneshot.graph_weights import weights_of_graph
from sparse_export.oneshot.layers import Method
from sparse_export.oneshot.links import Link, Place, links_of, wanted_of
from sparse_export.oneshot.paired_sums import PairedSums
from sparse_export.oneshot.recovered import recovered_weight
from sparse_export.oneshot.recovering import sparsify_recovering
from sparse_export.oneshot.recovery import Recovery, recovery_from_text
from sparse_export.oneshot.unfolding import InputSums
from sparse_export.oneshot.weights import by_magnitude, columns_from_weight
from sparse_export.oneshot.wiring import wiring_of
from sparse_export.signature import Array, Feeds
from sparse_export.sparsity.caps import Cap
from sparse_export.sparsity.pattern import NMPattern
from tests.oneshot.graphs import drawn, model_from, outputs_of

TWO_FOUR = NMPattern(n=2, m=4)
ALL = Recovery(damping=True, streams=True, sums=True, bias=True, variance=True)

RESIDUAL = """(float[N,32] x) => (float[N,32] y) {
    a = MatMul(x, w0)  b = Add(a, b0)  c = Relu(b)
    d = MatMul(c, w1)  e = Add(d, b1)  f = Add(e, c)  g = Relu(f)
    h = MatMul(g, w2)  i = Add(b2, h)  j = Add(g, i)
    y = MatMul(j, last)
}""".replace("  ", "\n")


def residual() -> onnx.ModelProto:
    weights = {f"w{at}": drawn(32, 32, seed=at) / 6 for at in range(3)}
    biases = {f"b{at}": drawn(32, seed=10 + at) for at in range(3)}
    return model_from(RESIDUAL, **weights, **biases, last=drawn(32, 32, seed=9) / 6)


def mixed(n: int, seed: int) -> Feeds:
    """Inputs of few directions, as those of real layers are."""
    few = drawn(n, 12, seed=seed) @ drawn(12, 32, seed=99)
    return {"x": (few + 0.3 * drawn(n, 32, seed=seed + 1) + 0.5).astype(np.float32)}


def pruned(
    model: onnx.ModelProto, batches: list[Feeds], recovery: Recovery | None, **more: Any
) -> PrunedGraph:
    options: dict[str, Any] = {"method": "reconstruction", "planned_dense": {}} | more
    return sparsify_graph(
        model,
        signature=signature_of(model),
        batches=batches,
        pattern=TWO_FOUR,
        recovery=recovery,
        errors=True,
        **options,
    )


def stored(model: onnx.ModelProto, name: str) -> Array:
    return np.asarray(next(array_of(one) for one in model.graph.initializer if one.name == name))


def change(model: onnx.ModelProto, done: PrunedGraph, feeds: Feeds) -> float:
    (before,), (after,) = outputs_of(model, feeds), outputs_of(done.model, feeds)
    return float(np.square(after - before).sum() / np.square(before - before.mean()).sum())


def with_output(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.output[:]
    made.graph.output.add(name=name)
    return made


def test_each_step_brings_outputs_closer_on_samples_that_no_weight_was_calibrated_on() -> None:
    model, batches, others = residual(), [mixed(300, 1), mixed(300, 3)], mixed(500, 5)
    steps = ("", "streams", "streams,sums", "streams,sums,bias")
    changes = [
        change(model, pruned(model, batches, recovery_from_text(text) if text else None), others)
        for text in steps
    ]
    assert changes == sorted(changes, reverse=True)
    assert changes[-1] < 0.7 * changes[0]


def test_of_few_samples_the_damping_is_chosen_so_that_others_are_met_better() -> None:
    model, batches, others = residual(), [mixed(40, 1)], mixed(500, 5)
    changes = [
        change(model, pruned(model, batches, recovery_from_text(text)), others)
        for text in ("streams", "damping,streams")
    ]
    assert changes[1] < 0.9 * changes[0]


@pytest.mark.parametrize("method", ["magnitude", "activation", "reconstruction"])
def test_the_bias_step_gives_each_channel_its_mean_back(method: Method) -> None:
    model, batches = residual(), [mixed(300, 1), mixed(100, 3)]
    feeds = {"x": np.concatenate([one["x"] for one in batches])}
    done = pruned(model, batches, Recovery(bias=True), method=method)
    assert set(done.beside) == {"w0", "w1", "w2"}
    for value in ("b", "e", "i"):
        means = [outputs_of(with_output(one, value), feeds)[0].mean(0) for one in (model, done.model)]
        np.testing.assert_allclose(means[0], means[1], atol=2e-5)
        plain = pruned(model, batches, None, method=method).model
        assert np.abs(outputs_of(with_output(plain, value), feeds)[0].mean(0) - means[0]).max() > 0.01


def test_the_variance_step_gives_channels_their_spread_back_where_that_costs_no_more_than_magnitude() -> None:
    model, batches = residual(), [mixed(400, 1)]

    def off(recovery: Recovery | None) -> float:
        done = pruned(model, batches, recovery, method="reconstruction")
        spreads = [outputs_of(with_output(one, "a"), batches[0])[0].std(0) for one in (model, done.model)]
        return float(np.abs(np.log(spreads[1] / spreads[0])).mean())

    assert off(Recovery(variance=True)) < 0.1 * off(Recovery(bias=True))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("text", ["bias", "streams", "variance", "damping,streams,bias,variance"])
def test_no_row_ends_further_from_the_wanted_outputs_than_plain_magnitude(groups: int, text: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn((8, 16, 1, 1), generator=generator)
    inputs = torch.randn((groups, 30, 16), generator=generator) + 1
    rows = columns_from_weight(weight)
    wanted = torch.cat([one @ part.mT for one, part in zip(inputs, rows.chunk(groups), strict=True)], 1)
    wanted = wanted + 2 * torch.randn(wanted.shape, generator=generator)
    sums = [InputSums(gram=True, sums=True), InputSums(gram=True, sums=True)]
    pairs = [PairedSums(), PairedSums()]
    for which, part in ((0, slice(0, 30)), (1, slice(24, 30))):
        sums[which].add(inputs[:, part])
        pairs[which].add(inputs[:, part], wanted[part])
    whole, check = (pair.statistics(one.statistics()) for pair, one in zip(pairs, sums, strict=True))
    assert whole is not None
    recovery = recovery_from_text(text)
    assert recovery is not None
    found = recovered_weight(
        weight, Cap(axis=1, pattern=TWO_FOUR), "reconstruction", whole, check, recovery, has_bias=True
    )
    plain = by_magnitude(rows, TWO_FOUR).weight

    def errors(columns: Tensor, shift: Tensor) -> Tensor:
        parts = zip(inputs, columns.chunk(groups), strict=True)
        given = torch.cat([one @ part.mT for one, part in parts], 1)
        return (wanted - given - shift).double().square().sum(0)

    ours = errors(columns_from_weight(found.weight), found.shift)
    assert bool((ours <= errors(plain, torch.zeros(8)) * (1 + 1e-5)).all())
    assert found.error == pytest.approx(float((ours.sum() / wanted.double().square().sum()).sqrt()), rel=1e-4)
    groups_of = columns_from_weight(found.mask).reshape(8, -1, 4)
    assert int(groups_of.sum(2).max()) == 2
    assert not bool(found.weight[~found.mask].any())


class Network(nn.Module):
    """A residual block with batch norms, as they come to be exported unfolded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.first = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.shortcut = nn.Conv2d(8, 16, 1, stride=2)
        self.second = nn.Conv2d(16, 16, 3, padding=2, dilation=2)
        self.last = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        inner = torch.relu(self.norm(self.first(x)))
        both = self.second(inner) + self.shortcut(x)
        answer: Tensor = self.last(torch.relu(both).mean((2, 3)))
        return answer


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    made = Network().eval()
    with torch.no_grad():
        made.norm.running_mean.copy_(torch.linspace(-1, 1, 16))  # type: ignore[union-attr]
        made.norm.running_var.copy_(torch.linspace(0.5, 2, 16))  # type: ignore[union-attr]
    return made


@pytest.fixture(scope="module")
def exported(network: Network) -> onnx.ModelProto:
    return onnx_from_module(network, example_of_shape((3, 12, 12)), masks={}, fold=False)


TURNED = """(float[4,N] x) => (float[8,N] y) { a = MatMul(w, x) y = MatMul(last, a) }"""
GEMM = """(float[N,4] x) => (float[N,8] y) {
    a = Gemm<alpha = 2.0, transB = 1>(x, w, b) y = MatMul(a, last)
}"""


@pytest.mark.parametrize("case", ["turned", "gemm", "first.weight", "second.weight", "shortcut.weight"])
def test_wanted_outputs_stand_in_the_order_of_the_inputs(exported: onnx.ModelProto, case: str) -> None:
    """Of a network that nothing was pruned in they are the inputs times the weight."""
    if case == "turned":
        model, feeds = model_from(TURNED, w=drawn(8, 4, seed=1), last=drawn(8, 8)), {"x": drawn(4, 6)}
    elif case == "gemm":
        model = model_from(GEMM, w=drawn(8, 4, seed=1), b=drawn(8, seed=2), last=drawn(8, 8))
        feeds = {"x": drawn(6, 4)}
    else:
        model, feeds = exported, {exported.graph.input[0].name: drawn(3, 3, 12, 12)}
    wiring = wiring_of(model)
    weights = weights_of_graph(model, wiring, TWO_FOUR, planned_dense={}, only=None).pruned
    weight = next(one for one in weights if one.name == (case if "." in case else "w"))
    link = links_of(model, wiring, [weight], sums=True)[weight.name]
    names = [weight.uses[0].factor.value, *link.values]
    values = {name: outputs_of(with_output(model, name), feeds)[0] for name in names if name not in feeds}
    values |= feeds
    bias = None if link.bias is None else stored(model, link.bias)
    wanted = wanted_of(link, values, values, bias)
    stored_weight = torch.from_numpy(stored(model, weight.name).copy())
    rows = columns_from_weight(weight.form.weight_of(stored_weight)).chunk(weight.form.n_groups)
    given = torch.cat(
        [
            torch.cat([one @ block.mT for one, block in zip(part, rows, strict=True)], 1)
            for part in inputs_of(weight.uses[0].factor, values[names[0]])
        ]
    )
    torch.testing.assert_close(wanted, given, rtol=1e-4, atol=1e-4)


def test_shifts_go_into_biases_and_into_means_of_batch_norms(exported: onnx.ModelProto) -> None:
    wiring = wiring_of(exported)
    weights = weights_of_graph(exported, wiring, TWO_FOUR, planned_dense={}).pruned
    links = links_of(exported, wiring, weights, sums=True)
    assert links["first.weight"].place == Place(name="norm.running_mean", sign=-1)
    assert links["second.weight"].place == Place(name="second.bias")
    sums = {name: link.beside for name, link in links.items() if link.beside}
    assert len(sums) == 1  # the later of the two branches makes up for what the other lost


def test_a_bias_that_two_layers_read_is_left_alone() -> None:
    text = RESIDUAL.replace("b1", "b0")
    weights = {f"w{at}": drawn(32, 32, seed=at) for at in range(3)}
    model = model_from(text, **weights, b0=drawn(32), b2=drawn(32), last=drawn(32, 32))
    wiring = wiring_of(model)
    links = links_of(model, wiring, weights_of_graph(model, wiring, TWO_FOUR).pruned, sums=True)
    assert [links[name].place for name in ("w0", "w1")] == [None, None]
    assert links["w2"] == Link(value="h", axis=-1, place=Place(name="b2"), beside="g")
    done = pruned(model, [mixed(60, 1)], ALL)
    assert np.array_equal(stored(done.model, "b0"), stored(model, "b0"))


def test_what_a_killed_process_finished_is_gone_on_from_to_the_same_bits(tmp_path: Path) -> None:
    model, batches = residual(), [mixed(40, 1), mixed(30, 3)]
    whole = pruned(model, batches, ALL)

    class KilledError(Exception):
        pass

    def kill(done: LayerDone) -> None:
        if done.number == 2:
            raise KilledError

    with pytest.raises(KilledError):
        pruned(model, batches, ALL, state=tmp_path, observer=kill)
    again = pruned(model, batches, ALL, state=tmp_path)
    assert again.n_resumed == 2
    assert again.model == whole.model
    assert again.beside.keys() == whole.beside.keys()
    # Another recovery does not take them.
    assert pruned(model, batches, Recovery(bias=True), state=tmp_path).n_resumed == 0


def test_little_memory_gives_the_same_weights(exported: onnx.ModelProto) -> None:
    name = exported.graph.input[0].name
    batches: list[Feeds] = [{name: drawn(6, 3, 12, 12, seed=seed)} for seed in range(3)]
    much, little = (pruned(exported, batches, ALL, memory_bytes=size) for size in (1 << 30, 1000))
    assert little.spilled_bytes > 0 == much.spilled_bytes
    assert little.model == much.model


def test_the_dense_network_runs_once_over_the_samples(
    exported: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each node of it at most once for a batch, beside one run of the pruned one."""
    planned: list[Any] = []
    genuine = segments.plan_following

    def noted(*args: Any) -> Any:
        planned.extend(genuine(*args))
        return genuine(*args)

    monkeypatch.setattr(calibrating, "plan_following", noted)
    pruned(exported, [{exported.graph.input[0].name: drawn(6, 3, 12, 12)}], ALL)
    constant = wiring_of(exported).constant
    run = [node for segment in planned for node in segment.nodes if node not in constant]
    assert len(run) == len(set(run)) > 5


@pytest.mark.parametrize("helps", [True, False])
def test_a_recovery_is_kept_where_it_helps_on_other_samples(
    helps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = residual(), [mixed(300, 1), mixed(300, 3)]
    if not helps:
        monkeypatch.setattr(
            calibrating, "wanted_of", lambda link, dense, *_: torch.from_numpy(-dense[link.value])
        )
    done = sparsify_recovering(
        model,
        signature=signature_of(model),
        batches=batches,
        recovery=ALL,
        pattern=TWO_FOUR,
        method="reconstruction",
        planned_dense={},
    )
    assert done.recovery is not None
    assert done.recovery.kept is helps
    assert (done.recovery.change_with < done.recovery.change_without) is helps
    assert done.recovery.n_samples == 64
    assert done.n_calibration == 536
    assert any(done.beside.values()) is helps
    assert ("no recovery helped" in str(done.recovery)) is not helps


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("bais", "no step 'bais'"),
        ("", "no step ''"),
        ("sums", "without streams"),
        ("auto,none", "no step 'none'"),
    ],
)
def test_steps_that_are_none_are_refused(text: str, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        recovery_from_text(text)


def test_too_few_samples_to_decide_are_refused() -> None:
    model = residual()
    with pytest.raises(UsageError, match="4 samples are too few"):
        sparsify_recovering(
            model,
            signature=signature_of(model),
            batches=[mixed(4, 1)],
            recovery=ALL,
            pattern=TWO_FOUR,
            method="reconstruction",
        )


def test_a_file_is_recovered_and_its_report_says_so(tmp_path: Path) -> None:
    onnx.save(residual(), tmp_path / "net.onnx")
    np.savez(tmp_path / "inputs.npz", x=mixed(400, 1)["x"])
    options: dict[str, Any] = {"inputs": tmp_path / "inputs.npz", "method": "reconstruction", "seed": 1}
    done = se.sparsify(tmp_path / "net.onnx", tmp_path / "run", recover="auto", **options)
    found = done.report.recovery
    assert found is not None
    assert found.kept
    assert "recovery was kept" in str(done.report)
    plain = se.sparsify(tmp_path / "net.onnx", tmp_path / "plain", **options)
    agreements = [one.report.stages[-1].agreement for one in (plain, done)]
    assert agreements[0] is not None
    assert agreements[1] is not None
    assert agreements[1].percent > agreements[0].percent
    with pytest.raises(
        UsageError, match="--recover compares the network with the dense one, and there are no samples"
    ):
        se.sparsify(tmp_path / "net.onnx", tmp_path / "none", recover="auto")


MAX_DROP = 0.3  # points; w0 alone loses 0.2


def test_layers_that_are_chosen_take_their_biases_along(tmp_path: Path) -> None:
    onnx.save(residual(), tmp_path / "net.onnx")
    np.savez(tmp_path / "inputs.npz", x=mixed(400, 1)["x"])
    done = se.sparsify(
        tmp_path / "net.onnx",
        tmp_path / "run",
        recover="bias",
        inputs=tmp_path / "inputs.npz",
        method="reconstruction",
        max_drop=MAX_DROP,
    )
    assert done.report.choice is not None
    sparse = {one.name for one in done.report.choice.layers if one.sparse}
    assert 0 < len(sparse) < 3
    before, after = residual(), open_model(open_run(tmp_path / "run").graph_path)
    for at in range(3):
        same = np.array_equal(stored(before, f"b{at}"), stored(after, f"b{at}"))
        assert same is (f"w{at}" not in sparse)


def test_a_dry_run_measures_layers_as_they_would_be_recovered(tmp_path: Path) -> None:
    onnx.save(residual(), tmp_path / "net.onnx")
    np.savez(tmp_path / "inputs.npz", x=mixed(400, 1)["x"])
    changes = [
        layer_sensitivities(
            tmp_path / "net.onnx", inputs=tmp_path / "inputs.npz", method="magnitude", recover=steps
        ).layers
        for steps in ("none", "bias")
    ]
    found = [{one.name: one.change for one in layers} for layers in changes]
    assert found[0].keys() == found[1].keys() == {"w0", "w1", "w2"}
    assert all(found[1][name] != found[0][name] for name in found[0])
    assert sorted(one.name for one in tmp_path.iterdir()) == ["inputs.npz", "net.onnx"]


def test_the_option_is_refused_by_name(tmp_path: Path) -> None:
    onnx.save(residual(), tmp_path / "net.onnx")
    result = CliRunner().invoke(command, [str(tmp_path / "net.onnx"), "--recover", "bais"])
    assert result.exit_code != 0
    assert isinstance(result.exception, UsageError)
    assert "damping, streams, sums, bias, variance" in str(result.exception)
