"""Layers of a network made to obey a pattern: what is moved, what is cut, what stays and why."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its customary name
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse_export.errors import ArtefactError, GateFailed
from sparse_export.formats.bundle import PatternLayer
from sparse_export.graph.passes import patterned
from sparse_export.graph.passes.fit_pattern import Fitted, fit_pattern, replay
from sparse_export.graph.passes.permute import permute_network
from sparse_export.sparsity.lossless import cut_share
from sparse_export.sparsity.pattern import NMPattern, groups_over, largest_per_group, obeys
from sparse_export.sparsity.permute import find_permutation
from sparse_export.train.layers import maskable_parameters
from tests.graph.networks import Residual

TWO_FOUR = NMPattern(n=2, m=4)


def sparsified(module: nn.Module, densities: dict[str, float], seed: int = 0) -> dict[str, Tensor]:
    """Weights of these densities, zeros elsewhere, and the masks of them."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    with torch.no_grad():
        for name, density in densities.items():
            weight = module.get_parameter(name)
            masks[name] = torch.rand(weight.shape, generator=generator) < density
            weight.mul_(masks[name]).add_(0.0)
    return masks


def crowded(weight: Tensor, n: int = 1) -> None:
    """Put four nonzeros into the first n groups of the first row, and leave the rest of that row empty."""
    with torch.no_grad():
        weight[0] = 0
        weight[0, : 4 * n] = 1.0


def fitted(module: nn.Module, sample: Tensor, **options: Any) -> tuple[Fitted, dict[str, PatternLayer]]:
    options.setdefault("masks", {})
    names = list(maskable_parameters(module))
    found = fit_pattern(module, sample, TWO_FOUR, names, **options)
    assert [layer.name for layer in found.layers] == names
    return found, {layer.name: layer for layer in found.layers}


def perceptron() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5)).eval()


X = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))


def test_a_sparse_layer_comes_to_obey_and_the_function_stays() -> None:
    module = perceptron()
    masks = sparsified(module, {"2.weight": 0.15})
    crowded(module.get_parameter("2.weight"))
    masks["2.weight"] = module.get_parameter("2.weight") != 0
    over = int(groups_over(module.get_parameter("2.weight"), 1, TWO_FOUR))
    before = module(X)
    found, layers = fitted(module, X, masks=masks)
    layer = layers["2.weight"]
    assert (layer.road, layer.groups_over_before, layer.groups_over_after) == ("permuted", over, 0)
    assert over > 0
    assert obeys(module.get_parameter("2.weight"), 1, TWO_FOUR)
    assert (layer.cut, layer.n_cut, layer.cut_needed, layer.reason) == (0, 0, 0, "")
    assert torch.equal(module.get_parameter("2.weight") != 0, masks["2.weight"])
    torch.testing.assert_close(module(X), before)
    assert found.obeying == ("2.weight",)
    assert found.difference < 1e-12


def test_what_obeys_already_needs_no_look_at_the_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    module = perceptron()
    with torch.no_grad():
        for name in maskable_parameters(module):
            weight = module.get_parameter(name)
            weight.mul_(largest_per_group(weight, 1, TWO_FOUR))

    def refused(*_: object) -> None:
        raise AssertionError("channels were looked for")

    monkeypatch.setattr(patterned, "find_channels", refused)
    found, layers = fitted(module, X)
    assert {layer.road for layer in layers.values()} == {"as trained"}
    assert found.document["permutation"]["spaces"] == [] and found.difference == 0.0
    crowded(module.get_parameter("2.weight"))
    with pytest.raises(AssertionError, match="channels were looked for"):
        fitted(module, X)


def test_layers_without_room_stay_dense_and_say_what_they_would_lose() -> None:
    module = perceptron()
    before = copy.deepcopy(module.state_dict())
    _, layers = fitted(module, X)
    assert {layer.road for layer in layers.values()} == {"dense"}
    assert "at least 2" in layers["4.weight"].reason or "at least 1" in layers["4.weight"].reason
    assert layers["4.weight"].groups_over_before == layers["4.weight"].n_groups == 30
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_first_layer_is_given_its_input_in_another_order() -> None:
    module = perceptron()
    sparsified(module, {"0.weight": 0.1})
    crowded(module.get_parameter("0.weight"), 2)  # eight of sixteen: the row is exactly full
    before = copy.deepcopy(module.state_dict())
    found, layers = fitted(module, X)
    assert layers["0.weight"].road == "gathered"
    assert list(found.gathers) == ["0.weight"]
    weight = module.get_parameter("0.weight")
    assert torch.equal(weight, before["0.weight"])  # only the graph will have it in that order
    assert not obeys(weight, 1, TWO_FOUR)
    assert obeys(weight[:, found.gathers["0.weight"]], 1, TWO_FOUR)


def test_without_a_gather_a_first_layer_stays_dense_with_the_reason() -> None:
    module = perceptron()
    sparsified(module, {"0.weight": 0.1})
    crowded(module.get_parameter("0.weight"))
    found, layers = fitted(module, X, gather="none")
    assert layers["0.weight"].road == "dense"
    assert "no gather was asked for" in layers["0.weight"].reason
    assert not found.gathers


class Flattened(nn.Module):
    """A convolution whose map is flattened: two columns of the linear layer are one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        y: Tensor = self.fc(x.flatten(1)) + torch.relu(self.last(x)).mean((1, 2, 3))[:, None]
        return y


def test_columns_that_move_only_together_want_a_gather_of_any() -> None:
    torch.manual_seed(0)
    module, x = Flattened().eval(), torch.randn(3, 8, 1, 2)
    sparsified(module, {"fc.weight": 0.1})
    crowded(module.fc.weight)
    assert fitted(copy.deepcopy(module), x)[1]["fc.weight"].road == "dense"
    assert "2 of its columns, which only move together" in fitted(module, x)[1]["fc.weight"].reason
    found, layers = fitted(module, x, gather="any")
    assert layers["fc.weight"].road == "gathered"
    assert obeys(module.fc.weight[:, found.gathers["fc.weight"]], 1, TWO_FOUR)


def test_what_obeys_already_is_not_broken_for_another_layer() -> None:
    torch.manual_seed(0)
    module, x = Flattened().eval(), torch.randn(3, 8, 1, 2)
    with torch.no_grad():
        for weight in (module.fc.weight, module.last.weight):
            weight.zero_()
        module.fc.weight[0, [0, 1, 4, 5]] = (
            1.0  # channels 0 and 2; with 0 and 3 side by side it would not obey
        )
        module.fc.weight[1, [2, 3, 6, 7]] = 1.0
        module.fc.weight[2, [0, 1, 6, 7]] = 1.0
        module.fc.weight[3, [2, 3, 4, 5]] = 1.0
        for first in range(0, 8, 4):  # every pair of channels 0, 1, 2, 3 is taken by some row
            module.fc.weight[4, [8 + first, 9 + first]] = 1.0
        module.last.weight[0, :4, 0, 0] = 1.0
    assert obeys(module.fc.weight, 1, TWO_FOUR)
    expected = module(x)
    _, layers = fitted(module, x)
    assert layers["fc.weight"].road == "as trained"
    assert obeys(module.fc.weight, 1, TWO_FOUR)
    torch.testing.assert_close(module(x), expected)


class Attending(nn.Module):
    """An attention and a layer at its side read the same channels. (N, 5, 16) to (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.side, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.embed(x))
        y: Tensor = self.head((self.attention(x, x, x, need_weights=False)[0] + self.side(x)).mean(1))
        return y


TOKENS = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(6))


def test_an_attention_that_obeys_already_is_not_broken_for_a_layer_at_its_side() -> None:
    torch.manual_seed(0)
    module, name = Attending().eval(), "attention.in_proj_weight"
    weight = module.attention.in_proj_weight
    masks = {name: largest_per_group(weight.detach(), 1, TWO_FOUR)}
    with torch.no_grad():
        weight.mul_(masks[name]).add_(0.0)
    _, layers = fitted(module, TOKENS, masks=masks, max_cut=0.9)
    assert (layers[name].road, layers[name].groups_over_after, layers[name].n_cut) == ("as trained", 0, 0)
    assert obeys(weight.detach(), 1, TWO_FOUR)
    assert torch.equal(masks[name], weight != 0)


def test_a_sparse_attention_comes_to_obey_and_the_function_stays() -> None:
    torch.manual_seed(0)
    module, name = Attending().eval(), "attention.in_proj_weight"
    masks = sparsified(module, {name: 0.08})
    crowded(module.attention.in_proj_weight)
    masks[name][0] = module.attention.in_proj_weight[0] != 0
    expected = module(TOKENS)
    _, layers = fitted(module, TOKENS, masks=masks)
    assert layers[name].road == "permuted"
    assert obeys(module.attention.in_proj_weight.detach(), 1, TWO_FOUR)
    torch.testing.assert_close(module(TOKENS), expected)


class Stream(nn.Module):
    """Three layers that read one residual stream; the middle one is as dense as can be."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 32)
        self.blocks = nn.Sequential(
            *[Residual(nn.Sequential(nn.Linear(32, 32), nn.GELU())) for _ in range(3)]
        )
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.blocks(self.embed(x)))
        return y


def test_a_layer_that_cannot_obey_does_not_keep_its_siblings_from_it() -> None:
    torch.manual_seed(0)
    module = Stream().eval()
    names = [f"blocks.{i}.inside.0.weight" for i in range(3)]
    sparsified(module, {names[0]: 0.1, names[2]: 0.1})
    for name in (names[0], names[2]):
        crowded(module.get_parameter(name))
    expected = module(X)
    _, layers = fitted(module, X)
    assert [layers[name].road for name in names] == ["permuted", "dense", "permuted"]
    for name in (names[0], names[2]):
        assert obeys(module.get_parameter(name), 1, TWO_FOUR)
    torch.testing.assert_close(module(X), expected)


def test_of_siblings_that_want_contrary_orders_one_goes_without() -> None:
    torch.manual_seed(0)
    module = Stream().eval()
    names = [f"blocks.{i}.inside.0.weight" for i in range(3)]
    with torch.no_grad():
        for name in names:
            module.get_parameter(name).zero_()
        first, second = module.get_parameter(names[0]), module.get_parameter(names[1])
        first[0, :4] = 1.0
        # Nearly every triple of channels is in some row: no order has room for all of it.
        second.copy_((torch.rand(32, 32) < 0.45).float())
        second[second.cumsum(1) > 16] = 0.0
    _, layers = fitted(module, X)
    assert [layers[name].road for name in names] == ["permuted", "dense", "as trained"]
    needed = layers[names[1]].cut_needed
    assert needed is not None
    assert needed > 0
    assert "in the best order found" in layers[names[1]].reason
    layers = fitted(module, X, gather="any", max_cut=needed)[1]
    assert layers[names[1]].road in ("permuted", "gathered")


def test_kernel_positions_have_one_order() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 3)).eval()
    sparsified(module, {"3.weight": 0.06})
    with torch.no_grad():
        module.get_parameter("3.weight")[0, :4, 1, 1] = 1.0
    x = torch.randn(2, 3, 8, 8)
    expected = module(x)
    _, layers = fitted(module, x)
    assert layers["3.weight"].road == "permuted"
    assert layers["3.weight"].n_groups == 8 * 9 * 8
    assert obeys(module.get_parameter("3.weight"), 1, TWO_FOUR)
    assert "sums over 3 channels" in layers["0.weight"].reason
    torch.testing.assert_close(module(x), expected)


def test_layers_that_have_no_groups_say_so() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(4, 16, 1)
            self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
            self.grouped = nn.ConvTranspose2d(16, 8, 1, groups=8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.grouped(self.depthwise(self.first(x))).flatten(2).transpose(1, 2)
            y: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return y

    _, layers = fitted(Odd().eval(), torch.randn(2, 4, 4, 4))
    assert "depthwise" in layers["depthwise.weight"].reason
    assert "sums over 2 channels" in layers["grouped.weight"].reason
    assert "MultiheadAttention, and has no mask" in layers["attention.in_proj_weight"].reason
    assert layers["attention.in_proj_weight"].n_groups is None


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_weights_that_diverged_are_told(wrong: float) -> None:
    module = perceptron()
    sparsified(module, {"2.weight": 0.2})
    with torch.no_grad():
        module.get_parameter("2.weight")[0, 0] = wrong
    with pytest.raises(GateFailed, match=r"2\.weight holds NaN or infinity.*may have diverged"):
        fitted(module, X)
    with pytest.raises(GateFailed, match=r"2\.weight holds NaN or infinity.*may have diverged"):
        permute_network(module, X, {"2.weight": TWO_FOUR}, find_permutation)


def test_only_what_is_allowed_is_cut_and_the_smallest_go() -> None:
    module = perceptron()
    masks = sparsified(module, {"2.weight": 0.45, "0.weight": 1.0, "4.weight": 1.0})
    weight = module.get_parameter("2.weight").detach().clone()
    strict = fitted(copy.deepcopy(module), X)[1]["2.weight"]
    assert strict.road == "dense"
    needed = fitted(copy.deepcopy(module), X, max_cut=0.99)[1]["2.weight"].cut
    assert 0 < needed < 0.2
    others = {name: module.get_parameter(name).detach().clone() for name in ("0.weight", "4.weight")}
    _, layers = fitted(module, X, max_cut=needed, masks=masks)
    layer, now = layers["2.weight"], module.get_parameter("2.weight").detach()
    assert layer.road == "permuted"
    assert layer.cut == pytest.approx(needed)
    assert layer.n_cut == int((weight != 0).sum()) - int((now != 0).sum()) > 0
    assert float(weight.abs().sum() - now.abs().sum()) / float(weight.abs().sum()) == pytest.approx(
        needed, rel=1e-3
    )
    assert obeys(now, 1, TWO_FOUR)
    assert torch.equal(masks["2.weight"], now != 0)
    assert not torch.signbit(now[now == 0]).any()
    for name, value in others.items():
        assert layers[name].road == "dense"
        assert float(module.get_parameter(name).detach().abs().sum()) == pytest.approx(
            float(value.abs().sum())
        )


def test_what_may_lose_nothing_is_left_out_of_the_cut() -> None:
    module = perceptron()
    sparsified(module, {"0.weight": 0.1, "2.weight": 0.45})
    crowded(module.get_parameter("0.weight"))
    uncut = dict.fromkeys(("0.weight", "2.weight"), "it was said so")
    _, layers = fitted(module, X, max_cut=0.9, uncut=uncut)
    assert layers["0.weight"].road == "gathered"  # nothing need be cut for that
    assert layers["2.weight"].road == "dense"
    assert layers["2.weight"].reason.endswith("none of its weights may be dropped, since it was said so")
    assert layers["4.weight"].n_cut > 0


def test_a_copy_that_replays_the_record_is_the_same_bit_for_bit() -> None:
    module = perceptron()
    sparsified(module, {"0.weight": 0.4, "2.weight": 0.3})
    twin = copy.deepcopy(module)
    found, layers = fitted(module, X, max_cut=0.3)
    assert layers["0.weight"].n_cut > 0
    assert layers["0.weight"].road == "gathered"
    replay(twin, json.loads(json.dumps(found.document)))
    for name, value in module.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
    with pytest.raises(ArtefactError, match="does not fit this network"):
        replay(nn.Linear(3, 3), found.document)
    with pytest.raises(ArtefactError, match="does not fit this network"):
        replay(twin, {})


def test_a_network_that_cannot_be_exported_says_so() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            y: Tensor = self.second(F.relu(x) if x.sum() > 0 else x)
            return y

    module = Branching().eval()
    sparsified(module, {"first.weight": 0.1, "second.weight": 0.1})
    crowded(module.first.weight)
    crowded(module.second.weight)
    _, layers = fitted(module, X)
    assert layers["first.weight"].road == "gathered"
    assert "cannot be exported" in layers["second.weight"].reason


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 2**31), st.floats(0.02, 0.3), st.sampled_from([0.0, 0.02]), st.booleans())
def test_obeying_layers_obey_within_the_cut_and_others_are_as_they_were(
    seed: int, density: float, max_cut: float, live_first: bool
) -> None:
    torch.manual_seed(seed)
    module = Stream().eval()
    names = list(maskable_parameters(module))
    masks = sparsified(module, dict.fromkeys(names, density), seed)
    before, expected = copy.deepcopy(module), module(X)
    found, layers = fitted(module, X, masks=masks, max_cut=max_cut, live_first=live_first, gather="any")
    for name, layer in layers.items():
        weight, old = module.get_parameter(name).detach(), before.get_parameter(name).detach()
        assert torch.equal(weight != 0, masks[name])
        if layer.road == "dense":
            assert torch.equal(weight.flatten().sort().values, old.flatten().sort().values)
            assert cut_share(old, 1, TWO_FOUR) > 0
        else:
            order = found.gathers.get(name, torch.arange(weight.shape[1]))
            assert obeys(weight[:, order], 1, TWO_FOUR)
            assert layer.cut <= max_cut
    if not any(layer.n_cut for layer in found.layers):
        torch.testing.assert_close(module(X), expected)
