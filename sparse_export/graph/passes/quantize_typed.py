"""Quantization as TensorRT takes it: int8 or fp8 on both sides of products, float16 everywhere else.

Pairs are placed by a pass of our own (`quantize_placement`), with ranges by the library's calibrators. The other
way, onnxruntime's quantizer with outputs, Add, Relu, MaxPool, Concat, Reshape and Transpose among its operators,
was tried on the same 2:4 graphs (max ranges, int8, root mean square of the error by the spread of the output,
onnxruntime 1.31.1 on a CPU, 2026-11-30):

| network | library: pairs, error | placed here: pairs, error | products that read and write int8, of all |
|---|---|---|---|
| ResNet-18, random weights | 49, 0.032 | 23, 0.027 | 20 of 21 |
| ViT tiny, random weights | 285, 0.50 | 99, 0.061 | 49 of 50 |
| MiniLM | 104, 0.73 | 30, 0.42 | 18 of 18 |

It has no option for the end of what is fused: of ResNet-18's pairs 20 stood between a Conv and its Relu, where they
round once more and keep the two apart, and in transformers it quantizes what Softmax, LayerNorm and GELU give, and
the residual. Left out are outputs of the network, here the last product of a classifier. Graphs are marked with an
Identity for each pair first, then taken to float16, since that knows which operators have no such type.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sparse_export.errors import UsageError
from sparse_export.graph.names import free_name, names_of_values
from sparse_export.graph.passes.calibrate import RangeMethod, largest_magnitudes, require_samples
from sparse_export.graph.passes.float16 import in_half
from sparse_export.graph.passes.newer_opset import with_opset
from sparse_export.graph.passes.quantize import Quantized, require_zeros_kept
from sparse_export.graph.passes.quantize_placement import PRODUCTS, Placement, output_axis, place_pairs
from sparse_export.signature import Array, Feeds

__all__ = ["quantized_for_engines"]

_OPSET = 20  # the first in which scales are float16 is 19; of 20 is what the exporter writes
_LARGEST = {"int8": 127.0, "fp8": 448.0}
_TYPES = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}
_SMALLEST_SCALE = float(np.finfo(np.float16).tiny)  # below it a scale has fewer digits


def quantized_for_engines(
    model: onnx.ModelProto,
    samples: Sequence[Feeds],
    precision: Quantized,
    *,
    method: RangeMethod = "max",
) -> onnx.ModelProto:
    """Make the graph that engines are built of; its inputs and outputs stay float32.

    Args:
        model: float32.
        samples: batches of inputs that the ranges are taken from.
        precision: of products and what lies between them.
        method: how ranges are taken.

    Raises:
        UsageError: there are no samples, or nothing to quantize; or as `in_half`.
        GateFailed: a zero of a weight, or a 2:4 pattern, did not survive; or as `in_half`.
    """
    require_samples(samples)
    plain = _with_stored_constants(with_opset(model, _OPSET, precision))
    placement = place_pairs(plain.graph)
    if not placement.products:
        raise UsageError(
            "The graph has nothing to quantize.",
            expected=f"A {', '.join(PRODUCTS)} with a constant weight was expected.",
            do="Build it as fp16 or fp32.",
        )
    magnitudes = _by_class(placement, largest_magnitudes(plain, placement.uses, samples, method))
    marked, marks = _with_marks(plain, placement)
    half = in_half(marked, "fp16")
    _replace_marks(half.graph, marks, placement, magnitudes, precision)
    found = {
        (name, one.weight)
        for name, value in marks.items()
        for one in placement.products
        if one.source == value
    }
    _quantize_weights(half.graph, plain.graph, found, precision)
    onnx.checker.check_model(half, full_check=True)
    require_zeros_kept(model, half)
    return half


def _with_stored_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose Constant nodes of tensors are initializers."""
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    graph = plain.graph
    outputs = {value.name for value in graph.output}
    for node in [node for node in graph.node if node.op_type == "Constant"]:
        if node.output[0] in outputs or not any(a.name == "value" for a in node.attribute):
            continue
        graph.initializer.add().CopyFrom(node.attribute[0].t)
        graph.initializer[-1].name = node.output[0]
        graph.node.remove(node)
    return plain


def _by_class(placement: Placement, magnitudes: Mapping[str, float]) -> dict[str, float]:
    """The largest magnitude of the values that share a scale, for each of them."""
    largest: dict[str, float] = {}
    for value, one in placement.classes.items():
        largest[one] = max(largest.get(one, 0.0), magnitudes.get(value, 0.0))
    return {value: largest[one] for value, one in placement.classes.items()}


def _with_marks(model: onnx.ModelProto, placement: Placement) -> tuple[onnx.ModelProto, dict[str, str]]:
    """A copy with an Identity where a pair will stand, and the value of each by the Identity's name.

    Types are changed in between, and an Identity has any.
    """
    marked = onnx.ModelProto()
    marked.CopyFrom(model)
    graph = marked.graph
    taken = names_of_values(graph) | {node.name for node in graph.node}
    behind: dict[str, onnx.NodeProto] = {}
    marks: dict[str, str] = {}
    for value, uses in placement.uses.items():
        if not uses:
            continue
        name = free_name(f"{value}_quantized", taken)
        taken.add(name)
        behind[value] = helper.make_node("Identity", [value], [name], name=name)
        marks[name] = value
        for index, at in uses:
            graph.node[index].input[at] = name
    nodes = [behind[value.name] for value in graph.input if value.name in behind]
    for node in graph.node:
        nodes.append(node)
        nodes += [behind[name] for name in node.output if name in behind]
    nodes = [copy.deepcopy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(nodes)
    return marked, marks


def _replace_marks(
    graph: onnx.GraphProto,
    marks: Mapping[str, str],
    placement: Placement,
    magnitudes: Mapping[str, float],
    precision: Quantized,
) -> None:
    """Put pairs in the place of the marks, in place; values that share a scale share its tensor."""
    taken = names_of_values(graph)
    dtype = helper.tensor_dtype_to_np_dtype(_TYPES[precision])
    zero = free_name("zero_point", taken)
    taken.add(zero)
    graph.initializer.append(numpy_helper.from_array(np.array(0, dtype), zero))
    scales: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.name not in marks or node.op_type != "Identity":
            nodes.append(node)
            continue
        value = marks[node.name]
        one = placement.classes[value]
        if one not in scales:
            scales[one] = free_name(f"{one}_scale", taken)
            taken.add(scales[one])
            scale = _scales(np.array(magnitudes[value]), precision)
            graph.initializer.append(numpy_helper.from_array(scale, scales[one]))
        small = free_name(f"{node.name}_{precision}", taken)
        taken.add(small)
        ends = [scales[one], zero]
        nodes.append(helper.make_node("QuantizeLinear", [node.input[0], *ends], [small], name=small))
        nodes.append(helper.make_node("DequantizeLinear", [small, *ends], [node.output[0]], name=node.name))
    nodes = [copy.deepcopy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(nodes)


def _scales(magnitudes: Array, precision: Quantized) -> Array:
    """Steps as float16, so large that the magnitudes are within the range; 1 where there is nothing."""
    wanted = np.asarray(magnitudes, np.float64) / _LARGEST[precision]
    found = np.maximum(wanted, _SMALLEST_SCALE).astype(np.float16)
    found = np.where(found < wanted, np.nextafter(found, np.float16(np.inf)), found)
    return np.asarray(np.where(wanted > 0, found, np.float16(1.0)), np.float16)


def _quantize_weights(
    graph: onnx.GraphProto,
    original: onnx.GraphProto,
    found: Collection[tuple[str, str]],
    precision: Quantized,
) -> None:
    """Store the weights of products by their output channels in few bits, in place.

    A weight keeps its name, since promises are by name, unless others read it too.  found: what products read
    and their weights, by name.
    """
    taken = names_of_values(graph)
    floats = {tensor.name: tensor for tensor in original.initializer}
    made: dict[tuple[str, int], str] = {}
    weight_of: dict[str, str] = {}
    front: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type not in PRODUCTS or (node.input[0], node.input[1]) not in found:
            continue
        weight, axis = node.input[1], output_axis(node)
        key = (weight, axis)
        if key not in made:
            made[key] = free_name(f"{weight}_dequantized", taken)
            taken.add(made[key])
            values, scales = _few_bits(numpy_helper.to_array(floats[weight]), axis, precision)
            names = [free_name(f"{weight}_{what}", taken) for what in ("values", "scale", "zero_point")]
            taken.update(names)
            weight_of[names[0]] = weight
            zero = np.zeros(scales.shape, values.dtype)
            for name, array in zip(names, (values, scales, zero), strict=True):
                graph.initializer.append(numpy_helper.from_array(array, name))
            front.append(helper.make_node("DequantizeLinear", names, [made[key]], name=made[key], axis=axis))
        node.input[1] = made[key]
    read = {name for node in graph.node for name in node.input}
    renamed: dict[str, str] = {}
    for node in front:
        weight = weight_of[node.input[0]]
        if weight not in read and weight not in renamed.values():
            renamed[node.input[0]] = weight
    for tensor in [one for one in graph.initializer if one.name in renamed.values()]:
        graph.initializer.remove(tensor)
    for tensor in graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in front:
        node.input[0] = renamed.get(node.input[0], node.input[0])
    rest = [copy.deepcopy(node) for node in graph.node]
    del graph.node[:]
    graph.node.extend([*front, *rest])


def _few_bits(weight: Array, axis: int, precision: Quantized) -> tuple[Array, Array]:
    """A weight in few bits, and its scales along an axis. A zero is stored as zero."""
    around = tuple(at for at in range(weight.ndim) if at != axis)
    scales = _scales(np.abs(weight).max(around, initial=0.0), precision)
    shape = [-1 if at == axis else 1 for at in range(weight.ndim)]
    scaled = weight.astype(np.float64) / scales.astype(np.float64).reshape(shape)
    top = _LARGEST[precision]
    rounded = np.clip(np.rint(scaled) if precision == "int8" else scaled, -top, top)
    return rounded.astype(np.float32).astype(helper.tensor_dtype_to_np_dtype(_TYPES[precision])), scales
