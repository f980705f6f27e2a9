"""Compares the output of a rewritten graph with that of the original."""

from __future__ import annotations

import math

import numpy as np
import onnx

from sparse_export.errors import GateFailed
from sparse_export.files import temporary_folder
from sparse_export.graph.layers import graph_layers
from sparse_export.graph.model import save_model
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.signature import Array, Feeds, Signature

__all__ = ["float_tolerance", "require_same_output"]

_SEED = 21
_TRIED = ((1, 1.0), (1, 0.0), (3, 10.0), (5, 1.0))
"""Samples, and what their floats are multiplied by. A sample is as good as another: zeros are tried once."""
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
    before: onnx.ModelProto, after: onnx.ModelProto, signature: Signature, *, by: str = "compacted"
) -> float:
    """Run two graphs on random batches and compare their outputs.

    Floats are standard normal times 1 and 10, and all zeros, integers as `Signature.draw` draws them. Where
    the number of samples is free, batches of 1, 3 and 5 are among them.

    Args:
        before: the original graph.
        after: the rewritten one.
        signature: of both.
        by: what was done to it, for the message.

    Returns:
        The largest difference, relative to the largest output.

    Raises:
        GateFailed: they differ by more than `float_tolerance`.
    """
    tolerance = float_tolerance(before)
    worst = 0.0
    with temporary_folder() as folder:
        files = [folder / name for name in ("before.onnx", "after.onnx")]
        for file, model in zip(files, (before, after), strict=True):
            save_model(model, file)
        with (
            open_session(files[0], signature=signature) as first,
            open_session(files[1], signature=signature) as second,
        ):
            tried = (
                _TRIED if signature.batch is not None else dict.fromkeys((1, scale) for _, scale in _TRIED)
            )
            for n, scale in tried:
                feeds = _scaled(signature.draw(n, _SEED), scale)
                difference, name = _largest_difference(first.run(feeds), second.run(feeds))
                worst = max(worst, difference)
                if not difference <= tolerance:
                    raise GateFailed(
                        f"The {by} graph differs from the whole one in {name} by {difference:.3g} of the "
                        f"largest value on {n} random inputs of scale {scale:g}.",
                        expected=f"Rounding explains at most {tolerance:.3g}.",
                        do="Build without that, and report the network.",
                    )
    return worst


def _scaled(feeds: Feeds, scale: float) -> dict[str, Array]:
    """Floats times a number; integers stay within their range."""
    return {
        name: (one * scale).astype(one.dtype) if one.dtype.kind in "fV" else one
        for name, one in feeds.items()
    }


def _largest_difference(wanted: Feeds, found: Feeds) -> tuple[float, str]:
    """Over all outputs, relative to the largest value of each, with the name of the output that has it."""
    of_each = {}
    for name, one in wanted.items():
        a, b = one.astype(np.float64), found[name].astype(np.float64)
        size = max(float(np.abs(a).max(initial=0.0)), float(np.finfo(np.float32).tiny))
        of_each[name] = math.inf if a.shape != b.shape else float(np.abs(b - a).max(initial=0.0)) / size
    name = max(of_each, key=lambda key: of_each[key] if of_each[key] == of_each[key] else math.inf)
    return of_each[name], name
