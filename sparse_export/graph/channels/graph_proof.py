"""The proof that an order of channels leaves what an ONNX graph computes as it was, and graphs in another order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from torch import Tensor

from sparse_export.errors import GateFailed
from sparse_export.files import temporary_folder
from sparse_export.graph.channels.graph_trace import is_indifferent, own_parameters
from sparse_export.graph.channels.onnx_graph import Array
from sparse_export.graph.model import save_model
from sparse_export.graph.stored_tensors import array_of
from sparse_export.onnxruntime_import import load_onnxruntime
from sparse_export.signature import Feeds

__all__ = ["Difference", "difference_by_orders", "reordered_graph"]

_ONLY_FATAL = 4
_SAFETY = 64.0
_LEAST = 64 * float(np.finfo(np.float32).eps)
_STRENGTHS = (0.5, 0.1, 0.02)
_SEED = 24
_MOST = 0.02
"""A graph that enlarges rounding beyond this share of its outputs tells a wrong order from none."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far outputs before and after lie apart, as a share of the largest value of an output.

    Attributes:
        largest: over all outputs and inputs.
        allowed: what rounding explains: 64 times what the outputs differ by when every weight is changed by
            one unit in its last place at most.
    """

    largest: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Does rounding explain the difference?"""
        return self.largest <= self.allowed

    @property
    def tells(self) -> bool:
        """Would a wrong order be seen?"""
        return self.allowed <= _MOST


def reordered_graph(model: onnx.ModelProto, orders: Mapping[str, Tensor]) -> onnx.ModelProto:
    """Another graph whose stored tensors have their entries in another order.

    Args:
        model: it stays as it is.
        orders: by name of a stored tensor, of its shape: the place in the old one of every entry, counted
            row-major.
    """
    arrays = {name: array_of(tensor) for name, tensor in own_parameters(model).items() if name in orders}
    return _with_arrays(
        model, {name: array.reshape(-1)[orders[name].numpy()] for name, array in arrays.items()}
    )


def difference_by_orders(
    model: onnx.ModelProto, orders: Mapping[str, Tensor], feeds: Sequence[Feeds]
) -> Difference:
    """Run a graph before and after, in float32, with its own weights and with others.

    The others are the own ones, each times a random number around 1, and a little added: channels that are
    alike, or whose weights are zero, would not tell a wrong order. The numbers lie between 0.5 and 1.5, or
    closer to 1 where the graph enlarges rounding too much with such weights.

    Args:
        model: the graph before.
        orders: as `reordered_graph` takes them.
        feeds: inputs that the graph takes.

    Raises:
        GateFailed: onnxruntime does not run the graph, an output is NaN or infinite, or rounding alone changes
            the outputs too much to tell.
    """
    own = _difference(model, orders, feeds)
    if not own.ok:
        return own
    for strength in _STRENGTHS:
        drawn = _difference(_redrawn(model, strength), orders, feeds)
        if drawn.tells:
            break
    for found in (own, drawn):
        if not found.tells:
            raise _unproven(f"rounding alone may change an output by {found.allowed:.2g} of the largest")
    return max(own, drawn, key=lambda one: one.largest / one.allowed)


def _difference(model: onnx.ModelProto, orders: Mapping[str, Tensor], feeds: Sequence[Feeds]) -> Difference:
    wanted = _outputs(model, feeds)
    rounding = _apart(wanted, _outputs(_rounded(model), feeds))
    found = _outputs(reordered_graph(model, orders), feeds)
    return Difference(largest=_apart(wanted, found), allowed=max(_SAFETY * rounding, _LEAST))


def _unproven(why: str) -> GateFailed:
    return GateFailed(
        f"Whether an order of channels keeps what the graph computes cannot be checked: {why}.",
        expected="A graph that runs in float32 by onnxruntime was expected. It was left as it was.",
        do="Leave its channels in their order.",
    )


def _with_arrays(model: onnx.ModelProto, arrays: Mapping[str, Array]) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for tensor in made.graph.initializer:
        if tensor.name in arrays:
            array = np.ascontiguousarray(arrays[tensor.name])
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return made


def _redrawn(model: onnx.ModelProto, strength: float) -> onnx.ModelProto:
    """Every weight times a random number that is at most `strength` from 1, and a fifth of that added."""
    generator = np.random.default_rng(_SEED)
    arrays = {}
    for name, tensor in own_parameters(model).items():
        array = array_of(tensor)
        if is_indifferent(array) or not array.size:
            continue
        values = array.astype(np.float64)
        size = float(np.abs(values).mean()) or 0.1
        little = generator.uniform(0.0 if (values >= 0).all() else -1.0, 1.0, array.shape)
        factor = generator.uniform(1 - strength, 1 + strength, array.shape)
        arrays[name] = (values * factor + strength / 5 * size * little).astype(array.dtype)
    return _with_arrays(model, arrays)


def _rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every weight changed by one unit in the last place of a float32 at most."""
    generator = np.random.default_rng(_SEED)
    eps = float(np.finfo(np.float32).eps)
    arrays = {}
    for name, tensor in own_parameters(model).items():
        array = array_of(tensor)
        changed = array.astype(np.float64) * (1 + eps * generator.uniform(-1, 1, array.shape))
        arrays[name] = changed.astype(array.dtype)
    return _with_arrays(model, arrays)


def _outputs(model: onnx.ModelProto, feeds: Sequence[Feeds]) -> list[dict[str, Array]]:
    names = [value.name for value in model.graph.output]
    with temporary_folder() as folder:
        file = folder / "graph.onnx"
        save_model(model, file)
        try:
            session = _session(file)
            found = [dict(zip(names, session.run(None, dict(one)), strict=True)) for one in feeds]
        except Exception as cause:  # whatever onnxruntime raises of a graph
            raise _unproven(f"onnxruntime ends with {str(cause).strip().partition(chr(10))[0]}") from cause
    for outputs in found:
        for name, one in outputs.items():
            if isinstance(one, np.ndarray) and one.dtype.kind == "f" and not np.isfinite(one).all():
                raise _unproven(f"its output {name} is not finite")
    return found


def _session(file: Path) -> Any:
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = _ONLY_FATAL
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _apart(before: Sequence[Mapping[str, Array]], after: Sequence[Mapping[str, Array]]) -> float:
    """The largest difference of an output, as a share of its largest value; of whole numbers the share of those
    that differ.
    """
    worst = 0.0
    for wanted, found in zip(before, after, strict=True):
        for name, a in wanted.items():
            b = found[name]
            if not isinstance(a, np.ndarray):
                continue
            if a.shape != b.shape:
                return float("inf")
            if not a.size:
                continue
            if a.dtype.kind != "f":
                worst = max(worst, float((a != b).mean()))
                continue
            a64 = a.astype(np.float64)
            size = max(float(np.abs(a64).max()), float(np.finfo(np.float32).tiny))
            worst = max(worst, float(np.abs(b.astype(np.float64) - a64).max()) / size)
    return worst
