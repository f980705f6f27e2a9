"""Small graphs written as text, with weights given as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper, parser

from sparse_export.onnxruntime_import import load_onnxruntime
from sparse_export.signature import Array, Feeds

__all__ = ["drawn", "model_from", "outputs_of"]


def drawn(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model_from(text: str, **weights: Array) -> onnx.ModelProto:
    """A model of the graph `text`, like `(float[N,4] x) => (float[N,3] y) { y = MatMul(x, w) }`."""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> network {text}')
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return model


def outputs_of(model: onnx.ModelProto, feeds: Feeds) -> list[Array]:
    ort: Any = load_onnxruntime()
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(None, dict(feeds))
    return found
