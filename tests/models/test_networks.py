"""The networks known by name."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from sparse_export import models
from sparse_export.errors import UnknownNameError

N_WEIGHTS = {"lenet300-100": 266_200, "lenet5": 430_500, "digits-cnn": 40_208}


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in module.named_parameters() if value.ndim > 1}


def test_the_table_in_the_docstring_lists_every_network_with_its_weight_count() -> None:
    rows = {
        line.split()[0]: line.split()[-1] for line in (models.__doc__ or "").splitlines() if "(1, " in line
    }
    assert rows == {name: f"{N_WEIGHTS[name]:,}" for name in models.names()}


@pytest.mark.parametrize("name", models.names())
def test_a_network_has_the_published_number_of_weights(name: str) -> None:
    assert sum(value.numel() for value in weights(models.create(name)).values()) == N_WEIGHTS[name]


@pytest.mark.parametrize("name", models.names())
def test_a_network_gives_one_logit_for_each_class(name: str) -> None:
    spec = models.spec(name)
    logits = models.create(name)(torch.randn(64, *spec.input_shape))
    assert logits.shape == (64, spec.n_classes)
    assert (logits < 0).any() and not torch.allclose(logits.exp().sum(1), torch.ones(64))


@pytest.mark.parametrize("name", models.names())
def test_parameters_are_listed_in_the_order_of_the_forward_pass(name: str) -> None:
    module = models.create(name)
    called: list[str] = []
    for child_name, child in module.named_children():
        child.register_forward_hook(lambda *_, child_name=child_name: called.append(child_name))
    module(torch.zeros(2, *models.spec(name).input_shape))
    listed = list(dict.fromkeys(key.partition(".")[0] for key, _ in module.named_parameters()))
    assert listed == called


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("lenet300-100", ["fc1", "fc2", "fc3"]),
        ("lenet5", ["conv1", "conv2", "fc1", "fc2"]),
        ("digits-cnn", ["conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "fc1", "fc2"]),
    ],
)
def test_layer_names_are_those_that_checkpoints_hold(name: str, layers: list[str]) -> None:
    assert [key for key, _ in models.create(name).named_children()] == layers


@pytest.mark.parametrize("name", models.names())
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(name: str) -> None:
    def first(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return next(models.create(name).parameters())

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_every_layer_of_the_digits_network_but_the_first_suits_two_four() -> None:
    columns = {name: value.shape[1] for name, value in weights(models.create("digits-cnn")).items()}
    assert [name for name, n in columns.items() if n % 16] == ["conv1.weight"]


def test_lenet5_pools_after_each_convolution_and_pads_nothing() -> None:
    net = models.create("lenet5").double()
    p = dict(net.named_parameters())
    x = torch.randn(3, 1, 28, 28, dtype=torch.float64)
    a = functional.max_pool2d(functional.conv2d(x, p["conv1.weight"], p["conv1.bias"]).clamp(min=0), 2)
    b = functional.max_pool2d(functional.conv2d(a, p["conv2.weight"], p["conv2.bias"]).clamp(min=0), 2)
    assert b.shape == (3, 50, 4, 4)
    c = (b.reshape(3, 800) @ p["fc1.weight"].T + p["fc1.bias"]).clamp(min=0)
    torch.testing.assert_close(net(x), c @ p["fc2.weight"].T + p["fc2.bias"])


def test_lenet300_100_flattens_images_row_by_row() -> None:
    net = models.create("lenet300-100")
    x = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(net(x), net(x.reshape(2, 784)))


def test_an_unknown_name_is_answered_with_the_nearest_one_and_the_way_to_an_own_network() -> None:
    with pytest.raises(
        UnknownNameError, match=r"'lenet-5'.*Did you mean 'lenet5'\?.*package\.module:factory"
    ):
        models.create("lenet-5")


def test_listing_the_networks_does_not_load_torch() -> None:
    code = "import sys; from sparse_export import models; models.spec('lenet5'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
