"""Batch norm folded into the convolution or matrix product before it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from sparse_export.graph.names import free_name
from sparse_export.signature import Array

__all__ = ["fold_norms", "with_folded_norms"]

_FEWEST_AXES = {"Conv": 3, "ConvTranspose": 3, "Gemm": 2, "MatMul": 2}  # of the weight of each layer


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A layer before a batch norm.

    node: of the product.  bias_of: the node that adds the bias, the same or an Add; None where none can.
    position: of the bias among its inputs.
    """

    node: ir.Node
    weight: ir.Value
    bias_of: ir.Node | None
    position: int


def with_folded_norms(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold the batch norms of a model as `fold_norms` does, into a new one; the same where it has none.

    Args:
        model: with its data; not changed.
    """
    if not any(node.op_type == "BatchNormalization" for node in model.graph.node):
        return model
    graph = ir.from_proto(model)
    fold_norms(graph)
    passes.RemoveUnusedNodesPass()(graph)
    return ir.to_proto(graph)


def fold_norms(model: ir.Model) -> dict[str, Array]:
    """Fold every batch norm that follows one layer and nothing else, in place.

    The layer is a Conv, ConvTranspose, Gemm or MatMul with a constant weight, the last perhaps with the
    addition of a bias. Nodes that only move its output may stand between. Folding scales the weight, which
    keeps its name. A layer whose weight or whose output has a second user is left as it is, for folding would
    change what that one sees.

    Args:
        model: without functions of its own.

    Returns:
        By the name of each changed weight what it was multiplied by, in a shape that fits it.
    """
    scales: dict[str, Array] = {}
    for node in list(model.graph.all_nodes()):
        if node.op_type == "BatchNormalization" and not node.domain:
            found = _fold(model, node)
            if found is not None:
                name, scale = found
                scales[name] = scales.get(name, np.ones(1)) * scale
    return scales


def _fold(model: ir.Model, norm: ir.Node) -> tuple[str, Array] | None:
    """Fold one batch norm. Gives the name of the weight and its scale, None where it cannot be folded."""
    affine = _affine(norm)
    found = _layer_before(norm)
    if affine is None or found is None:
        return None
    layer, axis = found
    scale, shift = affine
    product = layer.node.outputs[0]
    weight_scale = _weight_scale(layer, axis, scale)
    bias = _bias(layer, len(scale))
    if weight_scale is None or bias is None or product.shape is None:
        return None
    stored = layer.weight.const_value
    assert stored is not None and layer.weight.name is not None
    name, values = layer.weight.name, stored.numpy()
    layer.weight.const_value = ir.tensor((values * weight_scale).astype(values.dtype), name=name)
    _set_bias(model, layer, (bias * scale + shift).astype(values.dtype))
    source = norm.inputs[0]
    assert source is not None and norm.graph is not None
    norm.outputs[0].replace_all_uses_with(source, replace_graph_outputs=True)
    norm.graph.remove(norm, safe=True)
    return name, weight_scale


def _affine(norm: ir.Node) -> tuple[Array, Array] | None:
    """What a batch norm multiplies each channel by, and adds then; None where that is not known."""
    constants = [array for value in norm.inputs[1:] if (array := _constant(value)) is not None]
    trains: int = norm.attributes.get_int("training_mode", 0)
    if len(constants) != 4 or trains:
        return None
    gamma, beta, mean, variance = (one.astype(np.float64) for one in constants)
    scale = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
    return scale, beta - mean * scale


def _layer_before(norm: ir.Node) -> tuple[_Layer, int] | None:
    """The only layer that a batch norm follows, and the axis of its output that is normalised."""
    value, axis = norm.inputs[0], 1
    while True:
        node = _only_producer(value)
        moved = None if node is None else _before(node, axis)
        if moved is None:
            break
        value, axis = moved
    if node is None:
        return None
    adds = node if node.op_type == "Add" and not node.domain else None
    position = 2
    if adds is not None:
        position = next((i for i, one in enumerate(adds.inputs) if _constant(one) is not None), -1)
        node = _only_producer(adds.inputs[1 - position]) if position >= 0 else None
        if node is None or node.op_type != "MatMul":
            return None
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if node.op_type not in _FEWEST_AXES or node.domain or _constant(weight) is None:
        return None
    if weight is None or not weight.is_initializer() or len(weight.uses()) != 1 or weight.is_graph_output():
        return None
    bias_of = adds if node.op_type == "MatMul" else node
    return _Layer(node=node, weight=weight, bias_of=bias_of, position=position), axis


def _only_producer(value: ir.Value | None) -> ir.Node | None:
    """The node that makes a value of one user; None where it has more."""
    if value is None or len(value.uses()) != 1 or value.is_graph_output():
        return None
    return value.producer()


def _before(node: ir.Node, axis: int) -> tuple[ir.Value, int] | None:
    """Where an axis of the output of a node lies in its input, which it only moves; else None."""
    source = node.inputs[0] if node.inputs else None
    if source is None or node.domain:
        return None
    if node.op_type == "Identity":
        return source, axis
    if source.shape is None or node.outputs[0].shape is None:
        return None
    before, after = list(source.shape), list(node.outputs[0].shape)
    if node.op_type == "Transpose":
        return source, list(node.attributes.get_ints("perm", range(len(before))[::-1]))[axis]
    if node.op_type not in ("Reshape", "Squeeze", "Unsqueeze", "Flatten") or len(after) <= axis:
        return None
    behind = _product(after[axis + 1 :])
    fitting = [
        i for i, size in enumerate(before) if size == after[axis] and _product(before[i + 1 :]) == behind
    ]
    return (source, fitting[0]) if behind is not None and len(fitting) == 1 else None


def _product(sizes: list[int | ir.SymbolicDim]) -> int | None:
    """The product of sizes, None where one is free."""
    fixed = [size for size in sizes if isinstance(size, int)]
    return math.prod(fixed) if len(fixed) == len(sizes) else None


def _weight_scale(layer: _Layer, axis: int, scale: Array) -> Array | None:
    """What a weight is multiplied by, so that an axis of the output of its layer is; else None."""
    weight, output = _constant(layer.weight), layer.node.outputs[0].shape
    if weight is None or output is None or weight.ndim < _FEWEST_AXES[layer.node.op_type]:
        return None
    sizes = weight.shape
    tail = (1,) * (len(sizes) - 2)
    attributes = layer.node.attributes
    if layer.node.op_type == "MatMul":
        fits = len(sizes) == 2 and axis == len(output) - 1 and sizes[1] == len(scale)
        return scale[None, :] if fits else None
    if axis != 1:
        return None
    if layer.node.op_type == "Conv":
        return scale.reshape(-1, 1, *tail) if sizes[0] == len(scale) else None
    if layer.node.op_type == "ConvTranspose":
        groups = attributes.get_int("group", 1)
        if sizes[1] * groups != len(scale) or sizes[0] % groups:
            return None
        return np.repeat(scale.reshape(groups, -1), sizes[0] // groups, axis=0).reshape(*sizes[:2], *tail)
    turned = bool(attributes.get_int("transB", 0))
    if sizes[0 if turned else 1] != len(scale):
        return None
    return scale[:, None] if turned else scale[None, :]


def _bias(layer: _Layer, n: int) -> Array | None:
    """The bias of a layer, of n outputs; zero where it has none, None where it is no such vector."""
    if layer.bias_of is None or len(layer.bias_of.inputs) <= layer.position:
        return np.zeros(n)
    value = layer.bias_of.inputs[layer.position]
    if value is None:
        return np.zeros(n)
    found = _constant(value)
    if found is None or found.size not in (1, n) or (found.size == n and found.shape[-1:] != (n,)):
        return None
    if layer.node.op_type == "Gemm" and layer.node.attributes.get_float("beta", 1.0) != 1.0:
        return None
    return np.broadcast_to(found.reshape(-1).astype(np.float64), (n,))


def _set_bias(model: ir.Model, layer: _Layer, values: Array) -> None:
    """Give a layer a bias: where it has one of its own under that name, else a new one."""
    node, product = layer.bias_of, layer.node.outputs[0]
    here = node.inputs[layer.position] if node is not None and len(node.inputs) > layer.position else None
    if here is not None and here.is_initializer() and len(here.uses()) == 1:
        here.const_value = ir.tensor(values, name=here.name)
        here.shape = ir.Shape(values.shape)
        return
    assert layer.weight.name is not None
    owner, dot, _ = layer.weight.name.rpartition(".")
    taken = _names(model)
    bias = ir.Value(name=free_name(f"{owner}{dot}bias", taken), const_value=ir.tensor(values))
    bias.shape, bias.dtype = ir.Shape(values.shape), ir.DataType.from_numpy(values.dtype)
    model.graph.register_initializer(bias)
    if node is not None:
        node.resize_inputs(max(len(node.inputs), layer.position + 1))
        node.replace_input_with(layer.position, bias)
        return
    total = ir.Value(name=free_name(f"{product.name}_biased", taken), shape=product.shape, type=product.type)
    product.replace_all_uses_with(total, replace_graph_outputs=True)
    layer.node.append(
        ir.node("Add", [product, bias], outputs=[total], name=free_name(f"{total.name}_add", taken))
    )


def _names(model: ir.Model) -> set[str]:
    """Every name of a value in a model."""
    made = (value.name for node in model.graph.all_nodes() for value in node.outputs)
    ends = (value.name for value in (*model.graph.inputs, *model.graph.initializers.values()))
    return {name for name in (*made, *ends) if name}


def _constant(value: ir.Value | None) -> Array | None:
    """The array that a value always is, else None."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()
