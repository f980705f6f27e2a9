"""MNIST, Fashion-MNIST and CIFAR-10 as torchvision lays them out."""

from __future__ import annotations

import hashlib
import pickle
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets

from sparse_export.errors import ArtefactError, DataNotFound
from sparse_export.tasks import data

IMAGES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
LABELS = {"train": "train-labels-idx1-ubyte", "test": "t10k-labels-idx1-ubyte"}


def idx(array: np.ndarray[Any, Any]) -> bytes:
    return (
        struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    )


@pytest.fixture
def small_mnist(tmp_path: Path) -> Path:
    """A data folder whose MNIST/raw holds 30 and 20 images of noise; returns that folder raw."""
    rng = np.random.default_rng(0)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 30), ("test", 20)):
        (raw / IMAGES[part]).write_bytes(idx(rng.integers(0, 256, (n, 28, 28))))
        (raw / LABELS[part]).write_bytes(idx(np.arange(n) % 10))
    return raw


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_the_files_of_a_small_set_come_out_as_they_went_in(small_mnist: Path, tmp_path: Path) -> None:
    got = data.load("mnist", tmp_path)
    assert got.x_train.shape == (30, 1, 28, 28) and got.x_test.shape == (20, 1, 28, 28)
    assert got.x_test.numpy().tobytes() == (small_mnist / IMAGES["test"]).read_bytes()[16:]
    assert got.y_train.tolist() == [index % 10 for index in range(30)]
    assert got.y_train.dtype == torch.int64
    assert got.class_names == tuple("0123456789")


@pytest.mark.parametrize("file", [*IMAGES.values(), *LABELS.values()])
def test_a_missing_file_is_named_with_the_ways_to_get_it(
    file: str, small_mnist: Path, tmp_path: Path
) -> None:
    (small_mnist / file).unlink()
    with pytest.raises(DataNotFound) as caught:
        data.load("mnist", tmp_path)
    message = str(caught.value)
    assert f"{small_mnist / file} does not exist" in message
    assert f"holds MNIST/raw/{file}" in message
    assert "--data-dir" in message and "--download" in message and "SPARSE_EXPORT_DATA" in message


@pytest.mark.parametrize("file", [*IMAGES.values(), *LABELS.values()])
@pytest.mark.parametrize("keep", [0, 3, 8, -1])
def test_a_truncated_file_is_named(file: str, keep: int, small_mnist: Path, tmp_path: Path) -> None:
    path = small_mnist / file
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtefactError, match=rf"{file} \(\d+ bytes\) is truncated or garbled.*Delete it"):
        data.load("mnist", tmp_path)


def test_a_file_with_bytes_left_over_is_named(small_mnist: Path, tmp_path: Path) -> None:
    with (small_mnist / IMAGES["train"]).open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(ArtefactError, match=f"{IMAGES['train']} .*truncated or garbled"):
        data.load("mnist", tmp_path)


GARBLED = [
    (IMAGES["train"], b"<html>404 not found</html>", r"truncated or garbled"),
    (IMAGES["train"], b"\x1f\x8b\x08\x00 still packed by gzip", r"truncated or garbled.*unpacked"),
    (IMAGES["test"], idx(np.arange(20) % 10), r"truncated or garbled: .*3 dimension"),
    (LABELS["test"], idx(np.zeros((20, 28, 28))), r"truncated or garbled: .*1 dimension"),
    (IMAGES["train"], idx(np.zeros((30, 27, 28))), r"holds images of \(27, 28\).*\(28, 28\)"),
    (LABELS["train"], idx(np.zeros(29)), r"holds labels for train-images.*: 29 labels for 30 samples"),
    (LABELS["test"], idx(np.full(20, 10)), r"run from 10 to 10, outside the class numbers 0 to 9"),
]


@pytest.mark.parametrize(("file", "content", "message"), GARBLED)
def test_a_garbled_file_is_named(
    file: str, content: bytes, message: str, small_mnist: Path, tmp_path: Path
) -> None:
    (small_mnist / file).write_bytes(content)
    with pytest.raises(ArtefactError, match=f"{file} .*{message}"):
        data.load("mnist", tmp_path)


def test_mnist_does_not_stand_in_for_fashion_mnist(small_mnist: Path, tmp_path: Path) -> None:
    assert small_mnist.is_dir()
    with pytest.raises(DataNotFound, match="FashionMNIST/raw/train-images-idx3-ubyte does not exist"):
        data.load("fashion-mnist", tmp_path)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_a_download_without_a_network_says_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        DataNotFound, match=rf"Downloading data set {name} to .* failed: .*no network in this test"
    ):
        data.load(name, tmp_path, download=True)


@pytest.mark.usefixtures("no_network")
def test_what_is_there_is_not_downloaded_again(small_mnist: Path, tmp_path: Path) -> None:
    before = sorted(small_mnist.iterdir())
    assert len(data.load("mnist", tmp_path, download=True).y_train) == 30
    assert sorted(small_mnist.iterdir()) == before


@pytest.fixture
def small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in CIFAR-10's layout with 4 images a batch, whose MD5 sums torchvision is told to expect.

    The pickles carry a dtype with its flags as 0 and 1, as the published ones do.
    """
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def put(file: str, content: dict[str, Any]) -> str:
        plain = pickle.dumps(content, protocol=2)
        old = plain.replace(b"\x89\x88\x87", b"K\x00K\x01\x87")
        (folder / file).write_bytes(old)
        return hashlib.md5(old, usedforsecurity=False).hexdigest()

    def batch(seed: int) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        return {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [seed, 9, 1, 0]}

    train = [[f"data_batch_{k}", put(f"data_batch_{k}", batch(k))] for k in range(1, 6)]
    meta = put("batches.meta", {"label_names": [str(k) for k in range(10)]})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", put("test_batch", batch(6))]])
    monkeypatch.setattr(
        datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": meta}
    )
    return folder


def test_cifar10_batches_come_out_in_their_order_with_channels_first(
    small_batches: Path, tmp_path: Path
) -> None:
    assert b"K\x00K\x01\x87" in (small_batches / "data_batch_2").read_bytes()
    got = data.load("cifar10", tmp_path)
    assert got.x_train.shape == (20, 3, 32, 32) and got.x_test.shape == (4, 3, 32, 32)
    assert got.y_train.tolist() == [label for k in range(1, 6) for label in (k, 9, 1, 0)]
    second = np.random.default_rng(2).integers(0, 256, (4, 3072), dtype=np.uint8)
    assert torch.equal(got.x_train[4:8], torch.from_numpy(second).view(4, 3, 32, 32))
    assert (got.mean, got.std) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_changed_cifar10_batch_is_named_and_not_unpickled(
    file: str, small_batches: Path, tmp_path: Path
) -> None:
    content = bytearray((small_batches / file).read_bytes())
    content[-20] ^= 1
    (small_batches / file).write_bytes(content)
    with pytest.raises(ArtefactError, match=rf"cifar-10-batches-py/{file} is truncated or garbled.*MD5"):
        data.load("cifar10", tmp_path)


def test_a_missing_cifar10_batch_is_named(small_batches: Path, tmp_path: Path) -> None:
    (small_batches / "data_batch_4").unlink()
    with pytest.raises(DataNotFound, match="data_batch_4 does not exist"):
        data.load("cifar10", tmp_path)


def write_cifar_npz(folder: Path, *, shape: tuple[int, ...] = (32, 32, 3), top: int = 9) -> None:
    x = np.random.default_rng(0).integers(0, 256, (12, *shape), dtype=np.uint8)
    y = np.arange(12) % (top + 1)
    np.savez(folder / "cifar10.npz", x_train=x, y_train=y, x_test=x[:5], y_test=y[:5])


def test_cifar10_is_read_from_an_archive_with_the_usual_mean_and_std(tmp_path: Path) -> None:
    write_cifar_npz(tmp_path)
    got = data.load("cifar10", tmp_path)
    assert (got.name, got.input_shape, got.n_classes) == ("cifar10", (3, 32, 32), 10)
    assert (got.class_names[0], got.class_names[6], len(got.class_names)) == ("airplane", "frog", 10)
    assert (got.mean, got.std) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


@pytest.mark.parametrize(("shape", "top"), [((28, 28, 1), 9), ((32, 32, 3), 10)])
def test_an_archive_that_is_not_cifar10_does_not_pass_for_it(
    shape: tuple[int, ...], top: int, tmp_path: Path
) -> None:
    write_cifar_npz(tmp_path, shape=shape, top=top)
    with pytest.raises(ArtefactError, match=r"cifar10\.npz holds .*npz:FILE"):
        data.load("cifar10", tmp_path)


def materialised(shared_data: Path, folder: Path, *sets: str) -> Path:
    script = str(shared_data / "materialize.py")
    subprocess.run([sys.executable, script, str(folder), *sets], check=True, capture_output=True)
    return folder


def matches_published_statistics(got: data.DataSet, tolerance: float) -> bool:
    scaled = got.x_train.double() / 255
    mean, std = scaled.mean((0, 2, 3)).tolist(), scaled.std((0, 2, 3)).tolist()
    return got.mean == pytest.approx(mean, abs=5e-4) and got.std == pytest.approx(std, abs=tolerance)


def test_the_real_mnist_has_its_published_counts_and_statistics(mnist_dir: Path) -> None:
    got = data.load("mnist", mnist_dir)
    assert got.x_train.shape == (60_000, 1, 28, 28) and got.x_test.shape == (10_000, 1, 28, 28)
    assert got.y_train.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert got.y_test.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert matches_published_statistics(got, 5e-4)


def test_the_real_mnist_tests_on_no_image_that_it_trains_on(mnist_dir: Path) -> None:
    got = data.load("mnist", mnist_dir)
    train = {image.tobytes() for image in got.x_train.numpy()}
    assert not any(image.tobytes() in train for image in got.x_test.numpy())


@pytest.mark.timing
def test_the_real_mnist_loads_quickly(mnist_dir: Path) -> None:
    def seconds() -> float:
        start = time.perf_counter()
        data.load("mnist", mnist_dir)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 1.5


def test_the_real_fashion_mnist_is_balanced_and_has_its_published_statistics(
    shared_data: Path, tmp_path: Path
) -> None:
    got = data.load("fashion-mnist", materialised(shared_data, tmp_path, "fashion-mnist"))
    assert got.y_train.bincount().tolist() == [6000] * 10
    assert got.y_test.bincount().tolist() == [1000] * 10
    assert matches_published_statistics(got, 5e-4)


@pytest.mark.slow
@pytest.mark.full
def test_the_real_cifar10_is_balanced_and_has_its_published_mean(shared_data: Path, tmp_path: Path) -> None:
    got = data.load("cifar10", materialised(shared_data, tmp_path, "cifar10"))
    assert got.y_train.bincount().tolist() == [5000] * 10
    assert got.y_test.bincount().tolist() == [1000] * 10
    # The customary std is the mean over images of each image's own, below that of all pixels (.2470, …).
    assert matches_published_statistics(got, 0.065)
