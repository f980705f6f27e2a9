"""What each operator of ONNX does to channel labels: one rule each, by the operator's name.

Operators that only move values are run on the labels themselves. One that is not here pins what it reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import onnx
import torch

from sparse_export.graph.channels import reasons, rules
from sparse_export.graph.channels.graph_trace import GraphTrace, Rule, Value, moved_by
from sparse_export.graph.channels.labels import AxisKey, Labels, UnknownOperation, positions
from sparse_export.graph.channels.onnx_graph import attribute
from sparse_export.graph.channels.operators import ELEMENTWISE, POOLS, REDUCE
from sparse_export.graph.channels.parameters import Found, Undecided

__all__ = ["RULES"]

_RESHAPES = frozenset(("Reshape", "Flatten", "Squeeze", "Unsqueeze"))
_MOVES = frozenset(
    ("DepthToSpace", "SpaceToDepth", "GatherElements", "GatherND", "ReverseSequence", "Compress", "Tile")
)
_MOST = 1 << 24  # entries of a value that is told entry by entry; each takes some 100 bytes on the way
_SAME = frozenset(("Identity", "Cast", "CastLike", "Dropout"))


def elementwise(trace: GraphTrace, node: onnx.NodeProto) -> Sequence[Value]:
    """Each entry of the result is computed from the entries at its place."""
    if any(node.output[1:]):
        raise UnknownOperation("several results")
    places = [at for at in range(len(node.input)) if trace.given(node, at)]
    found = [trace.found(node, at) for at in places]
    try:
        shape = np.broadcast_shapes(*map(_shape_of, found))
    except ValueError as cause:
        raise UnknownOperation("sizes that do not fit") from cause
    # A number that is one for all entries tells none from another.
    values = [trace.value(node, at) for at in places]
    alike = [isinstance(value, np.ndarray) and value.size == 1 for value in values]
    operands = [one for one, is_alike in zip(found, alike, strict=True) if not is_alike] or found
    return [trace.parameters.elementwise(operands, shape, trace.where(node))]


def same(trace: GraphTrace, node: onnx.NodeProto) -> Sequence[Value]:
    """Values as they are."""
    if any(node.output[1:]):
        raise UnknownOperation("several results")
    if node.op_type == "Dropout" and trace.given(node, 2) and np.any(trace.known(node, 2)):
        raise UnknownOperation("dropout in training")
    return [trace.value(node, 0)]


def moved(trace: GraphTrace, node: onnx.NodeProto) -> Sequence[Value]:
    """Values that only change places: the operator is run on their places."""
    found = trace.found(node, 0)
    rest = [trace.known(node, at) for at in range(1, len(node.input))]
    places = positions(_told_at_most(found)).numpy()
    made = moved_by(node, trace.model.opset_import, [places, *rest])
    return [trace.parameters.looked_up(found, torch.from_numpy(np.array(index))) for index in made]


def _told_at_most(found: Found) -> tuple[int, ...]:
    """The shape of a value. Raises UnknownOperation where it is too large to be told entry by entry."""
    if math.prod(found.shape) > _MOST:
        raise UnknownOperation(f"{math.prod(found.shape):,} values, and {_MOST:,} of one tensor are followed")
    return tuple(found.shape)


def reshaped(trace: GraphTrace, node: onnx.NodeProto) -> Sequence[Value]:
    """The same values in the same order."""
    found, shape = trace.found(node, 0), trace.shape_of(node.output[0])
    if isinstance(found, Undecided) or shape is None or math.prod(shape) != math.prod(found.shape):
        return moved(trace, node)
    for at in range(1, len(node.input)):
        trace.known(node, at)
    return [found.reshaped(shape)]


def transposed(trace: GraphTrace, node: onnx.NodeProto) -> Sequence[Value]:
    """Axes in another order."""
    found = trace.found(node, 0)
    if isinstance(found, Undecided):
        return moved(trace, node)
    return [found.turned(attribute(node, "perm", None) or range(len(found.shape))[::-1])]


def expanded(trace: GraphTrace, node: onnx.NodeProto) -> Sequence[Value]:
    """Values again and again along axes of one."""
    found, sizes = trace.found(node, 0), trace.known(node, 1)
    if isinstance(found, Undecided) or sizes is None:
        return moved(trace, node)
    shape = np.broadcast_shapes(found.shape, tuple(int(size) for size in sizes))
    return [replace(found.led_by(len(shape) - len(found.shape)), shape=shape)]


def split(trace: GraphTrace, node: onnx.NodeProto) -> Sequence[Value]:
    """Runs of an axis."""
    found = trace.found(node, 0)
    shapes = [trace.shape_of(name) for name in node.output]
    axis = attribute(node, "axis", 0) % len(found.shape)
    trace.known(node, 1)
    sizes = [0 if shape is None else shape[axis] for shape in shapes]
    if isinstance(found, Undecided) or sum(sizes) != found.shape[axis]:
        return moved(trace, node)
    return [found.taken(axis, part) for part in torch.arange(found.shape[axis]).split(sizes)]


def sliced(trace: GraphTrace, node: onnx.NodeProto) -> Sequence[Value]:
    """A run of each axis, perhaps with steps."""
    found = trace.found(node, 0)
    rest = [trace.known(node, at) for at in range(1, len(node.input))]
    if isinstance(found, Undecided) or len(rest) < 2 or rest[0] is None or rest[1] is None:
        return moved(trace, node)
    rank = len(found.shape)
    axes = rest[2] if len(rest) > 2 and rest[2] is not None else np.arange(len(rest[0]))
    steps = rest[3] if len(rest) > 3 and rest[3] is not None else np.ones(len(axes), np.int64)
    for axis, start, end, step in zip(axes, rest[0], rest[1], steps, strict=True):
        along = int(axis) % rank
        places = np.arange(found.shape[along])[int(start) : int(end) : int(step)]
        found = found.taken(along, torch.from_numpy(places.copy()))
    return [found]


def pad(trace: GraphTrace, node: onnx.NodeProto) -> Sequence[Value]:
    """Filled-in values have the place -1; along axes where only places differ they are as the others."""
    found = trace.found(node, 0)
    mode = attribute(node, "mode", b"constant")
    if len(node.input) < 2:
        raise UnknownOperation("pads of an old form")
    pads, axes = trace.known(node, 1), trace.known(node, 3)
    if mode == b"constant" and pads is not None and bool((pads < 0).any()):
        raise UnknownOperation("pads that cut")
    if trace.given(node, 2):
        trace.known(node, 2)
    shape = trace.shape_of(node.output[0])
    if isinstance(found, Labels) and shape is not None and bool((found.atoms >= 0).any()):
        grown = [axis for axis, size in enumerate(shape) if size != found.shape[axis]]
        if not any(found.is_long(axis) for axis in grown):
            even = tuple(is_even and axis not in grown for axis, is_even in enumerate(found.even))
            return [replace(found, shape=shape, even=even)]
    places = positions(_told_at_most(found)).numpy()
    rest = [pads, np.array(-1) if mode == b"constant" else None, axes]
    while rest and rest[-1] is None:
        rest.pop()
    (index,) = moved_by(node, trace.model.opset_import, [places, *rest])
    return [trace.parameters.looked_up(found, torch.from_numpy(np.array(index)), node.output[0])]


def concat(trace: GraphTrace, node: onnx.NodeProto) -> Sequence[Value]:
    """Parts one behind the other."""
    parts = [trace.found(node, at) for at in range(len(node.input))]
    rank = len(_shape_of(parts[0]))
    axis = attribute(node, "axis", 0) % rank
    return [trace.parameters.joined(parts, axis, trace.where(node))]


def gather(trace: GraphTrace, node: onnx.NodeProto) -> Sequence[Value]:
    """A choice by known numbers moves values; one of a table's rows by an input is an embedding."""
    data, indices = trace.found(node, 0), trace.value(node, 1)
    axis = attribute(node, "axis", 0) % len(_shape_of(data))
    if isinstance(indices, np.ndarray):
        if isinstance(data, Undecided):
            return moved(trace, node)
        size = data.shape[axis]
        if indices.size and not -size <= indices.min() <= indices.max() < size:
            raise UnknownOperation("an index that is out of range")
        chosen = data.taken(axis, torch.from_numpy(indices.reshape(-1) % size))
        return [chosen.reshaped((*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]))]
    if isinstance(indices, Undecided):
        raise UnknownOperation("indices that are floats")
    if bool((indices.atoms >= 0).any()):
        raise UnknownOperation("an index that is computed from channels")
    if isinstance(data, Undecided):
        weight = trace.parameters.raw(data)
        if axis != 0 or len(trace.ledger.shapes[weight]) != 2:
            raise UnknownOperation("a table of another form")
        return [rules.embedding(trace.ledger, trace.made_shape(node), weight, trace.where(node))]
    return [_along(trace, data, [axis], trace.made_shape(node), node, n_after=len(indices.shape))]


def shape_of(trace: GraphTrace, node: onnx.NodeProto) -> Sequence[Value]:
    """Sizes are known at the sizes of a run."""
    shape = _shape_of(trace.found(node, 0))
    if node.op_type == "Size":
        return [np.array(math.prod(shape), np.int64)]
    part = slice(attribute(node, "start", 0), attribute(node, "end", None))
    return [np.array(shape[part], np.int64)]


def conv(trace: GraphTrace, node: onnx.NodeProto) -> Sequence[Value]:
    """Conv and ConvTranspose."""
    x, weight, bias = trace.labels(node), trace.raw(node, 1), trace.raw(node, 2)
    if weight is None or len(x.shape) != len(trace.ledger.shapes[weight]):
        raise UnknownOperation("a convolution of another form")
    groups = attribute(node, "group", 1)
    stored = trace.ledger.shapes[weight]
    if x.shape[1] != (stored[0] if node.op_type == "ConvTranspose" else stored[1] * groups):
        raise UnknownOperation("sizes that do not fit")
    made = rules.convolution(
        trace.ledger,
        x,
        weight,
        bias,
        trace.where(node),
        shape=trace.made_shape(node),
        groups=groups,
        transposed=node.op_type == "ConvTranspose",
    )
    return [made]


def gemm(trace: GraphTrace, node: onnx.NodeProto) -> Sequence[Value]:
    """A product with a matrix, and something added."""
    x = trace.labels(node)
    if attribute(node, "transA", 0):
        x = _turned(x)
    weight, in_axis = _matrix(trace, trace.found(node, 1))
    if attribute(node, "transB", 0):
        in_axis = 1 - in_axis
    where = trace.where(node)
    bias = trace.value(node, 2) if trace.given(node, 2) else None
    if isinstance(bias, Undecided) and bias.order is None and not bias.tag and len(bias.shape) == 1:
        return [_linear(trace, x, weight, in_axis, where, bias.name)]
    made: Found = _linear(trace, x, weight, in_axis, where)
    if bias is not None:
        made = trace.parameters.elementwise([made, trace.found(node, 2)], trace.made_shape(node), where)
    return [made]


def matmul(trace: GraphTrace, node: onnx.NodeProto) -> Sequence[Value]:
    """A product with a stored matrix from either side, or of two values."""
    x, y, where = trace.found(node, 0), trace.found(node, 1), trace.where(node)
    if isinstance(y, Undecided) and len(y.shape) == 2 and isinstance(x, Labels) and not y.tag:
        weight, in_axis = _matrix(trace, y)
        return [_linear(trace, x, weight, in_axis, where)]
    if isinstance(x, Undecided) and len(x.shape) == 2 and isinstance(y, Labels) and not x.tag:
        weight, out_axis = _matrix(trace, x)
        if len(y.shape) < 2:
            raise UnknownOperation("a product with a vector")
        made = _linear(trace, _turned(y), weight, 1 - out_axis, where)
        return [_turned(made)]
    if min(len(_shape_of(x)), len(_shape_of(y))) < 2:
        raise UnknownOperation("a product with a vector")
    if _shape_of(x)[-1] != _shape_of(y)[-2]:
        raise UnknownOperation("sizes that do not fit")
    return [rules.matrix_product(trace.ledger, trace.labels(node, 0), trace.labels(node, 1), where)]


def _linear(
    trace: GraphTrace, x: Labels, weight: str, in_axis: int, where: str, bias: str | None = None
) -> Labels:
    if not len(x.shape) or x.shape[-1] != trace.ledger.shapes[weight][in_axis]:
        raise UnknownOperation("sizes that do not fit")
    return rules.linear(trace.ledger, x, weight, bias, where, in_axis=in_axis)


def _turned(labels: Labels) -> Labels:
    rank = len(labels.shape)
    return labels.turned([*range(rank - 2), rank - 1, rank - 2])


def _matrix(trace: GraphTrace, found: Found) -> tuple[str, int]:
    """A stored matrix, and which of its axes is the first of the value. It may have been transposed."""
    if not isinstance(found, Undecided) or found.tag or len(found.shape) != 2:
        raise UnknownOperation("a computed matrix")
    stored = trace.ledger.shapes[found.name]
    if found.order is None:
        return found.name, 0
    if len(stored) == 2:
        for axis, index in ((0, positions(stored)), (1, positions(stored).T)):
            if index.shape == found.index.shape and torch.equal(index, found.index):
                return found.name, axis
    raise UnknownOperation("a rearranged matrix")


def batch_norm(trace: GraphTrace, node: onnx.NodeProto) -> Sequence[Value]:
    """Each channel by itself, with an entry of each parameter."""
    if attribute(node, "training_mode", 0) or any(node.output[1:]):
        raise UnknownOperation("statistics of the batch")
    x, read = trace.labels(node), [trace.value(node, at) for at in range(1, 5)]
    if any(isinstance(one, Labels) for one in read):  # statistics of the batch, computed beside it
        return [_scaled(trace, node, x, x, range(1, 5))]
    names = [name for at in range(1, 5) if (name := trace.raw(node, at)) is not None]
    return [rules.per_channel(trace.ledger, x, 1, names, trace.where(node))]


def _scaled(trace: GraphTrace, node: onnx.NodeProto, x: Labels, made: Found, places: Iterable[int]) -> Found:
    """What is made of x, with an entry for each channel of the inputs at these places."""
    for at in places:
        found = trace.found(node, at)
        shape = (x.shape[1], *[1] * (len(x.shape) - 2))
        spread = trace.parameters.looked_up(found, positions(_shape_of(found)).reshape(shape))
        made = trace.parameters.elementwise([made, spread], x.shape, trace.where(node))
    return made


def instance_norm(trace: GraphTrace, node: onnx.NodeProto) -> Sequence[Value]:
    """Each map by itself; with channels in the map it is a group norm."""
    x, where = trace.labels(node), trace.where(node)
    dims = range(2, len(x.shape))
    return [_scaled(trace, node, x, rules.normalised(trace.ledger, x, dims, (), where), (1, 2))]


def layer_norm(trace: GraphTrace, node: onnx.NodeProto) -> Sequence[Value]:
    """LayerNormalization and RMSNormalization."""
    if any(node.output[1:]):
        raise UnknownOperation("several results")
    x = trace.labels(node)
    rank = len(x.shape)
    first = attribute(node, "axis", -1) % rank
    names = [name for at in (1, 2) if (name := trace.raw(node, at)) is not None]
    return [rules.normalised(trace.ledger, x, range(first, rank), names, trace.where(node))]


def softmax(trace: GraphTrace, node: onnx.NodeProto) -> Sequence[Value]:
    """Every entry by all those along an axis; before opset 13 along all from that axis on."""
    x = trace.labels(node)
    rank = len(x.shape)
    if trace.opset >= 13:
        dims = [attribute(node, "axis", -1) % rank]
    else:
        dims = list(range(attribute(node, "axis", 1) % rank, rank))
    return [rules.normalised(trace.ledger, x, dims, (), trace.where(node))]


def lp_norm(trace: GraphTrace, node: onnx.NodeProto) -> Sequence[Value]:
    """Every entry by the length of all along an axis."""
    x = trace.labels(node)
    dims = [attribute(node, "axis", -1) % len(x.shape)]
    return [rules.normalised(trace.ledger, x, dims, (), trace.where(node))]


def reduced(trace: GraphTrace, node: onnx.NodeProto) -> Sequence[Value]:
    """One value for all those along some axes, in whatever order they come."""
    x = trace.labels(node)
    axes = trace.numbers(node, "axes", 1)
    if not axes:
        if attribute(node, "noop_with_empty_axes", 0):
            return [x]
        axes = list(range(len(x.shape)))
    dims = sorted({axis % len(x.shape) for axis in axes})
    shape = [1 if axis in dims else size for axis, size in enumerate(x.shape)]
    if not attribute(node, "keepdims", 1):
        shape = [size for axis, size in enumerate(shape) if axis not in dims]
    return [rules.reduced(trace.ledger, x, dims, tuple(shape), trace.where(node))]


def pooled(trace: GraphTrace, node: onnx.NodeProto) -> Sequence[Value]:
    """Each channel's map becomes another."""
    x = trace.labels(node)
    if any(node.output[1:]):
        raise UnknownOperation("several results")
    return [rules.planes(trace.ledger, x, len(x.shape) - 2, trace.made_shape(node), trace.where(node))]


def resized(trace: GraphTrace, node: onnx.NodeProto) -> Sequence[Value]:
    """The axes whose size changes become others."""
    x, shape = trace.labels(node), trace.made_shape(node)
    if attribute(node, "coordinate_transformation_mode", b"") == b"tf_crop_and_resize":
        raise UnknownOperation("a part of the map")
    changed = [axis for axis, size in enumerate(x.shape) if size != shape[axis]]
    dims = changed or list(range(min(2, len(x.shape)), len(x.shape)))
    return [_along(trace, x, dims, shape, node)]


def along_an_axis(trace: GraphTrace, node: onnx.NodeProto) -> Sequence[Value]:
    """Values that depend on others along one axis, and on their places in it."""
    x = trace.labels(node)
    default = {"ArgMax": 0, "ArgMin": 0}.get(node.op_type, -1)
    if node.op_type == "CumSum":
        found = trace.known(node, 1)
        axis = 0 if found is None else int(found.reshape(-1)[0])
    else:
        axis = int(attribute(node, "axis", default))
    dims = [axis % len(x.shape)]
    if node.op_type == "Hardmax" and trace.opset < 13:
        raise UnknownOperation("its older form")
    made = []
    for name in filter(None, node.output):
        shape = trace.shape_of(name)
        if shape is None:
            raise UnknownOperation("its shape depends on data")
        n_after = 0 if len(shape) < len(x.shape) else 1
        made.append(_along(trace, x, dims, shape, node, n_after=n_after))
    return made


def _along(
    trace: GraphTrace,
    x: Labels,
    dims: Sequence[int],
    shape: Sequence[int],
    node: onnx.NodeProto,
    *,
    n_after: int | None = None,
) -> Labels:
    """The axes `dims` become n_after axes at the place of the first, which may have other sizes."""
    n_after = len(dims) if n_after is None else n_after
    rank, first = len(x.shape), dims[0]
    others = [axis for axis in range(rank) if axis not in dims]
    after = list(range(first, first + n_after)) if n_after != len(dims) else list(dims)
    kept = [axis for axis in range(len(shape)) if axis not in after]
    sizes = [shape[axis] for axis in (*kept, *after)]
    made = rules.planes(trace.ledger, x.turned([*others, *dims]), len(dims), sizes, trace.where(node))
    places = [*kept, *after]
    return made.turned([places.index(axis) for axis in range(len(shape))])


def recurrent(trace: GraphTrace, node: onnx.NodeProto) -> Sequence[Value]:
    """RNN, GRU and LSTM: a unit's rows of all gates go together, with its columns of the recurrent matrix."""
    n_gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[node.op_type]
    names = [trace.raw(node, at) for at in (1, 2)]
    bias = trace.raw(node, 3)
    if None in names or attribute(node, "layout", 0) or trace.given(node, 7):
        raise UnknownOperation("a form of it that is not known")
    w, r = (str(name) for name in names)
    ledger, where, x = trace.ledger, trace.where(node), trace.labels(node)
    n_units = ledger.shapes[r][2]
    atoms, uses = ledger.columns(x.rows([2]), where)
    ledger.use(AxisKey(w, 2), atoms, uses, where)
    units = ledger.new_atoms(n_units)
    gates = torch.arange(n_gates).repeat_interleave(n_units) + 1
    ledger.use(AxisKey(w, 1), units.repeat(n_gates), gates, where)
    ledger.use(AxisKey(r, 1), units.repeat(n_gates), gates, where)
    ledger.use(AxisKey(r, 2), units, 1, where)
    if bias is not None:
        halves = torch.arange(2 * n_gates).repeat_interleave(n_units) + 1
        ledger.use(AxisKey(bias, 1), units.repeat(2 * n_gates), halves, where)
    for at in (5, 6):
        if trace.given(node, at):
            state = trace.labels(node, at)
            if _alike(state):
                continue
            atoms, uses = ledger.columns(state.rows([2]), where)
            ledger.tie(atoms, units)
            ledger.pin(units[atoms < 0], reasons.fixed_state(where))
            ledger.sum_over(units, uses, where)
    return [
        rules.made_along_last(units, trace.shape_of(name) or (), name) if name else Labels.of(units, units)
        for name in node.output
    ]


def _alike(labels: Labels) -> bool:
    """Are all values of the last axis the same?"""
    same = labels.is_long(-1) or labels.even[-1]
    return bool((labels.atoms < 0).all()) and same and bool((labels.subs == labels.subs[..., :1]).all())


def _shape_of(found: Found) -> tuple[int, ...]:
    return tuple(found.shape)


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(_MOVES, moved),
    **dict.fromkeys(_RESHAPES, reshaped),
    **dict.fromkeys(_SAME, same),
    **dict.fromkeys(REDUCE, reduced),
    **dict.fromkeys(POOLS, pooled),
    **dict.fromkeys(("Resize", "Upsample"), resized),
    **dict.fromkeys(("ArgMax", "ArgMin", "CumSum", "Hardmax", "TopK"), along_an_axis),
    **dict.fromkeys(("Conv", "ConvTranspose"), conv),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), layer_norm),
    **dict.fromkeys(("Softmax", "LogSoftmax"), softmax),
    **dict.fromkeys(("Shape", "Size"), shape_of),
    **dict.fromkeys(("RNN", "GRU", "LSTM"), recurrent),
    "BatchNormalization": batch_norm,
    "Concat": concat,
    "Gather": gather,
    "Gemm": gemm,
    "InstanceNormalization": instance_norm,
    "LpNormalization": lp_norm,
    "MatMul": matmul,
    "Expand": expanded,
    "Pad": pad,
    "Slice": sliced,
    "Split": split,
    "Transpose": transposed,
}
