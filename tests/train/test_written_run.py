"""What the run of somebody's own loop refuses, reports and leaves out when it is written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

import sparse_export as se
from sparse_export.errors import UsageError

MODULE = '''
import torch
from torch import nn


class Net(nn.Module):
    """With an auxiliary head, which only training calls."""

    def __init__(self, width=32):
        super().__init__()
        self.first, self.aux, self.last = nn.Linear(8, width), nn.Linear(width, 2), nn.Linear(width, 4)

    def forward(self, x):
        x = self.first(x).relu()
        return (self.last(x), self.aux(x)) if self.training else self.last(x)
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "written_nets", raising=False)
    (tmp_path / "written_nets.py").write_text(MODULE)
    return tmp_path


def trained(model: nn.Module, n: int = 6, **settings: Any) -> se.SparseTraining:
    optimizer = AdamW(model.parameters(), lr=1e-3)
    trainer = se.SparseTraining(
        model, optimizer, **{"density": 0.5, "total_steps": 6, "update_every": 2, **settings}
    )
    for _ in range(n):
        optimizer.zero_grad()
        outputs: tuple[Tensor, ...] = model(torch.randn(6, 8))
        sum(one.square().mean() for one in outputs).backward()  # type: ignore[union-attr]
        trainer.step()
    return trainer


def test_a_factory_of_another_network_is_refused_while_the_weights_are_still_there(here: Path) -> None:
    from written_nets import Net  # type: ignore[import-not-found]

    trainer = trained(Net(width=16))
    with pytest.raises(UsageError, match=r"first\.weight has shape \(16, 8\) instead of \(32, 8\).*def wide"):
        trainer.run(here / "run", model="written_nets:Net")
    with pytest.raises(UsageError, match="has no 'Nett'"):
        trainer.run(here / "run", model="written_nets:Nett")
    assert not (here / "run").exists()


def test_a_head_that_evaluation_does_not_use_is_recorded_as_dense_and_the_run_is_built(here: Path) -> None:
    from written_nets import Net

    trainer = trained(Net())
    run = trainer.run(here / "run", model="written_nets:Net")
    found = {layer.name: layer for layer in run.info.layers}
    assert not found["aux.weight"].masked and "evaluation" in str(found["aux.weight"].why_dense)
    assert found["first.weight"].masked and found["last.weight"].masked
    assert not torch.isnan(trainer.model.get_parameter("aux.weight")).any()
    assert se.build(run, here / "bundle").info.n_nonzero > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"density": 0.1, "start_density": 0.5}, r"density 0\.\d+ in place of 0\.1\d*, after 6 of 40 steps"),
        (
            {"density": None, "pattern": "2:4", "small_share": 0.0, "approach": (0.0, 0.7)},
            "[34] weights of a group in place",
        ),
    ],
)
def test_a_run_before_the_end_of_its_schedule_is_warned_of(
    settings: dict[str, Any], said: str, here: Path
) -> None:
    from written_nets import Net

    trainer = trained(Net(), total_steps=40, **settings)
    with pytest.warns(UserWarning, match=said):
        trainer.run(here / "run", model="written_nets:Net")


@pytest.mark.parametrize(("total_steps", "n_updates"), [(40, 19), (1000, 19)])
def test_masks_move_in_a_short_training_too(total_steps: int, n_updates: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = AdamW(model.parameters(), lr=1e-3)
    trainer = se.SparseTraining(model, optimizer, density=0.5, total_steps=total_steps)
    assert trainer.update_every == {40: 2, 1000: 50}[total_steps]
    for _ in range(total_steps):
        optimizer.zero_grad()
        model(torch.randn(6, 8)).square().mean().backward()
        trainer.step()
    assert trainer.n_updates == n_updates


@pytest.mark.parametrize(
    ("total_steps", "every"),
    [
        (np.int64(100), 5),
        (2, 1),
        (19, 1),
        (20, 1),
        (999, 49),
        (np.int32(1000), 50),
        (10_000, 500),
        (99_999, 500),
    ],
)
def test_the_interval_of_a_training_below_10000_steps_is_a_twentieth(total_steps: int, every: int) -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = AdamW(model.parameters(), lr=1e-3)
    trainer = se.SparseTraining(model, optimizer, density=0.5, total_steps=total_steps)
    assert trainer.update_every == every


def test_a_network_most_of_which_gets_no_mask_is_warned_of() -> None:
    from torch.nn.utils.parametrizations import weight_norm

    normed = nn.Sequential(
        weight_norm(nn.Linear(8, 64)), nn.ReLU(), weight_norm(nn.Linear(64, 64)), nn.Linear(64, 4)
    )
    with pytest.warns(
        UserWarning, match=r"Only 256 weights are masked, and 4,608 stay dense\. 0\.weight: .* Likewise 2"
    ):
        se.SparseTraining(normed, AdamW(normed.parameters()), density=0.5)
    recurrent = nn.ModuleDict({"first": nn.Linear(8, 16), "rnn": nn.GRU(16, 32)})
    with pytest.warns(UserWarning, match=r"rnn\.weight_ih_l0: GRU is masked by no method"):
        se.SparseTraining(recurrent, AdamW(recurrent.parameters()), density=0.5)


def test_objects_in_place_of_names_and_folders_are_refused(here: Path) -> None:
    from written_nets import Net

    trainer = trained(Net())
    with pytest.raises(UsageError, match=r"data is an object of type list.*data='my_module:data'"):
        trainer.run(here / "run", task="regression", data=[1, 2])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"SparseTraining is no run.*trainer\.run"):
        se.build(trainer, here / "bundle")  # type: ignore[arg-type]
