"""Channels of a network put in another order, in which more of its weights fit an N:M pattern.

A permutation is a re-labelling: names, shapes and the function stay, only the order of channels changes, in every
tensor that has them. What may move is decided by `channels.py`; which order is better is somebody else's search.

Legend: R stacked rows, I columns to be permuted.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from sparse_export.errors import GateFailed, UnknownNameError, UsageError
from sparse_export.graph.channels import Channels, Member, Space, find_channels
from sparse_export.sparsity.pattern import NMPattern, fits, groups_over, largest_per_group

_TOLERANCE = 1e-10  # of the largest output, in float64; sums in another order differ by about 1e-14
_N_RANDOM = 2

Search = Callable[[Tensor, NMPattern], Tensor]
Orders = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class SpaceChange:
    """A space of channels in the report. permutation: channel i is now what was channel permutation[i]; None where
    it stayed, and `reason` says why. members: as `name[axis]`."""

    name: str
    width: int
    members: tuple[str, ...]
    free: bool
    permutation: tuple[int, ...] | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class LayerChange:
    """A weight that wants a pattern, before and after.

    axis: the one that its groups run along, None where the tensor has none.  n_movable: weights in columns that a
    free space can move by themselves.  groups_over_*: groups with more than N nonzeros, a mask's where one was
    given.  kept_*: share of the sum of |weight| that at most N of M keep.  None where the pattern does not divide
    the axis; `reason` says so, or why no column was moved.
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
    """What was permuted. untraced: why nothing could be, or empty. difference: the largest between outputs before
    and after, over the largest output, in float64."""

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
) -> PermutationReport:
    """Reorder channels in place so that more of each layer fits its pattern; the function stays what it was.

    sample: one input batch, or a tuple of the forward's arguments.  layers: the parameter names of weights ->
        pattern.  search: (rows (R, I), pattern) -> int64 permutation of I; groups are consecutive columns.
    masks: moved alike, and what they keep is what counts as nonzero.  extra: mappings parameter name -> tensor of
        the parameter's shape, moved alike: momentum, exp_avg, exp_avg_sq. So are gradients.
    Before anything is touched, the outputs of a float64 copy are compared before and after, on the sample and on
    random inputs, with its weights and with random ones. Raises GateFailed when they differ, and UsageError for a
    name that the network does not have, an extra of another shape, or a search that gives no permutation.
    """
    masks = masks or {}
    tensors = _tensors(module)
    _check_names(module, layers, masks, extra)
    channels = find_channels(module, sample)
    weights = {name: _searched_weight(tensors[name], masks.get(name)) for name in layers}
    axes = {name: reduction_axis(module, name) for name in layers}
    chosen, notes = _chosen(channels, layers, weights, axes, search)
    orders = _orders(
        tensors, ((space, chosen[space.name]) for space in channels.free if space.name in chosen)
    )
    difference = _difference(module, sample, orders) if orders else 0.0
    if not difference <= _TOLERANCE:
        raise GateFailed(
            f"With its channels permuted the network's outputs differ by {difference:.3g} of the largest.",
            expected=f"At most {_TOLERANCE:g} was expected, in float64. The network was left as it was.",
            do="Train or export it without a permutation; the rules for one of its operations are wrong.",
        )
    record = record_of(channels, chosen)
    after = {name: reordered(weight, orders.get(name)) for name, weight in weights.items()}
    changes = tuple(
        _layer_change(name, pattern, axes[name], channels, weights[name], after[name], notes)
        for name, pattern in layers.items()
    )
    _apply(module, orders, [masks, *extra])
    return PermutationReport(
        spaces=tuple(_space_change(space, chosen, notes) for space in channels.spaces),
        layers=changes,
        record=record,
        difference=difference,
        untraced=channels.untraced,
    )


# Orders of tensors

# For each tensor that moves, the place in the old one of every entry of the new one, flat: int64, its shape.


def orders_from_record(module: nn.Module, record: Mapping[str, Any], *, inverse: bool = False) -> Orders:
    """What a record says of each tensor of this network, or how to undo it."""
    tensors = _tensors(module)

    def spaces() -> Iterable[tuple[Space, Tensor]]:
        for entry in record["spaces"]:
            permutation = torch.tensor(entry["permutation"], dtype=torch.int64)
            members = tuple(
                Member(
                    name=str(m["tensor"]),
                    axis=int(m["axis"]),
                    groups=int(m["groups"]),
                    slots=torch.tensor(m["slots"]).reshape(len(permutation), -1)
                    if m["slots"] is not None
                    else torch.arange(len(permutation))[:, None],
                    reads=False,
                )
                for m in entry["members"]
            )
            yield (
                Space(name=entry["name"], width=len(permutation), members=members, free=True, reason=""),
                permutation.argsort() if inverse else permutation,
            )

    return _orders(tensors, spaces())


def apply_record(
    module: nn.Module,
    record: Mapping[str, Any],
    *,
    inverse: bool = False,
    extra: Sequence[Mapping[str, Tensor]] = (),
) -> None:
    """Permute a network, and tensors that belong to it, as a report's record says; inverse undoes it bit for bit."""
    _check_names(module, {}, {}, extra)
    _apply(module, orders_from_record(module, record, inverse=inverse), extra)


def record_of(channels: Channels, permutations: Mapping[str, Tensor]) -> dict[str, Any]:
    """Permutations of spaces, by name, as data for JSON: channel i is now what was channel permutation[i].

    slots: the entries of a tensor's axis that each channel has, null where it is the entry of its own number.
    """
    entries = []
    for space in channels.free:
        if space.name not in permutations:
            continue
        members = []
        for m in space.members:
            plain = torch.equal(m.slots, torch.arange(space.width)[:, None])
            members.append(
                {
                    "tensor": m.name,
                    "axis": m.axis,
                    "groups": m.groups,
                    "slots": None if plain else m.slots.tolist(),
                }
            )
        entries.append(
            {"name": space.name, "permutation": permutations[space.name].tolist(), "members": members}
        )
    return {"version": 1, "spaces": entries}


def reordered(tensor: Tensor, order: Tensor | None) -> Tensor:
    """A copy of the tensor in another order of entries; itself when there is none."""
    return tensor if order is None else tensor.reshape(-1)[order.to(tensor.device)]


def _orders(tensors: Mapping[str, Tensor], permuted: Iterable[tuple[Space, Tensor]]) -> dict[str, Tensor]:
    by_axis: dict[tuple[str, int, int], Tensor] = {}
    for space, permutation in permuted:
        for m in space.members:
            size = tensors[m.name].shape[m.axis] * m.groups
            order = by_axis.setdefault((m.name, m.axis, m.groups), torch.arange(size))
            order[m.slots] = m.slots[permutation]
    orders: dict[str, Tensor] = {}
    for (name, axis, groups), order in by_axis.items():
        shape = tensors[name].shape
        before = orders.get(name, torch.arange(tensors[name].numel()).reshape(shape))
        if groups == 1:
            orders[name] = before.index_select(axis, order)
            continue
        n_rows, n_columns = shape[0] // groups, shape[1]  # an axis 1 that is another in every block of rows
        columns = (order.reshape(groups, n_columns) % n_columns).repeat_interleave(n_rows, 0)
        columns = columns.reshape(*columns.shape, *[1] * (len(shape) - 2)).expand(shape)
        orders[name] = before.gather(1, columns)
    return orders


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _aliases(module: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> its first one."""
    first: dict[int, str] = {}
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def _apply(module: nn.Module, orders: Orders, extra: Sequence[Mapping[str, Tensor]]) -> None:
    """Move what has to, in place: tensors keep their identity, so that optimisers and views still hold them."""
    tensors, aliases = _tensors(module), _aliases(module)
    done: set[int] = set()
    with torch.no_grad():
        for name, order in orders.items():
            tensor = tensors[name]
            tensor.copy_(reordered(tensor, order))
            if tensor.grad is not None:
                tensor.grad.copy_(reordered(tensor.grad, order))
        for mapping in extra:
            for name, tensor in mapping.items():
                order_of = orders.get(aliases[name])
                if order_of is not None and id(tensor) not in done:
                    done.add(id(tensor))
                    tensor.copy_(reordered(tensor, order_of))


def _check_names(
    module: nn.Module,
    layers: Iterable[str],
    masks: Mapping[str, Tensor],
    extra: Sequence[Mapping[str, Tensor]],
) -> None:
    tensors, aliases = _tensors(module), _aliases(module)
    for name in layers:
        if name not in tensors:
            raise UnknownNameError("parameter", name, tensors)
    for mapping in (masks, *extra):
        for name, tensor in mapping.items():
            if name not in aliases:
                raise UnknownNameError("parameter", name, aliases)
            if tensor.shape != tensors[aliases[name]].shape:
                raise UsageError(
                    f"A tensor of shape {tuple(tensor.shape)} was given to move with {name}.",
                    expected=f"The parameter's shape was expected, {tuple(tensors[aliases[name]].shape)}.",
                    do="Leave out what is no entry for an entry, like a step counter.",
                )


# The search


def _searched_weight(weight: Tensor, mask: Tensor | None) -> Tensor:
    """|weight| where the mask keeps it. A kept weight that is still 0 counts as a small one: it takes a place."""
    found = weight.detach().abs()
    if mask is None:
        return found
    small = found.max() * 1e-6 if found.numel() else found.sum()
    small = torch.where(small > 0, small, torch.ones_like(small))
    return torch.where(mask.bool(), torch.where(found == 0, small, found), torch.zeros_like(found))


def _chosen(
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
        usable = [m for m in readers if _reduction(m, weights[m.name], layers[m.name])]
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
    size = weight.shape[m.axis]
    return m.slots.shape[1] == 1 and size % pattern.m == 0 and len(m.slots) > pattern.m


def _whole_groups(m: Member, pattern: NMPattern) -> Tensor | None:
    """Channels in order of their columns, those whose groups belong to the space wholly; None without two groups."""
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
        n = max(blocks)
        return f"its channels are blocks of {n} columns of {readers[0].name}, and groups lie within blocks"
    patterns = ", ".join(sorted({str(layers[m.name]) for m in readers}))
    return f"{space.width} channels do not fill two groups of {patterns}"


# The report


def _space_change(space: Space, chosen: Mapping[str, Tensor], notes: Mapping[str, str]) -> SpaceChange:
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
    members = [m for m in members if m.reads and _reduction(m, weight, pattern)]
    return sum(weight.numel() * len(m.slots) // (weight.shape[axis] * m.groups) for m in members)


def _layer_change(
    name: str,
    pattern: NMPattern,
    axis: int | None,
    channels: Channels,
    before: Tensor,
    after: Tensor,
    notes: Mapping[str, str],
) -> LayerChange:
    n_movable = 0 if axis is None else movable_weights(channels, name, before, axis, pattern)
    readers = [
        (s, m) for s in channels.spaces for m in s.members if m.name == name and m.reads and m.axis == axis
    ]
    reason = ""
    if not n_movable:
        reason = channels.untraced or next((s.reason or notes.get(s.name, "") for s, _ in readers), "")
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


def reduction_axis(module: nn.Module, name: str) -> int | None:
    """The axis that a weight's layer sums over: 0 for transposed convolutions, else 1; None for a vector."""
    owner = module.get_submodule(name.rpartition(".")[0])
    if module.get_parameter(name).dim() < 2:
        return None
    return 0 if isinstance(owner, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) else 1


# The proof


def _difference(module: nn.Module, sample: Tensor | tuple[Tensor, ...], orders: Orders) -> float:
    """The largest difference of outputs by a permutation, over the largest output, in a float64 copy.

    Once as the network is, and once with every parameter and statistic drawn anew: a network that is fresh, or has
    a last layer of zeros, would not tell a wrong order. NaN, or outputs of another structure, give infinity.
    """
    inputs = sample if isinstance(sample, tuple) else (sample,)
    generator = torch.Generator().manual_seed(0)
    batches = [inputs] + [tuple(_random_like(x, generator) for x in inputs) for _ in range(_N_RANDOM)]
    try:
        double = copy.deepcopy(module).double().eval()
        worst = 0.0
        for drawn in (False, True):
            if drawn:
                _draw(double, generator)
            before = [_outputs(double, batch) for batch in batches]
            _apply(double, orders, ())
            after = [_outputs(double, batch) for batch in batches]
            for a, b in zip(before, after, strict=True):
                worst = max(worst, _apart(a, b))
    except Exception as cause:
        raise GateFailed(
            f"Whether a permutation keeps the function cannot be checked: {type(cause).__name__}: {cause}.",
            expected="A network that can be copied and runs in float64 was expected. It was left as it was.",
            do="Train or export it without a permutation.",
        ) from cause
    return worst


def _random_like(x: Tensor, generator: torch.Generator) -> Tensor:
    if not x.is_floating_point():
        return x
    return torch.randn(x.shape, generator=generator).to(x)


def _draw(module: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for tensor in _tensors(module).values():
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            noise = torch.rand(tensor.shape, generator=generator).to(tensor)
            scale = tensor.abs().mean()
            scale = torch.where(scale > 0, scale, torch.ones_like(scale) * 0.1)
            signed = bool((tensor < 0).any()) or not bool((tensor > 0).any())  # variances stay above 0
            tensor.copy_((noise * 2 - 1 if signed else noise + 0.5) * scale)


def _outputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        out = module(*(x.double() if x.is_floating_point() else x.clone() for x in inputs))
    return [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor)]


def _apart(before: list[Tensor], after: list[Tensor]) -> float:
    if len(before) != len(after) or any(a.shape != b.shape for a, b in zip(before, after, strict=True)):
        return float("inf")
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        if not a.numel():
            continue
        largest = float(a.abs().max())
        apart = float((a.double() - b.double()).abs().max())
        if math.isnan(largest) or math.isnan(apart):
            return float("inf")
        worst = max(worst, apart / largest if largest else apart)
    return worst
