"""Data that a network of any kind is scored on, by their name: opened once, read as they are needed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sparse_export.errors import ArtefactError, DataNotFound, OutputError, UsageError
from sparse_export.formats.preparation import RawType
from sparse_export.formats.run import DataInfo
from sparse_export.signature import Array, Feeds, Signature, TensorInfo, numpy_dtype
from sparse_export.tasks import data
from sparse_export.tasks.archives import open_arrays, pieces_of
from sparse_export.tasks.data import own
from sparse_export.tasks.data.imagefolder import Pictures
from sparse_export.tasks.data.picture_settings import PictureSettings
from sparse_export.tasks.data.pictures import Inputs as PictureInputs
from sparse_export.tasks.inputs import INPUTS_BATCH
from sparse_export.tasks.sample_set import SampleSet, SingleInput
from sparse_export.tasks.task import Targets

__all__ = ["TARGETS", "NamedData", "arrays_sha256", "calibration_of", "open_named"]

TARGETS = "targets"
"""The array of an archive that is no input."""
_FORMS = "npz:FILE with an array for each input and one named targets, package.module:data or imagefolder:DIR"


@dataclass(frozen=True, kw_only=True)
class NamedData:
    """Samples with targets.

    Attributes:
        name: `npz:FILE`, `package.module:data` or `imagefolder:DIR`.
        samples: the inputs.
        targets: one a sample, in their order.
        sha256: computes the digest of both.
        calibration: gives up to so many samples of a part that is not scored on, in batches; None where the
            data have no such part.
        normalised: what the record has of how pictures become inputs.
        n_train: number of training samples, of pictures.
    """

    name: str
    samples: SampleSet
    targets: Targets
    sha256: Callable[[], str]
    calibration: Callable[[int], list[Feeds]] | None = None
    normalised: Mapping[str, Any] = field(default_factory=lambda: {"mean": (), "std": ()})
    n_train: int = 0

    def info(self) -> DataInfo:
        """The record of the data."""
        return DataInfo(
            name=self.name,
            **self.normalised,
            n_train=self.n_train,
            n_validation=0,
            n_test=len(self.samples),
            test_sha256=self.sha256(),
        )


def open_named(
    name: str,
    signature: Signature,
    data_dir: str | Path | None,
    pictures: PictureSettings | None = None,
    raw: RawType | None = None,
) -> NamedData:
    """Open data by their name.

    Args:
        name: `npz:FILE`, `package.module:data` or `imagefolder:DIR`.
        signature: of the network that takes them.
        data_dir: where a relative FILE or DIR starts; None for the current folder.
        pictures: how those of a folder become inputs; None for the usual way.
        raw: type of the raw pictures of a folder, for a network that normalizes them itself; arrays and own
            data are taken as they are in any case.

    Raises:
        UsageError: there are no such data, or they are not the network's inputs.
        DataNotFound: the file is not there.
        ArtefactError: it cannot be read.
    """
    if own.is_own(name):
        found = own.own_data(name)
        part = found.part("test")
        return NamedData(
            name=name,
            samples=own.PartSamples(part=part, signature=signature),
            targets=part.targets() if part.knows_targets else own.PartTargets(part),
            sha256=part.sha256,
            calibration=_calibration(found, signature),
        )
    form, _, place = name.partition(":")
    if form == "imagefolder":
        return _of_pictures(name, signature, data_dir, pictures or PictureSettings(), raw)
    if form != "npz" or not place:
        raise UsageError(
            f"{name} is no data that a network of any kind is scored on.", expected=f"{_FORMS}, was expected."
        )
    path = Path(data_dir or "") / Path(place).expanduser()
    arrays = _arrays(path)
    trained = {f"{one}_test": one for one in signature.input_names}
    if TARGETS not in arrays and {*trained, "y_test"} <= arrays.keys():
        return _of_training(name, arrays, signature)
    if TARGETS not in arrays:
        raise UsageError(
            f"{path} has no array {TARGETS}; it holds {', '.join(arrays) or 'nothing'}.",
            expected=f"An array for each of {', '.join(signature.input_names)}, and {TARGETS}, was expected.",
            do=f"Write it by numpy.savez(FILE, {TARGETS}=…, {signature.input_names[0]}=…).",
        )
    targets = arrays.pop(TARGETS)
    try:
        samples = MappedSamples.of(arrays, signature)
    except UsageError as cause:
        raise UsageError(f"{path}: {cause.what}", expected=cause.expected, do=cause.do) from cause
    return NamedData(
        name=name,
        samples=samples,
        targets=targets,
        sha256=lambda: _feeds_sha256(samples, targets),
    )


@dataclass(frozen=True, kw_only=True)
class MappedSamples:
    """Arrays of a file as the inputs of a network, converted to its types as they are read.

    Attributes:
        arrays: by the names of the inputs.
        signature: of the network.
    """

    arrays: Feeds
    signature: Signature

    @classmethod
    def of(cls, arrays: Feeds, signature: Signature) -> MappedSamples:
        """Check that arrays are the inputs of a network, once they have its types.

        Raises:
            UsageError: they are not.
        """
        types = {one.name: one for one in signature.inputs}
        signature.require_feeds(
            {
                name: np.broadcast_to(np.zeros((), _type_for(array, types.get(name))), array.shape)
                for name, array in arrays.items()
            }
        )
        return cls(arrays=arrays, signature=signature)

    def __len__(self) -> int:
        return self.signature.n_samples(self.arrays)

    @property
    def n_values(self) -> int:
        return sum(math.prod(one.shape) for one in self.arrays.values()) // max(1, len(self))

    def batches(self, most: int) -> Iterator[dict[str, Array]]:
        if self.signature.batch is None:
            yield self._converted(self.arrays)
            return
        for start in range(0, len(self), most):
            yield self._converted(self.signature.part(self.arrays, start, start + most))

    def _converted(self, feeds: Feeds) -> dict[str, Array]:
        return {
            one.name: np.array(feeds[one.name], _type_for(feeds[one.name], one))
            for one in self.signature.inputs
        }


def _of_pictures(
    name: str,
    signature: Signature,
    data_dir: str | Path | None,
    settings: PictureSettings,
    raw: RawType | None,
) -> NamedData:
    """Pictures of a folder as the input of a network. Raises UsageError for one with another input."""
    taken = signature.only_input
    shape = () if taken is None else signature.input_shape
    if taken is None or len(shape) != 3 or shape[0] != 3:
        raise UsageError(
            f"{name} holds pictures, and the network takes {', '.join(map(str, signature.inputs))}.",
            expected="One input of floats (samples, 3, height, width) was expected.",
            do="Give npz:FILE or package.module:data.",
        )
    listing = data.picture_files(name, None if data_dir is None else Path(data_dir), settings.classes)
    assert listing is not None
    size = (shape[1], shape[2])
    crop_ratio = settings.crop_ratio(size)

    def inputs(pictures: Pictures) -> SingleInput:
        how = size, crop_ratio, settings.mean, settings.std, settings.interpolation, settings.workers, raw
        return SingleInput(name=taken.name, inputs=PictureInputs(pictures, *how))

    return NamedData(
        name=name,
        samples=inputs(listing.test),
        targets=listing.test.labels.numpy(),
        sha256=listing.test.sha256,
        calibration=lambda n: list(inputs(listing.train.part(0, n)).batches(INPUTS_BATCH)),
        normalised=settings.record() | {"crop_ratio": crop_ratio},
        n_train=len(listing.train),
    )


def _arrays(path: Path) -> dict[str, Array]:
    if not path.is_file():
        raise DataNotFound(f"{path} is not a file.", do="Correct the path after npz:.")
    try:
        return open_arrays(path)
    except OutputError:
        raise
    except Exception as cause:  # NumPy and zipfile raise many kinds for what is no archive
        raise ArtefactError(
            f"{path} cannot be read as arrays of NumPy: {cause}.", do="Write it again by numpy.savez."
        ) from cause


def _of_training(name: str, arrays: Feeds, signature: Signature) -> NamedData:
    """The test part of an archive that a network was trained on."""

    def of_part(part: str) -> tuple[MappedSamples, Array]:
        inputs = {one: arrays[f"{one}_{part}"] for one in signature.input_names}
        return MappedSamples.of(inputs, signature), arrays[f"y_{part}"]

    samples, targets = of_part("test")
    found = {one: arrays.get(f"{one}_train") for one in signature.input_names}
    train = {one: array for one, array in found.items() if array is not None}

    def calibration(n: int) -> list[Feeds]:
        whole = MappedSamples.of(train, signature)
        rows = np.array(_spread(len(whole), n))
        part = MappedSamples(arrays={key: one[rows] for key, one in train.items()}, signature=signature)
        return list(part.batches(INPUTS_BATCH))

    return NamedData(
        name=name,
        samples=samples,
        targets=targets,
        sha256=lambda: arrays_sha256({**samples.arrays, "y": targets}),
        calibration=calibration if len(train) == len(found) else None,
    )


def _type_for(array: Array, info: TensorInfo | None) -> np.dtype[np.generic]:
    """The type of an input; where that would lose something, its own, which is refused then."""
    if info is None:
        return array.dtype
    wanted = numpy_dtype(info.dtype)
    is_whole = wanted.kind not in "iub" or array.dtype.kind in "iub"
    return wanted if is_whole else array.dtype


def arrays_sha256(arrays: Feeds) -> str:
    """Compute the hex SHA-256 of arrays by name: name, type, shape and bytes of each, in pieces."""
    digest = hashlib.sha256()
    for key in sorted(arrays):
        _hash(digest, key, arrays[key], arrays[key].dtype)
    return digest.hexdigest()


def _feeds_sha256(samples: MappedSamples, targets: Array) -> str:
    digest = hashlib.sha256()
    for one in samples.signature.inputs:
        _hash(digest, one.name, samples.arrays[one.name], _type_for(samples.arrays[one.name], one))
    _hash(digest, TARGETS, targets, targets.dtype)
    return digest.hexdigest()


def _hash(digest: hashlib._Hash, key: str, array: Array, dtype: np.dtype[np.generic]) -> None:
    digest.update(f"{key} {dtype} {array.shape}\n".encode())
    for piece in pieces_of(array) if array.ndim else (array,):
        digest.update(np.ascontiguousarray(piece, dtype).tobytes())


def _calibration(found: own.OwnData, signature: Signature) -> Callable[[int], list[Feeds]] | None:
    if not {"calibration", "train"} & set(found.parts):
        return None
    part = found.part("calibration", "train")

    def calibration(n: int) -> list[Feeds]:
        chosen = own.Part(name=part.name, samples=[part.sample(row) for row in _spread(len(part), n)])
        return list(own.PartSamples(part=chosen, signature=signature).batches(INPUTS_BATCH))

    return calibration


def _spread(n: int, most: int) -> list[int]:
    """Places of up to `most` of n samples, evenly spread."""
    most = min(most, n)
    return [at * n // most for at in range(most)]


def calibration_of(
    name: str, signature: Signature, data_dir: str | Path | None, n: int
) -> list[Feeds] | None:
    """Inputs of data by name to calibrate on, evenly spread.

    Args:
        name: as of `open_named`, as are signature and data_dir.
        n: how many, at most.

    Returns:
        Batches; None where the data have no part that is not scored on.

    Raises:
        UsageError: as `open_named`.
    """
    if own.is_own(name):
        of_own = _calibration(own.own_data(name), signature)
        return None if of_own is None else of_own(n)
    found = open_named(name, signature, data_dir).calibration
    return None if found is None else found(n)
