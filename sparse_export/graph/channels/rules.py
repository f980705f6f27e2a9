"""What each kind of operation does to channel labels: one function a kind.

Each takes a ledger, the labels of what the operation reads, the names of its parameters and `where`, its name
in messages; it writes down what it ties together and gives the labels of the result. Parameters are named as
in `Module.named_parameters()`, None where there is none. `labels.py` says what labels are.

Legend: R rows, C columns, N batch, I input and O output channels, K what a product sums over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparse_export.graph.channels import reasons
from sparse_export.graph.channels.labels import (
    FIXED,
    AxisKey,
    Labels,
    Ledger,
    fixed_labels,
    hash_of,
    labels_along,
    mixed,
)

Shape = Sequence[int]


def elementwise(ledger: Ledger, operands: Sequence[Labels], shape: Shape) -> Labels:
    """Each entry of the result is computed from the entries at its place: those channels are one."""
    fitted = _fitted([one.led_by(len(shape) - len(one.shape)) for one in operands])
    atoms, subs = fitted[0].atoms, fitted[0].subs
    for other in fitted[1:]:
        ledger.tie(atoms, other.atoms)
        atoms, subs = torch.where(atoms < 0, other.atoms, atoms), mixed(subs, other.subs)
    even = tuple(map(all, zip(*(one.even for one in fitted), strict=True)))
    return Labels(atoms, subs, tuple(shape), even).packed(ledger)


def _fitted(operands: Sequence[Labels], axes: Iterable[int] | None = None) -> list[Labels]:
    """Labels of one number of axes, all told along the axes that one of them is told along."""
    axes = range(len(operands[0].shape)) if axes is None else axes
    long = [axis for axis in axes if any(one.is_long(axis) for one in operands)]
    return [one.spread(axis for axis in long if not one.even[axis]) for one in operands]


def joined(parts: Sequence[Labels], dim: int) -> Labels:
    """Parts one behind the other. Values of different parts are different, whatever their labels."""
    rank = len(parts[0].shape)
    dim %= rank
    shape = [*parts[0].shape]
    shape[dim] = sum(one.shape[dim] for one in parts)
    first = parts[0]
    if not first.is_long(dim) and len(parts) > 1 and all(_same_but(one, first, dim) for one in parts):
        even = tuple(is_even and axis != dim for axis, is_even in enumerate(first.even))
        return Labels(first.atoms, mixed(first.subs, hash_of("joined")), tuple(shape), even)
    others = [axis for axis in range(rank) if axis != dim]
    told = [one.spread([dim]) for one in _fitted(told_apart(parts), others)]
    sizes = [max(one.atoms.shape[axis] for one in told) for axis in range(rank)]
    even = tuple(axis != dim and all(one.even[axis] for one in told) for axis in range(rank))

    def together(of: Sequence[Tensor]) -> Tensor:
        return torch.cat([x.expand(*sizes[:dim], x.shape[dim], *sizes[dim + 1 :]) for x in of], dim)

    numbers = None
    if any(one.numbers is not None for one in told):
        numbers = together([_numbers(one) for one in told])
    made = Labels(
        together([x.atoms for x in told]), together([x.subs for x in told]), tuple(shape), even, numbers
    )
    return made.packed()


def _numbers(labels: Labels) -> Tensor:
    unknown = torch.full(tuple(labels.atoms.shape), math.nan, dtype=torch.float64)
    return unknown if labels.numbers is None else labels.numbers


def _same_but(a: Labels, b: Labels, dim: int) -> bool:
    """Are labels the same but for their length along an axis, along which only places differ?"""
    return (
        a.numbers is None
        and b.numbers is None
        and torch.equal(a.atoms, b.atoms)
        and torch.equal(a.subs, b.subs)
        and all(x == y for axis, (x, y) in enumerate(zip(a.even, b.even, strict=True)) if axis != dim)
    )


def told_apart(parts: Sequence[Labels]) -> list[Labels]:
    """Labels that say which part a value is of."""
    return [replace(part, subs=mixed(part.subs, i)) for i, part in enumerate(parts)]


def _rows_are_one(ledger: Ledger, atoms_RC: Tensor) -> Tensor:
    """Is each row one atom, or fixed throughout? bool (R,)."""
    rooted = ledger.rooted(atoms_RC)
    return rooted.min(1).values == rooted.max(1).values


def _columns_are_one(ledger: Ledger, atoms_RC: Tensor) -> bool:
    rooted = ledger.rooted(atoms_RC)
    return bool((rooted.min(0).values == rooted.max(0).values).all())


def _works_along_rows(ledger: Ledger, atoms_RC: Tensor) -> bool:
    """Do the channels lie along other axes than the one that is worked on, as in a token-mixing layer?"""
    if len(atoms_RC) < 2:
        return False
    return not _columns_are_one(ledger, atoms_RC) and bool(_rows_are_one(ledger, atoms_RC).all())


def _along_rows(
    ledger: Ledger, x: Labels, dims: Sequence[int], shape: Shape, names: Iterable[str | None], where: str
) -> Labels:
    """What an operation makes that works along `dims` where each row is one channel."""
    for name in filter(None, names):
        ledger.hold(name, reasons.another_axis(where))
    return _one_for(x, dims, shape, where)


def _row_by_row(ledger: Ledger, x: Labels, dims: Sequence[int], where: str) -> Labels:
    """What works along `dims` makes of rows that have other channels each, as group norm: none are tied."""
    told = x.spread(dims)
    rank = len(x.shape)
    sizes = [1 if axis in {dim % rank for dim in dims} else n for axis, n in enumerate(told.atoms.shape)]
    subs = mixed(told.subs, torch.arange(math.prod(sizes)).reshape(sizes), hash_of("along", where))
    ledger.sum_over(told.atoms, subs, where)
    return replace(told, subs=subs, numbers=None).packed()


def _one_for(x: Labels, dims: Sequence[int], shape: Shape, where: str) -> Labels:
    """Labels of the shape that the axes `dims` become: each row is one channel, and only places differ now.

    Args:
        shape: with as many axes as before, or without `dims`.
    """
    rank = len(x.shape)
    dims = [dim % rank for dim in dims]
    atoms, subs = x.atoms, mixed(x.subs, hash_of("along", where))
    for dim in dims:
        if x.is_long(dim):
            places = torch.arange(x.shape[dim]).reshape(-1, *[1] * (rank - dim - 1))
            atoms, subs = atoms.narrow(dim, 0, 1), mixed(subs, places).sum(dim, keepdim=True)
    even = tuple(is_even and axis not in dims for axis, is_even in enumerate(x.even))
    if len(shape) < rank:
        kept = [axis for axis in range(rank) if axis not in dims]
        sizes = [atoms.shape[axis] for axis in kept]
        atoms, subs, even = atoms.reshape(sizes), subs.reshape(sizes), tuple(even[axis] for axis in kept)
    even = tuple(is_even or size == 1 for is_even, size in zip(even, shape, strict=True))
    return Labels(atoms, subs, tuple(shape), even)


def linear(
    ledger: Ledger,
    x: Labels,
    weight: str,
    bias: str | None,
    where: str,
    *,
    in_axis: int = 1,
) -> Labels:
    """x (..., I) times a weight of shape (O, I), with in_axis 0 of shape (I, O)."""
    ins, outs = AxisKey(weight, in_axis), AxisKey(weight, 1 - in_axis)
    shape = (*x.shape[:-1], ledger.shapes[weight][1 - in_axis])
    rows = x.rows([-1])
    if _works_along_rows(ledger, rows[0]):
        return _along_rows(ledger, x, [-1], shape, (weight, bias), where)
    atoms, uses = ledger.columns(rows, where)
    ledger.use(ins, atoms, uses, where)
    return _made(ledger, outs, bias, 0, shape, len(shape) - 1, where)


def _made(
    ledger: Ledger, key: AxisKey, bias: str | None, uses: Tensor | int, shape: Shape, axis: int, where: str
) -> Labels:
    """Labels of fresh values whose channels, along `axis`, are the entries of a weight's axis."""
    atoms, apart = ledger.make(key, uses, where)
    if bias is not None:
        ledger.use(AxisKey(bias, 0), atoms, 0, where)
    return labels_along(atoms, apart, shape, [axis])


def made_along_last(atoms: Tensor, shape: Shape, *words: object) -> Labels:
    """Labels of fresh values whose channels are the entries of the last axis."""
    return labels_along(atoms, torch.full((len(atoms),), hash_of(*words)), shape, [-1])


def convolution(
    ledger: Ledger,
    x: Labels,
    weight: str,
    bias: str | None,
    where: str,
    *,
    shape: Shape,
    groups: int,
    transposed: bool,
) -> Labels:
    """x (N, I, ...) with a weight (O, I/groups, ...), transposed (I, O/groups, ...); gives labels of
    `shape`.
    """
    atoms, uses = ledger.columns(x.rows([1]), where)
    n_in, n_out = len(atoms), shape[1]
    if groups == 1:
        ledger.use(AxisKey(weight, 0 if transposed else 1), atoms, uses, where)
        return _made(ledger, AxisKey(weight, 1 if transposed else 0), bias, 0, shape, 1, where)
    if groups == n_in:  # depthwise: an output is a channel of the input, seen through its own filter
        n_each = n_out // n_in
        which = torch.arange(n_out) % n_each
        out_atoms = atoms.repeat_interleave(n_each)
        out_uses = mixed(uses.repeat_interleave(n_each), which)
        filters = (atoms, uses) if transposed else (out_atoms, out_uses)
        ledger.use(AxisKey(weight, 0), *filters, where)
        if bias is not None:
            ledger.use(AxisKey(bias, 0), out_atoms, out_uses, where)
        return labels_along(out_atoms, out_uses, shape, [1])
    of_input = torch.arange(n_in) // (n_in // groups)
    of_output = torch.arange(n_out) // (n_out // groups)
    blocks = AxisKey(weight, 1, groups)
    ins, outs = (AxisKey(weight, 0), blocks) if transposed else (blocks, AxisKey(weight, 0))
    ledger.use(ins, atoms, mixed(uses, of_input), where)
    return _made(ledger, outs, bias, mixed(of_output, 3), shape, 1, where)


def per_channel(ledger: Ledger, x: Labels, axis: int, names: Iterable[str], where: str) -> Labels:
    """Each channel by itself, with an entry of each parameter: batch norm."""
    atoms, uses = ledger.columns(x.rows([axis]), where)
    for name in names:
        ledger.use(AxisKey(name, 0), atoms, uses, where)
    return labels_along(atoms, uses, x.shape, [axis])


def normalised(ledger: Ledger, x: Labels, dims: Sequence[int], names: Sequence[str], where: str) -> Labels:
    """Every entry by all those along `dims`: layer norm, softmax.

    names: parameters with an entry for each.
    """
    dims = list(dims)
    if not names and not any(x.is_long(dim) for dim in dims):
        return _one_for(x, dims, x.shape, where)
    rows = x.rows(dims)
    if _works_along_rows(ledger, rows[0]):
        return _along_rows(ledger, x, dims, x.shape, names, where)
    if not names and not _columns_are_one(ledger, rows[0]):
        return _row_by_row(ledger, x, dims, where)
    if names and len(dims) > 1:
        for name in names:
            ledger.hold(name, reasons.several_axes(where, len(dims)))
    atoms, uses = ledger.columns(rows, where)
    ledger.sum_over(atoms, uses, where)
    for name in names:
        if len(dims) > 1:
            ledger.pin(atoms, reasons.several_axes(where, len(dims)))
        else:
            ledger.use(AxisKey(name, 0), atoms, uses, where)
    return labels_along(atoms, uses, x.shape, dims).packed()


def reduced(ledger: Ledger, x: Labels, dims: Sequence[int], shape: Shape, where: str) -> Labels:
    """One value for all those along `dims`, in whatever order they come: mean, sum, amax."""
    if any(x.is_long(dim) for dim in dims):
        rows = x.rows(dims)
        if not bool(_rows_are_one(ledger, rows[0]).all()):
            ledger.sum_over(*ledger.columns(rows, where), where)
            return fixed_labels(shape, where)
    return _one_for(x, dims, shape, where)


def planes(ledger: Ledger, x: Labels, n_dims: int, shape: Shape, where: str) -> Labels:
    """Each channel's map, the last n_dims axes, becomes another: pooling, interpolation."""
    rank = len(x.shape)
    dims = list(range(rank - n_dims, rank))
    if any(x.is_long(dim) for dim in dims):
        atoms, _ = x.rows(dims)
        if not bool(_rows_are_one(ledger, atoms).all()):
            ledger.pin(atoms, reasons.along_channels(where))
            return fixed_labels(shape, where)
    flat = _one_for(x, dims, (*x.shape[: rank - n_dims], *[1] * n_dims), where)
    n_after = len(shape) - (rank - n_dims)
    sizes = (*flat.atoms.shape[: rank - n_dims], *[1] * n_after)
    even = (*flat.even[: rank - n_dims], *(size == 1 for size in shape[rank - n_dims :]))
    return Labels(flat.atoms.reshape(sizes), flat.subs.reshape(sizes), tuple(shape), even)


def matrix_product(ledger: Ledger, x: Labels, y: Labels, where: str) -> Labels:
    """x (..., I, K) times y (..., K, J): sums over channels along K, or carries those along I or J."""
    shape = (*torch.broadcast_shapes(x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1])
    rank = len(shape)
    x, y = x.led_by(rank - len(x.shape)), y.led_by(rank - len(y.shape))
    turned = [*range(rank - 2), rank - 1, rank - 2]
    x, y = _fitted([x, y.turned(turned)], [*range(rank - 2), rank - 1])  # (..., I, K) and (..., J, K)
    x_rows, y_rows = (one.atoms.reshape(-1, one.atoms.shape[-1]) for one in (x, y))
    if bool(_rows_are_one(ledger, x_rows).all()) and bool(_rows_are_one(ledger, y_rows).all()):
        x, y = (_one_for(one, [-1], (*one.shape[:-1], 1), where) for one in (x, y))
        y = y.turned(turned)
        both = (x.atoms >= 0) & (y.atoms >= 0)
        for atoms in (x.atoms, y.atoms):
            ledger.pin(atoms.expand(both.shape)[both], reasons.every_with_every(where))
        subs = mixed(x.subs, y.subs)
        # Where both are pinned, their atoms are part of what tells values apart.
        subs = torch.where(both, mixed(subs, x.atoms, y.atoms), subs)
        atoms = torch.where(both, FIXED, torch.maximum(x.atoms, y.atoms))
        even = tuple(a and b for a, b in zip(x.even, y.even, strict=True))
        return Labels(atoms, subs, shape, even)
    batch = [axis for axis in range(rank - 2) if x.is_long(axis) or y.is_long(axis)]
    sizes = [shape[axis] for axis in batch]
    columns = []
    for one in (x, y):
        columns.append(ledger.columns(_expanded(one, batch, shape).rows([*batch, rank - 1]), where))
    (x_atoms, x_uses), (y_atoms, y_uses) = columns
    ledger.tie(x_atoms, y_atoms)
    which = torch.arange(len(x_atoms)) // (len(x_atoms) // max(1, math.prod(sizes)))
    ledger.sum_over(torch.maximum(x_atoms, y_atoms), mixed(x_uses, y_uses, which), where)
    return fixed_labels(shape, where)


def _expanded(labels: Labels, axes: Iterable[int], shape: Shape) -> Labels:
    """Labels whose axes of size 1 among `axes` have become those of `shape`."""
    sizes = [shape[axis] if axis in axes else size for axis, size in enumerate(labels.shape)]
    return replace(labels, shape=tuple(sizes))


def embedding(ledger: Ledger, shape: Shape, weight: str, where: str) -> Labels:
    """Rows of a table, chosen by fixed indices; channels are its columns."""
    n_rows = ledger.shapes[weight][0]
    ledger.use(AxisKey(weight, 0), torch.full((n_rows,), FIXED), 0, where)
    return _made(ledger, AxisKey(weight, 1), None, 0, shape, len(shape) - 1, where)
