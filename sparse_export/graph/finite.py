"""Stored tensors that hold NaN or infinity, which spoil what a network gives."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import numpy as np
import onnx

from sparse_export.errors import GateFailed
from sparse_export.graph.layers import FLOATS
from sparse_export.graph.stored_tensors import Read, array_of
from sparse_export.graph.weight_counts import is_all_finite

__all__ = ["naming_weights", "not_finite"]

_NAMED = 5


def not_finite(
    model: onnx.ModelProto, *, read: Read = array_of, finite: Collection[str] = frozenset()
) -> str:
    """Name the stored tensors of a graph that hold NaN or infinity, as `fc.bias (1 of 10 values)`.

    Args:
        model: not changed.
        read: gives the values of what the model stores.
        finite: names of tensors that are known to hold neither.

    Returns:
        The first of them with commas between; empty where there are none.
    """
    found = []
    for tensor in model.graph.initializer:
        if tensor.data_type in FLOATS and tensor.name not in finite:
            values = read(tensor)
            if is_all_finite(values):
                continue
            n_finite = int(np.count_nonzero(np.isfinite(values)))
            if n_finite < values.size:
                found.append(f"{tensor.name} ({values.size - n_finite:,} of {values.size:,} values)")
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"{', '.join(found[:_NAMED])}{more}"


@contextlib.contextmanager
def naming_weights(model: onnx.ModelProto, *, read: Read = array_of) -> Iterator[None]:
    """Name the weights that are not finite where outputs of a graph are not.

    Args:
        model: that is run.
        read: gives the values of what the model stores.

    Raises:
        GateFailed: that was raised inside, with the names.
    """
    try:
        yield
    except GateFailed as error:
        names = not_finite(model, read=read)
        if not names:
            raise
        raise GateFailed(
            f"{error.what} NaN or infinity is stored in {names}.",
            expected=error.expected,
            do="Export the network again from weights that are finite.",
        ) from error
