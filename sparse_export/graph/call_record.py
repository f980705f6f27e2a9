"""The record of a call of forward, from which the call is made again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from sparse_export.errors import ArtefactError, UsageError
from sparse_export.formats.run import CallInfo
from sparse_export.graph.example import SEED, Example, make_example
from sparse_export.graph.places import CONSTANTS, Place
from sparse_export.graph.tensor_arrays import tensor_from_array
from sparse_export.signature import FLOATS, Signature, numpy_dtype

__all__ = ["call_of", "example_of_signature"]


def call_of(example: Example) -> CallInfo | None:
    """The record of a call, from which `example_of_signature` makes it again.

    Args:
        example: of the call.

    Returns:
        The record; None for one tensor by position and nothing else.

    Raises:
        UsageError: an argument cannot be written down, like a named tuple.
    """
    if example.args == (Place(0),) and not example.kwargs:
        return None
    names = list(example.tensors)
    return CallInfo(
        args=tuple(_as_record(one, names) for one in example.args),
        kwargs={name: _as_record(one, names) for name, one in example.kwargs.items()},
    )


def example_of_signature(network: nn.Module, signature: Signature, call: CallInfo | None = None) -> Example:
    """Make a call again from its record, with two samples.

    Args:
        network: whose forward is called.
        signature: of the network.
        call: how its inputs are taken; None for one input by position, several by the names that forward has.

    Raises:
        UsageError: as of `make_example`.
        ArtefactError: the call is not one of this signature.
    """
    sizes = signature.with_sizes(2)
    generator = np.random.default_rng(SEED)
    tensors = {}
    for one in signature.inputs:
        shape = one.sizes(sizes)
        # Integers are the highest that is known: 1 in a mask, of which zeros leave nothing to attend to.
        highest = np.full(shape, one.high or 0)
        values = generator.standard_normal(shape) if one.dtype in FLOATS else highest
        tensors[one.name] = tensor_from_array(np.asarray(values).astype(numpy_dtype(one.dtype)))
    axes = {
        one.name: tuple(size if isinstance(size, str) else None for size in one.shape)
        for one in signature.inputs
    }
    alone = signature.output_names[0] if len(signature.outputs) == 1 else None
    if call is None and len(tensors) > 1:
        return replace(make_example(network, (), tensors, free_sizes=axes), lone_output=alone)
    args: tuple[Any, ...] = (Place(0),)
    kwargs: dict[str, Any] = {}
    if call is not None:
        places = {name: Place(number) for number, name in enumerate(tensors)}
        args = tuple(_from_record(one, places) for one in call.args)
        kwargs = {name: _from_record(one, places) for name, one in call.kwargs.items()}
    return Example(args=args, kwargs=kwargs, tensors=tensors, axes=axes, lone_output=alone)


def _as_record(value: Any, names: Sequence[str]) -> Any:
    """An argument as `CallInfo` has it. Raises UsageError."""
    if isinstance(value, Place):
        return {"input": names[value.index]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"mapping": {key: _as_record(one, names) for key, one in value.items()}}
    if isinstance(value, list):
        return [_as_record(one, names) for one in value]
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return {"tuple": [_as_record(one, names) for one in value]}
    if isinstance(value, CONSTANTS) and not (isinstance(value, float) and not math.isfinite(value)):
        return value
    raise UsageError(
        f"forward is called with {value if isinstance(value, float) else type(value).__name__}, which a run "
        "cannot record.",
        expected="Tensors were expected, lists, tuples and mappings of them by text, finite numbers, texts "
        "and None.",
        do="Wrap the network in one that takes these.",
    )


def _from_record(value: Any, places: Mapping[str, Place]) -> Any:
    """An argument from what `CallInfo` has of it. Raises ArtefactError."""
    if isinstance(value, list | tuple):
        return [_from_record(one, places) for one in value]
    if not isinstance(value, dict):
        return value
    kind, inside = next(iter(value.items()), ("", None))
    if kind == "input" and isinstance(inside, str) and inside in places:
        return places[inside]
    if kind == "tuple" and isinstance(inside, list | tuple):
        return tuple(_from_record(one, places) for one in inside)
    if kind == "mapping" and isinstance(inside, dict):
        return {key: _from_record(one, places) for key, one in inside.items()}
    raise ArtefactError(
        f"The record of the call holds {value}, which is neither an input nor a constant.",
        expected=f"The inputs are {', '.join(places)}.",
        do="Write the run again.",
    )
