"""Stored tensors that hold NaN or infinity, which spoil what a network gives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import onnx

from sparse_export.errors import GateFailed
from sparse_export.graph.constants import array_of
from sparse_export.graph.layers import FLOATS

__all__ = ["naming_weights", "not_finite"]

_NAMED = 5


def not_finite(model: onnx.ModelProto) -> str:
    """Name the stored tensors of a graph that hold NaN or infinity, as `fc.bias (1 of 10 values)`.

    Args:
        model: with its data; not changed.

    Returns:
        The first of them with commas between; empty where there are none.
    """
    found = []
    for tensor in model.graph.initializer:
        if tensor.data_type in FLOATS:
            values = array_of(tensor)
            n_finite = int(np.count_nonzero(np.isfinite(values)))
            if n_finite < values.size:
                found.append(f"{tensor.name} ({values.size - n_finite:,} of {values.size:,} values)")
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"{', '.join(found[:_NAMED])}{more}"


@contextlib.contextmanager
def naming_weights(model: onnx.ModelProto) -> Iterator[None]:
    """Name the weights that are not finite where outputs of a graph are not.

    Args:
        model: that is run.

    Raises:
        GateFailed: that was raised inside, with the names.
    """
    try:
        yield
    except GateFailed as error:
        names = not_finite(model)
        if not names:
            raise
        raise GateFailed(
            f"{error.what} NaN or infinity is stored in {names}.",
            expected=error.expected,
            do="Export the network again from weights that are finite.",
        ) from error
