"""The values of tensors that a model stores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from sparse_export.errors import ArtefactError, first_line
from sparse_export.graph.evaluation_limits import require_bounded
from sparse_export.signature import Array

Stored = onnx.TensorProto | onnx.SparseTensorProto
Read = Callable[[Stored], Array]
"""Gives the values of a stored tensor, as `array_of` does of one whose data are in the model."""

LARGEST_RANK = 64  # of a NumPy array


def array_of(tensor: Stored) -> Array:
    """The values of a stored tensor.

    Args:
        tensor: dense or sparse, with its data in the model.

    Returns:
        Its values; those of a sparse tensor as a dense array.

    Raises:
        ArtefactError: the data are not loaded, or do not fit shape and type.
        NotEvaluatedError: the dense array of a sparse tensor would be too large.
    """
    try:
        if isinstance(tensor, onnx.SparseTensorProto):
            return _dense(tensor)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ArtefactError(
                f"The data of {tensor.name} lies in a file beside the model and was not read.",
                expected="A model with its weights was expected.",
                do="Load it with its external data.",
            )
        return numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, AttributeError) as cause:
        name = tensor.values.name if isinstance(tensor, onnx.SparseTensorProto) else tensor.name
        raise ArtefactError(
            f"The tensor {name} cannot be read: {first_line(cause)}.",
            expected=f"Data that fills the shape {_shown(tensor.dims)} was expected.",
            do="Copy the model again, or export it again.",
        ) from cause


def nonzeros(values: Array) -> Array:
    """Find the entries that are not zero.

    Args:
        values: of any shape.

    Returns:
        Boolean array of that shape: -0.0 is zero, NaN is not.
    """
    with np.errstate(invalid="ignore"):  # a signalling NaN
        found: Array = values != 0
    return found


def _shown(dims: Sequence[int]) -> str:
    shown = "x".join(map(str, dims[:LARGEST_RANK])) or "of a scalar"
    return shown if len(dims) <= LARGEST_RANK else f"{shown}x…"


def _dense(tensor: onnx.SparseTensorProto) -> Array:
    shape = tuple(tensor.dims)
    require_bounded(math.prod(shape))
    values, indices = array_of(tensor.values), array_of(tensor.indices)
    flat = np.zeros(math.prod(shape), dtype=values.dtype)
    flat[indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), shape)] = values
    return flat.reshape(shape)
