"""A graph brought to the precision that it is to run in, and how far it may then be from the network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from sparse_export.engines.options import Precision
from sparse_export.graph.passes.float16 import in_half
from sparse_export.graph.passes.quantize import quantized

__all__ = ["CALIBRATED", "TOLERANCE", "convert_precision"]

CALIBRATED: frozenset[Precision] = frozenset(("int8", "fp8"))

# Largest difference from the float32 network, by the spread of its logits. Seen at most of digits-cnn (dense and at a
# density of .1, test set and golden pair) and of ResNet-18 and ResNet-50 with random weights: fp32 3.1e-6, fp16 2.1e-3,
# bf16 2.5e-2, int8 0.24, fp8 0.37 (onnxruntime 1.31.1 on a CPU, 2026-11-26). The floats have about ten times that, fp32
# a hundred times, for runtimes that sum in other orders; the calibrated ones, whose error is that of their few levels,
# about three. Two answers that have nothing to do with each other differ by several spreads.
TOLERANCE: dict[Precision, float] = {"fp32": 3e-4, "fp16": 2e-2, "bf16": 0.2, "int8": 0.75, "fp8": 1.0}


def convert_precision(
    model: onnx.ModelProto, precision: Precision, samples: Sequence[np.ndarray] = ()
) -> onnx.ModelProto:
    """The float32 graph in another precision, inputs and outputs still float32; itself for fp32.

    samples: batches of real inputs, for int8 and fp8.  Raises UsageError or GateFailed, as `quantized` and
    `in_half` do.
    """
    if precision == "int8" or precision == "fp8":
        return quantized(model, samples, precision)
    if precision == "fp16" or precision == "bf16":
        return in_half(model, precision)
    return model
