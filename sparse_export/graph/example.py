"""An example of a network's inputs: a call of its forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_export.errors import UsageError
from sparse_export.graph.free_axes import FreeSizes, named_axes
from sparse_export.graph.places import Place, filled, with_places
from sparse_export.graph.tensor_arrays import dtype_name, tensor_from_array
from sparse_export.signature import BATCH, Feeds, numpy_dtype

__all__ = [
    "SEED",
    "Example",
    "as_example",
    "example_of_shape",
    "example_of_tensors",
    "make_example",
]

SEED = 22
"""Of the values that are drawn for an example."""


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
            tensors: used in place of those of the example, in their order.

        Returns:
            Whatever it returns.
        """
        given = list(self.tensors.values()) if tensors is None else tensors
        return network(*filled(self.args, given), **filled(self.kwargs, given))

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Example:
        """The same call with other tensors.

        Args:
            tensors: by the same names.
        """
        return replace(self, tensors={name: tensors[name] for name in self.tensors})

    def with_sizes(self, sizes: Mapping[str, int]) -> Example:
        """The same call with other free sizes: tensors are repeated along their axes, or shortened.

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
            if name not in feeds or feeds[name].dtype != numpy_dtype(dtype_name(tensor)):
                found = f"is {feeds[name].dtype}" if name in feeds else "is missing"
                raise UsageError(f"The input {name} {found}.", do=f"Give it as {dtype_name(tensor)}.")
            tensors.append(tensor_from_array(feeds[name]).to(tensor.device))
        return tensors


def make_example(
    network: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    free_sizes: FreeSizes | None = None,
) -> Example:
    """Make an example of the arguments of forward.

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
    places = tuple(with_places(value, name, tensors) for name, value in zip(names, args, strict=True))
    keywords = {name: with_places(value, name, tensors) for name, value in given.items()}
    if not tensors:
        raise UsageError(
            f"The example for {type(network).__name__} holds no tensor.", do="Give the inputs of forward."
        )
    return Example(args=places, kwargs=keywords, tensors=tensors, axes=named_axes(tensors, free_sizes))


def example_of_shape(input_shape: Sequence[int]) -> Example:
    """One input of float32 named `input`, two samples of it drawn from the normal distribution.

    Args:
        input_shape: of one sample. The size of the batch is free.
    """
    generator = torch.Generator().manual_seed(SEED)
    return as_example(torch.randn((2, *input_shape), generator=generator))  # of one, torch fixes the size


def as_example(sample: Tensor | Example) -> Example:
    """One batch as the example that it is, with the input named `input`; an example stays what it is."""
    if isinstance(sample, Example):
        return sample
    axes: tuple[str | None, ...] = (BATCH, *[None] * (sample.dim() - 1))
    return Example(args=(Place(0),), kwargs={}, tensors={"input": sample}, axes={"input": axes})


def example_of_tensors(tensors: Sequence[Tensor]) -> Example:
    """A call with tensors by position, of which every size is fixed."""
    named = {f"input_{number}": one for number, one in enumerate(tensors)}
    places = tuple(Place(number) for number in range(len(named)))
    axes: dict[str, tuple[str | None, ...]] = {name: (None,) * one.dim() for name, one in named.items()}
    return Example(args=places, kwargs={}, tensors=named, axes=axes)


def _names_of_arguments(signature: inspect.Signature, n: int) -> list[str]:
    """What forward calls its first n positional arguments."""
    names: list[str] = []
    for one in signature.parameters.values():
        if one.kind is one.VAR_POSITIONAL:
            names += [f"{one.name}_{number}" for number in range(n - len(names))]
        else:
            names.append(one.name)
    return names[:n]
