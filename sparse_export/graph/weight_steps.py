"""The nodes between a layer and its stored weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from sparse_export.signature import Array

_DATA_COMES_FIRST = frozenset(
    (
        *("Identity", "Cast", "CastLike", "QuantizeLinear", "DequantizeLinear", "Clip", "Transpose"),
        *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Expand", "Tile", "Pad"),
        *("Gather", "GatherElements"),
    )
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One node between a layer and its stored weight.

    Attributes:
        node: of any operator.
        source: name of the input by which the weight comes in.
        shape: of the weight before this node.
        after: its shape after it.
        dtype: of the weight before this node.
        masked_by: name of the mask whose zeros the node puts into the weight, if it does.
        zero_point: is a quantized zero stored as something other than 0?
    """

    node: onnx.NodeProto
    source: str
    shape: tuple[int, ...]
    after: tuple[int, ...]
    dtype: str
    masked_by: str | None = None
    zero_point: bool = False


def main_input(node: onnx.NodeProto, inputs: Sequence[Array | None], output: Array) -> int | None:
    """By which input the weight comes in: the data, or the one with most nonzeros that is no mask.

    Args:
        node: between a layer and its weight.
        inputs: what it gets, None for an input that is left out.
        output: what it makes of them.

    Returns:
        Position of the input; None where no input has the output's type.
    """
    if node.op_type in _DATA_COMES_FIRST and inputs:
        return 0
    candidates = [i for i, values in enumerate(inputs) if values is not None and values.dtype == output.dtype]
    if len(candidates) < 2:
        return candidates[0] if candidates else None

    def has_more(i: int) -> tuple[bool, int]:
        values = inputs[i]
        assert values is not None
        return not _is_zeros_and_ones(values), int(np.count_nonzero(values))

    return max(candidates, key=has_more)


def _is_zeros_and_ones(values: Array) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def step_of(node: onnx.NodeProto, main: int, inputs: Sequence[Array | None], output: Array) -> Step:
    """What a node does to a weight.

    Args:
        node: between a layer and its weight.
        main: by which input the weight comes in, as `main_input` gives it.
        inputs: what the node gets, None for an input that is left out.
        output: what it makes of them.

    Returns:
        The node as a step of the weight.
    """
    before = inputs[main]
    assert before is not None
    masked_by = None
    if node.op_type in ("Mul", "Where") and before.shape == output.shape:
        mask = 0 if node.op_type == "Where" else 1 - main
        by = inputs[mask]
        if by is not None and not by.all() and np.count_nonzero(output) < np.count_nonzero(before):
            masked_by = node.input[mask]
    dequantizes = node.op_type == "DequantizeLinear" and len(inputs) > 2 and inputs[2] is not None
    return Step(
        node=node,
        source=node.input[main],
        shape=before.shape,
        after=output.shape,
        dtype=before.dtype.name,
        masked_by=masked_by,
        zero_point=dequantizes and bool((inputs[2] != 0).any()),  # type: ignore[union-attr]
    )
