"""RigL-ITOP, GraNet and the switches that let a training explore, against loops that are slow and obvious."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import sparse_export as se
from sparse_export.errors import Interrupted, RecipeError, UsageError
from sparse_export.sparsity import layer_counts
from sparse_export.sparsity import prune_rate as scheduled_rate
from sparse_export.train.cost import cost_of, layer_macs, training_macs
from sparse_export.train.exploration import Exploration
from sparse_export.train.loop import train
from sparse_export.train.methods import METHODS
from sparse_export.train.pruning_memory import PruningMemory
from sparse_export.train.recipe import Recipe, load_recipe
from sparse_export.train.sparsity_config import SparsityConfig
from sparse_export.train.update_schedule import with_own_interval
from tests.train.test_loop import outcome
from tests.train.test_methods import Stopping, backward, batch, copies, counts, network, take_steps

STEPS, EVERY = 40, 5
Masks = dict[str, Tensor]


def trainer(method: str = "sparse-momentum", **settings: Any) -> se.SparseTraining:
    model = network()
    every: dict[str, Any] = {"density": 0.1, "total_steps": STEPS, "update_every": EVERY, "prune_rate": 0.5}
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    return se.SparseTraining(model, optimizer, method=method, **(every | settings))


# Loops: Python numbers, one entry at a time. No two magnitudes are equal in what they are given.


def dropped_smallest(weights: dict[tuple[str, int], float], active: set[tuple[str, int]], n: int) -> None:
    """Take the n smallest |weight| out of `active`, one after the other."""
    for _ in range(n):
        smallest = min(active, key=lambda at: abs(weights[at]))
        active.remove(smallest)


def rigl_by_loop(
    weights: dict[tuple[str, int], float], scores: dict[tuple[str, int], float], masks: Masks, rate: float
) -> set[tuple[str, int]]:
    """Of each layer its smallest go, and as many come where |score| is largest of what is then inactive."""
    active: set[tuple[str, int]] = set()
    for name, mask in masks.items():
        here = {(name, at) for at, kept in enumerate(mask.flatten().tolist()) if kept}
        n = math.ceil(rate * len(here))
        dropped_smallest(weights, here, n)
        inactive = {(name, at) for at in range(mask.numel())} - here
        for _ in range(n):
            largest = max(inactive, key=lambda at: abs(scores[at]))
            inactive.remove(largest)
            here.add(largest)
        active |= here
    return active


def entries(tensors: dict[str, Tensor]) -> dict[tuple[str, int], float]:
    return {
        (name, at): value
        for name, tensor in tensors.items()
        for at, value in enumerate(tensor.detach().flatten().tolist())
    }


def active_of(masks: Masks) -> set[tuple[str, int]]:
    return {at for at, kept in entries(masks).items() if kept}


def watched(sparse: se.SparseTraining) -> list[dict[str, Any]]:
    """What stood before each update: masks, weights, gradients, steps."""
    seen: list[dict[str, Any]] = []

    def note() -> None:
        parameters = {name: sparse.model.get_parameter(name) for name in sparse.masks}
        seen.append(
            {
                "masks": copies(sparse.masks),
                "weights": entries({name: value.detach() for name, value in parameters.items()}),
                "gradients": entries(
                    {name: torch.as_tensor(value.grad) for name, value in parameters.items()}
                ),
                "step": sparse.n_steps,
            }
        )

    sparse.before_update(note)
    return seen


def test_rigl_itop_does_what_the_loop_does_until_the_end() -> None:
    sparse = trainer("rigl-itop")
    seen = watched(sparse)
    for step in range(STEPS):
        n_before = sparse.n_updates
        take_steps(sparse, 1, step)
        if sparse.n_updates > n_before:
            was = seen[-1]
            rate = 0.005 + 0.495 * (1 + math.cos(math.pi * was["step"] / STEPS)) / 2
            wanted = rigl_by_loop(was["weights"], was["gradients"], was["masks"], rate)
            assert active_of(sparse.masks) == wanted
    assert [was["step"] for was in seen] == [5, 10, 15, 20, 25, 30, 35]


def test_granet_does_what_the_loop_does() -> None:
    """Down to the cubic density over all layers together, then pruned and grown in each."""
    sparse = trainer("granet")
    assert sum(counts(sparse)) == round(0.5 * sparse.n_masked)
    n_weights, n_last = sparse.n_masked, round(0.1 * sparse.n_masked)
    end = math.ceil(110 / 160 * STEPS)
    seen = watched(sparse)
    for step in range(STEPS):
        n_before = sparse.n_updates
        take_steps(sparse, 1, step)
        if sparse.n_updates == n_before:
            continue
        was = seen[-1]
        progress = min(was["step"] / end, 1)
        density = n_last / n_weights + (0.5 - n_last / n_weights) * (1 - progress) ** 3
        left = active_of(was["masks"])
        dropped_smallest(was["weights"], left, len(left) - max(round(density * n_weights), n_last))
        masks = {
            name: torch.tensor([(name, at) in left for at in range(mask.numel())]).view(mask.shape)
            for name, mask in sparse.masks.items()
        }
        rate = 0.005 + 0.495 * (1 + math.cos(math.pi * was["step"] / STEPS)) / 2
        assert active_of(sparse.masks) == rigl_by_loop(was["weights"], was["gradients"], masks, rate)
    assert [was["step"] for was in seen] == [5, 10, 15, 20, 25, end, 30, 35]
    assert sum(counts(sparse)) == n_last == sparse.n_active


@pytest.mark.parametrize(("method", "share"), [("rigl-itop", 4000 / 97_750), ("granet", 1000 / 62_560)])
def test_a_method_with_an_interval_of_its_own_takes_its_share_of_the_training(
    method: Any, share: float
) -> None:
    own = with_own_interval(SparsityConfig(method=method, density=0.1), 54_000)
    assert own.update_every == round(share * 54_000)
    assert (
        with_own_interval(SparsityConfig(method=method, density=0.1, update_every=7), 54_000).update_every
        == 7
    )
    assert with_own_interval(SparsityConfig(method=method, density=0.1), 3).update_every == 1
    assert with_own_interval(SparsityConfig(method="rigl", density=0.1), 54_000).update_every == 0


@pytest.mark.parametrize("method", ["sparse-momentum", "set", "rigl", "rigl-itop", "dsr"])
def test_the_density_falls_from_above_by_the_cubic_schedule(method: str) -> None:
    sparse = trainer(method, start_density=0.6, falls_until=0.5)
    model = network()
    shapes = {name: tuple(model.get_parameter(name).shape) for name in sparse.masks}
    assert counts(sparse) == list(layer_counts(shapes, 0.6, "erdos-renyi").values())
    n_last = round(0.1 * sparse.n_masked)
    for step in range(1, STEPS + 1):
        take_steps(sparse, 1, step)
        if step % EVERY == 0 and step <= STEPS - EVERY:
            final = n_last / sparse.n_masked
            wanted = final + (0.6 - final) * (1 - min(step / 20, 1)) ** 3
            assert sum(counts(sparse)) == round(wanted * sparse.n_masked)
    assert sum(counts(sparse)) == n_last


def test_masks_that_were_active_at_some_time_and_mean_densities_are_those_of_a_loop() -> None:
    sparse = trainer("set", start_density=0.4)
    ever = active_of(sparse.masks)
    assert sparse.explored == pytest.approx(len(ever) / sparse.n_masked)
    sums = dict.fromkeys(sparse.masks, 0)
    for step in range(STEPS):
        for name, mask in sparse.masks.items():
            sums[name] += int(mask.sum())
        take_steps(sparse, 1, step)
        ever |= active_of(sparse.masks)
        assert sparse.explored == pytest.approx(len(ever) / sparse.n_masked)
    assert len(ever) > sparse.n_active * 2
    found = sparse.mean_densities
    assert found is not None
    for name, mask in sparse.masks.items():
        assert found[name] == pytest.approx(sums[name] / STEPS / mask.numel())


def test_a_state_that_does_not_know_the_past_says_so() -> None:
    sparse = trainer("set")
    take_steps(sparse, 12)
    state = sparse.state_dict()
    for key in ("ever", "active_steps"):
        del state[key]
    sparse.load_state_dict(state)
    take_steps(sparse, 6, 12)
    assert sparse.explored is None
    assert sparse.mean_densities is None
    assert "ever" not in sparse.state_dict()


def test_what_was_explored_survives_a_state() -> None:
    masks = {"a": torch.tensor([[True, False], [False, False]])}
    first, second = Exploration(masks), Exploration(masks)
    moved = {"a": torch.tensor([[False, True], [True, False]])}
    first.moved(moved, 3)
    second.take_over(first.table(5), moved, 5)
    assert second.share() == first.share() == 0.75
    assert second.mean_densities(7) == first.mean_densities(7) == {"a": (3 * 1 + 4 * 2) / 7 / 4}


# The switches


def test_growth_by_the_mean_gradient_is_that_of_a_loop_and_begins_anew_after_an_update() -> None:
    sparse = trainer("rigl", growth="mean-gradient")
    sums: dict[tuple[str, int], float] = {}
    seen = watched(sparse)
    for step in range(2 * EVERY):
        backward(sparse.model, step)
        gradients = {name: torch.as_tensor(sparse.model.get_parameter(name).grad) for name in sparse.masks}
        for at, value in entries(gradients).items():
            sums[at] = sums.get(at, 0.0) + value
        n_before = sparse.n_updates
        rate = scheduled_rate(step + 1, STEPS * 3 // 4, initial=0.5, final=0.0)
        sparse.step()
        if sparse.n_updates > n_before:
            was = seen[-1]
            assert active_of(sparse.masks) == rigl_by_loop(was["weights"], sums, was["masks"], rate)
            sums = {}
    assert len(seen) == 2


def test_growth_by_the_mean_gradient_needs_it_in_every_step() -> None:
    sparse = trainer("rigl", growth="mean-gradient")
    take_steps(sparse, 1)
    sparse.model.zero_grad()
    with pytest.raises(UsageError, match="has no gradient"):
        sparse.step()


def test_the_prune_rate_follows_the_learning_rate() -> None:
    sparse = trainer(prune_schedule="learning-rate", final_prune_rate=0.1)
    for rate, wanted in ((0.05, 0.5), (0.025, 0.3), (0.0, 0.1), (0.4, 0.5)):
        sparse.optimizer.param_groups[0]["lr"] = rate
        assert sparse.prune_rate == pytest.approx(wanted)
    assert trainer(prune_schedule="learning-rate", total_steps=None).prune_rate == 0.5


def test_a_weight_is_pruned_by_its_magnitude_over_past_updates() -> None:
    weight = nn.Parameter(torch.tensor([4.0, -1.0, 0.0, 2.0]))
    memory = PruningMemory(0.75, {"w": weight})
    first = memory.magnitudes()
    assert first["w"].tolist() == [4, 1, 0, 2]
    memory.keep(first, {"w": torch.tensor([True, True, False, False])})
    with torch.no_grad():
        weight.copy_(torch.tensor([0.4, -3.0, 0.5, 2.0]))
    second = memory.magnitudes()["w"].tolist()
    assert second == pytest.approx([0.75 * 4 + 0.25 * 0.4, 0.75 * 1 + 0.25 * 3, 0.5, 2.0])


def test_history_changes_what_is_pruned_and_none_is_the_method_as_it_was() -> None:
    ends = []
    for history in (0.0, 0.9):
        sparse = trainer("set", history=history)
        seen = watched(sparse)
        take_steps(sparse, STEPS)
        ends.append(active_of(sparse.masks))
        assert len(seen) == 7
    plain = trainer("set")
    take_steps(plain, STEPS)
    assert ends[0] == active_of(plain.masks)
    assert ends[0] != ends[1]


# What a training multiplies


def test_training_multiply_adds_are_those_of_the_papers_formula() -> None:
    """2 f_S + f_D where the gradient is dense in every step; (3 f_S dT + 2 f_S + f_D) / (dT + 1) in some."""
    assert training_macs({"a": 100.0}, {"a": 0.1}, 1.0) == pytest.approx(2 * 10 + 100)
    assert training_macs({"a": 100.0}, {"a": 0.1}, 1 / 101) == pytest.approx((30 * 100 + 20 + 100) / 101)
    assert training_macs({"a": 100.0, "b": 7.0}, {"a": 0.1}, 0.0) == pytest.approx(30 + 21)


def test_multiply_adds_of_layers_are_those_of_a_loop() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.ConvTranspose2d(6, 2, 2),
        nn.Flatten(),
        nn.Linear(2 * 4 * 4, 5),
    )
    found = layer_macs(model, torch.randn(3, 2, 8, 8))
    assert found == {
        "0.weight": 8 * 8 * 4 * (2 // 2) * 9,
        "1.weight": 3 * 3 * 6 * 4 * 9,
        "2.weight": 3 * 3 * 6 * 2 * 4,
        "4.weight": 32 * 5,
    }


@pytest.mark.parametrize(
    ("method", "dense_share"),
    [("sparse-momentum", 1.0), ("set", 0.0), ("rigl", 5 / STEPS), ("static", 0.0), ("magnitude", 0.0)],
)
def test_a_trainings_cost_counts_the_gradients_that_growth_reads(method: str, dense_share: float) -> None:
    sparse = trainer(method)
    take_steps(sparse, STEPS)
    cost = cost_of(
        sparse.model,
        batch(0)[0],
        sparse,
        n_steps=STEPS,
        batch_size=16,
        freeze=METHODS[method].freeze,
    )
    means = sparse.mean_densities
    assert means is not None
    assert cost.macs is not None
    wanted = 0.0
    for name, mask in sparse.masks.items():
        active = means[name] * mask.numel()
        wanted += 3 * active + (mask.numel() - active) * dense_share
    assert cost.macs == pytest.approx(wanted * STEPS * 16)
    assert cost.dense_macs == pytest.approx(3 * sparse.n_masked * STEPS * 16)
    if method == "rigl":
        assert sparse.n_updates == 5


# Bad input


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"start_density": 0.05}, "below the density 0.1 at the end"),
        ({"start_density": 1.5}, "start_density is 1.5"),
        ({"start_density": 0.5, "falls_until": 0.0}, "falls_until is 0.0"),
        ({"falls_until": 0.5}, "the density does not fall"),
        ({"start_density": 0.5, "falls_until": 0.9, "freeze": 0.8}, "arrives before masks stand still"),
        ({"method": "static", "start_density": 0.5}, "does not fall by it"),
        ({"method": "magnitude", "start_density": 0.5}, "does not fall by it"),
        ({"start_density": 0.5, "pattern": "2:4"}, "there is a pattern"),
        ({"start_density": 0.5, "products": "csr"}, "exclude each other"),
        ({"growth": "mean-gradient", "products": "csr"}, "exclude each other"),
        ({"method": "granet", "pattern": "2:4"}, "takes no pattern"),
        ({"method": "granet", "products": "csr"}, "products 'csr' need masks"),
        ({"history": 1.0}, "From 0 to below 1"),
        ({"history": "much"}, "history"),
        ({"prune_schedule": "rate"}, "prune_schedule is 'rate'"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe("digits", changes={"sparsity": {"density": 0.1, **settings}})


def test_a_density_that_falls_needs_the_length_of_the_training() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(UsageError, match="falls over the length of the training"):
        se.SparseTraining(model, optimizer, density=0.1, start_density=0.5)


# Resumed runs


def exploring(**sparsity: Any) -> Recipe:
    return load_recipe("digits", changes={"epochs": 3, "sparsity": {"density": 0.1, **sparsity}})


@pytest.mark.parametrize(
    "sparsity",
    [
        {"start_density": 0.5, "history": 0.5, "growth": "mean-gradient", "update_every": 7},
        {"prune_schedule": "learning-rate", "history": 0.9},
    ],
    ids=str,
)
def test_an_interrupted_run_with_switches_ends_with_the_bytes_of_an_unbroken_one(
    sparsity: dict[str, Any], tmp_path: Path
) -> None:
    whole = train(exploring(**sparsity), tmp_path / "whole", device="cpu")
    n_steps = whole.info.n_steps // 3
    for stop in (n_steps, 2 * n_steps - 3):
        with pytest.raises(Interrupted):
            train(
                exploring(**sparsity) if stop == n_steps else None,
                tmp_path / "broken",
                device="cpu",
                resume=stop != n_steps,
                observer=Stopping(stop),
            )
    again = train(None, tmp_path / "broken", device="cpu", resume=True)
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
    assert again.info.cost == whole.info.cost
    lines = [
        [json.loads(line)["explored"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "broken")
    ]
    assert lines[0] == lines[1]
    assert lines[0][-1] > 0.1


def test_a_dense_run_records_what_it_multiplied(tmp_path: Path) -> None:
    run = train(load_recipe("digits", changes={"epochs": 1, "dense": True}), tmp_path / "run", device="cpu")
    cost = run.info.cost
    assert cost is not None
    assert (cost.mean_density, cost.explored, cost.macs_share) == (1, 1, 1)
