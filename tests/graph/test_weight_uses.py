"""Weights that are multiplied along other axes than their layer's are found, whoever multiplies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparse_export.graph.example import make_example
from sparse_export.graph.weight_uses import WeightUse, uses_of_weights, why_no_axis


class Decoder(nn.Module):
    """Multiplies by the weight of a layer that it is given, past the layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Tied(nn.Module):
    """Encoder and decoder of one weight, as it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 12)
        self.decoder = Decoder(self.encoder)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(self.decoder(torch.relu(self.encoder(x))))
        return logits


class Transposed(nn.Module):
    """Two layers whose weights are one memory, one of them turned."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.out = nn.Linear(8, 12), nn.Linear(12, 8)
        self.out.weight = nn.Parameter(self.encoder.weight.detach().T)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(self.encoder(x))
        return logits


class Twice(nn.Module):
    """One layer called twice, and a convolution whose weight is used flat: in both along the layers' own
    axes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(8, 8), nn.Conv1d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(torch.relu(self.linear(x)))
        logits: Tensor = self.conv(x[:, :, None]).flatten(1) + nn.functional.linear(
            x, self.conv.weight.flatten(1)
        )
        return logits


class Flat(nn.Module):
    """The weight of a convolution as a matrix over channels and places together."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.repeat(1, 3), self.conv.weight.flatten(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = x[:, None].expand(-1, 3, -1)
        logits: Tensor = self.attention(y, y, y)[0].mean(1)
        return logits


SAMPLE = torch.zeros(2, 8)


def test_a_weight_that_two_products_read_along_different_axes_is_told_with_both() -> None:
    network = Tied()
    uses = uses_of_weights(network, SAMPLE, ["encoder.weight", "out.weight"])
    assert uses == {
        "encoder.weight": (WeightUse("encoder", 1), WeightUse("decoder", 0)),
        "out.weight": (WeightUse("out", 1),),
    }
    assert why_no_axis(network, SAMPLE, ["encoder.weight", "out.weight"]) == {
        "encoder.weight": "it is multiplied along axis 1 in encoder, and along axis 0 in decoder, while a pattern "
        "holds along axis 1, which its layer sums over"
    }
    assert network.training


def test_weights_of_one_memory_are_known_by_it() -> None:
    assert list(why_no_axis(Transposed(), SAMPLE, ["encoder.weight", "out.weight"])) == [
        "encoder.weight",
        "out.weight",
    ]


def test_a_matrix_over_channels_and_places_has_no_axis_of_the_weight() -> None:
    reasons = why_no_axis(Flat(), SAMPLE, ["conv.weight"])
    assert reasons["conv.weight"].startswith(
        "it is multiplied along several axes at once in the network's own forward"
    )


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (Twice, ["linear.weight", "conv.weight"]),
        (Attention, ["attention.in_proj_weight", "attention.out_proj.weight"]),
        (
            lambda: nn.Sequential(nn.Unflatten(1, (8, 1)), nn.ConvTranspose1d(8, 4, 3), nn.Flatten()),
            ["1.weight"],
        ),
    ],
)
def test_products_along_the_layers_own_axis_are_no_reason(
    make: Callable[[], nn.Module], names: list[str]
) -> None:
    network = make()
    uses = uses_of_weights(network, SAMPLE, names)
    assert all(uses[name] for name in names)
    assert why_no_axis(network, SAMPLE, names) == {}


class TiedToItsTable(nn.Module):
    """Scores every word by the table that it looks words up in, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(12, 8), nn.Linear(8, 8)

    def forward(self, *, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        states = self.mix(self.table(ids)) * mask[..., None]
        return {"scores": states @ self.table.weight.T}


def test_a_network_with_several_inputs_is_run_by_its_example() -> None:
    network = TiedToItsTable()
    example = make_example(network, (), {"ids": torch.ones(2, 3, dtype=torch.long), "mask": torch.ones(2, 3)})
    uses = uses_of_weights(network, example, ["table.weight", "mix.weight"])
    assert uses == {"table.weight": (WeightUse("", 1),), "mix.weight": (WeightUse("mix", 1),)}
