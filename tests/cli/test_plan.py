"""`plan`, and training by what it chose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_export.plan.timing import ProductTiming, Timings, write_timings
from tests.cli.conftest import Call


@pytest.fixture
def timings(tmp_path: Path) -> Path:
    """Of digits-cnn at batch 4, in float32 by the reference: the hidden Linear is faster as 2:4, by a made-up third."""
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
