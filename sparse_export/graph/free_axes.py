"""Names of the axes of tensors whose size is free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from sparse_export.errors import UsageError
from sparse_export.signature import BATCH

FreeSizes = Mapping[str, Sequence[str | int | None]]
"""For each input a name of every axis: a text for a size that is free, None or the number for a fixed one."""


def named_axes(
    tensors: Mapping[str, Tensor], free_sizes: FreeSizes | None
) -> dict[str, tuple[str | None, ...]]:
    """Name the axes of tensors.

    Args:
        tensors: by the names of the inputs.
        free_sizes: see `FreeSizes`. Without it the first axis of all inputs is free where it has one length
            of at least 2, and called `batch`.

    Returns:
        By the same names, what each axis is called; None where its size is fixed.

    Raises:
        UsageError: free sizes do not fit the tensors.
    """
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
