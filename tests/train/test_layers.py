"""Which parameters take part."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from sparse_export.errors import UsageError
from sparse_export.train.layers import computed_weights, layer_facts, maskable_parameters, masked_parameters


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 8, 3)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.fc = nn.Linear(8, 6)
        self.head = nn.Linear(8, 10)
        self.head.weight = self.embed.weight


def test_weights_of_linear_conv_and_attention_are_masked_and_nothing_else() -> None:
    assert list(maskable_parameters(Mixed())) == [
        "conv.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "fc.weight",
    ]


def test_separate_attention_projections_are_masked() -> None:
    names = list(maskable_parameters(nn.MultiheadAttention(8, 2, kdim=4, vdim=6)))
    assert names == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]


def test_a_weight_that_two_layers_share_appears_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    assert list(maskable_parameters(net)) == ["0.weight"]


@pytest.mark.parametrize("pattern", ["1", "1.weight", "[1]*"])
def test_keep_dense_takes_layer_parameter_and_pattern(pattern: str) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    assert list(masked_parameters(net, (pattern,))) == ["0.weight"]


def test_a_keep_dense_that_matches_nothing_is_an_error_that_names_the_layers() -> None:
    with pytest.raises(UsageError, match=r"'fc9'.*0\.weight"):
        masked_parameters(nn.Sequential(nn.Linear(4, 4)), ("fc9",))


def test_a_network_without_such_layers_is_refused() -> None:
    with pytest.raises(UsageError, match="no layer to make sparse"):
        masked_parameters(nn.Sequential(nn.BatchNorm1d(4)))


def test_a_lazy_layer_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"0\.weight has no shape yet"):
        maskable_parameters(nn.Sequential(nn.LazyLinear(4)))


def test_weights_that_are_computed_from_parameters_are_told_with_what_they_are_made_of() -> None:
    conv = parametrizations.weight_norm(nn.Conv1d(8, 4, 3))
    model = nn.Sequential(nn.Linear(8, 8), prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5), conv)
    assert list(maskable_parameters(model)) == ["0.weight"]
    found = computed_weights(model)
    assert list(found) == ["1.weight", "2.weight"]
    assert "computed at each call, from weight_orig, so" in found["1.weight"][1]
    made_of = "parametrizations.weight.original0 and parametrizations.weight.original1"
    assert f"computed at each call, from {made_of}, so" in found["2.weight"][1]
    torch.testing.assert_close(found["2.weight"][0], conv.weight.detach())
    facts = {fact.name: fact for fact in layer_facts(model, {})}
    assert list(facts) == ["0.weight", "1.weight", "2.weight"]
    assert (facts["1.weight"].n_active, facts["1.weight"].masked) == (32, False)
    assert facts["1.weight"].why_dense == found["1.weight"][1]
