"""What nodes that only move values say of channels: Reshape, Transpose, Concat, Split, Slice, Gather, Pad,
Resize.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from sparse_export.graph.channels.onnx_channels import REAL, Channels
from sparse_export.graph.channels.onnx_graph import FREE_SIZES, Array, Shape, attribute, title
from sparse_export.graph.channels.onnx_values import reduced_axes, uniform

_LARGEST_RESHAPE = 1 << 24


def reshape(channels: Channels, node: onnx.NodeProto) -> bool:
    """Reshape, Flatten, Squeeze, Unsqueeze: of the axes that the channels may be found on, the one that keeps
    most of them apart.
    """
    value = channels.values.get(node.input[0])
    if value is None:
        return True
    before, after = channels.shapes.get(node.input[0]), channels.shapes.get(node.output[0])
    if before is None or after is None or 0 in before or math.prod(before) != math.prod(after):
        return False
    if node.op_type == "Reshape":
        sizes = channels.array(node, 1)
        if sizes is None or (attribute(node, "allowzero", 0) and not sizes.all()):
            return False
    if node.op_type == "Squeeze" and not reduced_axes(channels, node, 1, len(before)):
        return False  # it would take away an axis on which one channel is left
    block = _block(before, after, value.axis)
    if block is None:
        return False
    first_in, ins, first_out, outs = block
    size = math.prod(ins)
    if not outs or size > _LARGEST_RESHAPE or any(n % free == 0 for n in ins for free in FREE_SIZES):
        return False
    flat = np.arange(size)
    source = flat // math.prod(ins[value.axis - first_in + 1 :]) % len(value.slots)
    best: tuple[tuple[int, int], int, Array, Array] | None = None
    for place, n in enumerate(outs):
        target = flat // math.prod(outs[place + 1 :]) % n
        pairs = np.unique(source * n + target)
        from_slots, to_slots = pairs // n, pairs % n
        n_apart, _ = classes(len(value.slots) + n, [(from_slots, to_slots + len(value.slots))])
        if best is None or (n_apart, n) > best[0]:
            best = (n_apart, n), place, from_slots, to_slots
    assert best is not None
    _, place, from_slots, to_slots = best
    slots = channels.fresh(outs[place])
    channels.tie(value.slots[from_slots], slots[to_slots])
    low, high = np.full(len(slots), np.inf), np.full(len(slots), -np.inf)
    with np.errstate(invalid="ignore"):  # NaN, which says that a channel is not constant, wins
        np.minimum.at(low, to_slots, value.constant[from_slots])
        np.maximum.at(high, to_slots, value.constant[from_slots])
    channels.set(node.output[0], first_out + place, slots, np.where(low == high, low, np.nan))
    return True


def _block(before: Shape, after: Shape, axis: int) -> tuple[int, Shape, int, Shape] | None:
    """The smallest run of axes around `axis` that becomes a run of axes after: start and sizes of both."""
    i = o = 0
    while i < len(before):
        i0, o0, n_in, n_out = i, o, before[i], 1
        i += 1
        while n_in != n_out or (o == o0 and o < len(after)):
            if n_out < n_in or (o == o0 and o < len(after)):
                if o == len(after):
                    return None
                n_out *= after[o]
                o += 1
            else:
                if i == len(before):
                    return None
                n_in *= before[i]
                i += 1
        if i0 <= axis < i:
            return i0, before[i0:i], o0, after[o0:o]
    return None


def classes(n: int, edges: Sequence[tuple[Array, Array]]) -> tuple[int, Array]:
    """How many classes n slots fall into, and the class of each. edges: what is tied to what."""
    a = np.concatenate([pair[0] for pair in edges]) if edges else np.zeros(0, np.int64)
    b = np.concatenate([pair[1] for pair in edges]) if edges else np.zeros(0, np.int64)
    n_classes, labels = connected_components(
        coo_matrix((np.ones(len(a)), (a, b)), shape=(n, n)), directed=False
    )
    return int(n_classes), labels


def transpose(channels: Channels, node: onnx.NodeProto) -> bool:
    value, shape = channels.values.get(node.input[0]), channels.shapes.get(node.input[0])
    if value is None:
        return True
    order = attribute(node, "perm", None)
    if order is None:
        if shape is None:
            return False
        order = list(range(len(shape)))[::-1]
    channels.set(node.output[0], list(order).index(value.axis), value.slots, value.constant)
    return True


def concat(channels: Channels, node: onnx.NodeProto) -> bool:
    values = [channels.values.get(name) for name in node.input]
    shapes = [channels.shapes.get(name) for name in node.input]
    axes = {value.axis for value in values if value is not None}
    if not axes:
        return True
    if len(axes) > 1 or any(shape is None for shape in shapes):
        return False
    (axis,) = axes
    known = [shape for shape in shapes if shape is not None]
    along = attribute(node, "axis", 0) % len(known[0]) == axis
    slots, constants = [], []
    for name, value, shape in zip(node.input, values, known, strict=True):
        array = channels.graph.arrays.get(name)
        if value is not None:
            slots.append(value.slots)
            constants.append(value.constant)
            continue
        slots.append(channels.fresh(shape[axis]))
        if array is not None and array.dtype in REAL and array.size:
            channels.claim(node, name, {axis: slots[-1]})
            constants.append(uniform(array, axis))
        else:
            channels.pin(slots[-1], f"{title(node)} joins it with what cannot lose channels")
            constants.append(np.full(shape[axis], np.nan))
    if along:
        channels.set(node.output[0], axis, np.concatenate(slots), np.concatenate(constants))
        return True
    for other in slots[1:]:
        channels.tie(slots[0], other)
    same = np.where((np.array(constants) == constants[0]).all(axis=0), constants[0], np.nan)
    channels.set(node.output[0], axis, slots[0], same)
    return True


def split(channels: Channels, node: onnx.NodeProto) -> bool:
    value, shape = channels.values.get(node.input[0]), channels.shapes.get(node.input[0])
    if value is None:
        return True
    if shape is None:
        return False
    if attribute(node, "axis", 0) % len(shape) != value.axis:
        for name in node.output:
            channels.set(name, value.axis, value.slots, value.constant)
        return True
    sizes = [channels.shapes.get(name, (0,) * len(shape))[value.axis] for name in node.output]
    by_attribute = attribute(node, "split", None) or channels.graph.opset < 13
    not_constant = channels.given(node, 1) and channels.array(node, 1) is None
    if by_attribute or not_constant or not all(sizes) or sum(sizes) != len(value.slots):
        return False
    ends = np.cumsum(sizes)
    for name, start, end in zip(node.output, ends - sizes, ends, strict=True):
        channels.set(name, value.axis, value.slots[start:end], value.constant[start:end])
    return True


def slice_range(channels: Channels, node: onnx.NodeProto, axis: int, size: int) -> tuple[int, int] | None:
    """Which part of an axis a Slice takes: (start, end); None when that is not a plain run."""
    starts, ends = channels.array(node, 1), channels.array(node, 2)
    if starts is None or ends is None:
        return None
    rank = len(channels.shapes[node.input[0]])
    if channels.given(node, 3):
        axes = channels.array(node, 3)
        if axes is None:
            return None
        places = [int(a) % rank for a in axes]
    else:
        places = list(range(len(starts)))
    steps = channels.array(node, 4) if channels.given(node, 4) else np.ones(len(places), np.int64)
    if steps is None:
        return None
    if axis not in places:
        return 0, size
    at = places.index(axis)
    if int(steps[at]) != 1:
        return None
    start, end, _ = slice(int(starts[at]), int(ends[at])).indices(size)
    return (start, end) if start < end else None


def sliced(channels: Channels, node: onnx.NodeProto) -> bool:
    value, shape = channels.values.get(node.input[0]), channels.shapes.get(node.input[0])
    if value is None:
        return True
    if shape is None or len(node.input) < 3:
        return False
    found = slice_range(channels, node, value.axis, len(value.slots))
    if found is None:
        return False
    start, end = found
    channels.set(node.output[0], value.axis, value.slots[start:end], value.constant[start:end])
    return True


def gather(channels: Channels, node: onnx.NodeProto) -> bool:
    """Channels that are picked by constant numbers are channels of their own: fewer numbers, fewer
    channels.
    """
    shape, indices = channels.shapes.get(node.input[0]), channels.array(node, 1)
    if shape is None or indices is None or node.input[0] in channels.graph.arrays:
        return False
    value = channels.values.get(node.input[0])
    axis = attribute(node, "axis", 0) % len(shape)
    if value is not None and value.axis != axis:
        place = value.axis if value.axis < axis else value.axis - 1 + indices.ndim
        channels.set(node.output[0], place, value.slots, value.constant)
        return True
    if indices.ndim != 1 or not indices.size:
        return False
    slots = channels.fresh(len(indices))
    channels.claim(node, node.input[1], {0: slots})
    constant = None
    if value is not None:
        channels.pin(value.slots, f"{title(node)} picks from it by number")
        constant = value.constant[indices]
    channels.set(node.output[0], axis, slots, constant)
    return True


def shape_of(channels: Channels, node: onnx.NodeProto) -> bool:
    value, shape = channels.values.get(node.input[0]), channels.shapes.get(node.input[0])
    if value is None:
        return True
    if shape is None:
        return False
    start, end, _ = slice(attribute(node, "start", 0), attribute(node, "end", None)).indices(len(shape))
    return not start <= value.axis < end


def pad(channels: Channels, node: onnx.NodeProto) -> bool:
    value, shape = channels.values.get(node.input[0]), channels.shapes.get(node.input[0])
    if value is None:
        return True
    pads = channels.array(node, 1)
    if shape is None or pads is None or channels.given(node, 3) or pads.size != 2 * len(shape):
        return False
    if pads.reshape(2, -1)[:, value.axis].any():
        return False
    constant = value.constant
    if attribute(node, "mode", b"constant") == b"constant":
        if channels.given(node, 2):
            filler = channels.array(node, 2)
            number = np.nan if filler is None or not filler.size else float(filler.reshape(-1)[0])
        else:
            number = 0.0
        constant = np.where(constant == number, constant, np.nan)
    channels.set(node.output[0], value.axis, value.slots, constant)
    return True


def resize(channels: Channels, node: onnx.NodeProto) -> bool:
    value = channels.values.get(node.input[0])
    if value is None:
        return True
    scales = channels.array(node, 2)
    if scales is None or channels.given(node, 3) or attribute(node, "axes", None):
        return False
    if value.axis >= scales.size or scales[value.axis] != 1:
        return False
    plain = attribute(node, "mode", b"nearest") == b"nearest"
    plain = plain and attribute(node, "coordinate_transformation_mode", b"") != b"tf_crop_and_resize"
    channels.set(node.output[0], value.axis, value.slots, value.constant if plain else None)
    return True
