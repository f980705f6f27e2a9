"""Tensors of a network put in another order, and the record of it.

An order gives, for a tensor that moves, the place in the old one of every entry of the new one: int64, the
tensor's shape, places counted row-major.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_export.errors import UnknownNameError, UsageError
from sparse_export.graph.channels.spaces import Channels, Member, Space

Orders = Mapping[str, Tensor]


def orders_from_record(module: nn.Module, record: Mapping[str, Any], *, inverse: bool = False) -> Orders:
    """What a record says of each tensor of this network, or how to undo it."""
    tensors = tensors_of(module)

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

    return orders_of(tensors, spaces())


def apply_record(
    module: nn.Module,
    record: Mapping[str, Any],
    *,
    inverse: bool = False,
    extra: Sequence[Mapping[str, Tensor]] = (),
) -> None:
    """Permute a network, and tensors that belong to it, as a report's record says; inverse undoes it bit for
    bit.
    """
    check_names(module, {}, {}, extra)
    apply_orders(module, orders_from_record(module, record, inverse=inverse), extra)


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


def orders_of(tensors: Mapping[str, Tensor], permuted: Iterable[tuple[Space, Tensor]]) -> dict[str, Tensor]:
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


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _aliases(module: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> its first one."""
    first: dict[int, str] = {}
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def apply_orders(module: nn.Module, orders: Orders, extra: Sequence[Mapping[str, Tensor]]) -> None:
    """Move what has to, in place: tensors keep their identity, so that optimisers and views still hold
    them.
    """
    tensors, aliases = tensors_of(module), _aliases(module)
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


def check_names(
    module: nn.Module,
    layers: Iterable[str],
    masks: Mapping[str, Tensor],
    extra: Sequence[Mapping[str, Tensor]],
) -> None:
    tensors, aliases = tensors_of(module), _aliases(module)
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
