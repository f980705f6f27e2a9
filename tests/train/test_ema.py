"""The average of the weights over the steps."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import sparse_export as se
from sparse_export.errors import Interrupted
from sparse_export.train.ema import Ema
from sparse_export.train.loop import train
from sparse_export.train.observer import SilentObserver
from tests.train.test_loop import outcome, small


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)


def network() -> Small:
    torch.manual_seed(0)
    return Small()


def test_the_average_is_that_of_the_formula() -> None:
    model = network()
    ema = Ema(model, 0.9)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(1, 8):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * step)
        model.norm(torch.randn(8, 4))  # moves the running statistics
        ema.step()
        decay = min(0.9, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
    assert ema.average.keys() == {name for name, value in expected.items() if value.is_floating_point()}
    for name, value in ema.average.items():
        torch.testing.assert_close(value, expected[name])


def test_a_weight_that_two_layers_share_is_averaged_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert list(Ema(model, 0.5).average) == ["0.weight", "0.bias", "1.bias"]


def test_masked_weights_leave_the_average_too() -> None:
    model = network()
    ema = Ema(model, 0.9)
    mask = torch.rand(4, 3) < 0.5
    ema.mask({"fc.weight": mask})
    assert not ema.average["fc.weight"][~mask].any()
    assert torch.equal(ema.average["fc.weight"][mask], model.fc.weight[mask])


def test_swapping_in_shows_the_average_and_gives_every_bit_back_whatever_happens() -> None:
    model = network()
    ema = Ema(model, 0.9)
    with torch.no_grad():
        model.fc.weight.add_(1)
    ema.step()
    own = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="within"), ema.swapped_in():
        assert torch.equal(model.fc.weight, ema.average["fc.weight"])
        assert not torch.equal(model.fc.weight, own["fc.weight"])
        raise RuntimeError("within")
    for name, value in model.state_dict().items():
        assert torch.equal(value, own[name])


def test_a_run_saves_the_average_which_keeps_to_the_masks(tmp_path: Path) -> None:
    run = train(small(ema=0.95), tmp_path / "averaged", device="cpu")
    train(small(), tmp_path / "plain", device="cpu")
    averaged, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("averaged", "plain"))
    masks = load_file(tmp_path / "averaged" / "masks.safetensors")
    assert outcome(tmp_path / "averaged")[1] == outcome(tmp_path / "plain")[1]  # training itself is the same
    for name, mask in masks.items():
        assert not torch.equal(averaged[name], plain[name])
        assert not averaged[name][~mask].any()
    state = load_file(tmp_path / "averaged" / "resume" / "state.safetensors")
    for name in masks:
        assert torch.equal(
            state[f"model.{name}"], plain[name]
        )  # what resuming goes on from is not the average
    # What is on record is the accuracy of what was saved: building and validating hold it to that.
    bundle = se.build(run, tmp_path / "bundle")
    validation = se.validate(bundle, max_drop=0.0)
    assert validation.score == run.info.test
    assert validation.parity_ok


def test_a_stopped_run_with_an_average_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    recipe = small(ema=0.95, sparsity={"update_every": 7})
    train(recipe, tmp_path / "unbroken", device="cpu")

    class StopAt(SilentObserver):
        def stepped(self, step: int, loss: torch.Tensor) -> None:
            if step == 30:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "broken", device="cpu", observer=StopAt())
    assert json.loads((tmp_path / "broken" / "run.json").read_text())["status"] == "running"
    train(None, tmp_path / "broken", resume=True)
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "unbroken")
