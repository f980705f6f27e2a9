"""`plan`, and training by what it chose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparse_export.errors import GateFailed
from sparse_export.formats.bundle import open_bundle
from sparse_export.formats.layer_plan import read_layer_plan
from sparse_export.formats.run import open_run
from sparse_export.formats.timings import ProductTiming, Timings, write_timings
from sparse_export.plan import network as plan_of_network
from sparse_export.plan.network import verify_plan
from tests.cli.conftest import Call, Made


@pytest.fixture
def timings(tmp_path: Path) -> Path:
    """Of digits-cnn at batch 4, in float32 by the reference: the hidden Linear is faster as 2:4, by a made-up
    third.
    """
    file = tmp_path / "timings.json"
    dense_ms = tuple(0.3 + 0.001 * (i % 3) for i in range(24))
    product = ProductTiming(
        n_outputs=64,
        n_inputs=256,
        n_rows=4,
        dense_ms=dense_ms,
        sparse_ms=tuple(ms / 1.5 for ms in dense_ms),
    )
    write_timings(
        file,
        Timings(
            model="digits-cnn",
            device="made up",
            dtype="float32",
            backend="reference",
            batch=4,
            model_ms=(1.0,) * 24,
            products=(product,),
            machine={},
            cards={},
            versions={},
            created="2026-11-25T00:00:00+00:00",
        ),
    )
    return file


def _plan(call: Call, timings: Path, *words: object) -> Any:
    return call("plan", "digits-cnn", "--batch", 4, "--timings", timings, *words)


def test_without_a_card_or_timings_a_plan_ends_with_5(call: Call) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    result = call("plan", "vit-b-16", "--json")
    assert (result.exit_code, json.loads(result.stdout)["error"]["type"]) == (5, "MissingCapability")
    assert "--timings" in result.stderr


def test_a_plan_is_written_and_trained_by(call: Call, timings: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    result = _plan(call, timings, "--out", plan, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert json.loads(plan.read_text()) == document
    chosen = [layer["name"] for layer in document["layers"] if layer["sparse"]]
    assert len(chosen) == 1
    assert document["expected_speedup"] == pytest.approx(1 / 0.9, rel=0.01)

    run = tmp_path / "run"
    words = ("train", "digits", "--plan", plan, "--epochs", 1, "--device", "cpu", "--out", run, "--json")
    trained = call(*words)
    assert trained.exit_code == 0, trained.stderr
    found = json.loads(trained.stdout)
    assert found["patterns"] == {chosen[0]: "2:4"}
    assert set(found["why_dense"].values()) == {"it was named to stay dense"}


def _why_dense(plan: Path) -> dict[str, str]:
    return {
        layer["name"]: f"the plan leaves it dense: {layer['why']}"
        for layer in json.loads(plan.read_text())["layers"]
        if not layer["sparse"]
    }


def test_sparsify_prunes_what_a_plan_chose_and_gives_its_reasons_for_the_rest(
    made: Made, call: Call, timings: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    assert _plan(call, timings, "--out", plan).exit_code == 0
    run = tmp_path / "run"
    words = ("sparsify", made.dense_run, "--data", "none", "--plan", plan, "--out", run, "--json")
    result = call(*words)
    assert result.exit_code == 0, result.stderr
    layers = json.loads(result.stdout)["layers"]
    why = _why_dense(plan)
    assert len(why) == len(layers) - 1 > 0
    assert {one["name"]: one["reason"] for one in layers if one["pattern"] is None} == why
    assert {one.name: one.why_dense for one in open_run(run).info.layers if one.why_dense} == why


def test_build_fits_what_a_plan_chose_and_gives_its_reasons_for_the_rest(
    made: Made, call: Call, timings: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    assert _plan(call, timings, "--out", plan).exit_code == 0
    document = json.loads(plan.read_text())
    for layer in document["layers"]:  # of this network only the second convolution can be permuted
        layer["sparse"] = layer["name"] == "conv2.weight"
    plan.write_text(json.dumps(document))
    out = tmp_path / "bundle"
    words = ("build", made.dense_run, "--plan", plan, "--max-cut", 0.5, "--data-dir", tmp_path, "--out", out)
    result = call(*words)
    assert result.exit_code == 0, result.stderr
    fitted = open_bundle(out).info.fitted
    assert fitted is not None
    why = _why_dense(plan)
    assert {one.name: one.reason for one in fitted.layers if one.road == "dense"} == why
    (chosen,) = (one for one in fitted.layers if one.road != "dense")
    assert chosen.name not in why
    for reason in why.values():
        assert reason in result.stdout


def test_a_plan_is_for_two_four_and_for_its_own_network(
    made: Made, call: Call, timings: Path, tmp_path: Path
) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    assert _plan(call, timings, "--out", plan).exit_code == 0
    for words in (
        ("build", made.dense_run, "--plan", plan, "--pattern", "1:4"),
        ("sparsify", made.dense_run, "--data", "none", "--plan", plan, "--pattern", "1:4"),
    ):
        result = call(*words, "--out", out)
        assert (result.exit_code, "1:4" in result.stderr) == (2, True)
    other = call("sparsify", "lenet5", "--weights", "random", "--plan", plan, "--out", out)
    assert (other.exit_code, "a plan for digits-cnn" in other.stderr) == (2, True)
    assert not out.exists()


def test_a_plan_may_not_take_back_what_a_run_promises(
    made: Made, call: Call, timings: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    assert _plan(call, timings, "--out", plan).exit_code == 0
    run = tmp_path / "run"
    assert call("sparsify", made.dense_run, "--data", "none", "--out", run).exit_code == 0
    result = call("build", run, "--plan", plan, "--out", tmp_path / "bundle")
    assert (result.exit_code, "the plan leaves it dense" in result.stderr) == (2, True)
    document = json.loads(plan.read_text())
    document["layers"][0] |= {"name": "elsewhere.weight", "sparse": False}
    plan.write_text(json.dumps(document))
    result = call("build", made.dense_run, "--plan", plan, "--out", tmp_path / "bundle")
    assert (result.exit_code, "leaves elsewhere.weight dense" in result.stderr) == (2, True)


def test_a_speed_up_out_of_reach_ends_with_4(call: Call, timings: Path) -> None:
    assert _plan(call, timings, "--speedup", 3).exit_code == 4


@pytest.mark.parametrize(
    "words", [("--speedup", 0.5), ("--max-sparse-loss", 2), ("--speedup", 1.1, "--max-sparse-loss", 0.1)]
)
def test_requirements_without_meaning_are_wrong_usage(
    words: tuple[object, ...], call: Call, timings: Path
) -> None:
    assert _plan(call, timings, *words).exit_code == 2


def test_damaged_timings_end_with_6(call: Call, timings: Path) -> None:
    timings.write_text("{}")
    assert _plan(call, timings).exit_code == 6


def test_training_takes_only_a_plan_for_its_own_network_and_one_that_chose_something(
    call: Call, timings: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    assert _plan(call, timings, "--out", plan).exit_code == 0
    other = call("train", "mnist-lenet5", "--plan", plan, "--out", tmp_path / "run")
    assert (other.exit_code, "digits-cnn" in other.stderr) == (2, True)
    document = json.loads(plan.read_text())
    for layer in document["layers"]:
        layer["sparse"] = False
    plan.write_text(json.dumps(document))
    nothing = call("train", "digits", "--plan", plan, "--out", tmp_path / "run")
    assert (nothing.exit_code, "every layer dense" in nothing.stderr) == (2, True)
    assert call("train", "digits", "--plan", tmp_path / "no.json", "--out", tmp_path / "run").exit_code == 2
    for words in (("--dense",), ("--pattern", "1:4")):
        assert call("train", "digits", "--plan", plan, *words, "--out", tmp_path / "run").exit_code == 2


def test_a_plan_is_verified_by_what_it_was_made_for_and_written_before(
    timings: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, asked = tmp_path / "plan.json", []

    def fails(network: nn.Module, shape: tuple[int, ...], possible: Any, planned: Any, **options: Any) -> Any:
        asked.append((shape, tuple(possible), tuple(planned), options))
        raise GateFailed("Something else was computed.")

    monkeypatch.setattr(plan_of_network, "require_gpu", lambda: None)
    monkeypatch.setattr(plan_of_network, "measure_whole", fails)
    result = _plan(call, timings, "--out", out, "--verify", "--rounds", 21)
    assert (result.exit_code, "Something else was computed" in result.stderr) == (3, True)
    plan = read_layer_plan(out)  # which is not lost with its verification
    ((shape, possible, planned, options),) = asked
    assert (shape, planned) == ((1, 8, 8), plan.sparse)
    assert planned == possible == ("fc1.weight",)
    assert (options["batch"], options["rounds"], options["backend"]) == (plan.batch, 21, plan.backend)
    assert options["dtype"] == getattr(torch, plan.dtype)
    with pytest.raises(GateFailed):
        verify_plan("digits-cnn", plan)
