"""An example of a network's inputs: what forward is called with, and which of the sizes are free."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparse_export.errors import ArtefactError, UsageError
from sparse_export.formats.run import CallInfo
from sparse_export.graph.names import free_name
from sparse_export.signature import BATCH, DTYPES, FLOATS, Array, Feeds, Signature, numpy_dtype

__all__ = [
    "Example",
    "FreeSizes",
    "as_example",
    "call_of",
    "example_from_arrays",
    "example_from_function",
    "example_from_seen",
    "example_of_shape",
    "example_of_signature",
    "example_of_tensors",
    "make_example",
]

FreeSizes = Mapping[str, Sequence[str | int | None]]
"""For each input a name of every axis: a text for a size that is free, None or the number for a fixed one."""

_SEED = 22
_CONSTANTS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class _Place:
    """Stands for the tensor of that number in the arguments of forward."""

    index: int


@dataclass(frozen=True, kw_only=True)
class Example:
    """A call of a network's forward; made by `make_example` and the functions beside it.

    Attributes:
        args: positional arguments, with places for tensors.
        kwargs: keyword arguments, likewise. Numbers, texts and None stay as they are in every call.
        tensors: by the names that the inputs of the graph get, in order.
        axes: by the same names, what each axis is called; None where its size is fixed.
        lone_output: name of the output of a network with one; None for `logits` of floats (samples, n), else
            `output`.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: dict[str, Tensor]
    axes: dict[str, tuple[str | None, ...]] = field(default_factory=dict)
    lone_output: str | None = None

    @property
    def all_sizes(self) -> dict[str, int]:
        """The free sizes in this example, by name."""
        return {
            name: size
            for one, names in self.axes.items()
            for name, size in zip(names, self.tensors[one].shape, strict=True)
            if name is not None
        }

    @property
    def sizes(self) -> dict[str, int]:
        """The free sizes other than that which counts samples, as `Signature.sizes` has them."""
        return {name: size for name, size in self.all_sizes.items() if name != BATCH}

    def call(self, network: Callable[..., Any], tensors: Sequence[Tensor] | None = None) -> Any:
        """Call a network.

        Args:
            network: what to call.
            tensors: others than those of the example, in their order.

        Returns:
            Whatever it returns.
        """
        given = list(self.tensors.values()) if tensors is None else tensors
        return network(*_filled(self.args, given), **_filled(self.kwargs, given))

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Example:
        """The same call with other tensors.

        Args:
            tensors: by the same names.
        """
        return replace(self, tensors={name: tensors[name] for name in self.tensors})

    def with_sizes(self, sizes: Mapping[str, int]) -> Example:
        """The same call with other free sizes: tensors are repeated along their axes, or cut.

        Args:
            sizes: by name; the rest stay.
        """
        made = {}
        for name, tensor in self.tensors.items():
            for axis, size in enumerate(self.axes[name]):
                if size is not None and size in sizes:
                    places = torch.arange(sizes[size], device=tensor.device) % tensor.shape[axis]
                    tensor = tensor.index_select(axis, places)
            made[name] = tensor
        return self.with_tensors(made)

    def on(self, device: torch.device | str) -> Example:
        """The same call with its tensors on a device."""
        return self.with_tensors({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def from_feeds(self, feeds: Feeds) -> list[Tensor]:
        """Arrays as tensors, in the order of the inputs and on the device of the example.

        Args:
            feeds: by the names of the inputs.

        Raises:
            UsageError: one is missing, or is of another type.
        """
        tensors = []
        for name, tensor in self.tensors.items():
            if name not in feeds or feeds[name].dtype != numpy_dtype(_dtype_name(tensor)):
                found = f"is {feeds[name].dtype}" if name in feeds else "is missing"
                raise UsageError(f"The input {name} {found}.", do=f"Give it as {_dtype_name(tensor)}.")
            tensors.append(tensor_from_array(feeds[name]).to(tensor.device))
        return tensors


def make_example(
    network: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    free_sizes: FreeSizes | None = None,
) -> Example:
    """Take what forward is called with.

    Args:
        network: names the inputs: each has the name of its parameter of forward, and inside lists, tuples and
            mappings the number or key behind a dot.
        args: positional arguments: tensors, and lists, tuples and mappings of them; numbers, texts and None.
        kwargs: keyword arguments, likewise.
        free_sizes: see `FreeSizes`. Without it the first axis of all inputs is free where it has one length
            of at least 2, and called `batch`.

    Raises:
        UsageError: forward does not take these arguments, there is no tensor among them, one is of a type
            that no graph takes, or free sizes do not fit them.
    """
    given = dict(kwargs or {})
    try:
        known = inspect.signature(network.forward).bind(*args, **given)
    except TypeError as cause:
        raise UsageError(
            f"forward of {type(network).__name__} cannot be called with the example: {cause}.",
            expected=f"It takes {', '.join(inspect.signature(network.forward).parameters) or 'nothing'}.",
            do="Name the inputs as forward does, in example_inputs() or in the file that --inputs names.",
        ) from cause
    names = _names_of_arguments(known.signature, len(args))
    tensors: dict[str, Tensor] = {}
    places = tuple(_taken(value, name, tensors) for name, value in zip(names, args, strict=True))
    keywords = {name: _taken(value, name, tensors) for name, value in given.items()}
    if not tensors:
        raise UsageError(
            f"The example for {type(network).__name__} holds no tensor.", do="Give the inputs of forward."
        )
    return Example(args=places, kwargs=keywords, tensors=tensors, axes=_axes(tensors, free_sizes))


def example_of_shape(input_shape: Sequence[int]) -> Example:
    """One input of float32 named `input`, two samples of it drawn from the normal distribution.

    Args:
        input_shape: of one sample. The size of the batch is free.
    """
    generator = torch.Generator().manual_seed(_SEED)
    return as_example(torch.randn((2, *input_shape), generator=generator))  # of one, torch fixes the size


def as_example(sample: Tensor | Example) -> Example:
    """One batch as the example that it is, with the input named `input`; an example stays what it is."""
    if isinstance(sample, Example):
        return sample
    axes: tuple[str | None, ...] = (BATCH, *[None] * (sample.dim() - 1))
    return Example(args=(_Place(0),), kwargs={}, tensors={"input": sample}, axes={"input": axes})


def example_of_tensors(tensors: Sequence[Tensor]) -> Example:
    """A call with tensors by position, of which every size is fixed."""
    named = {f"input_{number}": one for number, one in enumerate(tensors)}
    places = tuple(_Place(number) for number in range(len(named)))
    axes: dict[str, tuple[str | None, ...]] = {name: (None,) * one.dim() for name, one in named.items()}
    return Example(args=places, kwargs={}, tensors=named, axes=axes)


def example_of_signature(network: nn.Module, signature: Signature, call: CallInfo | None = None) -> Example:
    """The call that a record tells of, of two samples.

    Args:
        network: whose forward it is.
        signature: of it.
        call: how its inputs are taken; None for one input by position, several by the names that forward has.

    Raises:
        UsageError: as of `make_example`.
        ArtefactError: the call is not one of this signature.
    """
    sizes = signature.with_sizes(2)
    generator = np.random.default_rng(_SEED)
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
    args: tuple[Any, ...] = (_Place(0),)
    kwargs: dict[str, Any] = {}
    if call is not None:
        places = {name: _Place(number) for number, name in enumerate(tensors)}
        args = tuple(_from_record(one, places) for one in call.args)
        kwargs = {name: _from_record(one, places) for name, one in call.kwargs.items()}
    return Example(args=args, kwargs=kwargs, tensors=tensors, axes=axes, lone_output=alone)


def call_of(example: Example) -> CallInfo | None:
    """The record of a call, from which `example_of_signature` makes it again.

    Args:
        example: of the call.

    Returns:
        The record; None for one tensor by position and nothing else.

    Raises:
        UsageError: an argument cannot be written down, like a named tuple.
    """
    if example.args == (_Place(0),) and not example.kwargs:
        return None
    names = list(example.tensors)
    return CallInfo(
        args=tuple(_as_record(one, names) for one in example.args),
        kwargs={name: _as_record(one, names) for name, one in example.kwargs.items()},
    )


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
        _require_dtype(name, tensors[name])
        return Example(args=(_Place(0),), kwargs={}, tensors=tensors, axes=_axes(tensors, free_sizes))
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
    elif isinstance(free_sizes, Mapping):  # else `_axes` tells
        for name, sizes in free_sizes.items():
            for axis, size in enumerate(sizes if isinstance(sizes, tuple | list) else ()):
                one = tensors.get(name)
                if isinstance(size, str) and one is not None and one.shape[axis : axis + 1] == (1,):
                    tensors[name] = torch.cat([one, one], axis)
    example = replace(example, tensors=tensors, axes=_axes(tensors, free_sizes))
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


def _is_args_and_kwargs(value: Any) -> bool:
    """A pair of positional and keyword arguments?"""
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and isinstance(value[0], tuple | list)
        and isinstance(value[1], Mapping)
    )


def _names_of_arguments(signature: inspect.Signature, n: int) -> list[str]:
    """What forward calls its first n positional arguments."""
    names: list[str] = []
    for one in signature.parameters.values():
        if one.kind is one.VAR_POSITIONAL:
            names += [f"{one.name}_{number}" for number in range(n - len(names))]
        else:
            names.append(one.name)
    return names[:n]


def _taken(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """An argument with places for its tensors, which are added. Raises UsageError."""
    if isinstance(value, Tensor):
        _require_dtype(name, value)
        free = free_name(name, tensors)
        tensors[free] = value.detach()
        return _Place(len(tensors) - 1)
    if isinstance(value, Mapping):
        return {key: _taken(one, f"{name}.{key}", tensors) for key, one in value.items()}
    if isinstance(value, tuple | list):
        inside = [_taken(one, f"{name}.{number}", tensors) for number, one in enumerate(value)]
        if isinstance(value, list):
            return inside
        return type(value)(*inside) if hasattr(value, "_fields") else tuple(inside)
    if isinstance(value, _CONSTANTS):
        return value
    raise UsageError(
        f"{name} of the example is of type {type(value).__name__}.",
        expected="Tensors were expected, lists, tuples and mappings of them, numbers, texts and None.",
        do="Wrap the network in one that takes tensors.",
    )


def _filled(value: Any, tensors: Sequence[Tensor]) -> Any:
    """An argument with tensors in their places."""
    if isinstance(value, _Place):
        return tensors[value.index]
    if isinstance(value, dict):
        return {key: _filled(one, tensors) for key, one in value.items()}
    if isinstance(value, list):
        return [_filled(one, tensors) for one in value]
    if isinstance(value, tuple):
        inside = [_filled(one, tensors) for one in value]
        return type(value)(*inside) if hasattr(value, "_fields") else tuple(inside)
    return value


def _as_record(value: Any, names: Sequence[str]) -> Any:
    """An argument as `CallInfo` has it. Raises UsageError."""
    if isinstance(value, _Place):
        return {"input": names[value.index]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"mapping": {key: _as_record(one, names) for key, one in value.items()}}
    if isinstance(value, list):
        return [_as_record(one, names) for one in value]
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return {"tuple": [_as_record(one, names) for one in value]}
    if isinstance(value, _CONSTANTS) and not (isinstance(value, float) and not math.isfinite(value)):
        return value
    raise UsageError(
        f"forward is called with {value if isinstance(value, float) else type(value).__name__}, which a run "
        "cannot record.",
        expected="Tensors were expected, lists, tuples and mappings of them by text, finite numbers, texts "
        "and None.",
        do="Wrap the network in one that takes these.",
    )


def _from_record(value: Any, places: Mapping[str, _Place]) -> Any:
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


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _require_dtype(name: str, tensor: Tensor) -> None:
    if _dtype_name(tensor) not in DTYPES:
        raise UsageError(
            f"{name} of the example is {_dtype_name(tensor)}.",
            expected=f"One of {', '.join(DTYPES)} was expected.",
            do="Convert it, and convert it back in forward.",
        )


def _axes(tensors: Mapping[str, Tensor], free_sizes: FreeSizes | None) -> dict[str, tuple[str | None, ...]]:
    """What the axes of tensors are called. Raises UsageError where that does not fit them."""
    if free_sizes is None:
        lengths = {tensor.shape[0] for tensor in tensors.values() if tensor.dim()}
        first = BATCH if len(lengths) == 1 and min(lengths) >= 2 else None
        return {name: _first_named(tensor, first) for name, tensor in tensors.items()}
    if not isinstance(free_sizes, Mapping):
        raise UsageError(
            f"free_sizes is {free_sizes!r}.",
            expected="A mapping was expected, from each input to a name for every axis.",
            do=f"Write it like {{{next(iter(tensors))!r}: ('batch', 'length')}}, with None for a fixed axis.",
        )
    unknown = [name for name in free_sizes if name not in tensors]
    if unknown:
        raise UsageError(
            f"free_sizes names {', '.join(map(repr, unknown))}, which is no input.",
            expected=f"The inputs are {', '.join(tensors)}.",
            do="Name each input as forward does.",
        )
    axes = {name: _named(name, one, free_sizes.get(name)) for name, one in tensors.items()}
    _require_one_length(tensors, axes)
    return axes


def _first_named(tensor: Tensor, name: str | None) -> tuple[str | None, ...]:
    return tuple(name if axis == 0 else None for axis in range(tensor.dim()))


def _named(name: str, tensor: Tensor, sizes: Sequence[str | int | None] | None) -> tuple[str | None, ...]:
    """The axes of one input. Raises UsageError."""
    if sizes is None:
        return (None,) * tensor.dim()
    shape = tuple(tensor.shape)
    if not isinstance(sizes, tuple | list):
        raise UsageError(
            f"free_sizes of {name} is {sizes!r}, and the example has shape {shape}.",
            expected="A tuple with a name for each free axis was expected, and None for each fixed one.",
            do="Write it like ('batch', None).",
        )
    fits = len(sizes) == len(shape) and all(
        size is None or isinstance(size, str) or size == length
        for size, length in zip(sizes, shape, strict=True)
    )
    bad = [size for size in sizes if isinstance(size, str) and not size.isidentifier()]
    if not fits or bad:
        raise UsageError(
            f"free_sizes of {name} is {sizes!r}, and the example has shape {shape}.",
            expected="A name for each free axis was expected, and None for each fixed one.",
            do="Names are Python identifiers, like batch and sequence.",
        )
    return tuple(size if isinstance(size, str) else None for size in sizes)


def _require_one_length(tensors: Mapping[str, Tensor], axes: Mapping[str, tuple[str | None, ...]]) -> None:
    """Raise UsageError for a free size of two lengths, or of less than 2."""
    found: dict[str, tuple[int, str]] = {}
    for name, size, length in _named_lengths(tensors, axes):
        before, other = found.setdefault(size, (length, name))
        if before != length:
            raise UsageError(
                f"The free size {size} is {before} in {other} and {length} in {name}.",
                do="Give two sizes two names, or an example where they are equal.",
            )
        if length < 2:
            raise UsageError(
                f"The free size {size} is {length} in the example.",
                expected="At least 2 was expected: a network that is traced with 1 may hold for 1 alone.",
                do="Give a larger example.",
            )


def _named_lengths(
    tensors: Mapping[str, Tensor], axes: Mapping[str, tuple[str | None, ...]]
) -> Iterator[tuple[str, str, int]]:
    for name, tensor in tensors.items():
        for size, length in zip(axes[name], tensor.shape, strict=True):
            if size is not None:
                yield name, size, length
