"""A loop of somebody's own around a network that torch.compile compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel

import sparse_export as se


class Scaled(nn.Module):
    """Called by keyword, with a second input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.last(self.first(x).relu()) * scale  # type: ignore[no-any-return]


def compiled_before(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    made: nn.Module = torch.compile(model, backend="eager", fullgraph=True)  # type: ignore[assignment]
    return made, made


def compiled_after(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    return model, compiled_before(model)[0]


def compiled_in_place(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    model.compile(backend="eager", fullgraph=True)
    return model, model


@pytest.mark.parametrize("way", [compiled_before, compiled_after, compiled_in_place])
def test_its_run_knows_the_inputs_of_the_first_batch(
    way: Callable[[nn.Module], tuple[nn.Module, nn.Module]], tmp_path: Path
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    given, called = way(Scaled())
    optimizer = AdamW(given.parameters(), lr=1e-3)
    trainer = se.SparseTraining(given, optimizer, density=0.5, total_steps=6, update_every=2)
    trainer.attach()
    for _ in range(6):
        optimizer.zero_grad()
        called(x=torch.randn(5, 8), scale=torch.ones(5, 1)).square().mean().backward()
        optimizer.step()
    assert trainer.n_updates == 2
    run = trainer.run(tmp_path / "run")
    assert [one.name for one in run.info.signature.inputs] == ["x", "scale"]


def test_no_batch_is_held_after_its_step() -> None:
    torch._dynamo.reset()
    given, called = compiled_before(Scaled())
    optimizer = AdamW(given.parameters(), lr=1e-3)
    trainer = se.SparseTraining(given, optimizer, density=0.5, total_steps=6, update_every=None)
    for _ in range(3):
        called(x=torch.randn(5, 8), scale=torch.ones(5, 1)).square().mean().backward()
        trainer.step()
    assert trainer._seen._compiled is None


def test_an_average_of_a_compiled_network_is_masked() -> None:
    given, _ = compiled_before(Scaled())
    average = AveragedModel(given)
    trainer = se.SparseTraining(given, AdamW(given.parameters(), lr=1e-3), density=0.5, total_steps=6)
    trainer.mask_also(average)
    found = {name.split("_orig_mod.")[1]: value for name, value in average.named_parameters()}
    for name, mask in trainer.masks.items():
        assert not found[name][~mask].any()
