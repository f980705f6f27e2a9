"""A network of which some layers cannot be sparse, and data that it gets all right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from sparse_export.signature import Array
from tests.oneshot.graphs import drawn, model_from, outputs_of

__all__ = ["LAYERS", "WIDTH", "choosable", "write_data"]

WIDTH, _CLASSES = 64, 8
LAYERS = ("w0", "w1", "w2", "w3")


def _nearly_sparse(seed: int) -> Array:
    """A weight of which 2:4 drops a thousandth."""
    weight = drawn(WIDTH, WIDTH, seed=seed) / np.sqrt(WIDTH)
    weight[0::4] *= 1e-3
    weight[2::4] *= 1e-3
    found: Array = weight.astype(np.float32)
    return found


def choosable(sensitive: tuple[str, ...] = ("w1",)) -> onnx.ModelProto:
    """Four layers that may be sparse and one that may not; the sensitive ones lose a lot as 2:4."""
    weights = {name: _nearly_sparse(at) for at, name in enumerate(LAYERS)}
    weights |= {name: (drawn(WIDTH, WIDTH, seed=9) / 8).astype(np.float32) for name in sensitive}
    return model_from(
        """(float[N,64] x) => (float[N,8] y) {
            a = MatMul(x, w0)  b = Relu(a)  c = MatMul(b, w1)  d = Relu(c)
            e = MatMul(d, w2)  f = Relu(e)  g = MatMul(f, w3)  h = Relu(g)  y = MatMul(h, last)
        }""".replace("  ", "\n"),
        **weights,
        last=drawn(WIDTH, _CLASSES, seed=7),
    )


def write_data(path: Path, n: int = 400) -> None:
    """Inputs whose targets the dense network all gets right, beside the file."""
    x = drawn(n, WIDTH, seed=3)
    (y,) = outputs_of(onnx.load(path), {"x": x})
    np.savez(path.with_name("data.npz"), x=x, targets=y.argmax(1))
    np.savez(path.with_name("inputs.npz"), x=x)
