"""Data sets in one NumPy archive: arrays x_train, y_train, x_test and y_test."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_export.errors import DataNotFound, UsageError
from sparse_export.tasks.archives import mapped_copy, open_arrays, pieces_of
from sparse_export.tasks.data.dataset import DataSet, channel_statistics
from sparse_export.tasks.data.own import OwnData, Part
from sparse_export.tasks.data.places import damaged
from sparse_export.tasks.labels import label_problem

KEYS = ("x_train", "y_train", "x_test", "y_test")
MAX_CLASSES = 1_000_000  # a larger label is an identifier or a measurement, not a class

_Array = np.ndarray[Any, Any]


def load(name: str, path: Path, *, classes: bool = True) -> DataSet:
    """Load an archive.

    mean and std are those of its training set, and the number of classes is the largest label plus one.
    Samples keep their order: shuffle a training set that is sorted by class before writing it, since
    validation takes the last part.

    Args:
        name: of the data set.
        path: of the archive.
        classes: as of `read_arrays`.

    Raises:
        DataNotFound: there is no such file.
        ArtefactError: as `read_arrays`.
    """
    x_train, y_train, x_test, y_test = read_arrays(name, path, classes=classes)
    mean, std = channel_statistics(x_train)
    return DataSet(
        name=name,
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
        mean=mean,
        std=std,
        n_classes=int(max(y_train.max(), y_test.max())) + 1 if classes else None,
    )


def read_arrays(name: str, path: Path, *, classes: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read and check the arrays of an archive.

    Args:
        name: of the data set, for the message.
        path: of the archive. Its inputs are uint8 images (N, H, W), (N, C, H, W) or (N, H, W, C), or floats
            of any shape (N, C, …); its labels are integers (N,), from 0 up. Arrays of four axes are
            channels-last when the last axis has length 1 or 3 and the second has not.
        classes: the targets have to be class numbers; else they are finite numbers of any shape (N, …).

    Returns:
        x_train, y_train, x_test and y_test: inputs uint8 (N, C, H, W) or float32, labels int64 (N,).

    Raises:
        DataNotFound: there is no such file.
        ArtefactError: it is no such archive, or an array in it is missing or invalid.
        UsageError: labels are the targets of another task than a classification.
    """
    arrays = _arrays(name, path)
    missing = [key for key in KEYS if key not in arrays]
    if missing:
        raise damaged(
            path,
            f"has no {' and no '.join(missing)}",
            expected=f"It holds {', '.join(arrays) or 'no named arrays'}.",
            do="Write it with numpy.savez(FILE, x_train=…, y_train=…, x_test=…, y_test=…).",
        )
    x_train, y_train = _samples(path, arrays, "train", classes)
    x_test, y_test = _samples(path, arrays, "test", classes)
    if x_train.shape[1:] != x_test.shape[1:] or x_train.dtype != x_test.dtype:
        raise damaged(
            path,
            f"has training inputs of {_describe(x_train)} and test inputs of {_describe(x_test)}",
            do="Write the file again with matching arrays.",
        )
    return x_train, y_train, x_test, y_test


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Samples of arrays, with arrays by name for inputs.

    Attributes:
        inputs: by the names of the network's inputs, samples along the first axis.
        targets: likewise.
    """

    inputs: Mapping[str, _Array]
    targets: _Array

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, at: int) -> tuple[dict[str, _Array], Any]:
        return {name: one[at] for name, one in self.inputs.items()}, self.targets[at]


def named_parts(name: str, path: Path) -> OwnData | None:
    """Open an archive with an array for each input of a network.

    Args:
        name: of the data set.
        path: of an archive that holds NAME_train and NAME_test for each input, y_train and y_test, and
            perhaps NAME_validation and y_validation.

    Returns:
        Its parts, whose samples have their inputs by name; None for an archive whose only input is `x`, and
        for one of another layout.

    Raises:
        DataNotFound: there is no such file.
        ArtefactError: it is no such archive, or an array is missing or has another length.
    """
    arrays = _arrays(name, path)
    inputs = [key.removesuffix("_train") for key in arrays if key.endswith("_train") and key != "y_train"]
    if inputs in ([], ["x"]):
        return None
    parts = {}
    for part in ("train", "validation", "test"):
        wanted = [*(f"{one}_{part}" for one in inputs), f"y_{part}"]
        there = [key for key in wanted if key in arrays]
        if part == "validation" and not there:
            continue
        missing = [key for key in wanted if key not in arrays]
        if missing:
            raise damaged(
                path,
                f"has no {' and no '.join(missing)}",
                expected=f"It holds {', '.join(arrays)}.",
                do="Write it with NAME_train and NAME_test for each input, y_train and y_test.",
            )
        lengths = {key: len(arrays[key]) if arrays[key].ndim else 0 for key in wanted}
        if len(set(lengths.values())) > 1 or not min(lengths.values()):
            raise damaged(
                path,
                f"has {', '.join(f'{n} samples in {key}' for key, n in lengths.items())}",
                do="Give each array of a part the same number of samples, one at least.",
            )
        for key in wanted:
            _require_finite(path, key, arrays[key])
        rows = Rows(inputs={one: arrays[f"{one}_{part}"] for one in inputs}, targets=arrays[f"y_{part}"])
        parts[part] = Part(name=f"the part {part} of {name}", samples=rows)
    return OwnData(name=name, parts=parts)


def _arrays(name: str, path: Path) -> dict[str, _Array]:
    """The arrays of an archive, by key; nothing is unpickled."""
    if not path.is_file():
        raise DataNotFound(
            f"Data set {name} is not there: {path.absolute()} is not a file.",
            do="Correct the path; a relative one starts at --data-dir if given, else at the current folder.",
        )
    try:
        return open_arrays(path)
    except (
        *(OSError, EOFError, ValueError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error),
        RuntimeError,  # zipfile's error for a password; NotImplementedError for a compression
    ) as cause:
        raise damaged(
            path,
            f"cannot be read as a NumPy archive: {_why(cause)}",
            do="Get the file again, or write it with numpy.savez without Python objects.",
        ) from cause


def _why(cause: Exception) -> str:
    """The reason, without NumPy's advice on pickles, for which it takes any other file."""
    if "Object arrays" in str(cause):
        return "it holds Python objects, which are never loaded"
    if "pickle" in str(cause):
        return "it is no file of NumPy's"
    return str(cause).rstrip(".") or type(cause).__name__


def _samples(path: Path, arrays: dict[str, _Array], part: str, classes: bool) -> tuple[Tensor, Tensor]:
    """Inputs and labels of `train` or `test`."""
    x = _inputs(path, f"x_{part}", arrays[f"x_{part}"])
    read = _labels if classes else _targets
    return x, read(path, f"y_{part}", arrays[f"y_{part}"], len(x))


def _inputs(path: Path, key: str, x: _Array) -> Tensor:
    """Inputs as channels-first uint8, or float32. Raises ArtefactError for others."""
    is_image = x.dtype == np.uint8 and x.ndim in (3, 4)
    is_float = x.dtype.kind == "f" and x.ndim >= 2
    if not (is_image or is_float) or 0 in x.shape[1:]:
        raise damaged(
            path,
            f"has {key} of {_describe(x)}, neither uint8 images of 3 or 4 axes nor floats of 2 axes or more",
            do="Convert the array and write the file again.",
        )
    if x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if is_image:
        return torch.from_numpy(_as(x if x.ndim == 4 else x[:, None], np.dtype(np.uint8)))
    with np.errstate(over="ignore"):  # an overflow becomes infinite and is reported below
        x = _as(x, np.dtype(np.float32))
    _require_finite(path, key, x)
    return torch.from_numpy(x)


def _as(array: _Array, dtype: np.dtype[Any]) -> _Array:
    """An array in C order and of a type; a large one that is converted lies in a temporary file."""
    if array.dtype == dtype and array.flags.c_contiguous:
        return array
    return mapped_copy(array.shape, dtype, pieces_of(array))


def _require_finite(path: Path, key: str, x: _Array) -> None:
    """Raise ArtefactError for floats that are NaN or infinite, with their number and the first place."""
    if x.dtype.kind != "f":
        return
    n_wrong, start = 0, 0
    first: tuple[int, ...] = ()
    for piece in pieces_of(x):
        wrong = ~np.isfinite(piece)
        if wrong.any():
            row, *rest = (int(index) for index in np.argwhere(wrong)[0])
            first = first or (start + row, *rest)
            n_wrong += int(wrong.sum())
        start += len(piece)
    if n_wrong:
        raise damaged(
            path,
            f"has {n_wrong} values in {key} that are NaN or infinite, the first at {first}",
            do="Remove or replace them and write the file again.",
        )


def _labels(path: Path, key: str, y: _Array, n_samples: int) -> Tensor:
    """Labels as int64. Raises ArtefactError for invalid ones, and UsageError for those of another task."""
    problem = label_problem(y, n_samples=n_samples, n_classes=MAX_CLASSES)
    if problem is not None and problem.task is not None:
        raise UsageError(f"{path} has labels in {key} that {problem.what}.", do=problem.do)
    if problem is not None:
        raise damaged(
            path, f"has labels in {key} that {problem.what}", do=f"{problem.do} Then write the file again."
        )
    return torch.from_numpy(y.astype(np.int64))


def _targets(path: Path, key: str, y: _Array, n_samples: int) -> Tensor:
    """Targets of any task: int64 or float32. Raises ArtefactError for what are no finite numbers."""
    if y.dtype.kind not in "biuf" or y.ndim == 0 or len(y) != n_samples:
        raise damaged(
            path,
            f"has {key} of {_describe(y)} for {n_samples} samples, which are no numbers for each",
            do="Give one target for each sample and write the file again.",
        )
    _require_finite(path, key, y)
    return torch.from_numpy(_as(y, np.dtype(np.float32 if y.dtype.kind == "f" else np.int64)))


def _describe(array: _Array | Tensor) -> str:
    return f"type {str(array.dtype).removeprefix('torch.')} and shape {tuple(array.shape)}"
