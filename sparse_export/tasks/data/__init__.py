"""The data sets: arrays in memory, or folders of pictures that are decoded when needed.

    name             from                                                        inputs
    digits           scikit-learn's own package, nothing to download             uint8 (1, 8, 8)
    mnist            DATA/MNIST/raw                                              uint8 (1, 28, 28)
    fashion-mnist    DATA/FashionMNIST/raw                                       uint8 (1, 28, 28)
    cifar10          DATA/cifar-10-batches-py or DATA/cifar10.npz                uint8 (3, 32, 32)
    npz:FILE         x_train, y_train, x_test, y_test of a NumPy archive         uint8 (C, H, W), or float32
    imagefolder:DIR  DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg               uint8 (3, H, W)

DATA is `--data-dir`, else $SPARSE_EXPORT_DATA, else ~/.cache/sparse-export/data. What is not there is an error,
never replaced by another set.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from sparse_export.errors import ArtefactError, UnknownNameError, UsageError
from sparse_export.formats.run import DataInfo
from sparse_export.tasks.data.dataset import DataSet, first_of_validation, normalise, split, test_sha256
from sparse_export.tasks.data.places import default_data_dir

if TYPE_CHECKING:
    from sparse_export.tasks.data import imagefolder

__all__ = [
    "DataSet",
    "Inputs",
    "default_data_dir",
    "first_of_validation",
    "load",
    "load_test_set",
    "load_training_sample",
    "names",
    "normalise",
    "picture_files",
    "split",
    "test_sha256",
]

_SAMPLE_SEED = 23
_NAMES = ("digits", "mnist", "fashion-mnist", "cifar10")
_FORMS = ("npz:FILE", "imagefolder:DIR")


def names() -> tuple[str, ...]:
    """The data sets that a name alone tells; `npz:FILE` and `imagefolder:DIR` come besides."""
    return _NAMES


def load(
    name: str,
    data_dir: Path | None = None,
    *,
    image_size: tuple[int, int] | None = None,
    download: bool = False,
) -> DataSet:
    """Read a whole data set into memory, on the CPU.

    data_dir: where the named sets lie, `default_data_dir()` if None; also where a relative FILE or DIR starts,
    the current folder if None.  image_size: (H, W) for `imagefolder`; of another set of images, only its own is right.
    download: fetch what is not there, for the sets that torchvision can fetch.

    Raises UnknownNameError, UsageError, DataNotFound (absent, or the download failed) and ArtefactError (truncated,
    garbled, or not what the set should be).
    """
    data = _load(name, None if data_dir is None else Path(data_dir), image_size, download)
    is_image = len(data.input_shape) == 3
    if image_size is not None and is_image and data.input_shape[1:] != tuple(image_size):
        raise UsageError(
            f"Images of size {tuple(image_size)} were asked for, but those of {name} are {data.input_shape[1:]}.",
            expected="Only imagefolder:DIR can be had in other sizes.",
            do="Choose a network or a data set that suits the other.",
        )
    return data


Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Labels = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


class Inputs(Protocol):
    """What can be sliced along its first axis into arrays, as an array can; pictures are decoded then."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Array: ...


def picture_files(name: str, data_dir: Path | None = None) -> imagefolder.Listing | None:
    """The files of an `imagefolder:DIR`, none of them decoded; None for any other name. Raises as `load` does."""
    form, _, place = name.partition(":")
    if form != "imagefolder":
        return None
    from sparse_export.tasks.data import imagefolder

    return imagefolder.listed(name, _own_path(name, place, data_dir))


def load_test_set(
    fact: DataInfo, input_shape: tuple[int, ...], data_dir: str | Path | None = None
) -> tuple[Inputs, Labels]:
    """The test set that a run was tested on: inputs as its network takes them, (N, *input_shape), and labels (N,).

    Pictures of a folder are decoded as they are sliced.
    Raises what `load` raises, and ArtefactError when it is another test set than the run's.
    """
    folder = None if data_dir is None else Path(data_dir)
    image_size = (input_shape[1], input_shape[2]) if len(input_shape) == 3 else None
    listing = picture_files(fact.name, folder)
    if listing is not None and image_size is not None:
        from sparse_export.tasks.data.pictures import Inputs as Decoded

        _require_digest(fact, listing.test.sha256())
        inputs = Decoded(listing.test, image_size, fact.crop_ratio, fact.mean, fact.std)
        return inputs, listing.test.labels.numpy()
    found = load(fact.name, folder, image_size=image_size)
    _require_digest(fact, test_sha256(found))
    return normalise(found.x_test, fact.mean, fact.std).numpy(), found.y_test.numpy()


def load_training_sample(
    fact: DataInfo, input_shape: tuple[int, ...], n: int, data_dir: str | Path | None = None
) -> Array:
    """At most n inputs of the training part as the network takes them, (n, *input_shape): always the same ones.

    Chosen by chance from arrays; of a folder of pictures the first, whose order mixes the classes. Not augmented.
    Raises what `load` raises.
    """
    folder = None if data_dir is None else Path(data_dir)
    image_size = (input_shape[1], input_shape[2]) if len(input_shape) == 3 else None
    listing = picture_files(fact.name, folder)
    if listing is not None and image_size is not None:
        from sparse_export.tasks.data.pictures import Inputs as Decoded

        return Decoded(listing.train, image_size, fact.crop_ratio, fact.mean, fact.std)[
            : min(n, fact.n_train)
        ]
    found = load(fact.name, folder, image_size=image_size)
    n_train = min(fact.n_train, len(found.x_train))
    rows = np.random.default_rng(_SAMPLE_SEED).permutation(n_train)[:n]
    sample: Array = normalise(found.x_train[rows.tolist()], fact.mean, fact.std).numpy()
    return sample


def _require_digest(fact: DataInfo, digest: str) -> None:
    if digest != fact.test_sha256:
        raise ArtefactError(
            f"The test data of {fact.name} are others than the run was tested on: SHA-256 {digest}.",
            expected=f"{fact.test_sha256} was expected.",
            do="Give the folder with the original data by --data-dir.",
        )


def _load(name: str, data_dir: Path | None, image_size: tuple[int, int] | None, download: bool) -> DataSet:
    form, colon, place = name.partition(":")
    if colon and f"{form}:" in ("npz:", "imagefolder:"):
        return _load_own(name, form, place, data_dir, image_size)
    if name not in _NAMES:
        raise UnknownNameError("data set", name, (*_NAMES, *_FORMS))
    if name == "digits":
        from sparse_export.tasks.data import digits

        return digits.load()

    from sparse_export.tasks.data import torchvision_sets

    folder = default_data_dir() if data_dir is None else data_dir
    if name == "cifar10":
        return torchvision_sets.load_cifar10(folder, download=download)
    return torchvision_sets.load_idx(name, folder, download=download)


def _load_own(
    name: str, form: str, place: str, data_dir: Path | None, image_size: tuple[int, int] | None
) -> DataSet:
    path = _own_path(name, place, data_dir)
    if form == "npz":
        from sparse_export.tasks.data import npz

        return npz.load(name, path)

    from sparse_export.tasks.data import imagefolder

    return imagefolder.load(name, path, image_size=image_size)


def _own_path(name: str, place: str, data_dir: Path | None) -> Path:
    if not place:
        raise UsageError(
            f"{name!r} names no place.",
            expected=f"{' or '.join(_FORMS)} was expected.",
            do="Write the path after the colon.",
        )
    try:
        return (data_dir or Path()) / Path(place).expanduser()
    except RuntimeError as cause:
        raise UsageError(
            f"{name!r} starts in a home folder that is not known: {cause}",
            expected="A path was expected; ~ is this user's home, ~NAME another's.",
            do="Write the whole path after the colon.",
        ) from cause
