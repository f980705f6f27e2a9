"""Layers of a torch network are chosen by the score of its run's data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sparse_export as se
from sparse_export.errors import UsageError
from sparse_export.oneshot import sparsify
from sparse_export.train.loop import train
from sparse_export.train.recipe import load_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> se.Run:
    recipe = load_recipe("digits", changes={"dense": True, "epochs": 4})
    return train(recipe, tmp_path_factory.mktemp("dense") / "run", device="cpu")


@pytest.mark.parametrize("method", ["magnitude", "activation", "reconstruction"])
def test_layers_are_chosen_on_validation_samples(run: se.Run, tmp_path: Path, method: str) -> None:
    done = sparsify(run.path, tmp_path / "run", method=method, max_drop=3, device="cpu")
    choice = done.report.choice
    assert choice is not None
    assert choice.held_back.startswith("validation samples")
    assert run.info.data is not None and (
        run.info.data.n_validation == choice.n_searched + choice.dense.n_samples
    )
    sparse = {one.name for one in choice.layers if one.sparse}
    assert sparse == {layer.name for layer in done.report.layers if layer.pattern}
    before, after = done.report.stages[0].validation, done.report.stages[-1].validation
    assert before is not None and after is not None
    point = next(one for one in choice.curve if abs(one.share - choice.share) < 1e-9)
    if choice.weights == "first walk":  # the network has the very weights that were scored
        n_searched = round(point.score / 100 * choice.n_searched)
        assert after.n_correct == (choice.sparse.n_correct or 0) + n_searched
    assert choice.sparse.worse_by(choice.dense) <= 3
    assert choice.test is not None and choice.test.n_samples == run.info.data.n_test
    masks = load_file(done.run.path / "masks.safetensors")
    assert {name for name, mask in masks.items() if not bool(mask.all())} == sparse
    told = json.loads((done.run.path / "sparsify.json").read_text())
    assert told["choice"]["share"] == choice.share
    assert done.report.n_calibration == (0 if method == "magnitude" else 512)


@pytest.mark.parametrize("max_drop", [None, 3])
def test_biases_of_the_recovered_layers_go_back_into_the_network(
    run: se.Run, tmp_path: Path, max_drop: float | None
) -> None:
    done = sparsify(
        run.path,
        tmp_path / "run",
        method="reconstruction",
        recover="streams,bias",
        max_drop=max_drop,
        device="cpu",
    )
    found = done.report.recovery
    assert found is not None
    assert found.kept
    before, after = (load_file(one.path / "model.safetensors") for one in (run, done.run))
    sparse = {layer.name for layer in done.report.layers if layer.pattern}
    assert sparse
    for name in before:
        if name.endswith(".bias"):
            changed = name.replace(".bias", ".weight") in sparse
            assert bool((before[name] != after[name]).any()) is changed
    first, last = done.report.stages[0].test, done.report.stages[-1].test
    assert first is not None and last is not None
    assert last.figure > first.figure - 0.05
    assert json.loads((done.run.path / "sparsify.json").read_text())["recovery"]["kept"]


def test_it_is_fine_tuned_afterwards_and_keeps_the_choice(run: se.Run, tmp_path: Path) -> None:
    done = sparsify(run.path, tmp_path / "run", max_drop="5%", finetune=1, device="cpu")
    told = json.loads((done.run.path / "sparsify.json").read_text())
    assert told["stages"][-1]["name"] == "fine-tuned"
    assert told["choice"]["max_drop"] == "5%"


def test_without_a_validation_part_training_samples_that_are_left_are_taken(tmp_path: Path) -> None:
    recipe = load_recipe("digits", changes={"dense": True, "epochs": 1, "validation_fraction": 0.0})
    dense = train(recipe, tmp_path / "dense", device="cpu")
    done = sparsify(dense.path, tmp_path / "run", max_drop=50, calibration_samples=64, device="cpu")
    assert done.report.choice is not None
    assert done.report.choice.held_back.startswith("training samples")


def test_without_data_there_is_nothing_to_choose_by(run: se.Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no data to score on"):
        sparsify(run.path, tmp_path / "run", data="none", max_drop=1, device="cpu")
    with pytest.raises(UsageError, match="--norms are both given"):
        sparsify(run.path, tmp_path / "run", norms=True, max_drop=1, device="cpu")
    assert not (tmp_path / "run").exists()


def test_masks_of_a_sparse_run_stay_zero(tmp_path: Path) -> None:
    recipe = load_recipe("digits", changes={"epochs": 1, "sparsity": {"density": 0.3}})
    sparse = train(recipe, tmp_path / "sparse", device="cpu")
    done = sparsify(sparse.path, tmp_path / "run", method="reconstruction", max_drop=20, device="cpu")
    before = load_file(sparse.path / "model.safetensors")
    after = load_file(done.run.path / "model.safetensors")
    for name, weight in before.items():
        if weight.ndim > 1:
            assert not bool(torch.any((weight == 0) & (after[name] != 0))), name
