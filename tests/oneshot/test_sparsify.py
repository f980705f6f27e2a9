"""sparsify from end to end, on small networks and real digits."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sparse_export as se
from sparse_export import models
from sparse_export.errors import ArtefactError, DataNotFound, GateFailed, NotTrustedError, UsageError
from sparse_export.graph.passes.permute import permute_network
from sparse_export.oneshot import (
    Sparsified,
    Stage,
    graph_pruning,
    pipeline,
    recovering,
    sparsify,
    torch_work,
    unfolding,
)
from sparse_export.oneshot.costs import LayerDone
from sparse_export.oneshot.source import Source, open_source
from sparse_export.sparsity import permute
from sparse_export.sparsity.pattern import NMPattern, largest_per_group, obeys
from sparse_export.tasks import data
from sparse_export.train.layers import maskable_parameters
from sparse_export.train.loop import train
from sparse_export.train.recipe import load_recipe

TWO_FOUR = NMPattern(n=2, m=4)
METHODS = ("magnitude", "activation", "reconstruction")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> se.Run:
    recipe = load_recipe("digits", changes={"dense": True, "epochs": 4})
    return train(recipe, tmp_path_factory.mktemp("dense") / "run", device="cpu")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> se.Run:
    recipe = load_recipe("digits", changes={"epochs": 2, "sparsity": {"density": 0.3}})
    return train(recipe, tmp_path_factory.mktemp("sparse") / "run", device="cpu")


def capped(done: Sparsified) -> list[str]:
    return [layer.name for layer in done.report.layers if layer.pattern]


def check(done: Sparsified) -> None:
    """The run on disk is what the report and the pattern say."""
    run = se.open_run(done.run.path)
    weights, masks = load_file(run.path / "model.safetensors"), load_file(run.path / "masks.safetensors")
    promised = {layer.name for layer in run.info.layers if layer.pattern == "2:4"}
    assert promised == set(capped(done)) <= masks.keys()
    for name in promised:
        assert obeys(masks[name], 1, TWO_FOUR)
        assert obeys(weights[name], 1, TWO_FOUR)
    assert {layer.name: layer.why_dense for layer in run.info.layers if layer.why_dense} == {
        layer.name: layer.reason for layer in done.report.layers if not layer.pattern
    }
    assert {layer.name: layer.n_active for layer in done.report.layers} == {
        layer.name: layer.n_active for layer in run.info.layers
    }
    assert run.info.test == done.report.stages[-1].test
    told = json.loads((run.path / "sparsify.json").read_text())
    assert [stage["name"] for stage in told["stages"]] == [stage.name for stage in done.report.stages]


@pytest.mark.parametrize(
    ("method", "permuted"), [("magnitude", False), ("activation", True), ("reconstruction", True)]
)
def test_every_method_gives_a_run_that_build_packs(
    method: str, permuted: bool, dense: se.Run, tmp_path: Path
) -> None:
    done = sparsify(dense.path, tmp_path / "run", method=method, permute=permuted, device="cpu")
    check(done)
    report, info = done.report, done.run.info
    assert (info.method, info.data, info.epochs) == (f"sparsify-{method}", dense.info.data, 0)
    names = ["original", "permuted", "sparsified"] if permuted else ["original", "sparsified"]
    assert [stage.name for stage in report.stages] == names
    assert report.stages[0].test == dense.info.test
    assert report.stages[-2].test == dense.info.test  # another order of channels is the same function
    assert report.n_calibration == (0 if method == "magnitude" else 512)
    for layer in report.layers:
        if layer.pattern is None:
            assert layer.reason
            continue
        if method == "magnitude":
            assert (layer.error, layer.reason) == (None, "error not measured: --errors was not given")
            continue
        assert layer.error is not None
        assert 0 < layer.error < 1
        assert layer.kept_share is not None
        assert 0.5 <= layer.kept_share < 1
    bundle = se.build(done.run.path, tmp_path / "bundle", onnx="packed")
    assert bundle.info.score == info.test
    assert se.validate(bundle, max_drop=0.0).parity_ok


def test_magnitude_in_order_is_the_plain_rule_on_the_runs_weights(dense: se.Run, tmp_path: Path) -> None:
    done = sparsify(dense.path, tmp_path / "run", device="cpu")
    before, after = load_file(dense.path / "model.safetensors"), load_file(tmp_path / "run/model.safetensors")
    for layer in done.report.layers:
        weight = before[layer.name]
        mask = largest_per_group(weight, 1, TWO_FOUR) if layer.pattern else torch.ones_like(weight).bool()
        assert torch.equal(after[layer.name], weight * mask)
        if layer.pattern:
            kept = weight.abs().double()[mask].sum() / weight.abs().double().sum()
            assert layer.kept_share == pytest.approx(float(kept))
    for name in before.keys() - {layer.name for layer in done.report.layers}:
        assert torch.equal(after[name], before[name])


def test_reconstruction_is_closer_to_the_network_than_magnitude(dense: se.Run, tmp_path: Path) -> None:
    errors = {}
    for method in ("magnitude", "reconstruction"):
        done = sparsify(
            dense.path, tmp_path / method, method=method, device="cpu", calibration_samples=100, errors=True
        )
        assert done.report.n_calibration == 100
        first = next(layer for layer in done.report.layers if layer.pattern)
        errors[method] = first.error
    assert errors["reconstruction"] is not None
    assert errors["magnitude"] is not None
    assert errors["reconstruction"] < 0.8 * errors["magnitude"]


def test_magnitude_makes_no_walk_and_no_gram_matrix_unless_errors_are_asked_for(
    dense: se.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = sparsify(dense.path, tmp_path / "asked", errors=True, device="cpu", calibration_samples=20)
    assert asked.report.n_calibration == 20

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("samples were looked at")

    monkeypatch.setattr(graph_pruning, "Walk", refuse)
    monkeypatch.setattr(unfolding, "_upper_products", refuse)
    monkeypatch.setattr(pipeline, "onnx_from_module", refuse)
    done = sparsify(dense.path, tmp_path / "run", device="cpu", calibration_samples=20)
    check(done)
    assert done.report.stages[-1].test == asked.report.stages[-1].test is not None
    for one, other in zip(done.report.layers, asked.report.layers, strict=True):
        if other.error is not None:
            other = replace(other, error=None, reason="error not measured: --errors was not given")
        assert one == other
    files = [(run.path / "model.safetensors").read_bytes() for run in (done.run, asked.run)]
    assert files[0] == files[1]
    assert "--errors was not given" in str(done.report)
    assert any(layer.error for layer in asked.report.layers)


@pytest.mark.parametrize(
    ("n_asked", "n_train", "most", "found"),
    [
        (512, 60_000, 128, (512, 128)),  # small samples
        (128, 500, 17, (128, 16)),  # pictures of 224 x 224
        (100, 500, 17, (100, 10)),
        (512, 20, 128, (20, 20)),
        (127, 500, 17, (126, 14)),  # a prime number
        (3, 500, 1, (3, 1)),
    ],
)
def test_batches_are_small_and_leave_out_few_samples(
    n_asked: int, n_train: int, most: int, found: tuple[int, int]
) -> None:
    assert pipeline._whole_batches(n_asked, n_train, most) == found


def test_large_samples_are_walked_in_batches_of_few(
    dense: se.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_WALK_VALUES", 10 * 64)
    sizes: list[tuple[int, int]] = []

    def noted(*args: Any, **options: Any) -> Any:
        sizes.extend((len(feeds["input"]), options["memory_bytes"]) for feeds in options["batches"])
        return graph_pruning.sparsify_graph(*args, **options)

    monkeypatch.setattr(recovering, "sparsify_graph", noted)
    done = sparsify(
        dense.path,
        tmp_path / "run",
        method="activation",
        calibration_samples=40,
        calibration_memory=1000,
        device="cpu",
    )
    assert sizes == [(10, 1000)] * 4
    assert done.report.n_calibration == 40


class KilledError(Exception):
    pass


def kill_at(number: int) -> Callable[[LayerDone], None]:
    def finished(done: LayerDone) -> None:
        if done.number == number:
            raise KilledError

    return finished


@pytest.mark.parametrize("permute", [False, True])
def test_a_killed_call_goes_on_at_the_last_finished_layer_to_the_same_bits(
    permute: bool, sparse: se.Run, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"method": "reconstruction", "permute": permute, "calibration_samples": 40}
    whole = sparsify(sparse.path, tmp_path / "whole", device="cpu", **options)
    n_layers = len(capped(whole))
    assert n_layers > 1
    out = tmp_path / "run"
    with pytest.raises(KilledError):
        sparsify(sparse.path, out, device="cpu", **options, finished=kill_at(n_layers - 1))
    assert [one.name for one in out.iterdir()] == ["resume-sparsify"]
    told: list[LayerDone] = []
    done = sparsify(sparse.path, out, device="cpu", **options, finished=told.append)
    assert [one.resumed for one in told] == [True] * (n_layers - 1) + [False]
    assert done.report.n_resumed == n_layers - 1
    assert done.report.layers == whole.report.layers
    for file in ("model.safetensors", "masks.safetensors"):
        assert (done.run.path / file).read_bytes() == (whole.run.path / file).read_bytes()
    assert not (out / "resume-sparsify").exists()


@pytest.mark.parametrize("change", [{"method": "activation"}, {"seed": 1}, {"calibration_samples": 20}])
def test_layers_of_another_call_are_not_taken(change: dict[str, Any], dense: se.Run, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "reconstruction", "calibration_samples": 40, "device": "cpu"}
    with pytest.raises(KilledError):
        sparsify(dense.path, tmp_path / "run", **options, finished=kill_at(1))
    done = sparsify(dense.path, tmp_path / "run", **(options | change))
    assert done.report.n_resumed == 0


def test_fine_tuning_after_a_killed_call_starts_in_a_clean_folder(dense: se.Run, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "activation", "calibration_samples": 20, "finetune": 1}
    with pytest.raises(KilledError):
        sparsify(dense.path, tmp_path / "run", device="cpu", **options, finished=kill_at(1))
    done = sparsify(dense.path, tmp_path / "run", device="cpu", **options)
    check(done)
    assert done.report.n_resumed == 1
    assert not (tmp_path / "run" / "resume-sparsify").exists()


def test_fine_tuning_keeps_the_masks_and_gains(dense: se.Run, tmp_path: Path) -> None:
    once = sparsify(dense.path, tmp_path / "once", device="cpu")
    tuned = sparsify(dense.path, tmp_path / "tuned", finetune=2, device="cpu")
    check(tuned)
    masks = [load_file(run.run.path / "masks.safetensors") for run in (once, tuned)]
    assert masks[0].keys() == masks[1].keys()
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert [stage.name for stage in tuned.report.stages] == ["original", "sparsified", "fine-tuned"]
    validations = [stage.validation for stage in tuned.report.stages]
    assert validations[1] is not None
    assert validations[2] is not None
    assert validations[2].figure >= validations[1].figure
    assert (tuned.run.info.method, tuned.run.info.epochs) == ("sparsify-magnitude", 2)
    assert tuned.run.info.recipe["optimizer"]["lr"] == pytest.approx(
        0.1 * dense.info.recipe["optimizer"]["lr"]
    )
    assert tuned.run.info.recipe["learning_rate"]["schedule"] == "cosine"
    digits = tuple("0123456789")
    assert dense.info.task.labels == once.run.info.task.labels == tuned.run.info.task.labels == digits
    assert se.open_run(tuned.run.path).info.task.labels == digits
    se.build(tuned.run.path, tmp_path / "bundle", onnx="packed")


def test_masks_that_move_stay_under_the_pattern_and_keep_their_number(dense: se.Run, tmp_path: Path) -> None:
    once = sparsify(dense.path, tmp_path / "once", permute=True, device="cpu")
    moved = sparsify(dense.path, tmp_path / "moved", permute=True, finetune=2, moving=True, device="cpu")
    check(moved)
    masks = [load_file(run.run.path / "masks.safetensors") for run in (once, moved)]
    for name in masks[0]:
        assert int(masks[0][name].sum()) == int(masks[1][name].sum())
        assert not torch.equal(masks[0][name], masks[1][name])
    assert (moved.report.moving, once.run.info.density, moved.run.info.density) == (True, 0.5, 0.5)
    se.build(moved.run.path, tmp_path / "bundle", onnx="packed")


def test_masks_without_a_pattern_do_not_move_and_that_is_told_before_any_work(
    sparse: se.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[str] = []
    stage = pipeline.Work.stage

    def noted(own: pipeline.Work, name: str, seconds: float) -> Stage:
        began.append(name)
        return stage(own, name, seconds)

    monkeypatch.setattr(pipeline.Work, "stage", noted)
    with pytest.raises(UsageError, match="are sparse without a pattern"):
        sparsify(sparse.path, tmp_path / "run", finetune=1, moving=True, device="cpu")
    assert began == []
    assert not (tmp_path / "run").exists()


def test_what_was_sparsified_can_be_sparsified_again(dense: se.Run, tmp_path: Path) -> None:
    sparsify(dense.path, tmp_path / "once", device="cpu")
    again = sparsify(tmp_path / "once", tmp_path / "again", pattern="1:4", method="activation", device="cpu")
    masks = [load_file(tmp_path / name / "masks.safetensors") for name in ("once", "again")]
    for layer in again.report.layers:
        if layer.pattern:
            assert layer.pattern == "1:4"
            assert obeys(masks[1][layer.name], 1, NMPattern(n=1, m=4))
            assert not (masks[1][layer.name] & ~masks[0][layer.name]).any()


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_trained_sparse_stays_zero_where_it_is_zero(
    method: str, sparse: se.Run, tmp_path: Path
) -> None:
    done = sparsify(sparse.path, tmp_path / "run", method=method, device="cpu", calibration_samples=100)
    check(done)
    masks = [load_file(run / "masks.safetensors") for run in (sparse.path, tmp_path / "run")]
    assert masks[0].keys() == masks[1].keys()
    for name, mask in masks[1].items():
        assert not (mask & ~masks[0][name]).any()
        if name not in capped(done):
            assert torch.equal(mask, masks[0][name])
    assert done.run.info.density < sparse.info.density


def test_the_test_set_decides_nothing(tmp_path: Path) -> None:
    digits = data.load("digits")
    for name, factor in (("a", 1), ("b", 0)):
        np.savez(
            tmp_path / f"{name}.npz",
            x_train=digits.x_train.numpy(),
            y_train=digits.y_train.numpy(),
            x_test=digits.x_test.numpy() * factor,
            y_test=digits.y_test.numpy(),
        )
    for name in ("a", "b"):
        sparsify(
            "digits-cnn",
            tmp_path / name,
            weights="random",
            method="reconstruction",
            permute=True,
            data=f"npz:{tmp_path / name}.npz",
            calibration_samples=64,
            norms=True,
            device="cpu",
        )
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ("network.double()", UsageError, "1.weight .* is float64"),
        ("network[1].weight.data[0, 0] = float('nan')", ArtefactError, "1.weight .* holds NaN or infinity"),
    ],
)
def test_weights_of_another_type_or_without_a_number_are_told(
    change: str, error: type[Exception], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd_weights.py").write_text(
        "from torch import nn\n"
        "def factory():\n"
        "    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))\n"
        f"    {change}\n"
        "    return network\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_weights", raising=False)
    with pytest.raises(error, match=told):
        sparsify("odd_weights:factory", tmp_path / "run", input_shape=(1, 4, 4))
    assert not (tmp_path / "run").exists()


def test_a_network_that_is_random_in_evaluation_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "always_random.py").write_text(
        "from torch import nn\n"
        "from tests.graph.test_randomness import AlwaysDrops\n"
        "def factory():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(16, 16), AlwaysDrops(0.3), nn.Linear(16, 4))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"Sequential is random in evaluation mode, .* in 2: two runs"):
        sparsify("always_random:factory", tmp_path / "run", input_shape=(1, 4, 4))
    assert not (tmp_path / "run").exists()


def test_heads_that_only_training_has_stay_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two_heads.py").write_text(
        "from torch import nn\n"
        "class TwoHeads(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), "
        "nn.ReLU())\n"
        "        self.aux = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))\n"
        "        self.head = nn.Linear(32, 4)\n"
        "    def forward(self, x):\n"
        "        hidden = self.body(x)\n"
        "        return (self.head(hidden), self.aux(hidden)) if self.training else self.head(hidden)\n"
        "def factory():\n"
        "    return TwoHeads()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    done = sparsify("two_heads:factory", tmp_path / "run", input_shape=(1, 4, 4))
    assert capped(done) == ["body.1.weight", "body.3.weight"]
    reasons = {layer.name: layer.reason for layer in done.report.layers if layer.name.startswith("aux")}
    assert set(reasons) == {"aux.0.weight", "aux.2.weight"}
    assert all(reason == "the outputs do not hang on it in evaluation" for reason in reasons.values())
    se.build(tmp_path / "run", tmp_path / "bundle", onnx="packed")


def test_a_weight_that_is_multiplied_along_two_axes_stays_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tied_decoder.py").write_text(
        "from torch import nn\n"
        "class TiedDecoder(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.encoder, self.middle, self.out = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, "
        "4)\n"
        "    def forward(self, x):\n"
        "        x = self.encoder(x.flatten(1)).relu() @ self.encoder.weight\n"
        "        return self.out(self.middle(x).relu())\n"
        "def factory():\n"
        "    return TiedDecoder()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    done = sparsify("tied_decoder:factory", tmp_path / "run", input_shape=(1, 4, 4))
    assert capped(done) == ["middle.weight"]
    reason = next(layer.reason for layer in done.report.layers if layer.name == "encoder.weight")
    assert "along axis 1 in encoder, and along axis 0 in the network's own forward" in reason
    for pattern in (None, "2:4"):
        bundle = se.build(tmp_path / "run", tmp_path / f"bundle-{pattern}", pattern=pattern)
        assert {fact.name for fact in bundle.info.layers if fact.pattern} == {"middle.weight"}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.filterwarnings("ignore:The tensor attribute self.1.weight was assigned during export")
def test_layers_of_a_version_and_weights_computed_from_others_are_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "special_layers.py").write_text(
        "from torch import nn\n"
        "from tests.models.test_weights import Versioned\n"
        "def factory():\n"
        "    return nn.Sequential(\n"
        "        nn.Flatten(), nn.utils.weight_norm(nn.Linear(16, 32)), nn.ReLU(), Versioned(32, 32), "
        "nn.ReLU(),\n"
        "        nn.Linear(32, 4),\n"
        "    )\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    done = sparsify("special_layers:factory", tmp_path / "run", input_shape=(1, 4, 4))
    told = {layer.name: layer.reason for layer in done.report.layers}
    assert "computed at each call, from weight_g and weight_v" in told["1.weight"]
    for pattern in (None, "2:4"):
        bundle = se.build(tmp_path / "run", tmp_path / f"bundle-{pattern}", pattern=pattern)
        facts = {fact.name: fact for fact in bundle.info.layers}
        assert facts.keys() >= {"1.weight", "3.weight"}
        assert (facts["1.weight"].pattern, facts["1.weight"].why_dense) == (None, told["1.weight"])
    assert done.run.info.n_active == 32 * 32 // 2


def test_a_factory_with_its_own_weights_needs_no_data_but_a_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_sparsified.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "def factory():\n"
        "    torch.manual_seed(5)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), "
        "nn.Linear(24, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="shape of the inputs of own_sparsified:factory is not known"):
        sparsify("own_sparsified:factory", tmp_path / "run")
    done = sparsify("own_sparsified:factory", tmp_path / "run", permute=True, input_shape=(3, 2, 2))
    check(done)
    assert [stage.test for stage in done.report.stages] == [None, None, None]
    assert capped(done) == ["1.weight", "3.weight"]
    assert done.report.weights == {"from": "factory"}
    assert (done.run.info.data, done.run.info.signature.n_classes) == (None, 3)
    se.build(done.run.path, tmp_path / "bundle", onnx="packed")  # it is this user's, so nothing is asked
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "somebody-elses"))
    with pytest.raises(NotTrustedError, match="would run code"):
        sparsify(tmp_path / "run", tmp_path / "other", pattern="1:4")


def test_a_network_with_one_output_is_sparsified_without_a_score_and_not_on_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one_logit.py").write_text(
        "from torch import nn\n\n"
        "def factory():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))\n"
    )
    monkeypatch.chdir(tmp_path)
    x = np.zeros((40, 8, 8, 1), np.uint8)
    for n_classes in (1, 2):
        y = np.arange(40) % n_classes
        np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x, y_test=y)
        with pytest.raises(UsageError, match=r"one_logit:factory has one output, so its top-1 .*--data none"):
            sparsify("one_logit:factory", tmp_path / "run", data=f"npz:{tmp_path / 'd.npz'}", finetune=1)
        assert not (tmp_path / "run").exists()
    done = sparsify("one_logit:factory", tmp_path / "run", data="none", input_shape=(1, 8, 8))
    assert capped(done) == ["1.weight"]
    assert "no score was measured: no data were given" in str(done.report)


WIDE = """
import torch
from torch import nn


def factory():
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10)
    )
"""


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_too_wide_for_its_gram_matrix_goes_without_and_the_report_says_so(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wide_first.py").write_text(WIDE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(unfolding, "LARGEST_GRAM", 48**2)
    done = sparsify(
        "wide_first:factory",
        tmp_path / "run",
        data="digits",
        method=method,
        calibration_samples=20,
        errors=True,
        device="cpu",
    )
    check(done)
    wide, narrow, _ = done.report.layers
    assert wide.error is None
    assert "64 x 64 numbers" in wide.reason
    assert wide.pattern == "2:4"
    assert "error not measured" in wide.reason
    assert ("pruned by activation" in wide.reason) == (method == "reconstruction")
    assert wide.reason in str(done.report)
    assert narrow.error is not None
    assert (narrow.pattern, narrow.reason) == ("2:4", "")


UPSAMPLING = """
import torch
from torch import nn


def factory():
    torch.manual_seed(5)
    up = nn.ConvTranspose2d(64, 64, 2)
    return nn.Sequential(nn.Flatten(), nn.Unflatten(1, (64, 1, 1)), up, nn.Flatten(), nn.Linear(256, 10))
"""


@pytest.mark.parametrize("method", METHODS)
def test_a_transposed_convolution_is_calibrated_like_any_layer(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "upsampled.py").write_text(UPSAMPLING)
    monkeypatch.chdir(tmp_path)
    done = sparsify(
        "upsampled:factory",
        tmp_path / "run",
        data="digits",
        method=method,
        calibration_samples=20,
        errors=True,
        device="cpu",
    )
    first = done.report.layers[0]
    assert (first.name, first.pattern, first.reason) == ("2.weight", "2:4", "")
    assert obeys(load_file(done.run.path / "model.safetensors")["2.weight"], 0, TWO_FOUR)
    assert first.error is not None and 0 < first.error < 0.6


@pytest.mark.parametrize("finetune", [0, 1])
def test_a_network_whose_masks_are_all_empty_is_refused(
    finetune: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def emptied(*args: Any, **options: Any) -> Source:
        source = open_source(*args, **options)
        weights = maskable_parameters(source.network)
        masks = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in weights.items()}
        return replace(source, masks=masks)

    monkeypatch.setattr(torch_work, "open_source", emptied)
    with pytest.raises(UsageError, match="keep none of its weights"):
        sparsify(
            "digits-cnn",
            tmp_path / "run",
            weights="random",
            data="digits",
            finetune=finetune,
            calibration_samples=20,
            device="cpu",
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_weights_from_a_file_are_those_that_are_sparsified(form: str, tmp_path: Path) -> None:
    torch.manual_seed(77)
    state = models.create("digits-cnn").state_dict()
    file = tmp_path / "weights"
    save_file(state, file) if form == "safetensors" else torch.save(state, file)
    done = sparsify("digits-cnn", tmp_path / "run", weights=str(file))
    got = load_file(tmp_path / "run" / "model.safetensors")
    for name in capped(done):
        assert torch.equal(got[name], state[name] * largest_per_group(state[name], 1, TWO_FOUR))
    assert done.report.weights["from"] == "file"
    assert len(done.report.weights["sha256"]) == 64


def test_a_layer_that_is_named_stays_dense(dense: se.Run, tmp_path: Path) -> None:
    every = capped(sparsify(dense.path, tmp_path / "every", device="cpu"))
    kept = every[0]
    done = sparsify(dense.path, tmp_path / "run", keep_dense=[kept], device="cpu")
    layer = next(layer for layer in done.report.layers if layer.name == kept)
    assert (layer.pattern, layer.reason) == (None, "it was named to stay dense")
    assert capped(done) == every[1:]
    with pytest.raises(UsageError, match="keep_dense names 'nothing'"):
        sparsify(dense.path, tmp_path / "other", keep_dense=["nothing"], device="cpu")
    with pytest.raises(UsageError, match="has no layer for the pattern 2:4"):
        sparsify(dense.path, tmp_path / "other", keep_dense=every, device="cpu")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.full
def test_a_large_network_of_torchvision_is_sparsified_and_reordered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few rounds of the search and small images; what is left is mostly the proof in float64."""
    monkeypatch.setitem(permute.DEFAULT_ROUNDS, "magnitude", 3)
    done = sparsify("resnet18", tmp_path / "run", weights="random", permute=True, input_shape=(3, 64, 64))
    check(done)
    assert len(capped(done)) == 17  # the last layer is as wide as the others, and gets the pattern too
    assert done.report.permuted_spaces > 5
    assert 0 < done.report.output_difference < 1e-10
    for layer in done.report.layers:
        if layer.pattern:
            assert layer.kept_share is not None
            assert layer.kept_in_order is not None
            assert layer.kept_share > layer.kept_in_order


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("digits-cnn", {}, "comes without weights"),
        ("digits-cnn", {"weights": "nowhere"}, "no file nowhere"),
        ("digits-cnn", {"weights": "pretrained"}, "no published weights of digits-cnn"),
        ("own.module:factory", {"weights": "random"}, "decides about its weights itself"),
        ("digits-cm", {}, "no model named 'digits-cm'"),
        ("no/such/run", {}, "does not exist"),
        ("digits-cnn", {"weights": "random", "pattern": "4:2"}, "pattern 4:2"),
        ("digits-cnn", {"weights": "random", "method": "wanda"}, "no method named 'wanda'"),
        ("digits-cnn", {"weights": "random", "method": "activation"}, "--data NAME"),
        ("digits-cnn", {"weights": "random", "method": "reconstruction", "data": "none"}, "--data NAME"),
        ("digits-cnn", {"weights": "random", "finetune": 1}, "Fine-tuning trains on data"),
        ("digits-cnn", {"weights": "random", "norms": True}, "re-estimated on data"),
        ("digits-cnn", {"weights": "random", "moving": True}, "--moving was given without --finetune"),
        ("digits-cnn", {"weights": "random", "data": "digits", "calibration_samples": 0}, "is 0"),
        ("digits-cnn", {"weights": "random", "finetune": -1, "data": "digits"}, "finetune is -1"),
        ("digits-cnn", {"weights": "random", "input_shape": (3, 8, 8)}, "cannot take inputs"),
        ("digits-cnn", {"weights": "random", "data": "digits", "input_shape": (1, 9, 9)}, "One shape"),
        ("lenet5", {"weights": "random", "data": "digits"}, "cannot take inputs of shape"),
    ],
)
def test_what_cannot_be_meant_is_told_before_anything_is_written(
    model: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        sparsify(model, tmp_path / "run", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_run_has_weights_of_its_own_and_its_folder_is_not_overwritten(
    dense: se.Run, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="has weights of its own"):
        sparsify(dense.path, tmp_path / "run", weights="random")
    with pytest.raises(UsageError, match="already holds a run"):
        sparsify(dense.path, dense.path)


def test_a_run_whose_data_are_absent_or_others_says_so_and_can_do_without(
    tmp_path: Path, dense: se.Run
) -> None:
    digits = data.load("digits")

    def save(shift: int) -> None:
        np.savez(
            tmp_path / "own.npz",
            x_train=digits.x_train.numpy(),
            y_train=digits.y_train.numpy(),
            x_test=digits.x_test.numpy() // (1 + shift),
            y_test=digits.y_test.numpy(),
        )

    save(0)
    recipe = load_recipe("digits", changes={"dense": True, "epochs": 1, "data": f"npz:{tmp_path}/own.npz"})
    run = train(recipe, tmp_path / "trained", device="cpu")
    save(1)
    with pytest.raises(ArtefactError, match="The data differ from those that the run"):
        sparsify(run.path, tmp_path / "a", device="cpu")
    (tmp_path / "own.npz").unlink()
    with pytest.raises(DataNotFound):
        sparsify(run.path, tmp_path / "b", device="cpu")
    done = sparsify(run.path, tmp_path / "c", data="none", device="cpu")
    assert (done.run.info.data, done.run.info.test, done.report.n_calibration) == (None, None, 0)


def test_a_permutation_that_changes_what_is_answered_is_not_accepted(
    dense: se.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(module: torch.nn.Module, *arguments: Any, **named: Any) -> Any:
        report = permute_network(module, *arguments, **named)
        with torch.no_grad():
            next(iter(maskable_parameters(module).values())).mul_(-1)
        return report

    monkeypatch.setattr("sparse_export.oneshot.pipeline.permute_network", wrong)
    with pytest.raises(GateFailed, match="With its channels permuted"):
        sparsify(dense.path, tmp_path / "run", permute=True, device="cpu")
    assert not (tmp_path / "run").exists()


def test_the_same_call_gives_the_same_bytes(dense: se.Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        sparsify(dense.path, tmp_path / name, method="reconstruction", permute=True, device="cpu")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert one == other
