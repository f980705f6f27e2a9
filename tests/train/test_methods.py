"""The methods that sparse momentum is compared with: what each does to its masks, and that each resumes."""

from __future__ import annotations

import ast
import json
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import click
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD, Adam

import sparse_export as se
from sparse_export.cli.train import command
from sparse_export.errors import Interrupted, RecipeError, UnknownNameError, UsageError
from sparse_export.sparsity import NMPattern
from sparse_export.sparsity.pattern import obeys
from sparse_export.train.loop import train
from sparse_export.train.methods import METHODS, OWN_LOOP_METHODS, MethodName
from sparse_export.train.methods.snip import snip_masks
from sparse_export.train.methods.sparse_evolution import random_scores
from sparse_export.train.observer import SilentObserver
from sparse_export.train.recipe import Recipe, load_recipe
from tests.train.test_loop import outcome

MOVING = ("set", "rigl", "dsr")
STEPS, EVERY = 40, 5


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 4))


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 20, generator=torch.Generator().manual_seed(step))
    return x, x[:, :4].argmax(1)


def backward(model: nn.Module, step: int) -> None:
    x, y = batch(step)
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()


def trainer(method: str, **settings: Any) -> se.SparseTraining:
    model = network()
    every: dict[str, Any] = {"density": 0.2, "total_steps": STEPS, "update_every": EVERY, "prune_rate": 0.3}
    if method == "snip":
        masks = snip_masks(
            model, lambda: nn.functional.cross_entropy(model(batch(0)[0]), batch(0)[1]), density=0.2
        )
        every |= {"masks": masks, "density": None}
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    return se.SparseTraining(model, optimizer, method=method, **(every | settings))


def take_steps(sparse: se.SparseTraining, n_steps: int, first: int = 0) -> None:
    for step in range(first, first + n_steps):
        backward(sparse.model, step)
        sparse.step()


def counts(sparse: se.SparseTraining) -> list[int]:
    return [int(mask.sum()) for mask in sparse.masks.values()]


def copies(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: mask.clone() for name, mask in masks.items()}


def test_recipes_and_the_command_line_know_every_method_by_name() -> None:
    (option,) = (each for each in command.params if each.name == "method")
    assert isinstance(option.type, click.Choice)
    assert [*get_args(MethodName)] == [*METHODS] == [*option.type.choices]


def test_nothing_outside_of_the_methods_compares_with_the_name_of_one() -> None:
    """What a method decides is asked of the method. `magnitude` and `dense` are words of other things too."""
    names = set(METHODS) - {"magnitude", "dense"}
    checkout = Path(se.__file__).resolve().parent.parent
    methods = checkout / "train" / "methods"
    found = [
        f"{path.relative_to(checkout)}:{node.lineno}"
        for folder in ("sparse_export", "train", "models", "cli")
        for path in (checkout / folder).rglob("*.py")
        if not path.is_relative_to(methods)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Compare)
        and any(isinstance(part, ast.Constant) and part.value in names for part in ast.walk(node))
    ]
    assert found == []


@pytest.mark.parametrize("method", MOVING)
def test_masks_move_the_count_is_exact_and_inactive_weights_are_zero(method: str) -> None:
    sparse = trainer(method)
    start, wanted = copies(sparse.masks), sum(counts(sparse))
    for step in range(STEPS):
        take_steps(sparse, 1, step)
        assert sum(counts(sparse)) == wanted == sparse.n_active
        for name, mask in sparse.masks.items():
            assert not sparse.model.get_parameter(name)[~mask].any()
    assert any((mask ^ start[name]).any() for name, mask in sparse.masks.items())


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_set_and_rigl_leave_every_layer_its_count(method: str) -> None:
    sparse = trainer(method)
    before = counts(sparse)
    take_steps(sparse, STEPS)
    assert sparse.n_updates > 3
    assert counts(sparse) == before


def test_rigl_grows_where_the_last_gradient_is_largest_and_freezes_at_three_quarters() -> None:
    sparse = trainer("rigl")
    take_steps(sparse, EVERY - 1)
    backward(sparse.model, EVERY - 1)
    gradients = {name: sparse.model.get_parameter(name).grad for name in sparse.masks}
    before = copies(sparse.masks)
    sparse.step()
    for name, mask in sparse.masks.items():
        gradient = gradients[name]
        assert gradient is not None
        born = gradient.abs()[mask & ~before[name]]
        passed_over = gradient.abs()[~mask & ~before[name]]
        assert not born.numel() or not passed_over.numel() or passed_over.max() <= born.min()
    take_steps(sparse, STEPS - EVERY, EVERY)
    assert sparse.n_updates == STEPS * 3 // 4 // EVERY - 1
    assert sparse.is_frozen
    assert sparse.prune_rate == pytest.approx(0.0)


def test_what_set_grows_hangs_on_the_seed_and_the_step_alone() -> None:
    parameters = dict(network().named_parameters())
    one, same, other_step, other_seed = (
        random_scores(parameters, seed, step)["0.weight"] for seed, step in ((3, 5), (3, 5), (3, 6), (4, 5))
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other_step)
    assert not torch.equal(one, other_seed)
    assert bool((one > 0).all())


def test_random_growth_finds_every_position_equally_often() -> None:
    parameters = {"w": nn.Parameter(torch.zeros(50))}
    hits = torch.zeros(50)
    for step in range(2000):
        hits[random_scores(parameters, 0, step)["w"].topk(10).indices] += 1
    # Binomial(2000, .2): mean 400, deviation 17.9; five of them.
    assert hits.min() > 310
    assert hits.max() < 490


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_a_grown_weight_starts_without_the_momentum_of_its_inactive_time(kind: Any) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9) if kind is SGD else Adam(model.parameters())
    sparse = se.SparseTraining(model, optimizer, density=0.2, update_every=None, method="set", prune_rate=0.5)
    for step in range(3):
        backward(model, step)
        sparse.step()
    before = copies(sparse.masks)
    sparse.update()
    n_born = 0
    for name, mask in sparse.masks.items():
        state = optimizer.state[model.get_parameter(name)]
        statistic = state["momentum_buffer"] if kind is SGD else state["exp_avg"]
        born = mask & ~before[name]
        n_born += int(born.sum())
        assert not statistic[born].any()
        assert statistic[mask & before[name]].any()
    assert n_born > 10


def test_methods_that_read_no_momentum_take_an_optimiser_without_it() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.05)
    with pytest.raises(UsageError, match="SGD without momentum"):
        se.SparseTraining(model, optimizer, density=0.2, method="set", redistribution="momentum")
    sparse = se.SparseTraining(model, optimizer, density=0.2, method="set", update_every=2)
    take_steps(sparse, 4)
    assert sparse.n_updates == 2


def test_the_threshold_of_dsr_finds_the_rate() -> None:
    sparse = trainer("dsr", prune_schedule="constant", total_steps=None, update_every=None, prune_rate=0.2)
    take_steps(sparse, 2)
    removed = []
    for _ in range(14):
        update = sparse.update()
        removed.append(sum(int(n) for n in update.n_removed.values()))
    assert removed[0] < 0.1 * sparse.n_active
    assert max(removed) > 0.1 * sparse.n_active


def test_a_state_from_before_the_first_threshold_starts_it_anew() -> None:
    once = trainer("dsr")
    weights = {name: value.clone() for name, value in once.model.state_dict().items()}
    start = once.state_dict() | {"masks": copies(once.masks)}
    take_steps(once, STEPS)
    again = trainer("dsr")
    take_steps(again, 2 * EVERY)
    again.optimizer.state.clear()
    again.model.load_state_dict(weights)
    again.load_state_dict(start)
    take_steps(again, STEPS)
    assert again.n_updates == once.n_updates > 2
    assert all(torch.equal(mask, once.masks[name]) for name, mask in again.masks.items())


@pytest.mark.parametrize("total_steps", [STEPS, None])
@pytest.mark.parametrize("method", ["static", "snip"])
def test_masks_of_static_and_snip_never_move(method: str, total_steps: int | None) -> None:
    sparse = trainer(method, total_steps=total_steps)
    start = copies(sparse.masks)
    take_steps(sparse, STEPS)
    assert sparse.n_updates == 0
    assert sparse.is_frozen
    assert all(torch.equal(mask, start[name]) for name, mask in sparse.masks.items())
    with pytest.raises(UsageError, match="masks never move"):
        sparse.update()


def test_snip_keeps_the_largest_product_of_weight_and_gradient_of_all_layers() -> None:
    frozen = nn.Identity()
    model = nn.Sequential(network(), nn.BatchNorm1d(4), frozen.eval())
    x, y = batch(0)
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    masks = snip_masks(model, lambda: nn.functional.cross_entropy(model(x), y), density=0.1)
    assert all(torch.equal(value, statistics[name]) for name, value in model.named_buffers())
    assert all(value.grad is None for value in model.parameters())
    assert [part for part in model.modules() if not part.training] == [frozen]
    nn.functional.cross_entropy(model(x), y).backward()
    scores = torch.cat(
        [
            (value * torch.as_tensor(value.grad)).abs().flatten()
            for name, value in model.named_parameters()
            if name in masks
        ]
    )
    kept = torch.cat([mask.flatten() for mask in masks.values()])
    assert int(kept.sum()) == round(0.1 * kept.numel())
    assert scores[kept].min() >= scores[~kept].max()


@pytest.mark.parametrize("prune", ["magnitude", "global-magnitude"])
def test_magnitude_goes_from_dense_to_the_density_and_only_prunes(prune: Any) -> None:
    sparse = trainer("magnitude", prune=prune)
    assert sparse.density_now == 1.0
    course = []
    for step in range(STEPS):
        before = copies(sparse.masks)
        take_steps(sparse, 1, step)
        course.append(sparse.density_now)
        assert sum(counts(sparse)) == round(sparse.density_now * sparse.n_masked)
        assert not any((mask & ~before[name]).any() for name, mask in sparse.masks.items())
    assert course == sorted(course, reverse=True)
    assert len(set(course)) == 7
    end = STEPS * 3 // 4
    assert course[end - 2] > 0.2
    assert sum(counts(sparse)) == sparse.n_active
    assert course[end - 1] == course[-1] == pytest.approx(0.2, abs=1e-3)


def test_magnitude_arrives_even_when_no_update_falls_on_the_end() -> None:
    sparse = trainer("magnitude", update_every=None, freeze=0.5)
    take_steps(sparse, STEPS)
    assert sparse.n_updates == 1
    assert sum(counts(sparse)) == sparse.n_active


def test_every_switch_of_sparse_momentum_keeps_the_count_and_changes_the_masks() -> None:
    """From the same start and the same batches, no two choices end at the same masks.

    Dense enough that a layer is full: `nonzeros` gives back what each layer lost, as `own` does, but spares
    that one.
    """
    ends: dict[tuple[str, str], Tensor] = {}
    for growth in ("momentum", "random", "gradient"):
        for redistribution in ("momentum", "magnitude", "nonzeros", "none", "own"):
            settings: dict[str, Any] = {"growth": growth, "redistribution": redistribution}
            sparse = trainer("sparse-momentum", density=0.5, **settings)
            assert any(mask.all() for mask in sparse.masks.values())
            wanted = sum(counts(sparse))
            take_steps(sparse, 2 * EVERY)
            assert sparse.n_updates == 2
            assert sum(counts(sparse)) == wanted
            ends[growth, redistribution] = torch.cat([mask.flatten() for mask in sparse.masks.values()])
    alike = [(a, b) for a, b in combinations(ends, 2) if torch.equal(ends[a], ends[b])]
    assert alike == []


@pytest.mark.parametrize("method", [*MOVING, "static"])
def test_under_a_pattern_masks_obey_it(method: str) -> None:
    sparse = trainer(method, pattern="2:4", density=0.3)
    start = copies(sparse.masks)
    take_steps(sparse, STEPS)
    assert all(obeys(mask, 1, NMPattern(n=2, m=4)) for mask in sparse.masks.values())
    moved = any((mask ^ start[name]).any() for name, mask in sparse.masks.items())
    assert moved == (method != "static")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "sett"}, "no method named 'sett'"),
        ({"method": "static", "growth": "random"}, "growth is 'random', and the method is 'static'"),
        ({"method": "magnitude", "redistribution": "own"}, "this method has none"),
        ({"method": "magnitude", "prune": "threshold"}, "One of magnitude, global-magnitude was expected"),
        ({"growth": "weight"}, "One of momentum, random, gradient, mean-gradient was expected"),
        ({"method": "static", "freeze": 0.5}, "never moves its masks"),
        ({"method": "snip"}, "there are no masks"),
        ({"method": "magnitude", "pattern": "2:4"}, "asp prunes a dense network to a pattern"),
        ({"method": "magnitude", "total_steps": None}, "total_steps, a freeze above 0 and no masks"),
        ({"method": "magnitude", "freeze": 0.0}, "needs a freeze above 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings: dict[str, Any], said: str) -> None:
    model = network()
    every: dict[str, Any] = {"density": 0.2, "total_steps": 20}
    with pytest.raises((UsageError, UnknownNameError), match=said):
        se.SparseTraining(model, SGD(model.parameters(), lr=0.1, momentum=0.9), **(every | settings))


def test_growth_by_the_gradient_needs_it() -> None:
    sparse = trainer("rigl", update_every=None)
    take_steps(sparse, 1)
    sparse.model.zero_grad()
    with pytest.raises(UsageError, match="has no gradient"):
        sparse.update()


# By recipe


def recipe(method: str, **changes: Any) -> Recipe:
    return load_recipe(
        "digits", changes={"epochs": 3, "sparsity": {"method": method, "density": 0.1}, **changes}
    )


class Stopping(SilentObserver):
    """Asks for a stop after a step, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self._step = step

    def stepped(self, step: int, loss: Tensor) -> None:
        if step == self._step:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("method", [name for name in OWN_LOOP_METHODS if name != "sparse-momentum"])
def test_an_interrupted_run_ends_with_the_bytes_of_an_unbroken_one(method: str, tmp_path: Path) -> None:
    whole = train(recipe(method), tmp_path / "whole", device="cpu")
    n_steps = whole.info.n_steps // 3
    for stop in (
        n_steps,
        2 * n_steps - 3,
    ):  # the end of an epoch, before its mask update; and the midst of one
        with pytest.raises(Interrupted):
            train(
                recipe(method) if stop == n_steps else None,
                tmp_path / "broken",
                device="cpu",
                resume=stop != n_steps,
                observer=Stopping(stop),
            )
    train(None, tmp_path / "broken", device="cpu", resume=True)
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
    info = whole.info
    assert info.method == method
    masks = load_file(whole.path / "masks.safetensors")
    assert sum(int(mask.sum()) for mask in masks.values()) == info.n_active == round(0.1 * info.n_masked)
    lines = [json.loads(line) for line in (whole.path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["density"] == pytest.approx(0.1, abs=1e-3)
    assert (lines[0]["density"] > 0.12) == (METHODS[method].start_density is not None)
    assert lines[0]["explored"] + 1e-3 >= 0.1
    assert lines[0]["explored"] <= lines[-1]["explored"] <= 1
    cost = info.cost
    assert cost is not None
    assert cost.explored == lines[-1]["explored"]
    assert cost.mean_density is not None
    assert cost.mean_density > 0.1 - 1e-3


def test_dense_is_a_method_too() -> None:
    assert recipe("dense").dense
    assert not recipe("set").dense


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "static", "growth": "random"}, "the method is 'static'"),
        ({"method": "static", "freeze": 0.5}, "never moves its masks"),
        ({"method": "snip", "pattern": "2:4"}, "takes no pattern"),
        ({"method": "asp", "pattern": "2:4", "growth": "random"}, "No growth was expected"),
        ({"method": "magnitude", "freeze": 0.0}, "needs a freeze above 0"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe("digits", changes={"sparsity": {"density": None, **changes}})
