"""Counts, with numpy alone and with no line of this program, which layers of a graph are 2:4."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

__all__ = ["Counts", "counted", "is_two_four"]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Layers of a graph.

    Attributes:
        n_layers: Conv without groups, Gemm and MatMul with a stored weight whose input channels come in fours.
        n_two_four: those with at most two nonzeros in every four consecutive input channels.
        n_flat: those with at most two nonzeros in every four consecutive weights of a row as it lies in memory,
            which in a convolution are places of its kernel; no sparse kernel of a card takes that.
        n_half: those of which half of the weights or more are zero, whatever their places.
    """

    n_layers: int
    n_two_four: int
    n_flat: int
    n_half: int


def is_two_four(w_OI: np.ndarray) -> bool:
    """Has every row at most two nonzeros in every four consecutive columns?"""
    fours = (w_OI != 0).reshape(w_OI.shape[0], -1, 4)
    return bool((fours.sum(axis=2) <= 2).all())


def counted(file: Path) -> Counts:
    """Count the layers of an ONNX file."""
    graph = onnx.load(file).graph
    stored = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    for node in graph.node:  # a weight that is turned, or passed on, before it is used
        if node.op_type in ("Identity", "Transpose") and node.input[0] in stored:
            value = stored[node.input[0]]
            order = _attribute(node, "perm", None) if node.op_type == "Transpose" else range(value.ndim)
            stored[node.output[0]] = value.transpose(order)
    rows = [_rows(node, stored) for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    layers = [one for one in rows if one is not None and one.shape[-1] % 4 == 0]
    return Counts(
        n_layers=len(layers),
        n_two_four=sum(is_two_four(one.reshape(-1, one.shape[-1])) for one in layers),
        n_flat=sum(is_two_four(one.swapaxes(1, -1).reshape(len(one), -1)) for one in layers),
        n_half=sum(2 * int((one != 0).sum()) <= one.size for one in layers),
    )


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((onnx.helper.get_attribute_value(one) for one in node.attribute if one.name == name), default)


def _rows(node: onnx.NodeProto, stored: dict[str, np.ndarray]) -> np.ndarray | None:
    """The weight, (outputs, places of a kernel if any, input channels)."""
    weight = stored.get(node.input[1])
    if weight is None or weight.ndim < 2:
        return None
    if node.op_type == "Conv":
        if _attribute(node, "group", 1) != 1:
            return None
        return weight.reshape(*weight.shape[:2], -1).swapaxes(1, 2)
    if weight.ndim != 2:
        return None
    is_turned = node.op_type == "Gemm" and bool(_attribute(node, "transB", 0))
    return weight if is_turned else weight.T
