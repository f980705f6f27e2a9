"""Examples made of what a user gives: arrays, a call that happened or a function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from sparse_export.errors import UsageError
from sparse_export.graph.example import Example, make_example
from sparse_export.graph.free_axes import FreeSizes, named_axes
from sparse_export.graph.places import Place, require_dtype
from sparse_export.graph.tensor_arrays import tensor_from_array
from sparse_export.signature import BATCH, Feeds

__all__ = ["example_from_arrays", "example_from_function", "example_from_seen"]


def example_from_arrays(network: nn.Module, arrays: Feeds, *, free_sizes: FreeSizes | None = None) -> Example:
    """Take arrays, as an .npz file holds them, for the parameters of forward of the same names.

    Args:
        network: whose forward it is. A network that needs one argument takes a single array of any name, which is
            the name of the input then.
        arrays: by name.
        free_sizes: as of `make_example`.

    Raises:
        UsageError: as of `make_example`.
    """
    tensors = {name: tensor_from_array(np.asarray(array)) for name, array in arrays.items()}
    parameters = inspect.signature(network.forward).parameters
    needed = [
        one for one in parameters.values() if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
    ]
    required = [
        one
        for one in parameters.values()
        if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]
    is_alone = len(tensors) == 1 and needed and required in ([], needed[:1])
    if is_alone and not tensors.keys() & parameters.keys():
        (name,) = tensors
        require_dtype(name, tensors[name])
        return Example(args=(Place(0),), kwargs={}, tensors=tensors, axes=named_axes(tensors, free_sizes))
    return make_example(network, (), tensors, free_sizes=free_sizes)


def example_from_seen(
    network: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    free_sizes: FreeSizes | None = None,
) -> Example:
    """As `make_example`, of a call that happened: a free size of 1 becomes 2 by repeating, a larger batch 2.

    Args:
        network: whose forward was called.
        args: positional arguments.
        kwargs: keyword arguments.
        free_sizes: as of `make_example`. Without it a single input of floats is called `input`, and its first
            axis is the batch.

    Raises:
        UsageError: as of `make_example`.
    """
    example = make_example(network, args, kwargs)
    tensors = dict(example.tensors)
    if free_sizes is None:
        own = [one for one in tensors.values() if one.dim()]
        is_alone = len(tensors) == len(own) == 1 and own[0].is_floating_point()
        if is_alone or all(one.shape[0] == 1 for one in own):
            tensors = {
                name: torch.cat([one, one]) if one.dim() and one.shape[0] == 1 else one
                for name, one in tensors.items()
            }
        if is_alone:
            tensors = {"input": next(iter(tensors.values()))}
    elif isinstance(free_sizes, Mapping):  # else `named_axes` raises
        for name, sizes in free_sizes.items():
            for axis, size in enumerate(sizes if isinstance(sizes, tuple | list) else ()):
                one = tensors.get(name)
                if isinstance(size, str) and one is not None and one.shape[axis : axis + 1] == (1,):
                    tensors[name] = torch.cat([one, one], axis)
    example = replace(example, tensors=tensors, axes=named_axes(tensors, free_sizes))
    return example.with_sizes({BATCH: 2}) if example.all_sizes.get(BATCH, 2) > 2 else example


def example_from_function(
    network: nn.Module, function: Callable[[], Any], *, free_sizes: FreeSizes | None = None
) -> Example:
    """Take what a user's `example_inputs()` returns.

    Args:
        network: whose forward it is.
        function: returns a tensor, a tuple or list of positional arguments, a mapping of keyword arguments,
            or both as `(args, kwargs)`, a tuple or list and a mapping.
        free_sizes: the user's `free_sizes`, see `make_example`.

    Raises:
        UsageError: the function fails, or as of `make_example`.
    """
    try:
        found = function()
    except Exception as cause:  # whatever the user's code raises
        raise UsageError(
            f"{getattr(function, '__name__', 'The function')}() failed with {type(cause).__name__}: {cause}.",
            do="Call it in Python to see the whole traceback.",
        ) from cause
    if isinstance(found, Mapping):
        args, kwargs = (), found
    elif _is_args_and_kwargs(found):
        args, kwargs = tuple(found[0]), found[1]
    else:
        args, kwargs = tuple(found) if isinstance(found, tuple | list) else (found,), {}
    return make_example(network, args, kwargs, free_sizes=free_sizes)


def _is_args_and_kwargs(value: Any) -> bool:
    """A pair of positional and keyword arguments?"""
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and isinstance(value[0], tuple | list)
        and isinstance(value[1], Mapping)
    )
