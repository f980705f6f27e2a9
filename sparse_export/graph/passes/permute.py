"""Channels of a network put in another order, in which more of its weights fit an N:M pattern.

A permutation is a re-labelling: names, shapes and the function stay, only the order of channels changes, in
every tensor that has them. What may move is decided by `channels/groups.py`; which order is better is somebody
else's search.

Legend: R stacked rows, I columns to be permuted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from sparse_export.errors import GateFailed, UsageError
from sparse_export.graph.channels.groups import find_channels
from sparse_export.graph.channels.orders import (
    apply_orders,
    check_names,
    orders_of,
    record_of,
    reordered,
    tensors_of,
)
from sparse_export.graph.channels.proof import difference_by
from sparse_export.graph.channels.spaces import Channels, Member, Space
from sparse_export.sparsity.pattern import NMPattern, fits, groups_over, largest_per_group

_TOLERANCE = 1e-10  # of the largest output, in float64; sums in another order differ by about 1e-14

Search = Callable[[Tensor, NMPattern], Tensor]


@dataclass(frozen=True, kw_only=True)
class SpaceChange:
    """A space of channels in the report. permutation: channel i is now what was channel permutation[i]; None
    where it stayed, and `reason` says why. members: as `name[axis]`."""

    name: str
    width: int
    members: tuple[str, ...]
    free: bool
    permutation: tuple[int, ...] | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class LayerChange:
    """A weight that wants a pattern, before and after.

    axis: the one that its groups run along, None where the tensor has none.  n_movable: weights in columns
    that a free space can move by themselves.  groups_over_*: groups with more than N nonzeros, a mask's where
    one was given.  kept_*: share of the sum of |weight| that at most N of M keep.  None where the pattern
    does not divide the axis; `reason` says so, or why no column was moved.
    """

    name: str
    pattern: str
    axis: int | None
    n_weights: int
    n_movable: int
    n_groups: int | None
    groups_over_before: int | None
    groups_over_after: int | None
    kept_before: float | None
    kept_after: float | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class PermutationReport:
    """What was permuted. untraced: why nothing could be, or empty. difference: the largest between outputs
    before and after, over the largest output, in float64."""

    spaces: tuple[SpaceChange, ...]
    layers: tuple[LayerChange, ...]
    record: dict[str, Any]
    difference: float
    untraced: str

    def as_json(self) -> dict[str, Any]:
        """The whole report as data for JSON."""
        return asdict(self)


def permute_network(
    module: nn.Module,
    sample: Tensor | tuple[Tensor, ...],
    layers: Mapping[str, NMPattern],
    search: Search,
    *,
    masks: Mapping[str, Tensor] | None = None,
    extra: Sequence[Mapping[str, Tensor]] = (),
    scores: Mapping[str, Tensor] | None = None,
    channels: Channels | None = None,
) -> PermutationReport:
    """Reorder channels in place so that more of each layer fits its pattern; the function stays what it was.

    sample: one input batch, or a tuple of the forward's arguments.  layers: the parameter names of weights ->
        pattern.  search: (rows (R, I), pattern) -> int64 permutation of I; groups are consecutive columns.
    masks: moved alike, and what they keep is what counts as nonzero.  extra: mappings parameter name ->
        tensor of the parameter's shape, moved alike: momentum, exp_avg, exp_avg_sq. So are gradients.
    scores: what a weight's entries are worth, of its shape, in place of |weight|; the report tells of it
    then.  channels: what `find_channels` found; None to look. Before anything is touched, the outputs of a
    float64 copy are compared before and after, on the sample and on random inputs, with its weights and with
    random ones. Raises GateFailed when they differ, or weights are NaN or infinite, and UsageError for a name
    that the network does not have, an extra of another shape, or a search that gives no permutation.
    """
    masks, scores = masks or {}, scores or {}
    tensors = tensors_of(module)
    check_names(module, layers, masks, [*extra, scores])
    require_finite({name: tensors[name] for name in layers})
    if channels is None:
        channels = find_channels(module, sample)
    weights = {name: searched_weight(scores.get(name, tensors[name]), masks.get(name)) for name in layers}
    axes = {name: reduction_axis(module, name) for name in layers}

    def proven(orders: Mapping[str, Tensor]) -> float:
        difference = difference_by(module, sample, orders)
        if not difference <= _TOLERANCE:
            raise GateFailed(
                f"With its channels permuted the network's outputs differ by {difference:.3g} of the largest.",
                expected=f"At most {_TOLERANCE:g} was expected, in float64. The network was left as it was.",
                do="Train or export it without a permutation; the rules for one of its operations are wrong.",
            )
        return difference

    report, orders = searched_orders(channels, tensors, layers, weights, axes, search, proven)
    apply_orders(module, orders, [masks, *extra])
    return report


def searched_orders(
    channels: Channels,
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, NMPattern],
    weights: Mapping[str, Tensor],
    axes: Mapping[str, int | None],
    search: Search,
    proven: Callable[[Mapping[str, Tensor]], float],
) -> tuple[PermutationReport, dict[str, Tensor]]:
    """Find better orders of channels; nothing is moved.

    Args:
        channels: the spaces of a network.
        tensors: all that it has, by name.
        layers: names of weights -> pattern.
        weights: what is searched of these, as `searched_weight` gives it.
        axes: the one that each layer sums over.
        search: (rows (R, I), pattern) -> int64 permutation of I.
        proven: given orders, how far outputs differ by them; raises where that is too far.

    Returns:
        The report, and by tensor the place in the old one of every entry (see `reordered`).

    Raises:
        UsageError: the search gives no permutation.
    """
    chosen, notes = choose_orders(channels, layers, weights, axes, search)
    moved = ((space, chosen[space.name]) for space in channels.free if space.name in chosen)
    orders = orders_of(tensors, moved)
    report = PermutationReport(
        spaces=tuple(space_change(space, chosen, notes) for space in channels.spaces),
        layers=tuple(
            layer_change(
                name,
                pattern,
                axes[name],
                channels,
                weights[name],
                reordered(weights[name], orders.get(name)),
                notes,
            )
            for name, pattern in layers.items()
        ),
        record=record_of(channels, chosen),
        difference=proven(orders) if orders else 0.0,
        untraced=channels.untraced,
    )
    return report, orders


def require_finite(weights: Mapping[str, Tensor]) -> None:
    """Raise GateFailed for weights that are NaN or infinite, of which no order is better than another."""
    wrong = [name for name, weight in weights.items() if not bool(weight.isfinite().all())]
    if wrong:
        raise GateFailed(
            f"{', '.join(wrong[:3])}{' …' if len(wrong) > 3 else ''} "
            f"{'holds' if len(wrong) == 1 else 'hold'} NaN or "
            "infinity.",
            expected="Finite weights were expected.",
            do="Look at the training, which may have diverged.",
        )


def preview(
    tensors: Mapping[str, Tensor],
    axes: Mapping[str, int | None],
    channels: Channels,
    layers: Mapping[str, NMPattern],
    search: Search,
) -> dict[str, Tensor]:
    """The orders, by tensor, that a permutation would choose (see `reordered`); nothing is moved.

    tensors: of the network.  axes: of each layer's weight, the one that is summed over.  channels: the spaces
    of the network. Raises UsageError for a search that gives no permutation.
    """
    weights = {name: searched_weight(tensors[name], None) for name in layers}
    asked = {name: axes[name] for name in layers}
    chosen, _ = choose_orders(channels, layers, weights, asked, search)
    return orders_of(
        tensors, ((space, chosen[space.name]) for space in channels.free if space.name in chosen)
    )


# The search


def searched_weight(weight: Tensor, mask: Tensor | None) -> Tensor:
    """|weight| where the mask keeps it.

    A kept weight that is still 0 counts as a small one: it takes a place.
    """
    found = weight.detach().abs()
    if mask is None:
        return found
    small = found.max() * 1e-6 if found.numel() else found.sum()
    small = torch.where(small > 0, small, torch.ones_like(small))
    return torch.where(mask.bool(), torch.where(found == 0, small, found), torch.zeros_like(found))


def choose_orders(
    channels: Channels,
    layers: Mapping[str, NMPattern],
    weights: Mapping[str, Tensor],
    axes: Mapping[str, int | None],
    search: Search,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A permutation for each space where the search found a better one; notes on the others and on layers."""
    chosen: dict[str, Tensor] = {}
    notes: dict[str, str] = {}
    for space in channels.free:
        readers = [m for m in space.members if m.reads and axes.get(m.name) == m.axis]
        if not readers:
            notes[space.name] = "no layer that reads it wants a pattern"
            continue
        parts = [part for m in readers for part in _single_columns(m)]
        usable = [m for m in parts if _reduction(m, weights[m.name], layers[m.name])]
        usable = [m for m in usable if _whole_groups(m, layers[m.name]) is not None]
        lead = max(usable, key=lambda m: weights[m.name].numel(), default=None)
        movable = None if lead is None else _whole_groups(lead, layers[lead.name])
        if lead is None or movable is None:
            notes[space.name] = _why_not(space, readers, layers)
            continue
        pattern = layers[lead.name]
        rows = []
        for m in usable:
            if layers[m.name] != pattern or not _groups_alike(m, lead, movable, pattern):
                notes.setdefault(m.name, f"{space.name} was ordered for {lead.name}, whose groups are others")
                continue
            rows.append(_rows(weights[m.name], m)[:, movable])
        matrix = torch.cat([part.float() for part in rows])
        found = torch.as_tensor(search(matrix, pattern)).to("cpu", torch.int64)
        if not torch.equal(found.sort().values, torch.arange(len(movable))):
            raise UsageError(
                f"The search for {space.name} gave {tuple(found.shape)} indices that are no permutation.",
                expected=f"A permutation of 0 to {len(movable) - 1} was expected.",
                do="Mend the search.",
            )
        if not _better(matrix, found, pattern):
            notes[space.name] = "the search found nothing better"
            continue
        permutation = torch.arange(space.width)
        permutation[movable] = movable[found]
        chosen[space.name] = permutation
    return chosen, notes


def _reduction(m: Member, weight: Tensor, pattern: NMPattern) -> bool:
    """Can the order of these columns alone change the weight's groups?"""
    return weight.shape[m.axis] % pattern.m == 0 and len(m.slots) > pattern.m


def _single_columns(m: Member) -> list[Member]:
    """The member with one column for each channel, as often as a channel has columns.

    A map that is joined several times over gives each channel a column in every copy.
    """
    return [replace(m, slots=m.slots[:, i : i + 1]) for i in range(m.slots.shape[1])]


def _whole_groups(m: Member, pattern: NMPattern) -> Tensor | None:
    """Channels in order of their columns, those whose groups belong to the space wholly; None without two
    groups.
    """
    slots = m.slots[:, 0]
    order = slots.argsort()
    group = slots[order] // pattern.m
    _, index, counts = group.unique_consecutive(return_inverse=True, return_counts=True)
    whole = order[counts[index] == pattern.m]
    return whole if len(whole) > pattern.m else None


def _groups_alike(m: Member, lead: Member, movable: Tensor, pattern: NMPattern) -> bool:
    if m is lead:
        return True
    groups = (m.slots[movable, 0] // pattern.m).reshape(-1, pattern.m)
    return bool((groups == groups[:, :1]).all()) and len(groups[:, 0].unique()) == len(groups)


def _rows(weight: Tensor, m: Member) -> Tensor:
    """The space's columns of a weight as (R, width), one row for each output and kernel position."""
    if m.groups == 1:
        return (
            weight.movedim(m.axis, -1)
            .index_select(-1, m.slots[:, 0].to(weight.device))
            .reshape(-1, len(m.slots))
        )
    blocks = weight.reshape(m.groups, weight.shape[0] // m.groups, *weight.shape[1:]).movedim(2, -1)
    n_columns = weight.shape[1]
    block, column = m.slots[:, 0] // n_columns, m.slots[:, 0] % n_columns
    picked = [blocks[b, ..., c].reshape(-1) for b, c in zip(block.tolist(), column.tolist(), strict=True)]
    return torch.stack(picked, 1)


def _better(matrix: Tensor, permutation: Tensor, pattern: NMPattern) -> bool:
    """Does it keep more, or put fewer groups over the cap?"""
    after = matrix[:, permutation.to(matrix.device)]
    return _kept(after, 1, pattern) > _kept(matrix, 1, pattern) or int(groups_over(after, 1, pattern)) < int(
        groups_over(matrix, 1, pattern)
    )


def _kept(weight: Tensor, axis: int, pattern: NMPattern) -> float:
    """Share of the sum of |weight| that the N largest of each group hold; 1 when all is zero."""
    weight = weight.double()
    total = float(weight.abs().sum())
    kept = largest_per_group(weight, axis, pattern)
    return float(weight.abs()[kept].sum()) / total if total else 1.0


def _why_not(space: Space, readers: list[Member], layers: Mapping[str, NMPattern]) -> str:
    blocks = {m.slots.shape[1] for m in readers}
    if blocks != {1}:
        wide = max(readers, key=lambda m: m.slots.shape[1])
        n = wide.slots.shape[1]
        return f"each of its channels is {n} columns of {wide.name}, which only move together"
    patterns = ", ".join(sorted({str(layers[m.name]) for m in readers}))
    return f"{space.width} channels do not fill two groups of {patterns}"


# The report


def space_change(space: Space, chosen: Mapping[str, Tensor], notes: Mapping[str, str]) -> SpaceChange:
    permutation = chosen.get(space.name)
    return SpaceChange(
        name=space.name,
        width=space.width,
        members=tuple(f"{m.name}[{m.axis}]" for m in space.members),
        free=space.free,
        permutation=None if permutation is None else tuple(permutation.tolist()),
        reason=space.reason or ("" if permutation is not None else notes.get(space.name, "")),
    )


def movable_weights(channels: Channels, name: str, weight: Tensor, axis: int, pattern: NMPattern) -> int:
    """How many weights of a tensor lie in columns that free spaces can move, one by one and to another group.

    axis: the one that the groups run along. 0 where the pattern does not divide it.
    """
    members = [m for space in channels.free for m in space.members if m.name == name and m.axis == axis]
    parts = [
        part
        for m in members
        if m.reads
        for part in _single_columns(m)
        if m.slots.shape[1] == 1 or _whole_groups(part, pattern) is not None
    ]
    parts = [m for m in parts if _reduction(m, weight, pattern)]
    return sum(weight.numel() * len(m.slots) // (weight.shape[axis] * m.groups) for m in parts)


def layer_change(
    name: str,
    pattern: NMPattern,
    axis: int | None,
    channels: Channels,
    before: Tensor,
    after: Tensor,
    notes: Mapping[str, str],
) -> LayerChange:
    n_movable = 0 if axis is None else movable_weights(channels, name, before, axis, pattern)
    reason = ""
    if not n_movable:
        read = (
            s for s in channels.spaces for m in s.members if m.name == name and m.reads and m.axis == axis
        )
        reason = channels.untraced or next((s.reason or notes.get(s.name, "") for s in read), "")
        reason = reason or "its input channels are the network's input, or were not found"
    reason = notes.get(name, reason)
    fitting = axis is not None and fits(tuple(before.shape), axis, pattern)
    if axis is not None and not fitting:
        reason = f"{before.shape[axis]} columns; {pattern} needs a multiple of {pattern.m}"
    return LayerChange(
        name=name,
        pattern=str(pattern),
        axis=axis,
        n_weights=before.numel(),
        n_movable=n_movable,
        n_groups=before.numel() // pattern.m if fitting else None,
        groups_over_before=int(groups_over(before, axis or 0, pattern)) if fitting else None,
        groups_over_after=int(groups_over(after, axis or 0, pattern)) if fitting else None,
        kept_before=_kept(before, axis or 0, pattern) if fitting else None,
        kept_after=_kept(after, axis or 0, pattern) if fitting else None,
        reason=reason,
    )


def summed_parts(module: nn.Module, name: str) -> int:
    """Into how many parts a weight's reduction axis falls that are summed apart: groups of a transposed
    convolution.

    Those of an ordinary one are apart along its first axis already.
    """
    owner = module.get_submodule(name.rpartition(".")[0])
    return owner.groups if isinstance(owner, _ConvTransposeNd) else 1


def reduction_axis(module: nn.Module, name: str) -> int | None:
    """The axis that a weight's layer sums over: 0 for transposed convolutions, else 1; None for a vector."""
    owner = module.get_submodule(name.rpartition(".")[0])
    if module.get_parameter(name).dim() < 2:
        return None
    return 0 if isinstance(owner, _ConvTransposeNd) else 1
