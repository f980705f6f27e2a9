"""How each operator takes fewer channels, and which of its results are known numbers: by the operator's name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
import torch

from sparse_export.graph.channels import reasons
from sparse_export.graph.channels.graph_rules import RULES
from sparse_export.graph.channels.graph_trace import GraphTrace, Rule, Value, moved_by
from sparse_export.graph.channels.labels import Labels, UnknownOperation, fixed_labels
from sparse_export.graph.channels.onnx_graph import Array, Graph, attribute, padded, title
from sparse_export.graph.channels.operators import ELEMENTWISE, ONE_TO_ONE, REDUCE
from sparse_export.graph.channels.removal import REAL, Removal, Taker, with_numbers
from sparse_export.graph.channels.removal_layers import conv, conv_transpose, gemm, matmul
from sparse_export.graph.layers import FLOATS

__all__ = ["removal_of", "slice_range"]

Made = Sequence[Value]
_JOINS = frozenset(("Add", "Div", "Max", "Mean", "Min", "Mul", "PRelu", "Pow", "Sub", "Sum"))


def removal_of(graph: Graph) -> Removal:
    """What can leave a graph, its nodes walked in order."""
    found = Removal(graph, graph.shapes(), _OWN_RULES, _TAKERS)
    found.run()
    return found


# Rules that differ from those of orders


def _gather(trace: GraphTrace, node: onnx.NodeProto) -> Sequence[Value]:
    """Channels that are picked by constant numbers are channels of their own: fewer numbers, fewer channels."""
    made = RULES["Gather"](trace, node)
    assert isinstance(trace, Removal)
    data, index, axis = trace.find(node.input[0]), trace.array(node, 1), _picking_axis(trace, node)
    if index is None or index.ndim != 1 or axis is None or not isinstance(data, Labels):
        return made
    shape = tuple(made[0].shape) if isinstance(made[0], Labels) else ()
    trace.ledger.pin(data.atoms, reasons.picked(title(node)))
    slots = trace.ledger.new_atoms(len(index))
    trace.claim(node.input[1], {0: slots.numpy()})
    sizes = [size if place == axis else 1 for place, size in enumerate(shape)]
    even = tuple(size == 1 for size in shape)
    picked = Labels(slots.reshape(sizes), torch.zeros(sizes, dtype=torch.int64), shape, even)
    if data.numbers is None or data.long != [axis]:
        return [picked]
    return [
        replace(picked, numbers=data.numbers.index_select(axis, torch.from_numpy(index % data.shape[axis])))
    ]


def _picking_axis(trace: Removal, node: onnx.NodeProto) -> int | None:
    """The axis that a Gather picks channels along; None where it picks something else."""
    data = trace.find(node.input[0])
    if not isinstance(data, Labels):
        return None
    axis: int = attribute(node, "axis", 0) % len(data.shape)
    return axis if not data.long or data.long == [axis] else None


def _by_row(trace: GraphTrace, node: onnx.NodeProto) -> Sequence[Value]:
    """A product along another axis than the channels' makes channels of its own, and what it reads stays."""
    x = trace.find(node.input[0])
    rule = RULES[node.op_type]
    if not isinstance(x, Labels) or not x.long or x.is_long(-1) or node.input[1] not in trace.ledger.shapes:
        return rule(trace, node)
    trace.ledger.pin(x.atoms, reasons.read_along_another(title(node)))
    trace.values[node.input[0]] = fixed_labels(x.shape, node.input[0])
    try:
        return rule(trace, node)
    finally:
        trace.values[node.input[0]] = x


_OWN_RULES: dict[str, Rule] = {**RULES, "Gather": _gather, "MatMul": _by_row, "Gemm": _by_row}


# Moves


def as_made(removal: Removal, node: onnx.NodeProto, made: Made) -> Made | None:
    """Nothing of the node has to change, or only numbers that `compact` changes."""
    return made


def reshape(removal: Removal, node: onnx.NodeProto, made: Made) -> Made | None:
    """Reshape to stored sizes."""
    sizes = removal.array(node, 1)
    zeros = sizes is not None and not sizes.all()
    return None if sizes is None or (zeros and attribute(node, "allowzero", 0)) else made


def gather(removal: Removal, node: onnx.NodeProto, made: Made) -> Made | None:
    """Rows of a table lose its columns; a choice by constant numbers keeps the channels that it picks along."""
    table, whole = removal.graph.arrays.get(node.input[0]), made[0]
    if table is None:
        return made
    if table.ndim != 2 or attribute(node, "axis", 0) or not isinstance(whole, Labels):
        return None
    axis = len(whole.shape) - 1
    removal.claim(
        node.input[0], {1: removal.slots(whole, axis, table.shape[1], reasons.shared_weight(title(node)))}
    )
    return made


def squeeze(removal: Removal, node: onnx.NodeProto, made: Made) -> Made | None:
    """Without axes it would take away one on which a single channel is left."""
    x = removal.labels_of(node, 0)
    return made if x is not None and _axes(removal, node, len(x.shape)) else None


def shape_of(removal: Removal, node: onnx.NodeProto, made: Made) -> Made | None:
    """Shape of axes that keep their sizes."""
    along, x = removal.along.get(node.input[0]), removal.labels_of(node, 0)
    if along is None or x is None:
        return None
    start, end, _ = slice(attribute(node, "start", 0), attribute(node, "end", None)).indices(len(x.shape))
    return None if along.axis < 0 or start <= along.axis < end else made


def split(removal: Removal, node: onnx.NodeProto, made: Made) -> Made | None:
    """Split whose sizes are an input, or are not given."""
    along = removal.along.get(node.input[0])
    x = removal.labels_of(node, 0)
    if along is None or x is None or attribute(node, "axis", 0) % len(x.shape) != along.axis:
        return made
    not_constant = removal.given(node, 1) and removal.array(node, 1) is None
    return None if attribute(node, "split", None) or removal.opset < 13 or not_constant else made


def slice_range(removal: Removal, node: onnx.NodeProto, axis: int, size: int) -> tuple[int, int] | None:
    """Which part of an axis a Slice takes: (start, end); None when that is not a plain run."""
    starts, ends = removal.array(node, 1), removal.array(node, 2)
    if starts is None or ends is None:
        return None
    places = slice_places(removal, node, len(removal.sizes[node.input[0]]), len(starts))
    steps = removal.array(node, 4) if removal.given(node, 4) else np.ones(len(starts), np.int64)
    if places is None or steps is None:
        return None
    if axis not in places:
        return 0, size
    at = places.index(axis)
    if int(steps[at]) != 1:
        return None
    start, end, _ = slice(int(starts[at]), int(ends[at])).indices(size)
    return (start, end) if start < end else None


def slice_places(removal: Removal, node: onnx.NodeProto, rank: int, n: int) -> list[int] | None:
    """The axes of a Slice."""
    if not removal.given(node, 3):
        return list(range(n))
    axes = removal.array(node, 3)
    return None if axes is None else [int(axis) % rank for axis in axes]


def sliced(removal: Removal, node: onnx.NodeProto, made: Made) -> Made | None:
    """A run of the channels."""
    along = removal.along.get(node.input[0])
    if along is None or len(node.input) < 3:
        return None
    return made if slice_range(removal, node, along.axis, len(along.slots)) else None


def concat(removal: Removal, node: onnx.NodeProto, made: Made) -> Made | None:
    """Joined along the channels each part loses its own; along another axis all lose the same."""
    whole = made[0]
    if not isinstance(whole, Labels) or len(whole.long) > 1:
        return None
    axis = whole.long[0] if whole.long else -1
    if attribute(node, "axis", 0) % len(whole.shape) != axis:
        return _same_channels(removal, node, whole, axis)
    start = 0
    atoms, numbers = whole.atoms.reshape(-1).numpy().copy(), _flat_numbers(whole)
    for name in node.input:
        shape = removal.sizes.get(name)
        if shape is None:
            return None
        end = start + shape[axis]
        array = removal.graph.arrays.get(name)
        if array is not None and array.dtype in REAL and array.size:
            stays = atoms[start:end] < 0
            atoms[start:end][stays] = removal.ledger.new_atoms(int(stays.sum())).numpy()
            removal.claim(name, {axis: atoms[start:end]})
            numbers[start:end] = _even(
                array, [size == shape[axis] and i == axis for i, size in enumerate(array.shape)]
            ).reshape(-1)
        start = end
    made_of = replace(whole, atoms=torch.from_numpy(atoms).reshape(whole.atoms.shape))
    return [with_numbers(made_of, numbers.reshape(tuple(whole.atoms.shape)))]


def _same_channels(removal: Removal, node: onnx.NodeProto, whole: Labels, axis: int) -> Made | None:
    if axis < 0:
        return None
    numbers = []
    for at in range(len(node.input)):
        numbers.append(_operand(removal, node, at, whole, axis))
        if numbers[-1] is None:
            return None
    known = np.array([np.broadcast_to(one, tuple(whole.atoms.shape)) for one in numbers if one is not None])
    same: Array = np.where((known == known[0]).all(axis=0), known[0], np.nan)
    return [with_numbers(whole, same)]


def _flat_numbers(labels: Labels) -> Array:
    if labels.numbers is None:
        return np.full(labels.atoms.numel(), np.nan)
    return labels.numbers.reshape(-1).numpy().copy()


def pad(removal: Removal, node: onnx.NodeProto, made: Made) -> Made | None:
    """Pad beside the channels."""
    along, x, pads = removal.along.get(node.input[0]), removal.labels_of(node, 0), removal.array(node, 1)
    if along is None or x is None or pads is None or removal.given(node, 3) or pads.size != 2 * len(x.shape):
        return None
    if pads.reshape(2, -1)[:, along.axis].any() or not isinstance(made[0], Labels):
        return None
    if attribute(node, "mode", b"constant") != b"constant" or x.numbers is None:
        return made
    number = 0.0
    if removal.given(node, 2):
        filler = removal.array(node, 2)
        number = np.nan if filler is None or not filler.size else float(filler.reshape(-1)[0])
    known = x.numbers.numpy()
    if made[0].atoms.shape != x.atoms.shape:
        return made
    return [with_numbers(made[0], np.where(known == number, known, np.nan))]


def resize(removal: Removal, node: onnx.NodeProto, made: Made) -> Made | None:
    """Resize by stored scales beside the channels."""
    along, x, scales = removal.along.get(node.input[0]), removal.labels_of(node, 0), removal.array(node, 2)
    if (
        along is None
        or x is None
        or scales is None
        or removal.given(node, 3)
        or attribute(node, "axes", None)
    ):
        return None
    if along.axis >= scales.size or scales[along.axis] != 1:
        return None
    plain = attribute(node, "mode", b"nearest") == b"nearest"
    plain = plain and attribute(node, "coordinate_transformation_mode", b"") != b"tf_crop_and_resize"
    return _kept_numbers(made, x, x.numbers.numpy() if plain and x.numbers is not None else None)


def _kept_numbers(made: Made, x: Labels, numbers: Array | None) -> Made:
    """The first result with the numbers of an input whose channels it has."""
    first = made[0]
    if numbers is None or not isinstance(first, Labels) or first.atoms.numel() != x.atoms.numel():
        return made
    return [with_numbers(first, numbers.reshape(tuple(first.atoms.shape))), *made[1:]]


# Channel by channel


def elementwise(removal: Removal, node: onnx.NodeProto, made: Made) -> Made | None:
    """Each entry by those at its place; stored operands lose what the others do."""
    whole = made[0]
    if not isinstance(whole, Labels) or any(node.output[1:]):
        return None
    if node.op_type == "Dropout" and removal.given(node, 2):  # may be told to train
        return None
    along = removal._along(whole)
    operands = []
    for at in range(len(node.input)):
        if removal.given(node, at):
            operands.append(_operand(removal, node, at, whole, along.axis))
            if operands[-1] is None:
                return None
    if node.op_type == "Identity" or (node.op_type == "Dropout" and len(operands) == 1):
        return [with_numbers(whole, operands[0])]
    if node.op_type == "Cast" and attribute(node, "to", 0) not in FLOATS:
        return [with_numbers(whole, None)]
    sizes = tuple(whole.atoms.shape)
    columns = np.array([np.broadcast_to(one, sizes).reshape(-1) for one in operands if one is not None])
    return [with_numbers(whole, _computed(removal, node, columns).reshape(sizes))]


def _operand(removal: Removal, node: onnx.NodeProto, at: int, whole: Labels, axis: int) -> Array | None:
    """The numbers of an operand, as they meet those of the result; None for one that cannot be followed.

    One that has the result's channels loses what it loses, and holds it where it cannot.
    """
    name = node.input[at]
    array, shape = removal.graph.arrays.get(name), removal.sizes.get(name)
    value = removal.find(name)
    shape = shape if not isinstance(value, Labels) else value.shape
    if shape is None:
        return None
    rank = len(whole.shape)
    place = axis - (rank - len(shape))
    slots = whole.atoms.movedim(axis, -1).reshape(-1, whole.shape[axis])[0].numpy() if axis >= 0 else None
    if slots is not None and len(whole.long) > 1:
        slots = removal._along(whole).slots
    meets = slots is not None and place >= 0 and shape[place] == whole.shape[axis] and shape[place] > 1
    if array is not None and array.dtype in REAL:
        if meets:
            assert slots is not None
            _claim_kept(removal, name, place, slots)
        return _numbers_like(array.astype(np.float64), whole)
    has_channels = isinstance(value, Labels) and bool((value.atoms >= 0).any())
    if isinstance(value, Labels) and has_channels:
        own = value.atoms.reshape((1,) * (rank - len(shape)) + tuple(value.atoms.shape))
        if meets:
            assert slots is not None
            held = own.movedim(axis, -1).reshape(-1, own.shape[axis]).amax(0).numpy()
            removal.pin(slots[np.broadcast_to(held, slots.shape) < 0], reasons.beside_fixed(title(node)))
        elif axis >= 0:
            removal.ledger.pin(value.atoms, reasons.spread(title(node)))
        known = None if value.numbers is None else value.numbers.numpy()
        unknown = np.full((1,) * rank, np.nan)
        return unknown if known is None else _numbers_like(known, whole)
    if meets:
        assert slots is not None
        removal.pin(slots, reasons.beside_fixed(title(node)))
    return np.full((1,) * rank, np.nan)


def _claim_kept(removal: Removal, name: str, place: int, slots: Array) -> None:
    """An array loses what a value does; entries of it that stay have slots of their own."""
    own, stays = slots.copy(), slots < 0
    own[stays] = removal.ledger.new_atoms(int(stays.sum())).numpy()
    removal.pin(own[stays], reasons.LAST_CHANNEL)
    removal.claim(name, {place: own})


def _numbers_like(numbers: Array, whole: Labels) -> Array:
    """Numbers in the form of the result's atoms: where several meet in one they have to be the same."""
    rank = len(whole.shape)
    numbers = numbers.reshape((1,) * (rank - numbers.ndim) + numbers.shape)
    return _even(numbers, [whole.is_long(axis) for axis in range(rank)])


def _even(numbers: Array, kept: Sequence[bool]) -> Array:
    """Numbers along the kept axes, NaN where they differ along others."""
    numbers = numbers.astype(np.float64)
    for axis, is_kept in enumerate(kept):
        if not is_kept and numbers.shape[axis] > 1:
            low, high = numbers.min(axis, keepdims=True), numbers.max(axis, keepdims=True)
            numbers = np.where(low == high, low, np.nan)
    return numbers


def _computed(removal: Removal, node: onnx.NodeProto, columns: Array) -> Array:
    """Per channel what an operation on known numbers gives; 0 * anything is 0."""
    unknown = ~np.isfinite(columns).all(axis=0)
    result = np.full(columns.shape[1], np.nan)
    if not unknown.all() and node.op_type in _JOINS | ONE_TO_ONE:
        inputs = iter(np.where(unknown, 1.0, columns).astype(np.float32))
        given = [next(inputs) if name else None for name in node.input]
        if node.op_type in ONE_TO_ONE:  # what stands beside the value is one number
            given = [given[0], *(removal.array(node, at) for at in range(1, len(node.input)))]
        try:
            (found,) = moved_by(node, removal.graph.model.opset_import, given)
        except UnknownOperation:  # the channel counts as not constant then
            found = result
        if found.shape == result.shape:
            result = np.where(unknown, np.nan, found.astype(np.float64))
    if node.op_type == "Mul":
        result[(columns == 0).any(axis=0)] = 0.0
    return result


def batch_norm(removal: Removal, node: onnx.NodeProto, made: Made) -> Made | None:
    """A channel by itself, with an entry of each parameter."""
    x, whole = removal.labels_of(node, 0), made[0]
    if x is None or x.long not in ([1], []) or not isinstance(whole, Labels):
        return None
    n = whole.shape[1]
    known = [removal.array(node, at) for at in range(1, 5)]
    parameters = [one.astype(np.float64) for one in known if one is not None and one.shape == (n,)]
    if len(parameters) != 4:
        return None
    slots = removal.slots(x, 1, n, reasons.nothing_before(title(node)))
    for at in range(1, 5):
        removal.claim(node.input[at], {0: slots})
    scale, bias, mean, variance = parameters
    constant = np.full(n, np.nan) if x.numbers is None else x.numbers.reshape(-1).numpy()
    with np.errstate(all="ignore"):
        factor = scale / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
        result = np.where(factor == 0, bias, (constant - mean) * factor + bias)
    numbers = result.astype(np.float32).astype(np.float64)
    return [with_numbers(whole, numbers.reshape(tuple(whole.atoms.shape)))]


def pool(removal: Removal, node: onnx.NodeProto, made: Made) -> Made | None:
    """A map becomes another."""
    x = removal.labels_of(node, 0)
    if x is None or any(node.output[1:]):
        return None
    known = None if x.numbers is None else x.numbers.numpy()
    if attribute(node, "ceil_mode", 0):  # a window may lie outside; what it then holds, runtimes disagree on
        known = None
    elif node.op_type == "AveragePool" and attribute(node, "count_include_pad", 0) and padded(node):
        known = None if known is None else np.where(known == 0, 0.0, np.nan)
    return _kept_numbers(made, x, known)


def _axes(removal: Removal, node: onnx.NodeProto, rank: int) -> set[int] | None:
    if removal.given(node, 1):
        found = removal.array(node, 1)
        axes = None if found is None else [int(axis) for axis in found.reshape(-1)]
    else:
        axes = attribute(node, "axes", None)
    return None if not axes else {axis % rank for axis in axes}


def reduced(removal: Removal, node: onnx.NodeProto, made: Made) -> Made | None:
    """One value of those along axes beside the channels."""
    x = removal.labels_of(node, 0)
    axes = None if x is None else _axes(removal, node, len(x.shape))
    if x is None or axes is None or any(x.is_long(axis) for axis in axes) or not x.long:
        return None
    known = None if x.numbers is None else x.numbers.numpy()
    if node.op_type == "ReduceSum":
        known = None if known is None else np.where(known == 0, 0.0, np.nan)
    elif node.op_type not in ("ReduceMean", "ReduceMax", "ReduceMin"):
        known = None
    return _kept_numbers(made, x, known)


_TAKERS: dict[str, Taker] = {
    **dict.fromkeys(ELEMENTWISE | {"Cast", "Identity", "Dropout"}, elementwise),
    **dict.fromkeys(REDUCE, reduced),
    **dict.fromkeys(("AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool"), pool),
    **dict.fromkeys(("Flatten", "Transpose", "Unsqueeze"), as_made),
    "BatchNormalization": batch_norm,
    "Concat": concat,
    "Conv": conv,
    "Gather": gather,
    "ConvTranspose": conv_transpose,
    "Gemm": gemm,
    "MatMul": matmul,
    "Pad": pad,
    "Reshape": reshape,
    "Resize": resize,
    "Shape": shape_of,
    "Slice": sliced,
    "Split": split,
    "Squeeze": squeeze,
}
