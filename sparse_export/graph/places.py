"""The arguments of a call with places for their tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparse_export.errors import UsageError
from sparse_export.graph.names import free_name
from sparse_export.graph.tensor_arrays import dtype_name
from sparse_export.signature import DTYPES

CONSTANTS = (bool, int, float, str, type(None))
"""Types of arguments that stay as they are in every call."""


@dataclass(frozen=True)
class Place:
    """Stands for a tensor in the arguments of forward.

    Attributes:
        index: number of the tensor.
    """

    index: int


def with_places(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Replace the tensors of an argument by places.

    Args:
        value: the argument, with lists, tuples or mappings of tensors.
        name: what the input is called; inside `value` the number or key follows behind a dot.
        tensors: those taken so far by their names; that of this argument are added in place.

    Returns:
        The argument with places for its tensors.

    Raises:
        UsageError: it holds something that is neither a tensor nor a constant, or a tensor of a type that no
            graph takes.
    """
    if isinstance(value, Tensor):
        require_dtype(name, value)
        free = free_name(name, tensors)
        tensors[free] = value.detach()
        return Place(len(tensors) - 1)
    if isinstance(value, Mapping):
        return {key: with_places(one, f"{name}.{key}", tensors) for key, one in value.items()}
    if isinstance(value, tuple | list):
        inside = [with_places(one, f"{name}.{number}", tensors) for number, one in enumerate(value)]
        if isinstance(value, list):
            return inside
        return type(value)(*inside) if hasattr(value, "_fields") else tuple(inside)
    if isinstance(value, CONSTANTS):
        return value
    raise UsageError(
        f"{name} of the example is of type {type(value).__name__}.",
        expected="Tensors were expected, lists, tuples and mappings of them, numbers, texts and None.",
        do="Wrap the network in one that takes tensors.",
    )


def filled(value: Any, tensors: Sequence[Tensor]) -> Any:
    """Put tensors in the places of an argument.

    Args:
        value: the argument, as `with_places` made it.
        tensors: by the numbers of their places.

    Returns:
        The argument as forward takes it.
    """
    if isinstance(value, Place):
        return tensors[value.index]
    if isinstance(value, dict):
        return {key: filled(one, tensors) for key, one in value.items()}
    if isinstance(value, list):
        return [filled(one, tensors) for one in value]
    if isinstance(value, tuple):
        inside = [filled(one, tensors) for one in value]
        return type(value)(*inside) if hasattr(value, "_fields") else tuple(inside)
    return value


def require_dtype(name: str, tensor: Tensor) -> None:
    """Refuse a tensor of a type that no graph takes.

    Args:
        name: of the input, for the error.
        tensor: given for it.

    Raises:
        UsageError: its type is not one of `DTYPES`.
    """
    if dtype_name(tensor) not in DTYPES:
        raise UsageError(
            f"{name} of the example is {dtype_name(tensor)}.",
            expected=f"One of {', '.join(DTYPES)} was expected.",
            do="Convert it, and convert it back in forward.",
        )
