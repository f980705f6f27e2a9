"""Fewer live channels the sparser a training becomes, so that whole channels can be removed after it.

Which channels belong together is found as orders of channels are, in the exported graph. A group takes part
where a masked weight computes it, another reads it, and a runtime could do without some of it: not the
network's inputs and outputs, not what is normalised over channels, not parts of a layer's outputs, as heads
are.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparse_export.errors import UsageError
from sparse_export.graph.channels.groups import find_channels
from sparse_export.graph.channels.spaces import Space
from sparse_export.sparsity.channels import (
    ChannelGroup,
    WeightSlots,
    channel_strengths,
    live_channels,
    live_positions,
    n_live,
)
from sparse_export.train.user_run import SeenCall

__all__ = ["Narrowing", "channel_groups"]

_OVER_CHANNELS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.MultiheadAttention)


class Narrowing:
    """Says at each update where weights may be.

    Args:
        exponent: see `sparse_export.sparsity.channels.n_live`; 0 for everywhere.
        model: the network.
        seen: what it was called with first.
        masks: bool, by name of the masked weights.
    """

    def __init__(
        self, exponent: float, model: nn.Module, seen: SeenCall, masks: Mapping[str, Tensor]
    ) -> None:
        self._exponent, self._model, self._seen, self._names = exponent, model, seen, tuple(masks)
        self._groups: tuple[ChannelGroup, ...] | None = None

    def look(self) -> None:
        """Find the groups of channels, once the network was called. Raises UsageError for none."""
        if self._exponent and self._groups is None and self._seen.call is not None:
            self._groups = channel_groups(self._model, self._seen.call, self._names)

    def places(
        self, magnitudes: Mapping[str, Tensor], masks: Mapping[str, Tensor], density: float
    ) -> dict[str, Tensor] | None:
        """Where weights may be after an update.

        Args:
            magnitudes: float, by name.
            masks: bool, by name: the active weights before it.
            density: active / masked weights after it.

        Returns:
            bool, by name; None for everywhere.

        Raises:
            UsageError: the network was never called, or its channels cannot be followed.
        """
        if not self._exponent:
            return None
        self.look()
        if self._groups is None:
            raise UsageError(
                f"narrowing is {self._exponent:g}, and masks are updated before the network was called.",
                expected="A forward pass before the first update was expected.",
            )
        live = [
            live_channels(
                channel_strengths(magnitudes, masks, group), n_live(group.width, density, self._exponent)
            )
            for group in self._groups
        ]
        return live_positions(masks, self._groups, live)


def channel_groups(
    model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], names: tuple[str, ...]
) -> tuple[ChannelGroup, ...]:
    """The groups of channels that may become fewer.

    Args:
        model: the network.
        call: positional and keyword arguments of its forward.
        names: of the masked weights.

    Raises:
        UsageError: the network cannot be followed, or has no such group.
    """
    do = "Leave out narrowing, or choose another preset than compact."
    inputs = _inputs(model, call)
    if inputs is None:
        raise UsageError(
            "narrowing needs to follow the network's channels, and its forward takes something else than "
            "tensors.",
            do=do,
        )
    found = find_channels(model, inputs)
    if found.untraced:
        raise UsageError(f"narrowing needs to follow the network's channels. {found.untraced}", do=do)
    groups = tuple(group for space in found.free if (group := _group(model, space, names)) is not None)
    if not groups:
        raise UsageError("narrowing is set, and the network has no channels that could become fewer.", do=do)
    return groups


def _inputs(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[Tensor, ...] | None:
    """The arguments as a tuple of tensors; None where they are none."""
    args, kwargs = call
    if kwargs:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
        if bound.kwargs:
            return None
        args = bound.args
    return args if all(isinstance(one, Tensor) for one in args) else None


def _group(model: nn.Module, space: Space, names: tuple[str, ...]) -> ChannelGroup | None:
    """A space as a group; None where it has to keep its width."""
    owners = [model.get_submodule(member.name.rpartition(".")[0]) for member in space.members]
    if any(isinstance(owner, _OVER_CHANNELS) for owner in owners):
        return None
    if any(member.groups > 1 for member in space.members):
        return None  # groups of a convolution need equal sizes
    masked = [member for member in space.members if member.name in names]
    parts = {
        reads: tuple(
            WeightSlots(name=member.name, axis=member.axis, slots=member.slots)
            for member in masked
            if member.reads is reads
        )
        for reads in (False, True)
    }
    if not parts[False] or not parts[True]:
        return None
    if any(part.slots.numel() < model.get_parameter(part.name).shape[part.axis] for part in parts[False]):
        return None  # the weight's outputs are split, as into the heads of attention
    return ChannelGroup(width=space.width, makes=parts[False], reads=parts[True])
