"""The best epoch of a training, by the validation score of its task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_export.errors import Interrupted, RecipeError, UsageError
from sparse_export.formats.run import open_run
from sparse_export.formats.score import Score
from sparse_export.models.run_network import masks_of_run, network_of_run
from sparse_export.sparsity.compressed import TWO_FOUR
from sparse_export.sparsity.pattern import obeys
from sparse_export.train.best_state import BestState
from sparse_export.train.loop import train
from sparse_export.train.metrics import read_metrics
from sparse_export.train.observer import SilentObserver
from sparse_export.train.recipe import Recipe, recipe_from_table

NETS = """
from torch import nn

def line(): return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
"""


@pytest.fixture(autouse=True)
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "line_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    generator = np.random.default_rng(0)
    x = generator.standard_normal((400, 8)).astype(np.float32)
    y = x[:, 0] - x[:, 1]
    np.savez(tmp_path / "line.npz", x_train=x[:300], y_train=y[:300], x_test=x[300:], y_test=y[300:])


def recipe(folder: Path, **changes: Any) -> Recipe:
    """Learning so fast from the fourth epoch on that later ones are worse."""
    table = {
        "model": "line_nets:line",
        "data": f"npz:{folder / 'line.npz'}",
        "task": "regression",
        "epochs": 6,
        "batch_size": 30,
        "dense": True,
        "keep": "best",
        "optimizer": {"name": "adam", "lr": 0.01},
        "learning_rate": {"drops": [0.5], "factor": 300.0},
    }
    return recipe_from_table(table | changes, source="of the test")


def scores(run: Path) -> list[float]:
    return [line["validation_score"] for line in read_metrics(run)]


def test_the_epoch_with_the_least_error_is_kept(tmp_path: Path) -> None:
    run = train(recipe(tmp_path), tmp_path / "run", device="cpu")
    found = scores(run.path)
    best = int(np.argmin(found))
    assert 0 < best < 5, found  # an error goes down: the largest would be another epoch
    assert run.info.kept_epoch == best + 1 and open_run(run.path).info.kept_epoch == best + 1
    assert run.info.validation is not None and run.info.validation.figure == found[best]
    last = train(recipe(tmp_path, keep="last"), tmp_path / "last", device="cpu")
    assert last.info.kept_epoch is None
    assert last.info.validation is not None and last.info.validation.figure == found[-1]


def test_a_share_goes_up(tmp_path: Path) -> None:
    task = {"model": "digits-cnn", "data": "digits", "task": "classification", "epochs": 3}
    rate = {"optimizer": {"lr": 0.3}, "batch_size": 400, "learning_rate": {"schedule": "constant"}}
    run = train(recipe(tmp_path, **task, **rate), tmp_path / "run", device="cpu")
    found = scores(run.path)
    assert run.info.kept_epoch == int(np.argmax(found)) + 1
    assert run.info.validation is not None and run.info.validation.figure == max(found)


def test_only_epochs_with_the_pattern_of_the_end_count(tmp_path: Path) -> None:
    sparsity = {"pattern": "2:4", "approach": [0.0, 0.7], "small_share": 0.0}
    made = recipe(tmp_path, dense=False, sparsity=sparsity)
    run = train(made, tmp_path / "run", device="cpu")
    assert run.info.kept_epoch is not None and run.info.kept_epoch >= 4
    found = scores(run.path)
    assert min(found[:3]) < found[run.info.kept_epoch - 1]  # a denser epoch was better
    network = network_of_run(open_run(run.path))
    mask = masks_of_run(open_run(run.path), network)["0.weight"]
    assert obeys(mask, 1, TWO_FOUR) and not network.get_parameter("0.weight")[~mask].any()
    layers = {layer.name: layer.n_active for layer in run.info.layers}
    assert layers["0.weight"] == int(mask.sum())


@pytest.mark.parametrize("changes", [{}, {"ema": 0.8}])
def test_a_resumed_run_keeps_the_same_epoch_to_the_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    class StopsAt(SilentObserver):
        def stepped(self, step: int, loss: Tensor) -> None:
            if step == 44:
                raise KeyboardInterrupt

    whole = train(recipe(tmp_path, **changes), tmp_path / "whole", device="cpu")
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        train(recipe(tmp_path, **changes), tmp_path / "cut", device="cpu", observer=StopsAt())
    again = train(None, tmp_path / "cut", device="cpu", resume=True)
    assert whole.info.kept_epoch == again.info.kept_epoch and whole.info.kept_epoch is not None
    states = [network_of_run(open_run(one.path)).state_dict() for one in (whole, again)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert whole.info.validation is not None
    assert whole.info.validation.figure == min(scores(whole.path))


def test_an_equal_score_beats_nothing(tmp_path: Path) -> None:
    best = BestState(tmp_path, resumed=False)
    error = Score(name="RMSE", value=1.0, n_samples=3, higher_is_better=False)
    assert best.is_beaten_by(error)
    best.keep(torch.nn.Linear(1, 1), {}, error, 1, write=True)
    assert not best.is_beaten_by(error)
    assert best.is_beaten_by(Score(name="RMSE", value=0.9, n_samples=3, higher_is_better=False))
    assert (BestState(tmp_path, resumed=True).epoch, BestState(tmp_path, resumed=True).score) == (1, error)


def test_the_best_of_no_validation_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="keep 'best' chooses by the validation part"):
        recipe(tmp_path, validation_fraction=0.0)
    (tmp_path / "line_data.py").write_text(
        "import numpy as np\n"
        "x = np.ones((60, 8), 'float32')\n"
        "data = {'train': [(one, 0.5) for one in x], 'test': [(one, 0.5) for one in x]}\n"
    )
    made = recipe(tmp_path, data="line_data:data", validation_fraction=0.0)
    with pytest.raises(UsageError, match="no validation part to choose by"):
        train(made, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
