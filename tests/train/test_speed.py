"""The paper's estimates, by its own definitions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparse_export.train.speed import (
    LayerUse,
    convolutions_of,
    estimate,
    layer_times_ms,
    layer_uses,
    layers_of,
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
