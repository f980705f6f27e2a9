"""A network that draws random numbers in evaluation is told as one, with where it does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its customary name
from torch import Tensor, nn

from sparse_export.building import build
from sparse_export.building.golden import golden_pair
from sparse_export.errors import UsageError
from sparse_export.graph.example import example_of_shape, make_example
from sparse_export.graph.randomness import require_deterministic
from sparse_export.runtimes.torch_session import TorchSession
from sparse_export.signature import class_signature
from tests.making_runs import network_and_masks, save_run


class AlwaysDrops(nn.Module):
    """Dropout that does not ask for the mode."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Counts(nn.Module):
    """Changes from call to call without a random number."""

    n_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.n_calls += 1
        return x * self.n_calls


class DrawsForNothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * torch.rand_like(x)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (AlwaysDrops(0.3), r"random in evaluation mode, drawing random numbers by \w+ in 1: two runs"),
        (Noisy(), r"by randn_like in 1: two runs on one input differ by"),
        (Counts(), r"random in evaluation mode: two runs on one input differ by"),
    ],
)
def test_a_network_that_is_random_in_evaluation_is_told_with_where(part: nn.Module, told: str) -> None:
    network = nn.Sequential(nn.Linear(4, 8), part, nn.Linear(8, 3)).eval()
    with pytest.raises(UsageError, match=told):
        require_deterministic(network, example_of_shape((4,)))


@pytest.mark.parametrize("part", [nn.Dropout(0.5), AlwaysDrops(0.0), DrawsForNothing(), nn.BatchNorm1d(8)])
def test_a_network_that_answers_the_same_each_time_passes(part: nn.Module) -> None:
    require_deterministic(
        nn.Sequential(nn.Linear(4, 8), part, nn.Linear(8, 3)).eval(), example_of_shape((4,))
    )


def test_a_golden_pair_is_made_of_no_such_network() -> None:
    network = nn.Sequential(nn.Linear(4, 3), AlwaysDrops(0.3)).eval()
    with pytest.raises(UsageError, match="The network gives another logits each time it runs"):
        golden_pair(TorchSession(network, class_signature((4,), 3)))


def test_a_build_tells_of_it_before_anything_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, masks = network_and_masks()
    run = save_run(tmp_path / "run", module, masks)
    random = nn.Sequential(module, AlwaysDrops(0.3)).eval()
    building = sys.modules["sparse_export.building.graph"]
    monkeypatch.setattr(building, "network_of_run", lambda *_, **__: random)
    monkeypatch.setattr(building, "masks_of_run", lambda *_, **__: {})
    monkeypatch.setattr(building, "onnx_from_module", lambda *_, **__: pytest.fail("it was exported"))
    with pytest.raises(UsageError, match="random in evaluation mode"):
        build(run)


class TakesIds(nn.Module):
    """Takes integers and a scale by keyword, and gives two tensors in a mapping."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.table, self.drops = nn.Embedding(9, 4), AlwaysDrops(p)

    def forward(self, ids: Tensor, *, scale: float) -> dict[str, Tensor | None]:
        rows = self.table(ids)
        return {"plain": rows, "none": None, "scaled": self.drops(rows) * scale}


def test_any_inputs_and_outputs_are_run() -> None:
    ids = torch.arange(8).reshape(2, 4)
    quiet, loud = TakesIds(0.0).eval(), TakesIds(0.5).eval()
    require_deterministic(quiet, make_example(quiet, (), {"ids": ids, "scale": 2.0}))
    with pytest.raises(UsageError, match=r"by \w+ in drops: two runs on one input"):
        require_deterministic(loud, make_example(loud, (), {"ids": ids, "scale": 2.0}))
