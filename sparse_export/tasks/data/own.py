"""Data of a user's own code, `package.module:data`: parts of samples, each an input and a target."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from sparse_export.errors import UsageError
from sparse_export.own_code import attribute_named, current_folder_first, kind_of
from sparse_export.signature import Array, Signature, TensorInfo, numpy_dtype, size_text
from sparse_export.tasks.stacking import number_array, stacked

__all__ = ["OwnData", "Part", "PartSamples", "PartTargets", "is_own", "own_data"]

_HELD, _HELD_BYTES = 4096, 2**26  # targets that are kept after their samples were read
_HASHED = 256  # samples of a part that its digest is made of


class PartTargets:
    """The targets of a part without an attribute `targets`: read with its samples, and not before."""

    def __init__(self, part: Part) -> None:
        self._part = part

    def __len__(self) -> int:
        return len(self._part)

    def __getitem__(self, rows: slice | int) -> Any:
        if isinstance(rows, int):
            return self._part.target(rows)
        return stacked([self._part.target(at) for at in range(*rows.indices(len(self)))])

    def seen(self) -> Any:
        """Those of up to 256 samples, spread evenly."""
        return stacked([_array_or_other(target) for _, target in self._part.some(_HASHED)])


def is_own(name: str) -> bool:
    """Is this the name of a user's own data, `package.module:data`? Nothing is imported."""
    return ":" in name and not name.startswith(("npz:", "imagefolder:"))


class Samples(Protocol):
    """Pairs of inputs and a target, by their number."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: int, /) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Part:
    """Samples in a fixed order.

    Attributes:
        name: of the part, for messages.
        samples: pairs of inputs and a target. Inputs are an array, or a mapping of arrays by input.
    """

    name: str
    samples: Samples
    _held: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, index: int) -> tuple[Any, Any]:
        """Inputs and target of a sample, tensors as arrays.

        Raises:
            UsageError: it is no such pair, or the user's code fails.
        """
        try:
            found = self.samples[index]
        except (Exception, SystemExit) as cause:  # whatever code of other people raises
            raise UsageError(
                f"Sample {index} of {self.name} cannot be read: {type(cause).__name__}: {cause}.",
                do="Take that sample in Python to see the whole traceback.",
            ) from cause
        if not isinstance(found, Sequence) or len(found) != 2:
            raise UsageError(
                f"Sample {index} of {self.name} is {kind_of(found)}.",
                expected="A pair of inputs and a target was expected.",
            )
        inputs, target = found
        self._hold(index, _array_or_other(target))
        if isinstance(inputs, Mapping):
            return {str(name): _array(one) for name, one in inputs.items()}, _array_or_other(target)
        return _array(inputs), _array_or_other(target)

    def _hold(self, index: int, target: Any) -> None:
        """Keep the targets that were read last, for whoever asks for them after the inputs."""
        self._held.pop(index, None)
        self._held[index] = target
        while len(self._held) > _HELD or (
            len(self._held) > 1
            and sum(getattr(one, "nbytes", 0) for one in self._held.values()) > _HELD_BYTES
        ):
            del self._held[next(iter(self._held))]

    def target(self, index: int) -> Any:
        """The target of a sample, which is not read again where it was among the last ones."""
        return self._held[index] if index in self._held else _array_or_other(self.sample(index)[1])

    @property
    def knows_targets(self) -> bool:
        """Has the sequence an attribute `targets`, so that no sample is read for them?"""
        return getattr(self.samples, "targets", None) is not None

    def targets(self) -> Any:
        """All targets: an array where they are numbers of one shape, else a list.

        A sequence with an attribute `targets`, as torchvision's data sets have, is not read for them.
        """
        known = getattr(self.samples, "targets", None)
        if isinstance(known, np.ndarray | Tensor):
            return _array(known)
        found = list(known) if known is not None else [self.sample(at)[1] for at in range(len(self))]
        return stacked([_array_or_other(one) for one in found])

    def some(self, n: int) -> list[tuple[Any, Any]]:
        """Up to `n` samples, spread evenly."""
        rows = np.unique(np.linspace(0, len(self) - 1, min(len(self), n)).astype(int))
        return [self.sample(int(at)) for at in rows]

    def sha256(self) -> str:
        """Hex SHA-256 of up to 256 samples, spread evenly, so that other data are noticed."""
        digest = hashlib.sha256(f"{len(self)}\n".encode())
        for inputs, target in self.some(_HASHED):
            arrays = inputs if isinstance(inputs, Mapping) else {"": inputs}
            for name, one in arrays.items():
                digest.update(f"{name} {one.dtype} {one.shape}\n".encode())
                digest.update(np.ascontiguousarray(one).tobytes())
            known = number_array(target)
            digest.update(known.tobytes() if isinstance(known, np.ndarray) else repr(target).encode())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class OwnData:
    """A user's own data.

    Attributes:
        name: `package.module:data`.
        parts: by name: `train`, `calibration`, `validation`, `test`, those that there are.
    """

    name: str
    parts: Mapping[str, Part]

    def part(self, *names: str) -> Part:
        """The first of some parts that is there.

        Raises:
            UsageError: none is.
        """
        for name in names:
            if name in self.parts:
                return self.parts[name]
        raise UsageError(
            f"The data {self.name} have no part {' or '.join(names)}.",
            expected=f"They have {', '.join(self.parts)}.",
            do=f"Give them an attribute {names[0]}: a sequence of pairs of inputs and a target.",
        )


def own_data(name: str) -> OwnData:
    """Import a user's data, from the current folder first.

    Args:
        name: `package.module:data`, of an object with attributes `train`, `calibration`, `validation` and
            `test`, as far as they are needed, or of a function that gives one. Each is a sequence, like a
            data set of torch, or another iterable, whose pairs of inputs and a target are then kept.

    Raises:
        UsageError: it cannot be imported, fails, or has none of these parts.
    """
    names = ("train", "calibration", "validation", "test")
    with current_folder_first():
        found = attribute_named(name, "data", "like my_package.pictures:data")
        if callable(found) and not any(hasattr(found, one) for one in names):
            try:
                found = found()
            except (Exception, SystemExit) as cause:  # whatever code of other people raises
                raise UsageError(
                    f"The data {name} failed with {type(cause).__name__}: {cause}.",
                    do="Call it in Python to see the whole traceback.",
                ) from cause
    parts = {}
    for one in names:
        samples = found.get(one) if isinstance(found, Mapping) else getattr(found, one, None)
        if samples is None:
            continue
        if not (hasattr(samples, "__len__") and hasattr(samples, "__getitem__")):
            samples = list(samples)
        if not len(samples):
            raise UsageError(f"The part {one} of {name} holds no samples.", do="Give one at least.")
        parts[one] = Part(name=f"the part {one} of {name}", samples=samples)
    if not parts:
        raise UsageError(
            f"{name} is {kind_of(found)} without any of the parts {', '.join(names)}.",
            expected="An object with such attributes, or a function that gives one, was expected.",
        )
    return OwnData(name=name, parts=parts)


@dataclass(frozen=True, kw_only=True)
class PartSamples:
    """A part as the inputs of a network, read as they are needed.

    Attributes:
        part: whose samples these are.
        signature: of the network.
    """

    part: Part
    signature: Signature

    def __len__(self) -> int:
        return len(self.part)

    @property
    def n_values(self) -> int:
        """Numbers in the inputs of the first sample."""
        return sum(one.size for one in self._feeds(0).values())

    def batches(self, most: int) -> Iterator[dict[str, Array]]:
        """The inputs by name, in order; samples of one shape go together, at most so many."""
        held: list[dict[str, Array]] = []
        for index in range(len(self.part)):
            feeds = self._feeds(index)
            if held and (len(held) == most or _shapes(held[0]) != _shapes(feeds)):
                yield self._stacked(held)
                held = []
            held.append(feeds)
        if held:
            yield self._stacked(held)

    def _feeds(self, index: int) -> dict[str, Array]:
        """The inputs of one sample, in the types of the network."""
        inputs, _ = self.part.sample(index)
        names = self.signature.input_names
        if not isinstance(inputs, Mapping):
            inputs = {names[0]: inputs}
        if set(inputs) != set(names):
            raise UsageError(
                f"Sample {index} of {self.part.name} has the inputs {', '.join(map(str, inputs))}.",
                expected=f"The network takes {', '.join(names)}.",
                do="Name the arrays as the inputs of the network.",
            )
        for one in self.signature.inputs:
            self._require_fit(inputs[one.name], one, index)
        return {one.name: inputs[one.name].astype(numpy_dtype(one.dtype)) for one in self.signature.inputs}

    def _require_fit(self, array: Array, one: TensorInfo, index: int) -> None:
        """Raise UsageError for an input of a sample that the network does not take."""
        axis = one.axis(self.signature.batch)
        wanted = [size for place, size in enumerate(one.shape) if place != axis]
        fits = array.ndim == len(wanted) and all(
            isinstance(size, str) or have == size for have, size in zip(array.shape, wanted, strict=True)
        )
        if not fits:
            raise UsageError(
                f"Sample {index} of {self.part.name} has {one.name} of shape {array.shape}.",
                expected=f"{size_text(wanted)} was expected, of one sample for {one}.",
            )
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise UsageError(
                f"Sample {index} of {self.part.name} holds NaN in {one.name}.", do="Leave out such samples."
            )

    def _stacked(self, held: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
        found = {}
        for one in self.signature.inputs:
            axis = one.axis(self.signature.batch)
            arrays = [feeds[one.name] for feeds in held]
            found[one.name] = arrays[0] if axis is None else np.stack(arrays, axis)
        return found


def _shapes(feeds: Mapping[str, Array]) -> list[tuple[int, ...]]:
    return [one.shape for one in feeds.values()]


def _array(value: Any) -> Array:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _array_or_other(value: Any) -> Any:
    return _array(value) if isinstance(value, Tensor) else value
