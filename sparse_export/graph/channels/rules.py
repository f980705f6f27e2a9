"""What each kind of operation does to channel labels: one function a kind.

Each takes a ledger, the labels of what the operation reads, the names of its parameters and `where`, its name
in messages; it writes down what it ties together and gives the labels of the result. Parameters are named as
in `Module.named_parameters()`, None where there is none. `labels.py` says what labels are.

Legend: R rows, C columns, N batch, I input and O output channels, K what a product sums over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sparse_export.graph.channels.labels import (
    FIXED,
    AxisKey,
    Labels,
    Ledger,
    fixed_labels,
    hash_of,
    hashed_rows,
    mixed,
    positions,
)

Shape = torch.Size | tuple[int, ...]


def elementwise(ledger: Ledger, operands: Sequence[Labels], shape: Shape) -> Labels:
    """Each entry of the result is computed from the entries at its place: those channels are one."""
    first = operands[0].expanded(torch.Size(shape))
    atoms, subs = first.atoms, first.subs
    for operand in operands[1:]:
        other = operand.expanded(torch.Size(shape))
        ledger.tie(atoms, other.atoms)
        atoms, subs = torch.where(atoms < 0, other.atoms, atoms), mixed(subs, other.subs)
    return Labels(atoms, subs)


def joined(parts: Sequence[Labels], dim: int, *, stacked: bool) -> Labels:
    """torch.cat, or torch.stack. Values of different parts are different, whatever their labels."""
    join = torch.stack if stacked else torch.cat
    parts = told_apart(parts)
    return Labels(join([part.atoms for part in parts], dim), join([part.subs for part in parts], dim))


def told_apart(parts: Sequence[Labels]) -> list[Labels]:
    """Labels that say which part a value is of."""
    return [Labels(part.atoms, mixed(part.subs, i)) for i, part in enumerate(parts)]


def layout(shape: Shape, dims: Iterable[int]) -> Tensor:
    """Places of entries as (R, C): C runs over `dims`, R over the others."""
    moved = sorted(dim % len(shape) for dim in dims)
    n_columns = 1
    for dim in moved:
        n_columns *= shape[dim]
    last = list(range(len(shape) - len(moved), len(shape)))
    return positions(shape).movedim(moved, last).reshape(-1, n_columns)


def _put(values_RC: Tensor, place_RC: Tensor, shape: Shape) -> Tensor:
    flat = torch.empty(place_RC.numel(), dtype=torch.int64)
    flat[place_RC.reshape(-1)] = values_RC.expand(place_RC.shape).reshape(-1)
    return flat.reshape(tuple(shape))


def _rows_are_one(ledger: Ledger, atoms_RC: Tensor) -> Tensor:
    """Is each row one atom, or fixed throughout? bool (R,)."""
    rooted = ledger.rooted(atoms_RC)
    return rooted.min(1).values == rooted.max(1).values


def _columns_are_one(ledger: Ledger, atoms_RC: Tensor) -> bool:
    rooted = ledger.rooted(atoms_RC)
    return bool((rooted.min(0).values == rooted.max(0).values).all())


def _works_along_rows(ledger: Ledger, atoms_RC: Tensor) -> bool:
    """Do the channels lie along other axes than the one that is worked on, as in a token-mixing layer?"""
    return not _columns_are_one(ledger, atoms_RC) and bool(_rows_are_one(ledger, atoms_RC).all())


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
    shape = (*x.atoms.shape[:-1], ledger.shapes[weight][1 - in_axis])
    rows = Labels(x.atoms.reshape(-1, x.atoms.shape[-1]), x.subs.reshape(-1, x.subs.shape[-1]))
    if _works_along_rows(ledger, rows.atoms):
        for name in filter(None, (weight, bias)):
            ledger.hold(name, f"{where} works along another axis than the channels'")
        subs = mixed(hashed_rows(rows.subs)[:, None], torch.arange(shape[-1]), hash_of(weight))
        return Labels(rows.atoms[:, :1].expand_as(subs).reshape(shape), subs.reshape(shape))
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
    place = layout(shape, [axis])
    subs = mixed(apart, torch.arange(len(place))[:, None])
    return Labels(_put(atoms, place, shape), _put(subs, place, shape))


def made_along_last(atoms: Tensor, shape: Shape, *words: object) -> Labels:
    """Labels of fresh values whose channels are the entries of the last axis."""
    place = layout(shape, [len(shape) - 1])
    subs = mixed(torch.arange(len(place))[:, None], hash_of(*words))
    return Labels(_put(atoms, place, shape), _put(subs, place, shape))


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
    atoms, uses = ledger.columns(x.moved(layout(x.atoms.shape, [1])), where)
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
        place = layout(shape, [1])
        subs = mixed(out_uses, torch.arange(len(place))[:, None])
        return Labels(_put(out_atoms, place, shape), _put(subs, place, shape))
    of_input = torch.arange(n_in) // (n_in // groups)
    of_output = torch.arange(n_out) // (n_out // groups)
    blocks = AxisKey(weight, 1, groups)
    ins, outs = (AxisKey(weight, 0), blocks) if transposed else (blocks, AxisKey(weight, 0))
    ledger.use(ins, atoms, mixed(uses, of_input), where)
    return _made(ledger, outs, bias, mixed(of_output, 3), shape, 1, where)


def per_channel(
    ledger: Ledger,
    x: Labels,
    axis: int,
    names: Iterable[str],
    where: str,
    *,
    groups: int | None = None,
) -> Labels:
    """Each channel by itself, with an entry of each parameter: batch norm, PReLU.

    groups: the channels of a group are normalised together, as in group norm.
    """
    place = layout(x.atoms.shape, [axis])
    columns = x.moved(place)
    atoms, uses = ledger.columns(columns, where)
    if groups is not None:
        uses = mixed(uses, torch.arange(len(uses)) // (len(uses) // groups))
        ledger.sum_over(atoms, uses, where)
    for name in names:
        ledger.use(AxisKey(name, 0), atoms, uses, where)
    subs = mixed(uses, torch.arange(len(place))[:, None])
    return Labels(x.atoms, _put(subs, place, x.atoms.shape))


def normalised(ledger: Ledger, x: Labels, dims: Sequence[int], names: Sequence[str], where: str) -> Labels:
    """Every entry by all those along `dims`: layer norm, softmax.

    names: parameters with an entry for each.
    """
    shape = x.atoms.shape
    place = layout(shape, dims)
    rows = x.moved(place)
    if _works_along_rows(ledger, rows.atoms):
        for name in names:
            ledger.hold(name, f"{where} works along another axis than the channels'")
        subs = mixed(hashed_rows(rows.subs)[:, None], torch.arange(place.shape[1]))
        return Labels(x.atoms, _put(subs, place, shape))
    if names and len(dims) > 1:
        for name in names:
            ledger.hold(name, f"{where} has parameters over {len(dims)} axes")
    atoms, uses = ledger.columns(rows, where)
    ledger.sum_over(atoms, uses, where)
    for name in names:
        if len(dims) > 1:
            ledger.pin(atoms, f"{where} has parameters over {len(dims)} axes")
        else:
            ledger.use(AxisKey(name, 0), atoms, uses, where)
    subs = mixed(uses, torch.arange(len(place))[:, None])
    return Labels(x.atoms, _put(subs, place, shape))


def reduced(ledger: Ledger, x: Labels, dims: Sequence[int], shape: Shape, where: str) -> Labels:
    """One value for all those along `dims`, in whatever order they come: mean, sum, amax."""
    rows = x.moved(layout(x.atoms.shape, dims))
    if not bool(_rows_are_one(ledger, rows.atoms).all()):
        ledger.sum_over(*ledger.columns(rows, where), where)
        return fixed_labels(torch.Size(shape), where)
    return Labels(rows.atoms[:, 0].reshape(tuple(shape)), hashed_rows(rows.subs).reshape(tuple(shape)))


def planes(ledger: Ledger, x: Labels, n_dims: int, shape: Shape, where: str) -> Labels:
    """Each channel's map, the last n_dims axes, becomes another: pooling, interpolation."""
    rank = x.atoms.dim()
    rows = x.moved(layout(x.atoms.shape, range(rank - n_dims, rank)))
    if not bool(_rows_are_one(ledger, rows.atoms).all()):
        ledger.pin(rows.atoms, f"{where} works along the channels")
        return fixed_labels(torch.Size(shape), where)
    n_out = 1
    for size in shape[rank - n_dims :]:
        n_out *= size
    subs = mixed(hashed_rows(rows.subs)[:, None], torch.arange(n_out))
    return Labels(rows.atoms[:, :1].expand(-1, n_out).reshape(tuple(shape)), subs.reshape(tuple(shape)))


def matrix_product(ledger: Ledger, x: Labels, y: Labels, where: str) -> Labels:
    """x (..., I, K) times y (..., K, J): sums over channels along K, or carries those along I or J."""
    batch = torch.broadcast_shapes(x.atoms.shape[:-2], y.atoms.shape[:-2])
    (n_i, n_k), n_j = x.atoms.shape[-2:], y.atoms.shape[-1]
    shape = torch.Size((*batch, n_i, n_j))
    x = x.expanded(torch.Size((*batch, n_i, n_k)))
    y = y.expanded(torch.Size((*batch, n_k, n_j)))
    x_rows = Labels(x.atoms.reshape(-1, n_k), x.subs.reshape(-1, n_k))
    y_rows = Labels(y.atoms.mT.reshape(-1, n_k), y.subs.mT.reshape(-1, n_k))
    if bool(_rows_are_one(ledger, x_rows.atoms).all()) and bool(_rows_are_one(ledger, y_rows.atoms).all()):
        x_atoms = x_rows.atoms[:, 0].reshape(-1, n_i, 1).expand(-1, n_i, n_j)
        y_atoms = y_rows.atoms[:, 0].reshape(-1, 1, n_j).expand(-1, n_i, n_j)
        both = (x_atoms >= 0) & (y_atoms >= 0)
        for atoms in (x_atoms, y_atoms):
            ledger.pin(atoms[both], f"{where} multiplies every channel with every other")
        subs = mixed(
            hashed_rows(x_rows.subs).reshape(-1, n_i, 1), hashed_rows(y_rows.subs).reshape(-1, 1, n_j)
        )
        # Where both are pinned, their atoms are part of what tells values apart.
        subs = torch.where(both, mixed(subs, x_atoms, y_atoms), subs)
        atoms = torch.where(both, FIXED, torch.maximum(x_atoms, y_atoms))
        return Labels(atoms.reshape(shape), subs.reshape(shape))
    x_places = layout(x.atoms.shape, [d for d in range(len(shape)) if d != len(shape) - 2])  # (I, B*K)
    y_places = layout(y.atoms.shape, [d for d in range(len(shape)) if d != len(shape) - 1])  # (J, B*K)
    x_atoms, x_uses = ledger.columns(x.moved(x_places), where)
    y_atoms, y_uses = ledger.columns(y.moved(y_places), where)
    ledger.tie(x_atoms, y_atoms)
    which = torch.arange(len(x_atoms)) // n_k
    ledger.sum_over(torch.maximum(x_atoms, y_atoms), mixed(x_uses, y_uses, which), where)
    return fixed_labels(shape, where)


def scaled_attention(
    ledger: Ledger, query: Labels, key: Labels, value: Labels, mask: Labels | None, where: str
) -> Labels:
    """softmax(query key^T + mask) value, over the last two axes."""
    swapped = Labels(key.atoms.mT, key.subs.mT)
    scores = matrix_product(ledger, query, swapped, f"{where} (query by key)")
    if mask is not None:
        scores = elementwise(ledger, [scores, mask], scores.atoms.shape)
    shares = normalised(ledger, scores, [-1], (), where)
    return matrix_product(ledger, shares, value, f"{where} (by value)")


def embedding(ledger: Ledger, shape: Shape, weight: str, where: str) -> Labels:
    """Rows of a table, chosen by fixed indices; channels are its columns."""
    n_rows = ledger.shapes[weight][0]
    ledger.use(AxisKey(weight, 0), torch.full((n_rows,), FIXED), 0, where)
    return _made(ledger, AxisKey(weight, 1), None, 0, shape, len(shape) - 1, where)


def multihead_attention(
    ledger: Ledger,
    inputs: tuple[Labels, Labels, Labels],
    weights: tuple[str, str, str] | str,
    bias: str | None,
    out: tuple[str, str | None],
    shape: Shape,
    n_heads: int,
    where: str,
) -> Labels:
    """nn.MultiheadAttention: query, key, value (..., E); out: weight and bias of the output projection.

    weights: one matrix (3E, E), or three. Rows of query and key stay in place: nothing reads them but the
    scores. The value's rows move within their head, and the output projection's columns with them.
    """
    for labels, weight in zip(inputs, [weights] * 3 if isinstance(weights, str) else weights, strict=True):
        place = layout(labels.atoms.shape, [-1])
        atoms, uses = ledger.columns(labels.moved(place), where)
        ledger.use(AxisKey(weight, 1), atoms, uses, where)
    size = shape[-1]
    head = mixed(torch.arange(size) // (size // n_heads), 4)
    if isinstance(weights, str):
        rows, _ = ledger.make(
            AxisKey(weights, 0), torch.cat([torch.zeros(2 * size, dtype=torch.int64), head]), where
        )
        ledger.pin(rows[: 2 * size], f"{where}: rows of query and key stay in place")
        values = rows[2 * size :]
    else:
        values, _ = ledger.make(AxisKey(weights[2], 0), head, where)
    if bias is not None:
        ledger.use(AxisKey(bias, 0), torch.cat([torch.full((2 * size,), FIXED), values]), 0, where)
    weight, out_bias = out
    ledger.use(AxisKey(weight, 1), values, head, where)
    return _made(ledger, AxisKey(weight, 0), out_bias, 0, shape, len(shape) - 1, where)
