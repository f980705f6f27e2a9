from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparse_export.graph.attention import attention_in_parts
from sparse_export.graph.example_sources import example_from_arrays
from sparse_export.graph.named_network import NamedNetwork, run_module, signature_of_call
from sparse_export.train.cost import layer_macs
from sparse_export.train.speed import look

N_TOKENS = 6


class Tagger(nn.Module):
    """Numbers for each token; tokens 0 at the end of a sample are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.encoder(self.words(ids), src_key_padding_mask=ids == 0)
        return self.head(hidden)  # type: ignore[no-any-return]


@pytest.fixture
def tagger() -> nn.Module:
    torch.manual_seed(0)
    return Tagger().eval()


def _padded() -> Tensor:
    return torch.tensor([[1, 2, 3, 0, 0, 0], [4, 5, 0, 0, 0, 0]])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torch_puts_zeros_in_place_of_padding_unless_attention_is_in_parts(tagger: nn.Module) -> None:
    def bias_alone() -> list[bool]:
        found = tagger(_padded()) == tagger.get_parameter("head.bias")
        return found.all(dim=-1)[0].tolist()  # type: ignore[no-any-return]

    with torch.no_grad():
        assert bias_alone() == [False] * 3 + [True] * 3
        with attention_in_parts():
            assert bias_alone() == [False] * N_TOKENS
        assert bias_alone() == [False] * 3 + [True] * 3


def test_the_switch_is_put_back_after_an_error() -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ZeroDivisionError), attention_in_parts():
        assert not torch.backends.mha.get_fastpath_enabled()
        1 / 0  # noqa: B018
    assert torch.backends.mha.get_fastpath_enabled() is before


def test_a_network_is_run_as_its_graph_computes_and_nothing_warns(tagger: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        example = example_from_arrays(tagger, {"ids": _padded().numpy()})
        signature = signature_of_call(tagger, example)
        (found,) = run_module(NamedNetwork(tagger, example), {"ids": _padded().numpy()}).values()
    assert signature.outputs[0].shape[1] == N_TOKENS
    assert found.shape == (2, N_TOKENS, 3)
    assert not np.array_equal(found[0, 3], tagger.get_parameter("head.bias").detach().numpy())


def test_layers_within_an_encoder_are_looked_at(tagger: nn.Module) -> None:
    with torch.no_grad():
        tagger.get_parameter("encoder.layers.1.linear2.weight")[:, ::2] = 0
    seen = look(tagger, {"ids": _padded()})
    assert seen.uses["encoder.layers.1.linear2"].weight_density == 0.5
    assert seen.uses["encoder.layers.0.linear1"].weight_density == 1
    assert set(seen.left_out) == {f"encoder.layers.{n}.self_attn.out_proj" for n in (0, 1)}
    macs = layer_macs(tagger, {"ids": _padded()})
    assert macs["encoder.layers.0.linear1.weight"] == N_TOKENS * 8 * 16
