"""Reads inputs from files, checks them against a network's signature, and makes batches of them."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sparse_export.errors import ArtefactError, UsageError, first_line
from sparse_export.files import sha256_file
from sparse_export.signature import FLOATS, INTEGERS, Array, Signature, TensorInfo, joined
from sparse_export.tasks.archives import header_of, require_bounded

__all__ = ["INPUTS_BATCH", "InputFiles", "example_sizes", "read_inputs", "some_arrays", "with_seen_ranges"]

INPUTS_BATCH = 128
"""Samples at once, at most."""

_BATCH_VALUES = 2**24  # input values of a batch, at most, unless one sample has more

Shape = tuple[int, ...]
_Headers = dict[str, tuple[Shape, np.dtype[np.generic]]]


@dataclass(frozen=True, kw_only=True)
class InputFiles:
    """Inputs of a network.

    Attributes:
        batches: arrays by input; each batch fits the signature.
        n_samples: in all of them.
        n_available: samples in the files.
        files: SHA-256 of each file by its name.
    """

    batches: tuple[dict[str, Array], ...]
    n_samples: int
    n_available: int
    files: dict[str, str]


def read_inputs(
    path: str | Path, signature: Signature, *, n_samples: int = 512, seed: int = 0, within: bool = True
) -> InputFiles:
    """Read inputs of a network, at most `n_samples` of them, chosen at random.

    Args:
        path: an `.npz` with an array for each input; a folder of such files, whose free sizes may differ; or
            an `.npy` for a network with one input. Where the network has no free batch size, an array may
            hold several calls, along an axis before the others, or along a first axis of size 1.
        signature: of the network.
        n_samples: bound.
        seed: of the choice.
        within: integers outside the range of the signature are refused. That of a run or a bundle may only be
            what was seen so far.

    Raises:
        UsageError: there is no such file, or its arrays are not the network's inputs.
        ArtefactError: a file cannot be read, or holds something else than plain arrays.
    """
    if n_samples < 1 or seed < 0:
        raise UsageError(
            f"{n_samples} samples were asked for, with the seed {seed}.",
            expected="At least 1, and a seed of at least 0, were expected.",
        )
    path = Path(path)
    sources = [_Source(file, signature, within) for file in _files(path)]
    counts = [source.n_samples for source in sources]
    n_available = sum(counts)
    if not n_available:
        raise UsageError(f"{path} holds no samples.", do="Give a file with at least one.")
    chosen = np.arange(n_available)
    if n_available > n_samples:
        chosen = np.sort(np.random.default_rng(seed).choice(n_available, n_samples, replace=False))
    # Samples go together whose sizes are equal, and whose inputs without a batch axis are.
    groups: dict[object, list[dict[str, Array]]] = {}
    first = 0
    for source, count in zip(sources, counts, strict=True):
        own = chosen[(chosen >= first) & (chosen < first + count)] - first
        first += count
        for key, part in source.parts(own) if len(own) else ():
            groups.setdefault(key, []).append(part)
    batches = [batch for parts in groups.values() for batch in _batches(parts, signature)]
    return InputFiles(
        batches=tuple(batches),
        n_samples=len(chosen),
        n_available=n_available,
        files={source.path.name: sha256_file(source.path) for source in sources},
    )


def example_sizes(path: str | Path, signature: Signature) -> dict[str, int]:
    """The free sizes of the first sample of some inputs, but for that which counts samples.

    Args:
        path: as of `read_inputs`.
        signature: of the network.

    Raises:
        UsageError: as `read_inputs`.
        ArtefactError: likewise.
    """
    feeds = read_inputs(path, signature, n_samples=1).batches[0]
    sizes: dict[str, int] = {}
    for one in signature.inputs:
        one.problem(feeds[one.name], sizes)
    return {name: size for name, size in sizes.items() if name != signature.batch}


def some_arrays(path: str | Path) -> dict[str, Array]:
    """Two samples, or as many as there are, of inputs by whatever names they have, before a network is known.

    Args:
        path: an `.npz` or `.npy`, or a folder of `.npz` files, of which the first is read.

    Raises:
        UsageError: there is no such file.
        ArtefactError: it cannot be read, or holds something else than plain arrays.
    """
    file = _files(Path(path))[0]
    with _readable(file):
        with file.open("rb") as stream:
            require_bounded(stream)
        if file.suffix == ".npy":
            return {"input": np.load(file, mmap_mode="r", allow_pickle=False)[:2]}
        with np.load(file, allow_pickle=False) as stored:
            return {name: stored[name][:2] if stored[name].ndim else stored[name] for name in stored.files}


def with_seen_ranges(signature: Signature, found: InputFiles) -> Signature:
    """A signature in which integers whose range the graph does not tell have that of real inputs.

    Args:
        signature: of the network.
        found: real inputs.
    """

    def seen(one: TensorInfo) -> TensorInfo:
        arrays = [batch[one.name] for batch in found.batches]
        known = one.low is not None and one.high is not None
        if known or one.dtype not in INTEGERS or not all(array.size for array in arrays):
            return one
        low, high = min(int(array.min()) for array in arrays), max(int(array.max()) for array in arrays)
        return replace(one, low=low, high=high)

    return replace(signature, inputs=tuple(map(seen, signature.inputs)))


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix == ".npz" and file.is_file())
        if not found:
            raise UsageError(
                f"The folder {path} has no .npz file.",
                do="Write inputs there by numpy.savez, one call a file.",
            )
        return found
    if not path.is_file():
        raise UsageError(f"{path} is neither a file nor a folder.", do="Correct the path of the inputs.")
    if path.suffix not in (".npz", ".npy"):
        raise UsageError(
            f"{path} is no file of inputs by its name.",
            expected="An .npz file with an array for each input, or an .npy for one input, was expected.",
            do="Write one by numpy.savez(FILE, NAME=array, …).",
        )
    return [path]


class _Source:
    """One file of inputs, whose arrays are checked by their headers before any is read."""

    def __init__(self, path: Path, signature: Signature, within: bool) -> None:
        self.path, self._signature, self._within = path, signature, within
        with _readable(path):
            self._headers = _headers(path, signature)
        self._stacked: dict[str, str] = {}
        self.n_samples = self._checked()

    def _checked(self) -> int:
        """The number of samples, after a check of names, types and sizes."""
        signature, headers = self._signature, dict(self._headers)
        if signature.batch is None:
            headers = {name: self._one_call(name, *header) for name, header in headers.items()}
        stand_ins = {
            name: np.broadcast_to(np.zeros((), dtype), shape) for name, (shape, dtype) in headers.items()
        }
        try:
            signature.require_feeds(stand_ins)
        except UsageError as cause:
            raise UsageError(f"{self.path}: {cause.what}", expected=cause.expected, do=cause.do) from cause
        if signature.batch is not None:
            return signature.n_samples(stand_ins)
        counts = {name: self._headers[name][0][0] for name in self._stacked}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{count} of {name}" for name, count in counts.items())
            raise UsageError(
                f"{self.path} has different numbers of calls: {listed}.",
                expected="One number was expected.",
                do="Give as many of each input.",
            )
        return next(iter(counts.values()), 1)

    def _one_call(
        self, name: str, shape: Shape, dtype: np.dtype[np.generic]
    ) -> tuple[Shape, np.dtype[np.generic]]:
        """The header that one call of an array has which may hold several."""
        info = next((one for one in self._signature.inputs if one.name == name), None)
        if info is not None and len(shape) == len(info.shape) + 1:
            self._stacked[name] = "before"
            return shape[1:], dtype
        if info is not None and len(shape) == len(info.shape) and info.shape[:1] == (1,):
            self._stacked[name] = "first"
            return (1, *shape[1:]), dtype
        return shape, dtype

    def parts(self, chosen: Array) -> Iterator[tuple[object, dict[str, Array]]]:
        """The chosen samples, each part with what must be equal for samples to share a batch."""
        with _readable(self.path):
            arrays = _arrays(self.path, self._signature)
        for info in self._signature.inputs:
            _require_values(info, arrays[info.name], self.path, self._within)
        if self._signature.batch is None:
            for number, call in enumerate(chosen.tolist()):
                yield (self.path, number), {name: self._call(name, arrays[name], call) for name in arrays}
            return
        varied, fixed = {}, {}
        for info in self._signature.inputs:
            axis = info.axis(self._signature.batch)
            if axis is None:
                fixed[info.name] = arrays[info.name]
            else:
                varied[info.name] = arrays[info.name].take(chosen, axis)
        sizes = tuple(
            tuple(size for i, size in enumerate(array.shape) if i != info.axis(self._signature.batch))
            for info in self._signature.inputs
            if (array := varied.get(info.name)) is not None
        )
        yield (
            (sizes, tuple((name, array.shape, array.tobytes()) for name, array in fixed.items())),
            varied | fixed,
        )

    def _call(self, name: str, array: Array, call: int) -> Array:
        how = self._stacked.get(name)
        return array if how is None else array[call] if how == "before" else array[call : call + 1]


def _batches(parts: Sequence[dict[str, Array]], signature: Signature) -> Iterator[dict[str, Array]]:
    """Samples of equal sizes in batches of nearly equal numbers."""
    whole = joined(parts, signature.inputs, signature.batch)
    n_samples = signature.n_samples(whole)
    n_values = sum(array.size for array in whole.values()) / max(n_samples, 1)
    most = max(1, min(INPUTS_BATCH, int(_BATCH_VALUES / max(n_values, 1))))
    n_batches = math.ceil(n_samples / most)
    for i in range(n_batches):
        start, stop = (n_samples * at // n_batches for at in (i, i + 1))
        yield {name: np.asarray(a, order="C") for name, a in signature.part(whole, start, stop).items()}


def _require_values(info: TensorInfo, array: Array, path: Path, within: bool) -> None:
    if info.dtype in FLOATS:
        if not bool(np.isfinite(array).all()):
            raise UsageError(
                f"{path}: the input {info.name} holds NaN or infinity.", do="Leave out such samples."
            )
        return
    if info.dtype == "bool" or not array.size or not within:
        return
    low, high = int(array.min()), int(array.max())
    if (info.low is not None and low < info.low) or (info.high is not None and high > info.high):
        raise UsageError(
            f"{path}: the values of {info.name} are from {low} to {high}.",
            expected=f"The network takes those from {info.low} to {info.high}.",
            do="Give inputs that were made for this network.",
        )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise ArtefactError with plain words where NumPy cannot read a file."""
    try:
        yield
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, NotImplementedError, KeyError) as cause:
        if isinstance(cause, UsageError):
            raise
        raise ArtefactError(
            f"{path} cannot be read as arrays of NumPy: {first_line(cause)}.",
            expected="What numpy.savez or numpy.save writes of plain numbers was expected.",
            do="Write it again.",
        ) from cause


def _headers(path: Path, signature: Signature) -> _Headers:
    """Shapes and types of the arrays of a file, by input."""
    if path.suffix == ".npy":
        with path.open("rb") as stream:
            return {_only_input(path, signature): header_of(stream)}
    found = {}
    with path.open("rb") as stream:
        require_bounded(stream)
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            with archive.open(member) as stream:
                found[member.removesuffix(".npy")] = header_of(stream)
    return found


def _arrays(path: Path, signature: Signature) -> dict[str, Array]:
    if path.suffix == ".npy":
        return {_only_input(path, signature): np.load(path, mmap_mode="r", allow_pickle=False)}
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def _only_input(path: Path, signature: Signature) -> str:
    if len(signature.inputs) != 1:
        raise UsageError(
            f"{path} is one array, and the network takes {', '.join(map(str, signature.inputs))}.",
            expected="An .npz file with an array for each input was expected.",
            do="Write one by numpy.savez(FILE, NAME=array, …).",
        )
    return signature.inputs[0].name
