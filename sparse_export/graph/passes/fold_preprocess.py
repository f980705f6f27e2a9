"""The normalization of raw samples as a part of the graph, inside its first layer where that is exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from sparse_export.formats.preparation import FoldedPlace, RawType
from sparse_export.graph.names import free_name, names_of_values
from sparse_export.signature import Array

__all__ = ["FoldedGraph", "with_folded_preprocess"]


@dataclass(frozen=True, kw_only=True)
class FoldedGraph:
    """A graph that takes raw samples.

    Attributes:
        model: the graph.
        place: where they are normalized.
        weight: name of the weight that was scaled; empty where none was.
    """

    model: onnx.ModelProto
    place: FoldedPlace
    weight: str


def with_folded_preprocess(
    model: onnx.ModelProto, *, levels: int, mean: Sequence[float], std: Sequence[float], dtype: RawType
) -> FoldedGraph:
    """Make a graph take raw samples in place of (x / levels - mean) / std, by channel.

    Scaling by a positive number is folded into the weight of the only Conv or Gemm that reads the input,
    behind a Flatten or Reshape too: zeros stay zeros, so every pattern holds. The mean goes into its bias,
    unless the layer pads: it pads with zeros, which stand for the mean then, and raw zeros do not. A Sub
    before the layer takes its place. Behind any other node, or where a weight would underflow, the input is
    normalized by a Sub and a Mul.

    Args:
        model: with its data, one input of float32 (batch, C, …); not changed.
        levels: what samples are divided by first, 255 of pictures and 1 of others.
        mean: of each channel.
        std: of each channel, positive.
        dtype: of the raw samples.

    Returns:
        Another graph, with the same names of inputs, outputs and weights.
    """
    shift = levels * np.asarray(mean, np.float64)
    scale = 1 / (levels * np.asarray(std, np.float64))
    graph = ir.from_proto(model)
    names = names_of_values(model.graph)
    entry = _Entry(graph, names)
    place, weight = _fold(graph, entry, shift, scale)
    if dtype == "uint8":
        entry.cast()
    return FoldedGraph(model=ir.to_proto(graph), place=place, weight=weight)


class _Entry:
    """The input of a graph, in front of which nodes are put, the last ones first."""

    def __init__(self, model: ir.Model, names: set[str]) -> None:
        self._model, self._names = model, names
        self.value = model.graph.inputs[0]

    def constant(self, wanted: str, values: Array) -> ir.Value:
        name = self._free(wanted)
        made = ir.Value(name=name, const_value=ir.tensor(values, name=name))
        made.shape, made.dtype = ir.Shape(values.shape), ir.DataType.from_numpy(values.dtype)
        self._model.graph.register_initializer(made)
        return made

    def put(self, operator: str, wanted: str, values: Array) -> None:
        """Apply an operator of two inputs, the second constant, to the input before anybody reads it."""
        second = self.constant(f"preprocess/{wanted}", values)
        self._insert(operator, f"preprocess/{operator.lower()}", [second], {})

    def cast(self) -> None:
        """Take uint8."""
        self._insert("Cast", "preprocess/float", [], {"to": int(ir.DataType.FLOAT)})
        self.value.dtype = ir.DataType.UINT8

    def _insert(self, operator: str, wanted: str, more: list[ir.Value], attributes: dict[str, int]) -> None:
        name = self._free(wanted)
        made = ir.Value(name=name, shape=self.value.shape, type=ir.TensorType(ir.DataType.FLOAT))
        self.value.replace_all_uses_with(made, replace_graph_outputs=True)
        node = ir.node(operator, [self.value, *more], attributes=attributes, outputs=[made], name=name)
        graph = self._model.graph
        graph.insert_before(graph[0], node)

    def _free(self, wanted: str) -> str:
        name = free_name(wanted, self._names)
        self._names.add(name)
        return name


@dataclass(frozen=True, kw_only=True)
class _First:
    """The only layer that reads the input: its node, its weight and the channel that each entry of that
    multiplies, in a shape that fits the weight.
    """

    node: ir.Node
    weight: ir.Value
    channels: Array


def _fold(model: ir.Model, entry: _Entry, shift: Array, scale: Array) -> tuple[FoldedPlace, str]:
    """Put the normalization into the graph. Gives where, and the name of a scaled weight."""
    tail = (1,) * (max(2, len(entry.value.shape or ())) - 2)
    first = _first_layer(entry.value, len(shift))
    weights = None if first is None else _values(first.weight)
    scaled = None
    if first is not None and weights is not None:
        factors = scale[first.channels]
        exact = weights.astype(np.float64) * factors
        scaled = exact.astype(weights.dtype)
        if np.count_nonzero(scaled) != np.count_nonzero(weights) or not np.isfinite(scaled).all():
            scaled = None
    if first is None or scaled is None:
        entry.put("Mul", "scale", scale.astype(np.float32).reshape(-1, *tail))
        entry.put("Sub", "mean", shift.astype(np.float32).reshape(-1, *tail))
        return "Sub and Mul", ""
    name = str(first.weight.name)
    axes = _summed(first)
    bias = None if _pads(first.node) and shift.any() else _bias(first)
    first.weight.const_value = ir.tensor(scaled, name=name)
    if bias is None:
        entry.put("Sub", "mean", shift.astype(np.float32).reshape(-1, *tail))
        return "weight, behind a Sub", name
    alpha = first.node.attributes.get_float("alpha", 1.0)
    moved = bias - alpha * (exact * shift[first.channels]).sum(axis=axes)
    _set_bias(entry, first, moved.astype(scaled.dtype))
    return "weight and bias", name


def _first_layer(value: ir.Value, n_channels: int) -> _First | None:
    """The layer that alone reads the input; None where it is no Conv or Gemm with a weight of its own."""
    node = _only_reader(value)
    inner = list(value.shape or ())[2:]
    known = [size for size in inner if isinstance(size, int)]
    n_each = math.prod(known) if len(known) == len(inner) else 0
    if node is not None and node.op_type in ("Flatten", "Reshape") and not node.domain:
        after = node.outputs[0].shape
        if after is None or len(after) != 2 or not n_each or after[1] != n_channels * n_each:
            return None
        if node.op_type == "Flatten" and node.attributes.get_int("axis", 1) != 1:
            return None
        node = _only_reader(node.outputs[0])
    elif len(value.shape or ()) != 2 and node is not None and node.op_type == "Gemm":
        return None
    if node is None or node.domain or node.op_type not in ("Conv", "Gemm") or len(node.inputs) < 2:
        return None
    weight, reads = node.inputs[1], node.inputs[0]
    stored = None if weight is None else _values(weight)
    if weight is None or stored is None or stored.dtype != np.float32 or weight is reads:
        return None
    if not weight.is_initializer() or len(weight.uses()) != 1 or weight.is_graph_output():
        return None
    channels = _channels(node, stored.shape, n_channels, n_each)
    return None if channels is None else _First(node=node, weight=weight, channels=channels)


def _channels(node: ir.Node, sizes: tuple[int, ...], n_channels: int, n_each: int) -> Array | None:
    """The channel of the input that each entry of a weight multiplies, broadcast to its shape."""
    if node.op_type == "Conv":
        groups = node.attributes.get_int("group", 1)
        if len(sizes) < 3 or sizes[1] * groups != n_channels or sizes[0] % groups:
            return None
        group_of = np.arange(sizes[0]) // (sizes[0] // groups)
        found = group_of[:, None] * sizes[1] + np.arange(sizes[1])[None, :]
        return found.reshape(sizes[0], sizes[1], *(1,) * (len(sizes) - 2))
    turned = node.attributes.get_int("transB", 0) == 1
    if node.attributes.get_int("transA", 0) or len(sizes) != 2:
        return None
    if sizes[1 if turned else 0] != n_channels * n_each:
        return None
    of_column = np.repeat(np.arange(n_channels), n_each)
    return of_column[None, :] if turned else of_column[:, None]


def _summed(first: _First) -> tuple[int, ...]:
    """The axes of a weight along which its products are summed up."""
    sizes = first.weight.shape
    if first.node.op_type == "Conv":
        return tuple(range(1, len(sizes or ())))
    return (1,) if first.node.attributes.get_int("transB", 0) else (0,)


def _pads(node: ir.Node) -> bool:
    """Does a layer read zeros beside its input?"""
    if node.op_type != "Conv":
        return False
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    return automatic not in ("NOTSET", "VALID") or any(node.attributes.get_ints("pads", []))


def _bias(first: _First) -> Array | None:
    """The bias of a layer, float64; zeros where it has none, None where it cannot be changed."""
    node = first.node
    sizes = list(first.weight.shape or ())
    at = 0 if node.op_type == "Conv" or node.attributes.get_int("transB", 0) == 1 else 1
    size = sizes[at]
    n = size if isinstance(size, int) else 0
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return np.zeros(n)
    found = _values(value)
    if found is None or found.size != n or node.attributes.get_float("beta", 1.0) != 1.0:
        return None
    return found.reshape(-1).astype(np.float64)


def _set_bias(entry: _Entry, first: _First, values: Array) -> None:
    """Give a layer another bias, under the same name where nothing else reads that."""
    node = first.node
    here = node.inputs[2] if len(node.inputs) > 2 else None
    if here is not None and here.is_initializer() and len(here.uses()) == 1 and not here.is_graph_output():
        here.const_value = ir.tensor(values, name=here.name)
        here.shape = ir.Shape(values.shape)
        return
    owner, dot, _ = str(first.weight.name).rpartition(".")
    made = entry.constant(f"{owner}{dot}bias", values)
    node.resize_inputs(3)
    node.replace_input_with(2, made)


def _only_reader(value: ir.Value) -> ir.Node | None:
    """The node that reads a value as its first input, and alone; else None."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    ((node, at),) = uses
    return node if at == 0 else None


def _values(value: ir.Value) -> Array | None:
    """The array that a value always is, else None."""
    if value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()
