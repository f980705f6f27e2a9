"""Channels as wholes: how much each one carries, which of them stay live, and where that leaves weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "MOST_NARROWING",
    "ChannelGroup",
    "WeightSlots",
    "channel_strengths",
    "live_channels",
    "live_positions",
    "n_live",
]

MOST_NARROWING = 0.5
"""Beyond it a layer whose inputs and outputs both become fewer has no room for its weights."""


@dataclass(frozen=True, kw_only=True)
class WeightSlots:
    """Where the channels of a group lie in one weight.

    Args:
        name: of the weight.
        axis: of the weight.
        slots: int64 (width, block), the entries of that axis that belong to each channel; more than one where
            a convolution's map was flattened.
    """

    name: str
    axis: int
    slots: Tensor


@dataclass(frozen=True, kw_only=True)
class ChannelGroup:
    """Channels of one tensor, with the weights that compute them and those that read them.

    Args:
        width: how many channels there are.
        makes, reads: at least one weight each.
    """

    width: int
    makes: tuple[WeightSlots, ...]
    reads: tuple[WeightSlots, ...]


def n_live(width: int, density: float, narrowing: float) -> int:
    """How many channels of a group stay live: ceil(width * density ** narrowing), one at least.

    Args:
        width: channels of the group.
        density: kept / total over all masked weights, above 0 and up to 1.
        narrowing: 0, which leaves them all, to MOST_NARROWING.
    """
    return max(1, math.ceil(width * math.pow(density, narrowing) - 1e-9))  # 1e-9: the power is rounded


def _squares(magnitudes: Mapping[str, Tensor], masks: Mapping[str, Tensor], part: WeightSlots) -> Tensor:
    values = torch.where(masks[part.name], magnitudes[part.name], 0).double().square()
    lines = values.movedim(part.axis, 0).flatten(1).sum(1)
    return lines[part.slots.to(lines.device)].sum(1)


def channel_strengths(
    magnitudes: Mapping[str, Tensor], masks: Mapping[str, Tensor], group: ChannelGroup
) -> Tensor:
    """The norm of the active weights that compute a channel times the norm of those that read it.

    What a ReLU leaves free, a channel's weights times a and its readers' by 1 / a, changes nothing of it. One
    that is not computed, or not read, has 0.

    Args:
        magnitudes: float, by name of the weight.
        masks: bool, of the same names and shapes.
        group: of these weights.

    Returns:
        float64 (width,).
    """
    made = torch.stack([_squares(magnitudes, masks, part) for part in group.makes]).sum(0)
    read = torch.stack([_squares(magnitudes, masks, part) for part in group.reads]).sum(0)
    return (made * read).sqrt()


def live_channels(strengths: Tensor, n: int) -> Tensor:
    """Mark the n strongest channels; on ties the lower index.

    Args:
        strengths: float (width,).
        n: 1 to width.

    Returns:
        bool (width,).
    """
    live = torch.zeros(strengths.shape, dtype=torch.bool, device=strengths.device)
    live[strengths.argsort(descending=True, stable=True)[:n]] = True
    return live


def live_positions(
    masks: Mapping[str, Tensor], groups: Sequence[ChannelGroup], live: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Where weights may be: everywhere but in lines of a channel that is not live.

    Args:
        masks: bool, by name; their shapes count.
        groups: of channels of these weights.
        live: bool (width,) for each group.

    Returns:
        bool, by name, in the weights' shapes.
    """
    places = {name: torch.ones_like(mask) for name, mask in masks.items()}
    for group, alive in zip(groups, live, strict=True):
        for part in (*group.makes, *group.reads):
            place = places[part.name]
            line = torch.ones(place.shape[part.axis], dtype=torch.bool, device=place.device)
            slots = part.slots.to(place.device)
            line[slots] = alive.to(place.device).unsqueeze(1).expand_as(slots)
            place &= line.view(-1, *[1] * (place.dim() - part.axis - 1))
    return places
