"""Tensors as arrays of their own memory, those of bfloat16 too."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparse_export.signature import Array, numpy_dtype


def tensor_from_array(array: Array) -> Tensor:
    """An array as a tensor of its own memory, bfloat16 of ml_dtypes too."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array, order="C"))  # ascontiguousarray would give a scalar an axis


def array_from_tensor(tensor: Tensor) -> Array:
    """A tensor as an array of its own memory, bfloat16 by ml_dtypes too."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(numpy_dtype("bfloat16")).copy()
    return tensor.numpy().copy()


def dtype_name(tensor: Tensor) -> str:
    """The name of a tensor's type.

    Args:
        tensor: of any type.

    Returns:
        The name without `torch.`, as float32.
    """
    return str(tensor.dtype).removeprefix("torch.")
