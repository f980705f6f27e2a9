"""Copies of networks that keep what a forward computed."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch import Tensor, nn

from sparse_export.errors import UsageError
from sparse_export.graph.copies import copy_of


class Remembers(nn.Module):
    """Keeps its state in a buffer, a list and a mapping, with their gradients."""

    state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("state", torch.zeros(1, 4))
        self.seen: list[Tensor] = []
        self.last: dict[str, tuple[Tensor, ...]] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.state = self.linear(x).mean(0, keepdim=True)
        self.seen.append(self.state)
        self.last["state"] = (self.state, x)
        return self.state + x


def weight_normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))


@pytest.mark.parametrize("made", [Remembers, weight_normed])
def test_a_network_is_copied_with_what_its_last_training_step_left_in_it(made: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network = made()
    x = torch.randn(3, 4)
    network(x).sum().backward()
    copied = copy_of(network).eval()
    assert torch.equal(copied(x), network.eval()(x))
    own = {one.data_ptr() for one in network.state_dict().values()}
    assert not own & {one.data_ptr() for one in copied.state_dict().values()}


def test_a_copy_keeps_what_is_shared() -> None:
    network = Remembers()
    network(torch.randn(3, 4))
    copied = copy_of(network)
    assert isinstance(copied, Remembers)
    assert copied.state is copied.seen[0] is copied.last["state"][0]
    assert not copied.state.requires_grad


def test_what_cannot_be_copied_is_named() -> None:
    network = nn.Linear(4, 4)
    network.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(UsageError, match=r"Linear cannot be copied: .*lock"):
        copy_of(network)
