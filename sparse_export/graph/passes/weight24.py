"""One 2:4 tensor stored as two values and one nibble for every four entries, and back.

Legend: G groups of 4 consecutive entries along the reduction axis. Work is done on unsigned integers of the
dtype's width, so that every bit stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from sparse_export.errors import ArtefactError, GateFailed, UsageError
from sparse_export.signature import Array

Shape = tuple[int, ...]

BITS: dict[int, np.dtype[Any]] = {
    TensorProto.FLOAT: np.dtype("<u4"),
    TensorProto.FLOAT16: np.dtype("<u2"),
    TensorProto.BFLOAT16: np.dtype("<u2"),
    TensorProto.INT8: np.dtype("u1"),
}
_SIGN: dict[int, int] = {
    TensorProto.FLOAT: 1 << 31,
    TensorProto.FLOAT16: 1 << 15,
    TensorProto.BFLOAT16: 1 << 15,
}
_MAX_RANK = 32

# Both indices of a group by its nonzeros (bit i: weight i is not zero). Groups with fewer than two are
# completed as torch's CUTLASS packing does, so that values and metadata are those that a GPU's loader would
# make.
_PAIRS = {
    0b0000: (2, 3),
    0b0001: (0, 2),
    0b0010: (1, 2),
    0b0100: (2, 3),
    0b1000: (2, 3),
    0b0011: (0, 1),
    0b0101: (0, 2),
    0b1001: (0, 3),
    0b0110: (1, 2),
    0b1010: (1, 3),
    0b1100: (2, 3),
}
_FIRST = np.array([_PAIRS.get(mask, (0, 0))[0] for mask in range(16)], dtype=np.uint8)
_SECOND = np.array([_PAIRS.get(mask, (0, 0))[1] for mask in range(16)], dtype=np.uint8)
_OBEYS = np.array([mask in _PAIRS for mask in range(16)])


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A packed tensor. values: (G, 2), the weight's dtype.  meta: uint8 (ceil(G/2),), the even group in the
    low nibble.

    shape: of the weight with its reduction axis moved last.
    """

    values: Array
    meta: Array
    shape: Shape


def pack_weight(array: Array, axis: int) -> PackedWeight:
    """Pack a 2:4 tensor, bit for bit; only -0.0 becomes +0.0.

    array: float32, float16, bfloat16 or int8, any shape.  axis: the reduction axis; 4 divides its length.
    Raises UsageError for another dtype, axis or length, and GateFailed when a group has more than 2 nonzeros.
    """
    data_type = data_type_of(array)
    if data_type not in BITS:
        raise UsageError(
            f"A tensor of {array.dtype} cannot be packed.",
            expected="float32, float16, bfloat16 or int8 was expected.",
        )
    if not 0 <= axis < array.ndim:
        raise UsageError(
            f"A tensor of shape {array.shape} cannot be packed along axis {axis}.",
            expected=f"An axis from 0 to {array.ndim - 1} was expected.",
        )
    if not has_groups(array.shape, axis):
        raise UsageError(
            f"Axis {axis} of shape {array.shape} has {array.shape[axis]} entries.",
            expected="A multiple of 4 was expected, and no empty axis.",
            do="Leave this tensor dense.",
        )
    groups = groups_of(bits_of(array, data_type), axis)
    mask = nonzero_mask(groups)
    n_over = groups_over(mask)
    if n_over:
        raise GateFailed(
            f"{n_over} of {len(groups)} groups have more than 2 nonzeros in 4.",
            expected=(
                f"A 2:4 tensor was expected along axis {axis} of shape {array.shape}; packing cuts nothing."
            ),
            do="Prune it to 2:4, or leave it dense.",
        )
    first, second = _FIRST[mask], _SECOND[mask]
    rows = np.arange(len(groups)) * 4
    flat = groups.reshape(-1)
    values = np.stack([flat[rows + first], flat[rows + second]], axis=1)
    nibbles = np.zeros(len(groups) + len(groups) % 2, dtype=np.uint8)
    nibbles[: len(groups)] = first | second << 2
    return PackedWeight(
        values=_as(values, data_type),
        meta=nibbles[0::2] | nibbles[1::2] << 4,
        shape=_moved(array.shape, axis),
    )


def unpack_weight(packed: PackedWeight) -> Array:
    """The tensor with its reduction axis still last, of `packed.shape`.

    Raises ArtefactError when values, metadata and shape contradict each other; nothing is allocated before.
    """
    data_type = data_type_of(packed.values)
    if data_type not in BITS:
        raise damaged(f"the values are {packed.values.dtype}", "float32, float16, bfloat16 or int8")
    values = np.ascontiguousarray(packed.values).view(BITS[data_type])
    return _as(unpacked_bits(PackedWeight(values=values, meta=packed.meta, shape=packed.shape)), data_type)


def unpacked_bits(packed: PackedWeight) -> Array:
    """As `unpack_weight`, of values that are unsigned integers of the dtype's width."""
    values, meta, shape = packed.values, packed.meta, packed.shape
    if values.ndim != 2 or values.shape[1] != 2 or not len(values):
        raise damaged(f"the values have shape {values.shape}", "(groups, 2)")
    n_groups = len(values)
    if meta.dtype != np.uint8 or meta.shape != ((n_groups + 1) // 2,):
        raise damaged(
            f"the metadata are {meta.dtype} of shape {meta.shape}",
            f"uint8 of shape ({(n_groups + 1) // 2},) for {n_groups} groups",
        )
    if (
        not 1 <= len(shape) <= _MAX_RANK
        or min(shape) < 1
        or shape[-1] % 4
        or math.prod(shape) != 4 * n_groups
    ):
        raise damaged(f"the shape is {shape}", f"4 * {n_groups} entries, and a last axis that 4 divides,")
    nibbles = np.empty((len(meta), 2), dtype=np.uint8)
    nibbles[:, 0] = meta & 15
    nibbles[:, 1] = meta >> 4
    if n_groups % 2 and nibbles[-1, 1]:
        raise damaged(f"the nibble after the last group is {nibbles[-1, 1]}", "0")
    indices = nibbles.reshape(-1)[:n_groups]
    first, second = indices & 3, indices >> 2
    wrong = first >= second
    if wrong.any():
        at = int(wrong.argmax())
        raise damaged(f"group {at} has the indices {first[at]} and {second[at]}", "the smaller one first")
    dense = np.zeros(4 * n_groups, dtype=values.dtype)
    rows = np.arange(0, 4 * n_groups, 4)
    dense[rows + first] = values[:, 0]
    dense[rows + second] = values[:, 1]
    return dense.reshape(shape)


def data_type_of(array: Array) -> int:
    try:
        return int(helper.np_dtype_to_tensor_dtype(array.dtype))
    except (KeyError, ValueError, TypeError):
        return TensorProto.UNDEFINED


def type_name(data_type: int) -> str:
    names = TensorProto.DataType
    return names.Name(data_type) if data_type in names.values() else f"of unknown type {data_type}"


def bits_of(array: Array, data_type: int) -> Array:
    """The tensor as unsigned integers of its width, contiguous, zeros being positive."""
    bits = np.ascontiguousarray(array).reshape(array.shape).view(BITS[data_type])
    sign = _SIGN.get(data_type)
    return bits if sign is None else np.where(bits == sign, bits.dtype.type(0), bits)


def _as(bits: Array, data_type: int) -> Array:
    array: Array = bits.view(helper.tensor_dtype_to_np_dtype(data_type))
    return array


def has_groups(shape: Shape, axis: int) -> bool:
    return math.prod(shape) > 0 and shape[axis] % 4 == 0


def _moved(shape: Shape, axis: int) -> Shape:
    return (*shape[:axis], *shape[axis + 1 :], shape[axis])


def groups_of(array: Array, axis: int) -> Array:
    """(G, 4): the axis moved last, groups in row-major order."""
    return np.ascontiguousarray(np.moveaxis(array, axis, -1)).reshape(-1, 4)


def nonzero_mask(groups: Array) -> Array:
    """Bit i of entry g: member i of group g is not zero."""
    nonzero = (groups != 0).view(np.uint8)
    mask: Array = nonzero[:, 0] | nonzero[:, 1] << 1 | nonzero[:, 2] << 2 | nonzero[:, 3] << 3
    return mask


def groups_over(mask: Array) -> int:
    return int(np.count_nonzero(~_OBEYS[mask]))


def damaged(what: str, expected: str) -> ArtefactError:
    return ArtefactError(
        f"The packed model is damaged: {what}.",
        expected=f"{expected[:1].upper()}{expected[1:]} was expected.",
        do="Copy it again, or pack the dense model again.",
    )
