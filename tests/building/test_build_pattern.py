"""A bundle whose layers were made to obey a pattern: what it promises, tells and computes."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from sparse_export.building import build
from sparse_export.building.patterns import measure_scores
from sparse_export.cli.main import cli
from sparse_export.errors import ArtefactError, GateFailed, UnknownNameError, UsageError
from sparse_export.evaluate.validate import validate
from sparse_export.evaluate.validation import check_gates
from sparse_export.formats.bundle import Bundle, PatternLayer, open_bundle
from sparse_export.formats.run import Run, read_run_info, save_run_info
from sparse_export.graph.passes.format24 import packed_weights
from sparse_export.inspect import inspect
from sparse_export.signature import class_signature
from sparse_export.sparsity.pattern import NMPattern, obeys
from sparse_export.train.loop import train
from sparse_export.train.recipe import load_recipe
from tests.exporting import exported_once
from tests.making_runs import digits_accuracy, digits_fact, digits_run, save_run

TWO_FOUR = NMPattern(n=2, m=4)


class Perceptron(nn.Module):
    """A network that reads its input flattened. (N, 1, 8, 8) to (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(64, 48), nn.Linear(48, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc3(torch.relu(self.fc2(x)))
        return logits


def perceptron(fc1: float = 0.12, fc2: float = 0.12) -> tuple[Perceptron, dict[str, Tensor]]:
    """Sparse but for fc3; in fc1 and fc2 a fifth of the units have no weights, and some groups are
    crowded.
    """
    torch.manual_seed(4)
    module = Perceptron().eval()
    masks = {}
    for name, density in (("fc1.weight", fc1), ("fc2.weight", fc2), ("fc3.weight", 1.0)):
        weight = module.get_parameter(name)
        mask = torch.rand(weight.shape) < density
        if density < 1:
            mask[0, :4] = True
            mask[:, 5::10] = False
            mask[7::5] = False
        masks[name] = mask
        with torch.no_grad():
            weight.mul_(mask).add_(0.0)
    return module, masks


@pytest.fixture(scope="module", autouse=True)
def _exported_once() -> Iterator[None]:
    """Export takes seconds, and is tested elsewhere: each network is exported once."""
    with exported_once():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    module, masks = perceptron()
    folder = tmp_path_factory.mktemp("pattern") / "run"
    saved = save_run(
        folder,
        module,
        masks,
        name="tests.building.test_build_pattern:Perceptron",
        fact=digits_fact(),
        test=digits_accuracy(module),
    )
    return replace(saved, module=module)


@pytest.fixture(autouse=True)
def _trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """These runs are made here, by a factory of this file."""
    monkeypatch.setattr("sparse_export.trust.require_all", lambda *_, **__: None)


@pytest.fixture(scope="module")
def bundle(run: Run) -> Bundle:
    return build(run, run.path.with_name("bundle"), pattern="2:4")


def layers_of(bundle: Bundle) -> Mapping[str, PatternLayer]:
    assert bundle.info.fitted is not None
    return {layer.name: layer for layer in bundle.info.fitted.layers}


def weight_of(bundle: Bundle, name: str) -> Tensor:
    model = onnx.load(bundle.onnx_path)
    return torch.from_numpy(
        onnx.numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name)).copy()
    )


def test_what_obeys_is_promised_and_is_so_in_the_file(bundle: Bundle) -> None:
    layers = layers_of(bundle)
    assert {name: layer.road for name, layer in layers.items()} == {
        "fc1.weight": "gathered",
        "fc2.weight": "permuted",
        "fc3.weight": "dense",
    }
    assert {layer.name: layer.pattern for layer in bundle.info.layers} == {
        "fc1.weight": "2:4",
        "fc2.weight": "2:4",
        "fc3.weight": None,
    }
    for name in ("fc1.weight", "fc2.weight"):
        assert obeys(weight_of(bundle, name), 1, TWO_FOUR)
        assert (layers[name].groups_over_after, layers[name].n_cut) == (0, 0)
        assert (layers[name].groups_over_before or 0) > 0
    assert not obeys(weight_of(bundle, "fc3.weight"), 1, TWO_FOUR)
    assert open_bundle(bundle.path).info == bundle.info


def test_nothing_cut_leaves_every_answer_as_it_was(bundle: Bundle, run: Run) -> None:
    fact = bundle.info.fitted
    assert fact is not None
    assert fact.score_before == fact.score_after == run.info.test == bundle.info.score
    assert (fact.n_changed, fact.not_measured) == (0, None)
    found = validate(bundle, max_drop=0.0, n_threads=1)
    check_gates(found)
    assert found.parity is not None
    assert found.parity.top1_agreement == 1.0


def test_the_verifier_holds_the_bundle_to_its_promises(bundle: Bundle) -> None:
    found = inspect(bundle.path)
    assert not found.broken
    graph = {layer.weight: layer for layer in found.graph}
    assert graph["fc1.weight"].pattern_holds
    assert not graph["fc3.weight"].pattern_holds


def test_promised_weights_are_packed(run: Run, tmp_path: Path) -> None:
    packed = build(run, tmp_path / "packed", pattern=TWO_FOUR, onnx="both")
    assert packed_weights(onnx.load(packed.onnx_path)) == ("fc1.weight", "fc2.weight")
    check_gates(validate(packed, max_drop=0.0, n_threads=1))


def test_compacting_leaves_whole_groups(run: Run, tmp_path: Path) -> None:
    small = build(run, tmp_path / "small", pattern="2:4", compact=True)
    assert small.info.compacted is not None
    for name in ("fc1.weight", "fc2.weight"):
        weight = weight_of(small, name)
        assert obeys(weight, 1, TWO_FOUR)
        assert weight.shape[1] < layers_of(small)[name].shape[1]
        assert weight.shape[0] < layers_of(small)[name].shape[0]
        assert weight.shape[1] % 4 == 0
    assert small.info.compacted.n_weights_after < small.info.compacted.n_weights_before
    assert small.info.compacted.n_weights_after == small.info.n_parameters
    rows = {row.weight: row for row in small.info.compacted.layers}
    for name, row in rows.items():
        assert row.after == tuple(weight_of(small, name).shape)
    n_kept = rows["fc1.weight"].after[1]
    assert small.info.compacted.n_inputs_dropped == 64 - n_kept > 0  # the pixels that the gather leaves out
    n_unread = int((weight_of(small, "fc1.weight") == 0).all(dim=0).sum())
    assert ("not read" in rows["fc1.weight"].why) == (n_unread > 0)
    assert not n_unread or f"{n_unread} input" in rows["fc1.weight"].why
    check_gates(validate(small, max_drop=0.0, n_threads=1))


def test_a_cut_is_told_and_the_network_is_cut_alike_when_it_is_validated(tmp_path: Path) -> None:
    module, masks = perceptron(fc2=0.6)
    folder = tmp_path / "run"
    run = save_run(
        folder,
        module,
        masks,
        name="tests.building.test_build_pattern:Perceptron",
        fact=digits_fact(),
        test=digits_accuracy(module),
    )
    strict = build(run.path, pattern="2:4")
    assert layers_of(strict)["fc2.weight"].road == "dense"
    cut = build(run.path, tmp_path / "cut", pattern="2:4", max_cut=0.3)
    layer = layers_of(cut)["fc2.weight"]
    assert layer.road == "permuted"
    assert 0 < layer.cut <= 0.3
    assert obeys(weight_of(cut, "fc2.weight"), 1, TWO_FOUR)
    described = {entry.name: entry for entry in cut.info.layers}
    assert described["fc2.weight"].n_active == int(masks["fc2.weight"].sum()) - layer.n_cut
    assert described["fc2.weight"].n_active == int((weight_of(cut, "fc2.weight") != 0).sum())
    assert "since it gives the outputs" in layers_of(cut)["fc3.weight"].reason
    assert described["fc3.weight"].why_dense == layers_of(cut)["fc3.weight"].reason
    n_masked = sum(mask.numel() for mask in masks.values())
    n_cut = sum(entry.n_cut for entry in layers_of(cut).values())
    assert cut.info.density == pytest.approx(run.info.density - n_cut / n_masked)
    fact = cut.info.fitted
    assert fact is not None
    assert fact.score_after is not None
    assert fact.score_before == run.info.test
    found = validate(cut, n_threads=1)
    check_gates(found)
    assert found.score == found.torch_score == fact.score_after
    (cut.path / "orders.json").write_text("[]")
    with pytest.raises(ArtefactError, match=r"orders\.json"):
        validate(cut, n_threads=1)


class HeadFirst(Perceptron):
    """The same network, its output layer registered first."""

    def __init__(self) -> None:
        super().__init__()
        fc1, fc2, fc3 = self.fc1, self.fc2, self.fc3
        del self.fc1, self.fc2, self.fc3
        self.fc3, self.fc1, self.fc2 = fc3, fc1, fc2


def test_the_layer_that_gives_the_outputs_is_never_cut_wherever_it_is_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FittedUpTo(Exception):  # noqa: N818 - it stops the build where the question is answered
        pass

    def stop(*_: Any, uncut: Mapping[str, str], **__: Any) -> None:
        raise FittedUpTo(dict(uncut))

    monkeypatch.setattr("sparse_export.building.graph.fit_pattern", stop)
    torch.manual_seed(4)
    run = save_run(
        tmp_path / "run", HeadFirst().eval(), {}, name="tests.building.test_build_pattern:HeadFirst"
    )
    assert run.info.layers[-1].name == "fc2.weight"
    with pytest.raises(FittedUpTo) as stopped:
        build(run.path, pattern="2:4", max_cut=0.9)
    assert stopped.value.args[0] == {"fc3.weight": "it gives the outputs"}


def test_a_dense_run_promises_only_what_it_keeps(tmp_path: Path) -> None:
    module, _ = perceptron()
    run = save_run(tmp_path / "run", module, {}, name="tests.building.test_build_pattern:Perceptron")
    made = build(run.path, pattern="2:4", data_dir=tmp_path)
    assert [layer.pattern for layer in made.info.layers] == ["2:4", "2:4", None]
    assert made.info.fitted is not None
    assert made.info.fitted.not_measured == "the run names no data set"
    assert made.info.density == 1


def test_absent_data_are_told_and_are_no_failure(tmp_path: Path) -> None:
    module, masks = perceptron()
    fact = replace(digits_fact(), name="mnist")
    run = save_run(
        tmp_path / "run", module, masks, name="tests.building.test_build_pattern:Perceptron", fact=fact
    )
    done = CliRunner().invoke(cli, ["build", str(run.path), "--pattern", "2:4", "--data-dir", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "score not measured, because" in done.stdout
    assert str(tmp_path) in done.stdout


@pytest.mark.parametrize(
    ("n_outputs", "why"),
    [
        (1, "the network has one output, so its top-1 accuracy cannot be computed; that needs one per class"),
        (5, "The labels of the test set of digits run from 0 to 9, outside the class numbers 0 to 4"),
    ],
)
def test_labels_that_do_not_fit_the_outputs_are_told_and_not_scored(
    n_outputs: int, why: str, run: Run, tmp_path: Path
) -> None:
    info = replace(run.info, signature=class_signature(run.info.signature.input_shape, n_outputs))
    found = measure_scores(info, nn.Identity(), tmp_path / "is not opened.onnx", None)
    assert found == {"score_before": None, "score_after": None, "n_changed": None, "not_measured": why}


def test_the_command_prints_a_line_a_layer(run: Run, tmp_path: Path) -> None:
    words = ["build", str(run.path), "--pattern", "2:4", "--out", str(tmp_path / "b")]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split()[:5] == ["layer", "shape", "density", "over", "2:4"]
    row = next(line for line in lines if line.startswith("fc1.weight")).split()
    assert row[1] == "48x64"
    assert row[4] == "0"
    assert row[-2:] == ["2:4,", "gathered"]
    assert "no permutation satisfies 2:4 without dropping" in next(
        line for line in lines if line.startswith("fc3.weight")
    )
    assert any(line.startswith("2 of 3 layers are 2:4, 4,608 of 4,928 weights; 0 cut") for line in lines)
    assert "0 predictions changed" in done.stdout


def test_the_document_has_the_same_facts(run: Run, tmp_path: Path) -> None:
    words = ["build", str(run.path), "--pattern", "2:4", "--gather", "none", "--json"]
    done = CliRunner().invoke(cli, [*words, "--out", str(tmp_path / "b")])
    assert done.exit_code == 0, done.output
    fitted = json.loads(done.stdout)["manifest"]["fitted"]
    assert [layer["road"] for layer in fitted["layers"]] == ["dense", "permuted", "dense"]
    assert fitted["gather"] == "none"
    assert "no gather was asked for" in fitted["layers"][0]["reason"]


@pytest.mark.parametrize("pattern", ["2:4:8", "4:2", "2", "", "a:b", "0:4", "4:4", "-1:4"])
def test_what_is_no_pattern_is_refused(run: Run, pattern: str) -> None:
    done = CliRunner().invoke(cli, ["build", str(run.path), "--pattern", pattern])
    assert done.exit_code == 2
    assert "N:M" in done.stderr


@pytest.mark.parametrize("max_cut", [-0.1, 1.0, 2, float("nan"), float("inf")])
def test_a_cut_that_is_no_share_is_refused(run: Run, max_cut: float) -> None:
    with pytest.raises(UsageError, match="from 0 to below 1"):
        build(run, pattern="2:4", max_cut=max_cut)


def test_what_only_a_pattern_gives_sense_to_is_refused_without(run: Run) -> None:
    with pytest.raises(UsageError, match="no pattern was requested"):
        build(run, max_cut=0.1)
    with pytest.raises(UnknownNameError, match="gather"):
        build(run, pattern="2:4", gather="all")  # type: ignore[arg-type]


def test_a_run_of_an_unknown_network_is_refused(tmp_path: Path) -> None:
    run = digits_run(tmp_path / "run")
    save_run_info(
        run.path, replace(read_run_info(run.path), model=replace(run.info.model, name="no-such-net"))
    )
    done = CliRunner().invoke(cli, ["build", str(run.path), "--pattern", "2:4"])
    assert done.exit_code == 2
    assert "no-such-net" in done.stderr


def test_a_run_that_promises_another_pattern_is_refused(tmp_path: Path) -> None:
    run = digits_run(tmp_path / "run")
    info = read_run_info(run.path)
    promising = tuple(replace(layer, pattern="1:4") for layer in info.layers)
    save_run_info(run.path, replace(info, layers=promising))
    with pytest.raises(UsageError, match="trained for 1:4, and 2:4 was requested"):
        build(run.path, pattern="2:4")


def test_a_promise_of_the_run_that_does_not_hold_is_not_dropped(tmp_path: Path) -> None:
    module, masks = perceptron()
    run = save_run(tmp_path / "run", module, masks, name="tests.building.test_build_pattern:Perceptron")
    info = read_run_info(run.path)
    promising = tuple(replace(layer, pattern="2:4") for layer in info.layers)
    save_run_info(run.path, replace(info, layers=promising))
    with pytest.raises(GateFailed, match=r"fc3\.weight, promised 2:4"):
        build(run.path, pattern="2:4")


def test_a_wrong_order_is_not_written(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine: Any = importlib.import_module("sparse_export.building.patterns").gathered

    def spoilt(model: onnx.ModelProto, orders: Mapping[str, Any], **options: Any) -> onnx.ModelProto:
        found: onnx.ModelProto = genuine(model, orders, **options)
        order = next(t for t in found.graph.initializer if "order" in t.name)
        order.CopyFrom(onnx.numpy_helper.from_array(np.arange(64), order.name))
        return found

    monkeypatch.setattr("sparse_export.building.patterns.gathered", spoilt)
    with pytest.raises(GateFailed, match="The gathered graph differs"):
        build(run, tmp_path / "wrong", pattern="2:4")
    assert not (tmp_path / "wrong").exists()


def test_other_patterns_are_for_the_asking(run: Run, tmp_path: Path) -> None:
    made = build(run, tmp_path / "b", pattern="1:2", max_cut=0.2)
    for layer in made.info.layers:
        if layer.pattern is not None:
            assert layer.pattern == "1:2"
            assert obeys(weight_of(made, layer.name), 1, NMPattern(n=1, m=2))
    assert any(layer.pattern for layer in made.info.layers)


def test_a_network_trained_without_a_pattern_becomes_two_four_and_answers_alike(tmp_path: Path) -> None:
    recipe = load_recipe("digits", changes={"epochs": 4, "sparsity": {"density": 0.1}})
    trained = train(recipe, tmp_path / "run", device="cpu")
    made = build(trained.path, pattern="2:4", gather="any", compact=True, onnx="packed")
    layers, fact = layers_of(made), made.info.fitted
    assert fact is not None
    assert layers["conv3.weight"].road == "permuted"
    assert layers["fc1.weight"].road == "gathered"  # behind a flattened picture
    assert packed_weights(onnx.load(made.onnx_path)) == ("conv3.weight", "fc1.weight")
    assert sum(layer.n_cut for layer in fact.layers) == fact.n_changed == 0
    assert fact.score_after == fact.score_before == trained.info.test
    check_gates(validate(made, max_drop=0.0, n_threads=1))


def test_lenet_on_mnist_becomes_two_four_without_a_changed_answer(mnist_dir: Path, tmp_path: Path) -> None:
    recipe = load_recipe("mnist-lenet300-100", changes={"epochs": 2, "sparsity": {"density": 0.1}})
    trained = train(recipe, tmp_path / "run", device="cpu", data_dir=mnist_dir)
    made = build(trained.path, pattern="2:4", data_dir=mnist_dir)
    layer, fact = layers_of(made)["fc1.weight"], made.info.fitted
    assert fact is not None
    assert layer.groups_over_before is not None
    assert layer.groups_over_before > 100
    assert (layer.road, layer.groups_over_after, layer.n_cut) == ("gathered", 0, 0)
    assert (fact.score_after, fact.n_changed) == (trained.info.test, 0)
