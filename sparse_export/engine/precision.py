"""A graph brought to the precision that it is to run in, and how far it may then be from the network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from sparse_export.engine.options import Precision
from sparse_export.engine.quantize import quantized
from sparse_export.graph.precision import in_half

__all__ = ["CALIBRATED", "TOLERANCE", "at_precision"]

CALIBRATED: frozenset[Precision] = frozenset(("int8", "fp8"))

# Largest difference from the float32 network, by the largest logit: about ten times what was seen of digits-cnn and
# ResNet-18 with random weights (fp16 4e-4, bf16 5e-3, int8 2e-2, fp8 6e-2; onnxruntime 1.31.1 on a CPU, 2026-11-25).
TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 5e-2, "int8": 0.2, "fp8": 0.5}


def at_precision(
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
