"""The data sets: arrays in memory, or folders of pictures that are decoded when needed.

    name             from                                                        inputs
    digits           scikit-learn's own package, nothing to download             uint8 (1, 8, 8)
    mnist            DATA/MNIST/raw                                              uint8 (1, 28, 28)
    fashion-mnist    DATA/FashionMNIST/raw                                       uint8 (1, 28, 28)
    cifar10          DATA/cifar-10-batches-py or DATA/cifar10.npz                uint8 (3, 32, 32)
    npz:FILE         x_train, y_train, x_test, y_test of a NumPy archive         uint8 (C, H, W), or float32
    imagefolder:DIR  DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg               uint8 (3, H, W)

DATA is `--data-dir`, else $SPARSE_EXPORT_DATA, else ~/.cache/sparse-export/data. A missing set is an error;
it is never replaced by another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from sparse_export.errors import ArtefactError, UnknownNameError, UsageError
from sparse_export.formats.preparation import RawType
from sparse_export.formats.run import DataInfo
from sparse_export.signature import Array
from sparse_export.tasks.data.dataset import (
    DataSet,
    as_inputs,
    first_of_validation,
    normalise,
    split,
    test_sha256,
)
from sparse_export.tasks.data.places import default_data_dir

if TYPE_CHECKING:
    from sparse_export.tasks.data import imagefolder

__all__ = [
    "DataSet",
    "Inputs",
    "archive_of",
    "default_data_dir",
    "first_of_validation",
    "load",
    "load_test_set",
    "load_training_sample",
    "names",
    "normalise",
    "picture_files",
    "require_digest",
    "require_given",
    "split",
    "test_sha256",
]

_SAMPLE_SEED = 23
_DECODED = 64  # pictures at a time
_NAMES = ("digits", "mnist", "fashion-mnist", "cifar10")
_FORMS = ("npz:FILE", "imagefolder:DIR")


def names() -> tuple[str, ...]:
    """List the data sets that have a name; there are also `npz:FILE` and `imagefolder:DIR`."""
    return _NAMES


def load(
    name: str,
    data_dir: Path | None = None,
    *,
    image_size: tuple[int, int] | None = None,
    download: bool = False,
    classes: bool = True,
) -> DataSet:
    """Read a whole data set into memory, on the CPU.

    Args:
        name: one of `names()`, `npz:FILE` or `imagefolder:DIR`.
        data_dir: folder of the named sets, `default_data_dir()` if None; also where a relative FILE or DIR
            starts, the current folder if None.
        image_size: (H, W) for `imagefolder`; for another set of images only its own size is valid.
        download: download a missing set, where torchvision can.
        classes: the targets have to be class numbers; else those of `npz:FILE` may be any numbers.

    Raises:
        UnknownNameError: there is no such set.
        UsageError: another size, or a FILE or DIR that is not given.
        DataNotFound: the data are missing, or the download failed.
        ArtefactError: a file is truncated, damaged, or not what the set should be.
    """
    data = _load(name, None if data_dir is None else Path(data_dir), image_size, download, classes)
    is_image = len(data.input_shape) == 3
    if image_size is not None and is_image and data.input_shape[1:] != tuple(image_size):
        raise UsageError(
            f"Images of size {tuple(image_size)} were requested, but those of {name} are "
            f"{data.input_shape[1:]}; only imagefolder:DIR has other sizes.",
            do="Choose a network and a data set of one size.",
        )
    return data


Labels = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


class Inputs(Protocol):
    """Inputs that can be sliced along the first axis into arrays; pictures are decoded on slicing."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Array: ...


def require_given(name: str, data_dir: Path | None = None) -> None:
    """Check that the file or folder of a data set that a caller names is there.

    Args:
        name: of a data set; one of another kind than `npz:FILE` and `imagefolder:DIR` passes.
        data_dir: where a relative path starts, the current folder if None.

    Raises:
        UsageError: it is not.
    """
    form, _, place = name.partition(":")
    if form not in ("npz", "imagefolder"):
        return
    path = _own_path(name, place, data_dir)
    kind, is_there = ("file", path.is_file()) if form == "npz" else ("folder", path.is_dir())
    if not is_there:
        raise UsageError(f"{path} is not a {kind}.", do=f"Correct the path after {form}:.")


class NormalisedInputs:
    """Samples of a set in memory, or mapped, normalised on slicing.

    Args:
        x: raw samples (N, C, …).
        mean: of each channel.
        std: likewise.
        raw: the type that samples are given in as they are; None to normalize them.
    """

    def __init__(
        self, x: Tensor, mean: Sequence[float], std: Sequence[float], raw: RawType | None = None
    ) -> None:
        self._x, self._mean, self._std, self._raw = x, mean, std, raw

    def __len__(self) -> int:
        return len(self._x)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, …)."""
        return tuple(self._x.shape)

    def __getitem__(self, rows: slice) -> Array:
        return as_inputs(self._x[rows], self._mean, self._std, self._raw)


def picture_files(
    name: str, data_dir: Path | None = None, classes: Mapping[str, int] | None = None
) -> imagefolder.Listing | None:
    """List the files of an `imagefolder:DIR` without decoding them.

    Args:
        name: of a data set.
        data_dir: where a relative DIR starts, the current folder if None.
        classes: the number of each class folder; None to number them by their sorted names.

    Returns:
        The files; None for a data set of another kind.

    Raises:
        SparseExportError: as `load`.
    """
    form, _, place = name.partition(":")
    if form != "imagefolder":
        return None
    from sparse_export.tasks.data import imagefolder

    return imagefolder.list_pictures(name, _own_path(name, place, data_dir), classes)


def archive_of(name: str, data_dir: Path | None = None) -> Path | None:
    """The file of an `npz:FILE`, which need not be there.

    Args:
        name: of a data set.
        data_dir: where a relative FILE starts, the current folder if None.

    Returns:
        Its path; None for a data set of another kind.

    Raises:
        UsageError: there is no FILE behind the colon.
    """
    form, _, place = name.partition(":")
    return _own_path(name, place, data_dir) if form == "npz" else None


def load_test_set(
    info: DataInfo,
    input_shape: tuple[int, ...],
    data_dir: str | Path | None = None,
    *,
    classes: bool = True,
    workers: int = 0,
    raw: RawType | None = None,
) -> tuple[Inputs, Array]:
    """Load the test set that a run was tested on.

    Args:
        info: of the run.
        input_shape: of one sample.
        data_dir: as of `load`.
        classes: as of `load`.
        workers: processes that decode pictures; 0 for threads.
        raw: the type of raw samples, for a network that normalizes them itself; None to normalize them here.

    Returns:
        Inputs as the network takes them, (N, *input_shape), of which pictures are decoded on slicing, and
        targets, class numbers (N,) of classes.

    Raises:
        ArtefactError: it is another test set than the run's; also as `load`.
        SparseExportError: as `load`.
    """
    folder = None if data_dir is None else Path(data_dir)
    image_size = (input_shape[1], input_shape[2]) if len(input_shape) == 3 else None
    listing = picture_files(info.name, folder, info.classes or None)
    if listing is not None and image_size is not None:
        from sparse_export.tasks.data.pictures import Inputs as Decoded

        require_digest(info, listing.test.sha256())
        inputs = Decoded(
            *(listing.test, image_size, info.crop_ratio, info.mean, info.std, info.interpolation),
            n_workers=workers,
            raw=raw,
        )
        return inputs, listing.test.labels.numpy()
    found = load(info.name, folder, image_size=image_size, classes=classes)
    require_digest(info, test_sha256(found))
    return NormalisedInputs(found.x_test, info.mean, info.std, raw), found.y_test.numpy()


def load_training_sample(
    info: DataInfo,
    input_shape: tuple[int, ...],
    n: int,
    data_dir: str | Path | None = None,
    *,
    workers: int = 0,
    raw: RawType | None = None,
) -> Array:
    """Load some training inputs, always the same ones, without augmentation.

    Of arrays they are drawn with a fixed seed; of a folder of pictures they are the first, whose order mixes
    the classes.

    Args:
        info: of the run.
        input_shape: of one sample.
        n: number of samples.
        data_dir: as of `load`.
        workers: as of `load_test_set`, as is `raw`.

    Returns:
        Inputs as the network takes them, (at most n, *input_shape).

    Raises:
        SparseExportError: as `load`.
    """
    folder = None if data_dir is None else Path(data_dir)
    image_size = (input_shape[1], input_shape[2]) if len(input_shape) == 3 else None
    listing = picture_files(info.name, folder, info.classes or None)
    if listing is not None and image_size is not None:
        from sparse_export.tasks.data.pictures import Inputs as Decoded

        first = listing.train.part(0, min(n, info.n_train))
        taken = Decoded(
            *(first, image_size, info.crop_ratio, info.mean, info.std, info.interpolation),
            n_workers=workers,
            raw=raw,
        )
        return np.concatenate(list(taken.batches(_DECODED)))
    found = load(info.name, folder, image_size=image_size, classes=False)
    n_train = min(info.n_train, len(found.x_train))
    drawn = np.random.default_rng(_SAMPLE_SEED).permutation(n_train)[:n]
    return as_inputs(found.x_train[drawn.tolist()], info.mean, info.std, raw)


def require_digest(info: DataInfo, digest: str) -> None:
    """Check that a test set is that of a run.

    Args:
        info: of the run.
        digest: of the test set.

    Raises:
        ArtefactError: it is another one.
    """
    if digest != info.test_sha256:
        raise ArtefactError(
            f"The test data of {info.name} differ from those that the run was tested on: "
            f"SHA-256 {digest}, not {info.test_sha256}.",
            do="Give the folder of the original data by --data-dir.",
        )


def _load(
    name: str, data_dir: Path | None, image_size: tuple[int, int] | None, download: bool, classes: bool
) -> DataSet:
    """Load a data set of any kind."""
    form, colon, place = name.partition(":")
    if colon and f"{form}:" in ("npz:", "imagefolder:"):
        return _load_own(name, form, place, data_dir, image_size, classes)
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
    name: str, form: str, place: str, data_dir: Path | None, image_size: tuple[int, int] | None, classes: bool
) -> DataSet:
    """Load a user's own data set."""
    path = _own_path(name, place, data_dir)
    if form == "npz":
        from sparse_export.tasks.data import npz

        return npz.load(name, path, classes=classes)

    from sparse_export.tasks.data import imagefolder

    return imagefolder.load(name, path, image_size=image_size)


def _own_path(name: str, place: str, data_dir: Path | None) -> Path:
    """The path of a user's own data set. Raises UsageError where there is none."""
    if not place:
        raise UsageError(
            f"{name!r} has no path after the colon.",
            do=f"Write {' or '.join(_FORMS)}.",
        )
    try:
        return (data_dir or Path()) / Path(place).expanduser()
    except RuntimeError as cause:
        raise UsageError(
            f"{name!r} starts in a home folder that is not known: {cause}",
            do="Write the whole path after the colon; ~ is this user's home, ~NAME another's.",
        ) from cause
