"""What `train` and `build` say at their end about speed on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sparse_export.building.bundle import build
from sparse_export.building.gain import gain_of_bundle, gain_of_run
from sparse_export.formats.run import read_run_info
from sparse_export.train.loop import train
from sparse_export.train.recipe import load_recipe


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One trained by each preset, of one epoch."""
    folder = tmp_path_factory.mktemp("runs")
    for preset in ("default", "compact"):
        every = {"update_every": 3} if preset == "compact" else {}
        changes = {"epochs": 1, "sparsity": {"density": 0.1, **every}}
        train(load_recipe("digits", preset=preset, changes=changes), folder / preset, device="cpu")
    return {preset: folder / preset for preset in ("default", "compact")}


def test_train_names_the_preset_or_the_build_that_gains(runs: dict[str, Path]) -> None:
    assert "--preset compact" in gain_of_run(read_run_info(runs["default"]), "runs/a")
    assert "sparse-export build runs/a --compact" in gain_of_run(read_run_info(runs["compact"]), "runs/a")


def test_nothing_is_said_of_dense_networks_patterns_and_what_was_not_trained_here(
    runs: dict[str, Path],
) -> None:
    info = read_run_info(runs["default"])
    layers = tuple(replace(layer, pattern="2:4") for layer in info.layers)
    for other in (
        replace(info, density=1.0),
        replace(info, method="sparsify"),
        replace(info, layers=layers),
    ):
        assert gain_of_run(other, "runs/a") == ""


def test_build_names_the_preset_until_channels_were_removed(runs: dict[str, Path], tmp_path: Path) -> None:
    whole = build(runs["default"], tmp_path / "whole").info
    assert "--compact removes empty channels" in gain_of_bundle(whole)
    assert "--preset compact" in gain_of_bundle(whole)
    compacted = build(runs["compact"], tmp_path / "compacted", compact=True).info
    found = compacted.compacted
    assert found is not None
    assert found.n_weights_after < 0.5 * found.n_weights_before
    assert gain_of_bundle(compacted) == ""
    few = replace(compacted, compacted=replace(found, n_weights_after=found.n_weights_before - 1))
    assert gain_of_bundle(few).startswith("few channels were empty; ")
