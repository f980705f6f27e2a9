"""The update against traces of the reference implementation (see tests/golden/README.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_export.sparsity import MaskUpdate, update_masks

GOLDEN = Path(__file__).parents[1] / "golden"
TRACES = [(optimizer, update) for optimizer in ("sgd", "adam") for update in range(3)]


class Trace:
    """One update of one trace: what went in, and the reference's numbers by layer."""

    def __init__(self, optimizer: str, update: int) -> None:
        with np.load(GOLDEN / f"mask_update_{optimizer}.npz", allow_pickle=False) as file:
            self._arrays: dict[str, Any] = dict(file)
        self._prefix = f"u{update}"
        self.names: list[str] = [str(name) for name in self._arrays["names"]]
        self.rate = float(self._arrays["rates"][update])
        self.is_adam = optimizer == "adam"

    def tensor(self, name: str, key: str) -> Tensor:
        return torch.from_numpy(self._arrays[f"{self._prefix}.{name}.{key}"])

    def number(self, name: str, key: str) -> float:
        return float(self._arrays[f"{self._prefix}.{name}.{key}"])

    def score(self, name: str) -> Tensor:
        if self.is_adam:
            return self.tensor(name, "exp_avg") / (self.tensor(name, "exp_avg_sq").sqrt() + 1e-8)
        return self.tensor(name, "momentum_buffer")

    def update(self) -> MaskUpdate:
        return update_masks(
            {name: self.tensor(name, "weight_before") for name in self.names},
            {name: self.score(name) for name in self.names},
            {name: self.tensor(name, "mask_before").bool() for name in self.names},
            prune_rate=self.rate,
        )


@pytest.fixture(params=TRACES, ids=lambda trace: f"{trace[0]}-u{trace[1]}")
def trace(request: pytest.FixtureRequest) -> Trace:
    return Trace(*request.param)


def test_the_shares_are_the_references_to_float32_accuracy(trace: Trace) -> None:
    result = trace.update()
    for name in trace.names:
        assert float(result.shares[name]) == pytest.approx(trace.number(name, "share"), rel=1e-6), name


def test_the_prune_rate_of_each_layer_is_the_references(trace: Trace) -> None:
    result = trace.update()
    assert {name: float(rate) for name, rate in result.prune_rates.items()} == {
        name: trace.number(name, "prune_rate_used") for name in trace.names
    }


def test_as_many_weights_are_removed_as_in_the_reference(trace: Trace) -> None:
    result = trace.update()
    assert {name: int(removed) for name, removed in result.n_removed.items()} == {
        name: int(trace.number(name, "removed")) for name in trace.names
    }


def test_the_masks_after_pruning_are_the_references_bit_for_bit(trace: Trace) -> None:
    result = trace.update()
    for name in trace.names:
        assert torch.equal(result.pruned[name], trace.tensor(name, "mask_pruned").bool()), name


def test_the_grown_positions_are_the_front_of_the_references_ranking(trace: Trace) -> None:
    result = trace.update()
    for name in trace.names:
        inactive = ~trace.tensor(name, "mask_pruned").bool().flatten()
        ranking = trace.score(name).abs().flatten().masked_fill(~inactive, -1.0).argsort(descending=True)
        expected = set(ranking[: int(result.n_grown[name])].tolist())
        born = result.masks[name] & ~result.pruned[name]
        assert set(born.flatten().nonzero().flatten().tolist()) == expected, name


def test_where_both_grow_the_smaller_growth_is_contained_in_the_larger(trace: Trace) -> None:
    result = trace.update()
    for name in trace.names:
        ours, theirs = result.masks[name], trace.tensor(name, "mask_after").bool()
        assert int((ours & theirs).sum()) == min(int(ours.sum()), int(theirs.sum())), name


def test_all_that_was_removed_grows_where_the_reference_only_approaches_it(trace: Trace) -> None:
    result = trace.update()
    before = sum(int(trace.tensor(name, "mask_before").sum()) for name in trace.names)
    assert sum(int(mask.sum()) for mask in result.masks.values()) == before
