"""Explicit quantization: int8 or fp8 values between QuantizeLinear and DequantizeLinear, calibrated on real
data.

onnxruntime's quantizer places the nodes and measures the ranges. Everything is symmetric with zero point 0,
weights per output channel, so that a zero stays a zero and 2:4 stays 2:4. Biases stay float32, which TensorRT
wants. fp8 is made from the same ranges: NVIDIA's convention is E4M3 with the largest magnitude at 448.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sparse_export.errors import GateFailed, UsageError
from sparse_export.files import temporary_folder
from sparse_export.graph.layers import graph_layers
from sparse_export.graph.names import free_name, names_of_values, rename_values
from sparse_export.graph.passes.newer_opset import with_opset
from sparse_export.onnxruntime_import import load_onnxruntime
from sparse_export.signature import Array, Feeds

__all__ = ["Quantized", "quantized", "require_zeros_kept"]

Quantized = Literal["int8", "fp8"]
_OPERATORS = ["Conv", "Gemm", "MatMul"]
_OPSETS = {"int8": 13, "fp8": 19}  # the first with a scale for each channel, and with the type
_INT8_MAX = 127.0
_FP8_MAX = 448.0
_OPTIONS = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "QuantizeBias": False,
    "MatMulConstBOnly": True,
    # Only what goes into a product is quantized. A pair behind it would stand between it and the Relu it is
    # fused with.
    "OpTypesToExcludeOutputQuantization": _OPERATORS,
    "QDQKeepRemovableActivations": True,  # a symmetric range does not clip at 0, so that Relu has to stay
}


def quantized(model: onnx.ModelProto, samples: Sequence[Feeds], precision: Quantized) -> onnx.ModelProto:
    """A new model with Q/DQ around every Conv, Gemm and MatMul that has a constant weight.

    model: float32.  samples: batches of inputs, as the network takes them, from which the ranges are taken.
    Raises UsageError when there are no samples, or nothing to quantize, and GateFailed when a zero of a
    weight, or a 2:4 pattern, did not survive.
    """
    if not samples or not all(array.size for feeds in samples for array in feeds.values()):
        raise UsageError(
            "There is nothing to calibrate on.",
            expected="Samples of the training set were expected.",
            do="Build from a run that names its data, or choose fp16.",
        )
    model = with_opset(model, _OPSETS[precision], precision)
    small = _int8(model, samples)
    if not any(node.op_type == "DequantizeLinear" for node in small.graph.node):
        raise UsageError(
            "The graph has nothing to quantize.",
            expected=f"A {', '.join(_OPERATORS)} with a constant weight was expected.",
            do="Build it as fp16 or fp32.",
        )
    if precision == "fp8":
        small = _fp8_from_int8(small, model)
    require_zeros_kept(model, small)
    return small


def _int8(model: onnx.ModelProto, samples: Sequence[Feeds]) -> onnx.ModelProto:
    quantization = load_onnxruntime("onnxruntime.quantization")
    base: Any = quantization.CalibrationDataReader
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    # The quantizer calls what it makes `W_scale` and the like without a look at the names that are taken.
    originals = {f"v{i}:": name for i, name in enumerate(sorted(names_of_values(model.graph)))}
    rename_values(copy.graph, {name: stand_in for stand_in, name in originals.items()})
    stand_in_of = {name: stand_in for stand_in, name in originals.items()}

    class Reader(base):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self._batches: Iterator[Feeds] = iter(samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            feeds = next(self._batches, None)
            return None if feeds is None else {stand_in_of[name]: one for name, one in feeds.items()}

    loud = logging.getLogger().level
    with temporary_folder() as folder:
        out = folder / "int8.onnx"
        try:
            logging.getLogger().setLevel(logging.ERROR)  # it advises to pre-process, which the export did
            quantization.quantize_static(
                copy,
                out,
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=_OPERATORS,
                per_channel=True,
                activation_type=quantization.QuantType.QInt8,
                weight_type=quantization.QuantType.QInt8,
                extra_options=_OPTIONS,
            )
        finally:
            logging.getLogger().setLevel(loud)
        small: onnx.ModelProto = onnx.load(out)
    small.producer_name, small.producer_version = model.producer_name, model.producer_version
    _restore_names(small.graph, originals, {node.name for node in model.graph.node})
    return small


_SUFFIX = "_quantized"  # that onnxruntime gives a weight


def _drop_stale_types(graph: onnx.GraphProto) -> None:
    """Remove, in place, what is told of the type and shape of weights that are gone."""
    made = {name for node in graph.node for name in node.output} | {one.name for one in graph.initializer}
    for value in [value for value in graph.value_info if value.name not in made]:
        graph.value_info.remove(value)


_STAND_IN = re.compile(r"v\d+:")


def _restore_names(graph: onnx.GraphProto, originals: Mapping[str, str], nodes: Collection[str]) -> None:
    """Give values their names back in place of stand-ins, and free ones, made of these, to what the quantizer
    added.

    A weight has its name although it is another tensor now: promises are by name.
    nodes: names of the nodes that were there before.
    """
    _drop_stale_types(graph)
    present = names_of_values(graph)
    weights = (tensor.name for tensor in graph.initializer if tensor.name.endswith(_SUFFIX))
    replaced = {name: name.removesuffix(_SUFFIX) for name in weights}
    new = {stand_in: name for stand_in, name in originals.items() if stand_in in present}
    new |= {name: originals[one] for name, one in replaced.items() if one in originals and one not in present}
    taken = set(new.values())

    def restored(name: str) -> str:
        found = free_name(_STAND_IN.sub(lambda match: originals[match[0]], name), taken)
        taken.add(found)
        return found

    new |= {name: restored(name) for name in sorted(present - new.keys())}
    rename_values(graph, new)
    taken = set(nodes)
    for node in graph.node:
        if _STAND_IN.match(node.name):
            node.name = restored(node.name)


def _fp8_from_int8(small: onnx.ModelProto, model: onnx.ModelProto) -> onnx.ModelProto:
    """The same nodes with E4M3 in place of int8: scales grow by 127 / 448, weights are rounded anew."""
    graph = small.graph
    originals = {tensor.name: tensor for tensor in model.graph.initializer}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    dtype = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)
    scaled: set[str] = set()
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale, zero = tensors[node.input[1]], tensors[node.input[2]]
        if scale.name not in scaled:
            scaled.add(scale.name)
            scale.CopyFrom(
                numpy_helper.from_array(
                    (numpy_helper.to_array(scale) * (_INT8_MAX / _FP8_MAX)).astype(np.float32), scale.name
                )
            )
        if zero.data_type == TensorProto.INT8:
            zero.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(zero).astype(dtype), zero.name))
    for node in graph.node:
        weight = tensors.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if weight is None or weight.data_type != TensorProto.INT8:
            continue
        original = originals[weight.name]
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        values = numpy_helper.to_array(original)
        scales = numpy_helper.to_array(tensors[node.input[1]])
        if scales.ndim:
            scales = scales.reshape([-1 if at == axis % values.ndim else 1 for at in range(values.ndim)])
        rounded = np.clip(values / scales, -_FP8_MAX, _FP8_MAX).astype(dtype)
        weight.CopyFrom(numpy_helper.from_array(rounded, weight.name))
    for value in graph.value_info:
        if value.type.tensor_type.elem_type == TensorProto.INT8:
            value.type.tensor_type.elem_type = TensorProto.FLOAT8E4M3FN
    return small


def require_zeros_kept(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """Raise GateFailed when quantization lost a zero of a weight, a 2:4 pattern, or has a zero point that is
    not 0.
    """
    for tensor in _zero_points(after):
        if np.any(_array(tensor) != 0):
            raise GateFailed(
                f"The zero point {tensor.name} is not 0.",
                expected=(
                    "Symmetric quantization was expected: else a zero weight is stored as another number."
                ),
                do="Choose fp16, and report the network.",
            )
    old = {layer.node: layer for layer in graph_layers(before)}
    new = {layer.node: layer for layer in graph_layers(after)}
    for node, layer in old.items():
        found = new.get(node)
        if not layer.constant:
            continue
        if found is None or found.n_weights != layer.n_weights:
            problem = "is not in the quantized graph"
        elif found.n_nonzero > layer.n_nonzero:
            problem = f"has {found.n_nonzero:,} nonzeros, which were {layer.n_nonzero:,}"
        elif layer.pattern_holds and not found.pattern_holds:
            problem = "is no longer 2:4"
        else:
            continue
        raise GateFailed(
            f"After quantization the weight of {node} {problem}.",
            expected="Every zero was expected to stay a zero.",
            do="Choose fp16, and report the network.",
        )


def _zero_points(model: onnx.ModelProto) -> Iterator[TensorProto]:
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2:
            yield tensors[node.input[2]]


def _array(tensor: Any) -> Array:
    array: Array = numpy_helper.to_array(tensor)
    return array.astype(np.float32)
