"""The signature of a network: names, types and sizes of its inputs and outputs; a size may be free.

A free size has a name. Where two tensors name one size alike they have it in common: the first axis of every
input is `batch`, say, and `sequence` is the second of both `input_ids` and `attention_mask`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from sparse_export.errors import UsageError

__all__ = [
    "BATCH",
    "DTYPES",
    "Array",
    "Feeds",
    "Signature",
    "TensorInfo",
    "class_signature",
    "joined",
    "numpy_dtype",
    "size_text",
]

BATCH: Final = "batch"
"""What the size that counts samples is called in networks that this program exports."""

FLOATS = ("float32", "float16", "bfloat16", "float64")
INTEGERS = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8")
DTYPES: Final = (*FLOATS, *INTEGERS, "bool")
"""The types that a tensor of a signature may have."""

_LONGEST_SIZE = 24  # characters of a size in a text

Array = np.ndarray[tuple[int, ...], np.dtype[Any]]
Feeds = Mapping[str, Array]
"""Arrays by the names of a network's inputs, or of its outputs."""


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Look up NumPy's type of that name; bfloat16 is that of ml_dtypes.

    Args:
        name: one of `DTYPES`.
    """
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return found


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """An input or output of a network.

    Attributes:
        name: of the tensor.
        dtype: one of `DTYPES`.
        shape: its sizes; a text names one that is free.
        low: of an input of integers, the smallest value that the network takes; None where that is not known.
        high: likewise the largest.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    low: int | None = None
    high: int | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {size_text(self.shape)}"

    @property
    def class_axis(self) -> int | None:
        """The axis that counts classes, of scores (batch, classes), (batch, sequence, classes) or (batch,
        classes, height, width); None where there is none.
        """
        axis = {2: 1, 3: 2, 4: 1}.get(len(self.shape))
        return axis if axis is not None and isinstance(self.shape[axis], int) else None

    def axis(self, size: str | None) -> int | None:
        """Find the axis of a free size.

        Args:
            size: its name.

        Returns:
            The first axis of that name, None where there is none.
        """
        return self.shape.index(size) if size is not None and size in self.shape else None

    def sizes(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Fill in the free sizes.

        Args:
            sizes: by name.

        Raises:
            UsageError: one is missing.
        """
        missing = [one for one in self.shape if isinstance(one, str) and one not in sizes]
        if missing:
            raise UsageError(
                f"The size {missing[0]} of {self.name} is free, and no example of it is known.",
                do=f"Give one by --size {missing[0]}=NUMBER, or example inputs by --inputs FILE.npz.",
            )
        return tuple(sizes[one] if isinstance(one, str) else one for one in self.shape)

    def problem(self, array: Array, sizes: dict[str, int]) -> str | None:
        """Say why an array is not this tensor.

        Args:
            array: whatever was given for it.
            sizes: free sizes that are known by now; those that are found are added.

        Returns:
            A clause, None where it fits.
        """
        if array.dtype != numpy_dtype(self.dtype):
            return f"{self.name} is {array.dtype}, not {self.dtype}"
        if array.ndim != len(self.shape):
            return f"{self.name} has shape {array.shape}, not {size_text(self.shape)}"
        for found, wanted in zip(array.shape, self.shape, strict=True):
            if isinstance(wanted, int):
                if found != wanted:
                    return f"{self.name} has shape {array.shape}, not {size_text(self.shape)}"
            elif sizes.setdefault(wanted, found) != found:
                return f"{wanted} is {found} in {self.name} and {sizes[wanted]} in another input"
        return None


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What a network takes and gives.

    Attributes:
        inputs: in the network's order.
        outputs: likewise. A free size of an output may be one that no input has, as the number of boxes.
        batch: name of the free size that counts samples; None where a call is one sample.
        sizes: an example of each other free size of the inputs, which is measured and checked with.
        appended: what the graph gives behind the network's outputs, made of these. A session does not give
            them unless they are asked for, and nothing is scored by them.
    """

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    batch: str | None = BATCH
    sizes: dict[str, int] = field(default_factory=dict)
    appended: tuple[TensorInfo, ...] = ()

    @property
    def whole(self) -> Signature:
        """What the graph takes and gives, appended outputs among the others."""
        return replace(self, outputs=(*self.outputs, *self.appended), appended=())

    @property
    def free(self) -> tuple[str, ...]:
        """Names of the free sizes of the inputs, each once, in their order."""
        named = (size for one in self.inputs for size in one.shape if isinstance(size, str))
        return tuple(dict.fromkeys(named))

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(one.name for one in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(one.name for one in self.outputs)

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.inputs))} → {', '.join(map(str, self.outputs))}"

    def with_ranges_of(self, other: Signature) -> Signature:
        """The same signature with the ranges of integers that another one knows.

        Args:
            other: of the same inputs.
        """
        known = {one.name: one for one in other.inputs}

        def filled(one: TensorInfo) -> TensorInfo:
            found = known.get(one.name, one)
            return one if None in (found.low, found.high) else replace(one, low=found.low, high=found.high)

        return replace(self, inputs=tuple(map(filled, self.inputs)))

    def with_ranges(self, ranges: Mapping[str, tuple[int, int]]) -> Signature:
        """The same signature with other ranges of integers.

        Args:
            ranges: the smallest and the largest value, by input.
        """

        def ranged(one: TensorInfo) -> TensorInfo:
            return (
                replace(one, low=ranges[one.name][0], high=ranges[one.name][1]) if one.name in ranges else one
            )

        return replace(self, inputs=tuple(map(ranged, self.inputs)))

    def agrees_with(self, other: Signature) -> bool:
        """Does a network of this signature take and give the same as one of another?"""

        def ends(one: Signature) -> list[tuple[object, ...]]:
            return [(end.name, end.dtype, end.shape) for end in (*one.inputs, *one.outputs)]

        return (ends(self), self.batch) == (ends(other), other.batch)

    @property
    def only_input(self) -> TensorInfo | None:
        """The input where there is one alone, of floats, with the samples along its first axis; else None."""
        if len(self.inputs) != 1 or self.batch is None:
            return None
        (one,) = self.inputs
        return one if one.dtype in FLOATS and one.axis(self.batch) == 0 else None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample, of a network with one input of floats; free sizes by their examples.

        Raises:
            UsageError: the network has other inputs.
        """
        one = self.only_input
        if one is None:
            raise UsageError(
                f"The network takes {', '.join(map(str, self.inputs))}.",
                expected="One input of floats, samples along its first axis, was expected here.",
            )
        return one.sizes({**self.sizes, str(self.batch): 1})[1:]

    @property
    def n_classes(self) -> int | None:
        """The number of logits, of a network whose only output is floats (samples, classes); else None."""
        if len(self.outputs) != 1:
            return None
        (one,) = self.outputs
        is_logits = one.dtype in FLOATS and len(one.shape) == 2 and one.shape[0] == self.batch
        return one.shape[1] if is_logits and isinstance(one.shape[1], int) else None

    def with_sizes(self, n: int, sizes: Mapping[str, int] | None = None) -> dict[str, int]:
        """Every free size as a number.

        Args:
            n: samples.
            sizes: others than the examples.
        """
        return {**self.sizes, **(sizes or {})} | ({} if self.batch is None else {self.batch: n})

    def require_feeds(self, feeds: Feeds) -> None:
        """Check that arrays are the inputs of this network.

        Args:
            feeds: by name.

        Raises:
            UsageError: an input is missing or unknown, of another type or shape, or two disagree about a free
                size.
        """
        wanted = ", ".join(map(str, self.inputs))
        unknown = [name for name in feeds if name not in self.input_names]
        missing = [name for name in self.input_names if name not in feeds]
        if unknown or missing:
            faults = [f"{one} is missing" for one in self.inputs if one.name in missing]
            faults += [f"the network has no input {name}" for name in unknown]
            raise UsageError(
                f"The inputs are {', '.join(feeds) or 'none'}: {'; '.join(faults)}.",
                expected=f"{wanted} was expected.",
                do="Name the arrays as the network names its inputs.",
            )
        sizes: dict[str, int] = {}
        for one in self.inputs:
            problem = one.problem(feeds[one.name], sizes)
            if problem is not None:
                raise UsageError(
                    f"The input {problem}.", expected=f"{wanted} was expected.", do="Cast or reshape it."
                )

    def sizes_in(self, feeds: Feeds) -> dict[str, int]:
        """What the free sizes of the inputs are in arrays that fit, by name.

        Args:
            feeds: the inputs, by name.
        """
        sizes: dict[str, int] = {}
        for one in self.inputs:
            one.problem(feeds[one.name], sizes)
        return sizes

    def outside(self, feeds: Feeds) -> str:
        """Say which integers are outside the range that is known of an input, as `ids holds 100`.

        Args:
            feeds: inputs that fit otherwise.

        Returns:
            The first, with the range; empty where there are none.
        """
        for one in self.inputs:
            array = feeds[one.name]
            if one.dtype not in INTEGERS or not array.size:
                continue
            for value in (int(array.min()), int(array.max())):
                if (one.low is not None and value < one.low) or (one.high is not None and value > one.high):
                    return f"{one.name} holds {value}, and the network takes {one.low} to {one.high}"
        return ""

    def n_samples(self, feeds: Feeds) -> int:
        """Count the samples of arrays that fit; 1 where no size counts them."""
        for one in self.inputs:
            axis = one.axis(self.batch)
            if axis is not None:
                return int(feeds[one.name].shape[axis])
        return 1

    def part(self, feeds: Feeds, start: int, stop: int) -> dict[str, Array]:
        """Take some of the samples; an input without a batch axis stays whole.

        Args:
            feeds: the inputs, or outputs, by name.
            start: number of the first sample.
            stop: number after the last.
        """
        tensors = {one.name: one for one in (*self.outputs, *self.inputs)}
        found = {}
        for name, array in feeds.items():
            axis = tensors[name].axis(self.batch) if name in tensors else None
            found[name] = array if axis is None else array[(slice(None),) * axis + (slice(start, stop),)]
        return found

    @property
    def drawable(self) -> bool:
        """Can inputs be drawn at random? Not where the range of an integer, or a free size, is not known."""
        return all(size in self.with_sizes(1) for size in self.free) and not any(
            one.dtype in INTEGERS and one.dtype != "uint8" and None in (one.low, one.high)
            for one in self.inputs
        )

    def repeated(self, feeds: Feeds, n: int) -> dict[str, Array]:
        """So many samples, by repeating those that there are.

        Args:
            feeds: inputs by name, with one sample at least.
            n: samples that are wanted.
        """
        found = {}
        for one in self.inputs:
            axis, array = one.axis(self.batch), feeds[one.name]
            found[one.name] = array if axis is None else array.take(np.arange(n) % array.shape[axis], axis)
        return found

    def draw(self, n: int, seed: int, sizes: Mapping[str, int] | None = None) -> dict[str, Array]:
        """Draw random inputs: floats from the standard normal distribution, integers within their range.

        Args:
            n: samples.
            seed: of the generator.
            sizes: others than the examples.

        Raises:
            UsageError: the range of an integer, or a free size, is not known.
        """
        generator = np.random.default_rng(seed)
        known = self.with_sizes(n, sizes)
        return {one.name: _drawn(one, one.sizes(known), generator) for one in self.inputs}


def _drawn(one: TensorInfo, shape: tuple[int, ...], generator: np.random.Generator) -> Array:
    if one.dtype == "bool":
        return generator.integers(0, 2, shape).astype(bool)
    if one.dtype in FLOATS:
        dtype = np.float64 if one.dtype == "float64" else np.float32
        return generator.standard_normal(shape, dtype=dtype).astype(numpy_dtype(one.dtype), copy=False)
    if one.dtype == "uint8" and one.low is None:
        return generator.integers(0, 256, shape, dtype=np.uint8)
    if one.low is None or one.high is None:
        raise UsageError(
            f"The graph does not tell which integers its input {one} takes.",
            do=f"Give real inputs by --inputs FILE.npz, with an array named {one.name}.",
        )
    return generator.integers(one.low, one.high, shape, dtype=numpy_dtype(one.dtype), endpoint=True)


def class_signature(
    input_shape: Sequence[int], n_classes: int, *, names: tuple[str, str] = ("input", "logits")
) -> Signature:
    """Make the signature of a classifier as this program exports it.

    Args:
        input_shape: of one sample.
        n_classes: number of logits.
        names: of input and output.

    Returns:
        float32 (batch, *input_shape) to float32 (batch, n_classes).
    """
    return Signature(
        inputs=(TensorInfo(name=names[0], dtype="float32", shape=(BATCH, *input_shape)),),
        outputs=(TensorInfo(name=names[1], dtype="float32", shape=(BATCH, n_classes)),),
    )


def joined(parts: Iterable[Feeds], tensors: Sequence[TensorInfo], batch: str | None) -> dict[str, Array]:
    """Join arrays of several calls along their batch axes; those without one are taken from the first call.

    Args:
        parts: arrays by name, one mapping a call, one at least.
        tensors: what they are.
        batch: name of the size that counts samples.
    """
    calls = list(parts)
    axes = {one.name: one.axis(batch) for one in tensors}
    return {
        name: first
        if (axis := axes.get(name)) is None
        else np.concatenate([call[name] for call in calls], axis)
        for name, first in calls[0].items()
    }


def size_text(shape: Sequence[int | str]) -> str:
    """Write sizes as `(batch, 3, height, width)`; of a long formula for a free size its beginning."""
    sizes = [one if len(one) <= _LONGEST_SIZE else f"{one[:_LONGEST_SIZE]}…" for one in map(str, shape)]
    return f"({', '.join(sizes)}{',' if len(shape) == 1 else ''})"
