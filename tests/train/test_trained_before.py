"""Sparse training of a network that was trained already: its largest weights stay, and losses are reported."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from sparse_export.errors import TrainingDiverged, UsageError
from sparse_export.sparsity import NMPattern
from sparse_export.sparsity.pattern import obeys
from sparse_export.train import SparseTraining


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def optimizer_of(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.1, momentum=0.9)


def make(model: nn.Module, **settings: Any) -> SparseTraining:
    return SparseTraining(model, optimizer_of(model), **settings)


def take_steps(trainer: SparseTraining, n: int = 2) -> None:
    for _ in range(n):
        trainer.optimizer.zero_grad()
        trainer.model(torch.ones(4, 8)).square().mean().backward()
        trainer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_by_magnitude_the_largest_weights_of_each_layer_stay_as_they_are() -> None:
    model = network()
    before = weights(model)
    trainer = make(model, density=0.25, masks="magnitude", start="uniform")
    assert trainer.n_active == sum(int(mask.sum()) for mask in trainer.masks.values())
    for name, mask in trainer.masks.items():
        value = before[name]
        assert value[mask].abs().min() >= value[~mask].abs().max()
        assert torch.equal(model.get_parameter(name), value * mask)


@pytest.mark.parametrize("settings", [{}, {"density": 0.2}, {"transposable": True}])
def test_by_magnitude_under_a_pattern(settings: dict[str, Any]) -> None:
    model, pattern = network(), NMPattern(n=2, m=4)
    before = weights(model)
    trainer = make(model, pattern="2:4", masks="magnitude", small_share=0.0, **settings)
    for name, mask in trainer.masks.items():
        assert obeys(mask, 1, pattern)
        assert torch.equal(model.get_parameter(name), before[name] * mask)
        kept = before[name][mask].abs().mean()
        assert kept > before[name].abs().mean()


@pytest.mark.parametrize("method", ["static", "sparse-momentum"])
def test_a_network_that_is_2_of_4_already_goes_on_unchanged(method: str) -> None:
    model = network()
    make(model, pattern="2:4", small_share=0.0)
    before = weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = make(model, pattern="2:4", small_share=0.0, masks="magnitude", method=method)
        assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
        take_steps(trainer)


def test_a_network_that_was_trained_sparse_keeps_all_its_weights() -> None:
    model = network()
    with torch.no_grad():  # of 0.weight more than its share at this density, of 2.weight fewer
        model.get_parameter("2.weight")[2:] = 0
        model.get_parameter("4.weight")[:, 4:] = 0
    before = weights(model)
    n_nonzero = {name: int(value.count_nonzero()) for name, value in before.items() if value.dim() > 1}
    total = sum(value.numel() for value in before.values() if value.dim() > 1)
    for n_wanted in (sum(n_nonzero.values()), sum(n_nonzero.values()) + 50):
        other = copy.deepcopy(model)
        trainer = make(other, density=n_wanted / total, masks="magnitude")
        assert trainer.n_active == sum(int(mask.sum()) for mask in trainer.masks.values()) == n_wanted
        assert all(torch.equal(value, before[name]) for name, value in other.named_parameters())
    assert {name: int(mask.sum()) for name, mask in trainer.masks.items()} != n_nonzero


def test_of_zeros_those_that_become_active_are_drawn() -> None:
    model = network()
    nn.init.zeros_(model.get_parameter("2.weight"))
    masks = [
        make(copy.deepcopy(model), density=0.25, masks="magnitude", seed=seed).masks["2.weight"]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert int(masks[0].any(1).sum()) > 28  # of 32 rows, not the first ones alone


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [{"density": 0.25}, {"pattern": "2:4", "small_share": 0.0}])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, settings: dict[str, Any]) -> None:
    model = network()
    with torch.no_grad():
        model.get_parameter("2.weight")[0, 0] = value
    with pytest.raises(UsageError, match=r"2\.weight holds NaN or infinity"):
        make(model, masks="magnitude", **settings)


def test_another_text_in_place_of_masks_is_refused() -> None:
    with pytest.raises(UsageError, match=r"masks is 'largest'.*'magnitude'"):
        make(network(), density=0.5, masks="largest")
    with pytest.raises(UsageError, match="Neither a density nor a pattern"):
        make(network(), masks="magnitude")


def test_random_masks_on_a_trained_network_are_warned_of() -> None:
    model = network()
    optimizer = optimizer_of(model)
    model(torch.ones(4, 8)).square().mean().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"optimizer has made steps.*masks='magnitude'.*checkpoint"):
        SparseTraining(model, optimizer, density=0.5)


def test_so_they_are_where_batch_norms_or_zeros_show_it() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Linear(32, 4))
    for _ in range(20):
        model(torch.randn(4, 8))
    with pytest.warns(UserWarning, match="batch norms have seen batches"):
        make(model, density=0.5)
    pruned = network()
    make(pruned, pattern="2:4", small_share=0.0)
    with pytest.warns(UserWarning, match=r"0\.weight has zeros, as of an earlier pruning"):
        make(pruned, pattern="2:4", small_share=0.0)


def test_a_fresh_network_full_masks_and_layers_that_start_at_zero_are_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = network()
        nn.init.zeros_(model.get_parameter("2.weight"))
        take_steps(make(model, density=0.5))
        make(model, density=1.0)


@pytest.mark.parametrize("attached", [False, True])
def test_weights_that_are_loaded_without_the_trainers_state_are_warned_of_before_they_are_lost(
    attached: bool,
) -> None:
    model = network()
    trainer = make(model, density=0.5)
    take_steps(trainer)
    saved = copy.deepcopy((model.state_dict(), trainer.state_dict()))

    def resumed(loads_masks: bool) -> SparseTraining:
        other = network()
        again = make(other, density=0.5, seed=1)
        other.load_state_dict(saved[0])
        if loads_masks:
            again.load_state_dict(saved[1])
        if attached:
            again.attach()
        return again

    def step(trainer: SparseTraining) -> None:
        trainer.model(torch.ones(4, 8)).square().mean().backward()
        trainer.optimizer.step() if attached else trainer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(resumed(True))
    careless = resumed(False)
    with pytest.warns(
        UserWarning, match=r"inactive values in 0\.weight and .* set or loaded after the masks"
    ):
        step(careless)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(careless)  # once is enough


def test_a_state_of_other_layers_is_refused_with_the_difference_and_the_way_out() -> None:
    saved = make(network(), density=0.5).state_dict()
    trainer = make(network(), pattern="2:4", small_share=0.0)
    with pytest.raises(
        UsageError, match=r"they have 4\.weight, which is not masked here\. Make .*pattern"
    ) as found:
        trainer.load_state_dict(saved)
    assert "0.weight" not in str(found.value)


def test_an_update_of_weights_that_are_no_numbers_says_what_to_do() -> None:
    trainer = make(network(), density=0.5, update_every=2)
    take_steps(trainer, 1)
    trainer.model.get_parameter("0.weight").data.fill_(float("nan"))
    with pytest.raises(
        TrainingDiverged, match=r"After step 2 weights are no longer numbers.*last good checkpoint"
    ):
        take_steps(trainer, 1)


def test_a_checkpoint_of_a_network_that_another_optimizer_steps_is_warned_of() -> None:
    trainer = make(network(), density=0.5)
    trainer.attach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take_steps(trainer)
        trainer.state_dict()
    other = optimizer_of(trainer.model)
    trainer.model(torch.ones(4, 8)).square().mean().backward()
    other.step()
    with pytest.warns(UserWarning, match=r"inactive values in 0\.weight and .* another optimizer"):
        state = trainer.state_dict()
    again = SparseTraining(trainer.model, other, masks=trainer.masks)
    again.load_state_dict(state)
    assert again.n_steps == 2
    assert all(torch.equal(mask, trainer.masks[name]) for name, mask in again.masks.items())
