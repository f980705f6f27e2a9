"""What a network in training takes: a tensor, or tensors by the names that forward has for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_export.errors import UsageError
from sparse_export.signature import Array

__all__ = [
    "ModelInputs",
    "called",
    "each",
    "n_samples_of",
    "parts_of",
    "repeated",
    "tensors_of",
    "trained_on",
]

ModelInputs = Tensor | dict[str, Tensor]
"""Samples along the first axis of every tensor."""


def called(network: Callable[..., Any], x: ModelInputs) -> Any:
    """Call a network: with one tensor by position, with named ones by keyword.

    Args:
        network: what to call.
        x: its inputs.

    Raises:
        UsageError: an integer lies outside a table that it is looked up in.
    """
    try:
        return network(**x) if isinstance(x, dict) else network(x)
    except IndexError as cause:
        held = _integers_of(x)
        if not held:
            raise
        raise UsageError(
            f"The network does not take a batch: {cause}. The batch holds {held}.",
            expected="Integers that its tables have a row for were expected.",
            do="Correct the data, or give the table (as num_embeddings of Embedding) more rows.",
        ) from cause


def _integers_of(x: ModelInputs) -> str:
    """The range of each integer input, as `ids from 0 to 64`."""
    named = x if isinstance(x, dict) else {"the input": x}
    return ", ".join(
        f"{name} from {int(one.min())} to {int(one.max())}"
        for name, one in named.items()
        if not one.is_floating_point() and one.dtype != torch.bool and one.numel()
    )


def each(x: ModelInputs, change: Callable[[Tensor], Tensor]) -> ModelInputs:
    """The same inputs, each changed.

    Args:
        x: the inputs.
        change: called with each tensor.
    """
    return {name: change(one) for name, one in x.items()} if isinstance(x, dict) else change(x)


def tensors_of(x: ModelInputs) -> tuple[Tensor, ...]:
    """The tensors, in their order."""
    return tuple(x.values()) if isinstance(x, dict) else (x,)


def n_samples_of(x: ModelInputs) -> int:
    """The number of samples."""
    return len(tensors_of(x)[0])


def parts_of(x: ModelInputs, n: int) -> list[ModelInputs]:
    """Cut samples into `n` parts of nearly one size, as `Tensor.tensor_split` does."""
    if not isinstance(x, dict):
        return list(x.tensor_split(n))
    split = {name: one.tensor_split(n) for name, one in x.items()}
    return [{name: parts[at] for name, parts in split.items()} for at in range(n)]


def repeated(x: ModelInputs, n: int) -> ModelInputs:
    """So many samples, by repeating those that there are."""
    return each(x, lambda one: one[torch.arange(n, device=one.device) % len(one)])


def trained_on(inputs: Array | Mapping[str, Array]) -> ModelInputs:
    """One sample as a network is trained on it.

    Args:
        inputs: an array, which becomes float32; or arrays by name, of which float64 becomes float32 and every
            other type stays.

    Raises:
        UsageError: an array is none of numbers.
    """
    named = inputs.items() if isinstance(inputs, Mapping) else [("the input", inputs)]
    for name, one in named:
        if np.asarray(one).dtype.kind not in "biuf":
            raise UsageError(
                f"Of a sample, {name} is an array of {np.asarray(one).dtype.name}.",
                expected="Numbers were expected.",
                do="Turn words into numbers before they become samples.",
            )
    if not isinstance(inputs, Mapping):
        return torch.as_tensor(inputs, dtype=torch.float32)
    return {
        name: torch.as_tensor(one.astype(np.float32) if one.dtype == np.float64 else one)
        for name, one in inputs.items()
    }
