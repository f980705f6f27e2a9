"""Training that begins at given weights and masks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import sparse_export as se
from sparse_export import models
from sparse_export.errors import ArtefactError, Interrupted
from sparse_export.formats.run import read_run_info
from sparse_export.sparsity.pattern import NMPattern, largest_per_group, obeys
from sparse_export.train.layers import maskable_parameters
from sparse_export.train.loop import train
from sparse_export.train.observer import SilentObserver
from sparse_export.train.recipe import Recipe, load_recipe
from sparse_export.train.starting_point import StartingPoint
from sparse_export.train.stopping import Stop

TWO_FOUR = NMPattern(n=2, m=4)


def made() -> tuple[Recipe, StartingPoint]:
    torch.manual_seed(11)
    network = models.create("digits-cnn")
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    layers = maskable_parameters(network)
    capped = next(name for name, value in layers.items() if value.dim() == 2 and value.shape[1] % 4 == 0)
    masks = {capped: largest_per_group(weights[capped], 1, TWO_FOUR)}
    recipe = load_recipe(
        "digits",
        changes={
            "epochs": 2,
            "optimizer": {"lr": 0.01},
            "sparsity": {
                "density": 0.5,
                "start": "uniform",
                "rescale": False,
                "prune_rate": 0.0,
                "final_prune_rate": 0.0,
                "keep_dense": [name for name in layers if name != capped],
            },
        },
    )
    start = StartingPoint(
        weights=weights, masks=masks, n_outputs=10, method="sparsify-test", patterns={capped: "2:4"}
    )
    return recipe, start


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> se.Run:
    recipe, start = made()
    return train(recipe, tmp_path_factory.mktemp("begun") / "run", device="cpu", start=start)


def files(run: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return load_file(run / "model.safetensors"), load_file(run / "masks.safetensors")


def test_masks_stay_what_they_were_and_the_run_says_what_it_promises(unbroken: se.Run) -> None:
    _, start = made()
    weights, masks = files(unbroken.path)
    (name,) = start.masks
    assert masks.keys() == {name}
    assert torch.equal(masks[name], start.masks[name])
    assert obeys(weights[name], 1, TWO_FOUR)
    assert not torch.equal(weights[name], start.weights[name] * masks[name])
    assert unbroken.info.method == "sparsify-test"
    assert {layer.name: layer.pattern for layer in unbroken.info.layers if layer.pattern} == {name: "2:4"}


class StopAt(SilentObserver):
    def __init__(self, step: int, stop: Stop) -> None:
        self.step, self.stop = step, stop

    def stepped(self, step: int, loss: Tensor) -> None:
        self.stop.requested = step == self.step


@pytest.mark.parametrize("step", [1, 25])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    step: int, unbroken: se.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, start = made()
    stop = Stop()

    class Signals:
        def __enter__(self) -> Stop:
            return stop

        def __exit__(self, *_: object) -> None:
            pass

    with monkeypatch.context() as patch:
        patch.setattr("sparse_export.train.loop.stop_signals", lambda **_: Signals())
        with pytest.raises(Interrupted):
            train(recipe, tmp_path / "run", device="cpu", start=start, observer=StopAt(step, stop))
    resumed = train(None, tmp_path / "run", device="cpu", resume=True)
    for got, wanted in zip(files(resumed.path), files(unbroken.path), strict=True):
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert (resumed.info.method, resumed.info.layers) == (unbroken.info.method, unbroken.info.layers)


def test_the_start_itself_is_saved_so_that_a_killed_run_does_not_begin_at_fresh_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, start = made()

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sparse_export.train.session.Session._train_epoch", die)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "run", device="cpu", start=start)
    assert read_run_info(tmp_path / "run").status == "running"
    state = load_file(tmp_path / "run" / "resume" / "state.safetensors")
    (name,) = start.masks
    assert torch.equal(state[f"model.{name}"], start.weights[name] * start.masks[name])
    shutil.rmtree(tmp_path / "run" / "resume")
    with pytest.raises(ArtefactError, match=r"is missing.*did not begin at fresh weights"):
        train(None, tmp_path / "run", device="cpu", resume=True)
