"""Converts a graph to the precision that it runs in; how far its output may then be from the network's."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from sparse_export.engines.options import Precision
from sparse_export.graph.layers import graph_layers
from sparse_export.graph.passes.float16 import in_half
from sparse_export.graph.passes.quantize import quantized
from sparse_export.signature import Feeds

__all__ = ["CALIBRATED", "RMS_TOLERANCE", "TOLERANCE", "convert_precision", "precision_of"]

CALIBRATED: frozenset[Precision] = frozenset(("int8", "fp8"))

# Largest difference from the float32 network, as a share of the spread of its logits. The largest measured
# with digits-cnn (dense and at a density of .1, test set and golden pair) and with ResNet-18 and ResNet-50 of
# random weights: fp32 3.1e-6, fp16 2.1e-3, bf16 2.5e-2, int8 0.24, fp8 0.37 (onnxruntime 1.31.1 on a CPU,
# 2026-11-26). Allowed is about ten times that for bf16, a hundred times for fp32, since other runtimes sum in
# another order; about three times for calibrated types, whose error comes from their few levels. Of published
# detectors, whose outputs are some hundred thousand values, the largest of fp16 was 7.6e-2 (PP-OCR's, made
# 2:4, 2026-11-30). Unrelated outputs differ by several spreads.
TOLERANCE: dict[Precision, float] = {"fp32": 3e-4, "fp16": 0.1, "bf16": 0.2, "int8": 0.75, "fp8": 1.0}
# The same of the root mean square, which does not grow with the number of values. The largest measured, that
# of the worst sample too, with digits-cnn, ResNet-18 of random weights, magika, MiniLM, YOLOv8n and two
# networks of PP-OCR, dense and 2:4 (onnxruntime 1.31.1 on a CPU, 2026-11-30): fp32 1e-6, fp16 1.1e-3, of
# PP-OCR 9.8e-3, bf16 9.1e-3, int8 0.24 (MiniLM), fp8 0.11. Allowed by about the same rule; unrelated outputs
# are 1.4 apart.
RMS_TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.07, "int8": 0.5, "fp8": 0.5}


def precision_of(model: onnx.ModelProto) -> Precision:
    """The precision that a graph from elsewhere computes in, by the types of its layers' weights."""
    types = {layer.dtype for layer in graph_layers(model)}
    halves: dict[str, Precision] = {"float16": "fp16", "bfloat16": "bf16"}
    return next((precision for dtype, precision in halves.items() if dtype in types), "fp32")


def convert_precision(
    model: onnx.ModelProto, precision: Precision, samples: Sequence[Feeds] = ()
) -> onnx.ModelProto:
    """Convert a float32 graph to another precision. Its inputs and outputs stay float32.

    Args:
        model: the graph.
        precision: the precision; for fp32 the graph itself is returned.
        samples: batches of real inputs, for int8 and fp8.

    Raises:
        UsageError: as `quantized`.
        GateFailed: as `quantized` and `in_half`.
    """
    if precision == "int8" or precision == "fp8":
        return quantized(model, samples, precision)
    if precision == "fp16" or precision == "bf16":
        return in_half(model, precision)
    return model
