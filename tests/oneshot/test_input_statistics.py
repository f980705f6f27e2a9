"""Sums over what layers meet on calibration data, against the layers' own arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparse_export.oneshot import unfolding
from sparse_export.oneshot.unfolding import gram_too_large
from sparse_export.oneshot.weights import columns_from_weight
from tests.oneshot.hooked import InputStatistics, input_statistics


def recorded(module: nn.Module, *inputs: Tensor, name: str = "weight") -> InputStatistics:
    return input_statistics(module, inputs, [name], gram=True)[name]


def energy(module: nn.Module, found: InputStatistics) -> float:
    """The sum of squared outputs, without bias, that a Gram matrix tells of."""
    weight = columns_from_weight(module.get_parameter("weight").detach()).double()
    assert found.gram is not None
    blocks = weight.reshape(len(found.gram), -1, weight.shape[1])
    return float(((blocks @ found.gram) * blocks).sum())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(6, 8, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(4, 6, 3, padding=1, bias=False),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 3), dilation=(2, 1), padding=(1, 0), bias=False),
        nn.Conv2d(8, 12, 3, groups=4, bias=False),
        nn.Conv2d(4, 6, 3, padding="same", bias=False),
        nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect", bias=False),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False),
        nn.Conv3d(4, 6, (1, 3, 2), stride=2, bias=False),
    ],
    ids=lambda layer: str(layer),
)
@pytest.mark.parametrize("chunk", [1, 1 << 25])
def test_the_gram_matrix_of_a_convolution_tells_the_size_of_its_outputs(
    layer: nn.Module, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With random weights a wrong patch, or columns in another order than the weight's, would not."""
    monkeypatch.setattr(unfolding, "_CHUNK", chunk)
    weight = layer.get_parameter("weight")
    n_channels = weight.shape[1] * int(getattr(layer, "groups", 1))
    batches = [torch.randn(n, n_channels, *(9 - n, 7, 5)[: weight.dim() - 2]) for n in (3, 2)]
    found = recorded(layer, *batches)
    outputs = [layer(batch).detach().double() for batch in batches]
    assert energy(layer, found) == pytest.approx(sum(float(out.square().sum()) for out in outputs), rel=1e-5)
    assert found.n_inputs == sum(out.numel() // weight.shape[0] for out in outputs)
    assert found.gram is not None
    assert torch.allclose(found.gram.diagonal(dim1=1, dim2=2), found.squares, rtol=1e-4)


def test_the_statistics_of_a_linear_layer_are_sums_over_everything_before_its_last_axis() -> None:
    layer = nn.Linear(5, 3)
    batches = [torch.randn(2, 4, 5), torch.randn(1, 7, 5)]
    found = recorded(layer, *batches)
    rows = torch.cat([batch.reshape(-1, 5) for batch in batches]).double()
    assert found.gram is not None
    assert torch.allclose(found.gram[0], rows.T @ rows, rtol=1e-5)
    assert torch.allclose(found.squares[0], rows.square().sum(0), rtol=1e-6)
    assert found.n_inputs == 15


class Attends(nn.Module):
    def __init__(self, *, cross: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = cross

    def forward(self, x: Tensor) -> Tensor:
        other = x.flip(1) if self.cross else x
        answer: Tensor = self.attention(x, other, other, need_weights=False)[0]
        return answer


def test_attention_is_calibrated_where_it_attends_to_itself() -> None:
    x = torch.randn(3, 4, 8)
    names = ["attention.in_proj_weight", "attention.out_proj.weight"]
    found = input_statistics(Attends(cross=False), [x], names, gram=True)
    assert list(found) == ["attention.in_proj_weight"]
    rows = x.reshape(-1, 8).double()
    gram = found["attention.in_proj_weight"].gram
    assert gram is not None
    assert torch.allclose(gram[0], rows.T @ rows, rtol=1e-4, atol=1e-5)
    assert not input_statistics(Attends(cross=True), [x], names, gram=True)


def test_a_weight_used_twice_sums_over_both_uses_and_order_is_that_of_the_forward_pass() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 2)
            self.first = nn.Linear(4, 4)
            self.tied = nn.Linear(4, 4)
            self.tied.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.last(self.tied(self.first(x)))
            return answer

    module = Twice()
    x = torch.randn(6, 4)
    found = input_statistics(module, [x], ["last.weight", "first.weight"], gram=False)
    assert list(found) == ["first.weight", "last.weight"]
    both = torch.cat([x, module.first(x)]).detach().double()
    assert torch.allclose(found["first.weight"].squares[0], both.square().sum(0), rtol=1e-5)
    assert found["first.weight"].gram is None


def test_transposed_convolutions_are_left_out() -> None:
    layer = nn.ConvTranspose2d(4, 4, 3)
    assert not input_statistics(layer, [torch.randn(1, 4, 5, 5)], ["weight"], gram=True)


def test_the_mode_of_every_part_is_what_it_was_and_no_hook_is_left() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    module[1].eval()
    before = module[1].state_dict()["running_mean"].clone()
    input_statistics(module, [torch.randn(5, 4)], ["0.weight"], gram=True)
    assert [part.training for part in module] == [True, False, True]
    assert torch.equal(module[1].state_dict()["running_mean"], before)
    assert not module[0]._forward_pre_hooks


def test_gram_matrices_of_more_than_a_hundred_million_numbers_are_too_large() -> None:
    assert "25,088 x 25,088" in gram_too_large(1, 25088)  # the first Linear of VGG-16
    assert not gram_too_large(1, 9216)  # the widest convolution of a Wide ResNet-50-2
