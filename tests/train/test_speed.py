"""The paper's estimates, by its own definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from sparse_export.train.speed import (
    LayerUse,
    convolutions_of,
    estimate,
    layer_times_ms,
    layer_uses,
    layers_of,
    look,
    speed_of,
)


def use(
    *, inputs: float = 0.0, features: float = 0.0, activations: float = 1.0, weights: float = 1.0
) -> LayerUse:
    return LayerUse(
        empty_inputs=inputs, empty_features=features, activation_density=activations, weight_density=weights
    )


def test_the_estimates_are_ratios_of_sums_over_layers_and_moments() -> None:
    moments = [
        {"a": use(inputs=0.5, weights=0.1), "b": use(features=0.25, activations=0.5, weights=0.2)},
        {"a": use(weights=0.2), "b": use(inputs=0.5, features=0.5, activations=0.25, weights=0.4)},
    ]
    found = estimate({"a": 2.0, "b": 4.0}, moments, ["a", "b"])
    assert found is not None
    assert found.channels == pytest.approx(12 / (2 * 0.5 + 4 * 0.75 + 2 + 4 * 0.25))
    assert found.macs == pytest.approx(12 / (2 * 0.1 + 4 * 0.1 + 2 * 0.2 + 4 * 0.1))
    only_a = estimate({"a": 2.0, "b": 4.0}, moments, ["a"])
    assert only_a is not None
    assert only_a.channels == pytest.approx(4 / 3)


def test_a_dense_network_is_estimated_at_one() -> None:
    found = estimate({"a": 2.0}, [{"a": use()}], ["a"])
    assert found is not None
    assert (found.channels, found.macs) == (1.0, 1.0)


def test_without_layers_or_without_work_there_is_no_estimate() -> None:
    assert estimate({"a": 1.0}, [{"a": use()}], []) is None
    assert estimate({"a": 1.0}, [], ["a"]) is None
    assert estimate({"a": 1.0}, [{"a": use(weights=0.0)}], ["a"]) is None


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 4 * 4, 5),
        nn.Dropout(0.5),
    )


def test_what_layers_do_is_counted_in_weights_and_in_features() -> None:
    model = network()
    with torch.no_grad():
        model[0].get_parameter("weight")[:, 1] = 0
        model[4].get_parameter("weight")[:, :48] = 0
    x = torch.rand(3, 4, 6, 6) + 0.1
    x[:, :2] = 0
    x[0, 3] = 0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = layer_uses(model, x)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found["0"].empty_inputs == pytest.approx(0.25)
    assert found["0"].empty_features == pytest.approx(0.5)
    assert found["0"].weight_density == pytest.approx(0.75)
    assert found["0"].activation_density == pytest.approx(0.5 - 1 / 12)
    assert found["4"].empty_inputs == pytest.approx(0.5)
    assert 0 < found["4"].activation_density < 1


def test_a_transposed_convolution_has_its_input_channels_first() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 2, 3))
    with torch.no_grad():
        model[0].get_parameter("weight")[1] = 0
    assert layer_uses(model, torch.ones(1, 4, 5, 5))["0"].empty_inputs == pytest.approx(0.25)


def test_times_are_had_for_every_layer_and_convolutions_are_told_apart() -> None:
    model = network()
    times = layer_times_ms(model, torch.rand(8, 4, 6, 6))
    assert set(times) == set(layers_of(model)) == {"0", "4"}
    assert all(value > 0 for value in times.values())
    assert convolutions_of(model) == ["0"]


class ByKeyword(nn.Module):
    """Calls its layers by keyword, one of them by a name of its own, and one not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.own, self.unused = nn.Linear(4, 6), nn.Linear(6, 6), Own(6, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.own(features=self.b(input=self.a(x).relu())))


class Own(nn.Linear):
    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features)


def test_layers_that_are_called_by_keyword_are_looked_at_like_others() -> None:
    model = ByKeyword()
    found = look(model, torch.ones(3, 4))
    assert set(found.uses) == {"a", "b", "own"}
    assert found.left_out == {"unused": "the network does not call it"}
    assert found.uses["b"] == layer_uses(nn.Sequential(model.a, nn.ReLU(), model.b), torch.ones(3, 4))["2"]


@pytest.mark.parametrize("normed", [weight_norm, spectral_norm, nn.utils.spectral_norm])
def test_a_weight_that_is_computed_is_looked_at_as_it_is_multiplied_by(
    normed: Callable[..., nn.Module],
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight[:, 1] = 0
    model = nn.Sequential(normed(layer))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (use,) = layer_uses(model, torch.ones(2, 4)).values()
    assert use.empty_inputs == pytest.approx(0.25)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_looked_at_is_left_out_with_the_reason() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.plain = Pair(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.plain(self.pair((x, x))))

    class Pair(nn.Linear):
        def forward(self, both: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]  # as above
            return super().forward(both[0] + both[1])

    found = look(Odd(), torch.ones(2, 4))
    assert set(found.uses) == {"plain"}
    assert found.left_out == {"pair": "its input is no tensor"}
    fact = speed_of(Odd(), torch.ones(2, 4), [{"step_ms": 2.0, "layer_use": {}}])
    assert fact is not None
    assert fact.left_out == {"pair": "its input is no tensor"}


def test_lines_that_say_nothing_usable_are_left_out() -> None:
    good = {"empty_inputs": 0.0, "empty_features": 0.0, "activation_density": 1.0, "weight_density": 0.5}
    lines: list[dict[str, Any]] = [
        {"step_ms": 2.0, "layer_use": {"0": good}},
        {"step_ms": "3", "layer_use": {"0": good | {"weight_density": "x"}}},
        {"step_ms": float("nan"), "layer_use": [good]},
        {"step_ms": None, "layer_use": {"0": {"weight_density": 0.5}}},
        {},
    ]
    fact = speed_of(nn.Sequential(nn.Linear(4, 2)), torch.ones(2, 4), lines)
    assert fact is not None
    assert (fact.step_ms, fact.n_moments, fact.estimate_macs) == (2.0, 1, None)
    assert fact.all_layers_estimate_macs == pytest.approx(2.0)
    assert speed_of(nn.Linear(4, 2), None, lines[1:]) is None


def test_a_step_is_charged_its_part_of_the_update_that_is_made_once_an_epoch() -> None:
    model = nn.Linear(4, 2)
    lines: list[dict[str, Any]] = [
        {"epoch": 1, "step": 10, "step_ms": 2.0, "update_ms": 30.0},
        {"epoch": 2, "step": 20, "step_ms": 4.0, "update_ms": 10.0},
        {"epoch": 3, "step": 30, "step_ms": 1.0, "update_ms": None},
        {"epoch": 4, "step": 40, "step_ms": None, "update_ms": 90.0},
    ]
    once = speed_of(model, None, lines)
    assert once is not None
    assert once.step_ms == pytest.approx(5.0)  # the median of 5, 5 and 1
    old = speed_of(model, None, [{"epoch": 1, "step": 10, "step_ms": 2.0}])
    assert old is not None
    assert old.step_ms == 2.0
    assert speed_of(model, None, [{"step_ms": 2.0, "update_ms": 1.0}]) is None
