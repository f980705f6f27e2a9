"""Compares the output of a rewritten graph with that of the original."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx

from sparse_export.errors import GateFailed
from sparse_export.files import temporary_folder
from sparse_export.graph.layers import graph_layers
from sparse_export.runtimes.onnxruntime import open_session

__all__ = ["float_tolerance", "require_same_output"]

_SEED = 21
_BATCHES = (1, 3, 16)
_SCALES = (1.0, 0.0, 10.0)
_SAFETY = 32.0


def float_tolerance(model: onnx.ModelProto) -> float:
    """Bound the difference that float32 rounding makes where the same sums are taken in another order.

    A sum of n terms rounds by about sqrt(n) times half a unit in the last place, and the layers add up; 32
    times that is allowed, since a layer may enlarge earlier errors.

    Args:
        model: the graph.

    Returns:
        The bound, relative to the largest output.
    """
    layers = [layer for layer in graph_layers(model) if layer.constant]
    n_terms = sum(
        math.prod(layer.shape[1:]) if layer.op_type == "Conv" else layer.shape[layer.reduction_axis]
        for layer in layers
    )
    return float(_SAFETY * np.finfo(np.float32).eps / 2 * math.sqrt(max(n_terms, 1)))


def require_same_output(
    before: onnx.ModelProto, after: onnx.ModelProto, input_shape: Sequence[int], *, by: str = "compacted"
) -> float:
    """Run two graphs on random batches and compare their outputs.

    The batches are of 1, 3 and 16 samples, standard normal times 1 and 10, and all zeros.

    Args:
        before: the original graph.
        after: the rewritten one.
        input_shape: of one sample.
        by: what was done to it, for the message.

    Returns:
        The largest difference, relative to the largest output.

    Raises:
        GateFailed: they differ by more than `float_tolerance`.
    """
    tolerance = float_tolerance(before)
    generator = np.random.default_rng(_SEED)
    worst = 0.0
    with temporary_folder() as folder:
        files = [folder / name for name in ("before.onnx", "after.onnx")]
        for file, model in zip(files, (before, after), strict=True):
            file.write_bytes(model.SerializeToString())
        with open_session(files[0]) as first, open_session(files[1]) as second:
            for n in _BATCHES:
                for scale in _SCALES:
                    x = generator.standard_normal((n, *input_shape), dtype=np.float32)
                    x *= np.float32(scale)
                    wanted, found = first.run(x).astype(np.float64), second.run(x).astype(np.float64)
                    if wanted.shape != found.shape:
                        difference = math.inf
                    else:
                        size = max(float(np.abs(wanted).max(initial=0.0)), float(np.finfo(np.float32).tiny))
                        difference = float(np.abs(found - wanted).max(initial=0.0)) / size
                    worst = max(worst, difference)
                    if not difference <= tolerance:
                        raise GateFailed(
                            f"The {by} graph differs from the whole one by {difference:.3g} of the largest "
                            "output "
                            f"on {n} random inputs of scale {scale:g}.",
                            expected=f"Rounding explains at most {tolerance:.3g}.",
                            do="Build without that, and report the network.",
                        )
    return worst
