"""MNIST, Fashion-MNIST and CIFAR-10, read and downloaded by torchvision: the one module that imports it."""

from __future__ import annotations

import http.client
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import check_integrity

from sparse_export.errors import DataNotFound
from sparse_export.tasks.data import npz
from sparse_export.tasks.data.dataset import DataSet
from sparse_export.tasks.data.places import damaged, data_not_found
from sparse_export.tasks.labels import label_problem

_IDX_SETS: dict[str, Any] = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST}
_IDX_STATISTICS = {"mnist": ((0.1307,), (0.3081,)), "fashion-mnist": ((0.2860,), (0.3530,))}
_N_CLASSES = 10
_CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": tuple(datasets.FashionMNIST.classes),
}
# Of batches.meta, which an archive has not.
_CIFAR10_NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2023, 0.1994, 0.2010)


def load_idx(name: str, data_dir: Path, *, download: bool = False) -> DataSet:
    """Load MNIST or Fashion-MNIST, uint8 (N, 1, 28, 28).

    The files are read one by one with torchvision's readers, so that an error can name the file.

    Args:
        name: `mnist` or `fashion-mnist`.
        data_dir: with MNIST/raw or FashionMNIST/raw.
        download: download the files where one is missing.

    Raises:
        DataNotFound: a file is missing, or the download failed.
        ArtefactError: a file is truncated or damaged.
    """
    source = _IDX_SETS[name]
    layout = Path(source.__name__, "raw")
    files = [data_dir / layout / Path(archive).stem for archive, _ in source.resources]
    if download and not all(file.is_file() for file in files):
        _download(name, source, data_dir)
    for file in files:
        if not file.is_file():
            raise data_not_found(name, file, str(layout / file.name), downloadable=True)
    x_train, y_train = _read_idx(files[0], files[1])
    x_test, y_test = _read_idx(files[2], files[3])
    mean, std = _IDX_STATISTICS[name]
    return DataSet(
        name=name,
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
        mean=mean,
        std=std,
        n_classes=_N_CLASSES,
        class_names=_CLASS_NAMES[name],
    )


def load_cifar10(data_dir: Path, *, download: bool = False) -> DataSet:
    """Load CIFAR-10, uint8 (N, 3, 32, 32), in the order of its files.

    Args:
        data_dir: with cifar-10-batches-py, or cifar10.npz.
        download: download the first where both are missing.

    Raises:
        DataNotFound: a file is missing, or the download failed.
        ArtefactError: a file has not the published MD5, or the archive not CIFAR-10's shapes.
    """
    folder, archive = data_dir / datasets.CIFAR10.base_folder, data_dir / "cifar10.npz"
    if download and not folder.exists() and not archive.exists():
        _download("cifar10", datasets.CIFAR10, data_dir)
    if folder.exists():
        return _cifar10_from_batches(data_dir, folder)
    if archive.exists():
        return _cifar10_from_npz(archive)
    raise data_not_found(
        "cifar10", folder, f"{folder.name}/data_batch_1 … test_batch or {archive.name}", downloadable=True
    )


def _download(name: str, source: Any, data_dir: Path) -> None:
    """Download a data set by its torchvision class. Raises DataNotFound."""
    try:
        source(data_dir, download=True)
    except (RuntimeError, OSError, http.client.HTTPException) as cause:
        reason = " ".join(str(cause).split())  # torchvision's has a line for each address
        raise DataNotFound(
            f"Downloading data set {name} to {data_dir.absolute()} failed: {reason}.",
            do="Try again with a network and a writable folder, or copy the files from another machine "
            "and give their folder by --data-dir.",
        ) from cause


def _read_idx(image_file: Path, label_file: Path) -> tuple[Tensor, Tensor]:
    """Inputs (N, 1, 28, 28) and labels (N,)."""
    images = _idx(image_file, read_image_file)
    labels = _idx(label_file, read_label_file)
    if images.shape[1:] != (28, 28):
        raise damaged(
            image_file,
            f"holds images of {tuple(images.shape[1:])}, not (28, 28)",
        )
    problem = label_problem(labels, n_samples=len(images), n_classes=_N_CLASSES)
    if problem is not None:
        raise damaged(label_file, f"holds labels for {image_file.name} that {problem.what}")
    return images.unsqueeze(1), labels


def _idx(file: Path, reader: Any) -> Tensor:
    """Read one idx file. Raises ArtefactError."""
    try:
        tensor: Tensor = reader(file)
    except (AssertionError, RuntimeError, ValueError, TypeError, KeyError) as cause:
        raise damaged(
            file,
            f"({file.stat().st_size} bytes) is truncated or garbled: "
            f"{cause or 'its header is not of the idx format'}",
            expected="It has to be an unpacked idx file of unsigned bytes.",
            do="Delete it and get it again, from its home or by `train --download`.",
        ) from cause
    return tensor


def _cifar10_from_batches(data_dir: Path, folder: Path) -> DataSet:
    """CIFAR-10 from the published files, checked by their MD5."""
    meta = datasets.CIFAR10.meta
    listed = [*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list, (meta["filename"], meta["md5"])]
    for file, md5 in listed:
        if not (folder / file).is_file():
            raise data_not_found("cifar10", folder / file, f"{folder.name}/{file}", downloadable=True)
        if not check_integrity(folder / file, md5):
            raise damaged(
                folder / file,
                "is truncated or garbled",
                expected=f"Its MD5 is not {md5}.",
                do=f"Delete {folder} and get it again, from its home or by `train --download`.",
            )
    train = datasets.CIFAR10(data_dir, train=True)
    test = datasets.CIFAR10(data_dir, train=False)
    return _cifar10(
        *(_channels_first(train.data), torch.tensor(train.targets)),
        *(_channels_first(test.data), torch.tensor(test.targets)),
    )


def _channels_first(x_NHWC: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x_NHWC.transpose(0, 3, 1, 2)))


def _cifar10_from_npz(archive: Path) -> DataSet:
    x_train, y_train, x_test, y_test = npz.read_arrays("cifar10", archive)
    top = int(max(y_train.max(), y_test.max()))
    if x_train.shape[1:] != (3, 32, 32) or x_train.dtype != torch.uint8 or top >= _N_CLASSES:
        raise damaged(
            archive,
            f"holds {x_train.dtype} samples of {tuple(x_train.shape[1:])} with labels up to {top}",
            expected="CIFAR-10 has uint8 images of (32, 32, 3) or (3, 32, 32) with labels up to 9.",
            do="If it is another data set, rename it and load it as npz:FILE.",
        )
    return _cifar10(x_train, y_train, x_test, y_test)


def _cifar10(x_train: Tensor, y_train: Tensor, x_test: Tensor, y_test: Tensor) -> DataSet:
    return DataSet(
        name="cifar10",
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
        n_classes=_N_CLASSES,
        class_names=_CIFAR10_NAMES,
    )
