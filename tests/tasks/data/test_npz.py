"""A user's own arrays in a NumPy archive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparse_export.errors import ArtefactError, DataNotFound, UsageError
from sparse_export.tasks import data


def write(path: Path, **changes: Any) -> Path:
    """A sound archive of 10 and 4 images, 6x5x3, with some arrays changed, or left out where None."""
    rng = np.random.default_rng(7)
    arrays: dict[str, Any] = {
        "x_train": rng.integers(0, 256, (10, 6, 5, 3), dtype=np.uint8),
        "y_train": np.arange(10) % 3,
        "x_test": rng.integers(0, 256, (4, 6, 5, 3), dtype=np.uint8),
        "y_test": np.array([2, 1, 0, 2], dtype=np.uint8),
    }
    arrays.update(changes)
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def load(path: Path) -> data.DataSet:
    return data.load(f"npz:{path}")


def test_channels_last_images_become_channels_first(tmp_path: Path) -> None:
    path = write(tmp_path / "own.npz")
    got = load(path)
    assert got.input_shape == (3, 6, 5)
    assert got.n_classes == 3
    assert torch.equal(got.x_train.permute(0, 2, 3, 1), torch.from_numpy(np.load(path)["x_train"]))
    assert got.x_train.is_contiguous() and got.y_test.tolist() == [2, 1, 0, 2]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((28, 28), (1, 28, 28)),
        ((28, 28, 1), (1, 28, 28)),
        ((1, 28, 28), (1, 28, 28)),
        ((3, 9, 3), (3, 9, 3)),
        ((1, 9, 3), (1, 9, 3)),
        ((4, 9, 8), (4, 9, 8)),
    ],
)
def test_the_axis_of_the_channels_is_told_by_its_length(
    shape: tuple[int, ...], expected: tuple[int, ...], tmp_path: Path
) -> None:
    def images(n: int) -> np.ndarray[Any, Any]:
        return np.ones((n, *shape), dtype=np.uint8)

    got = load(write(tmp_path / "own.npz", x_train=images(10), x_test=images(4)))
    assert got.input_shape == expected


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(5,), (2, 9), (3, 4, 4), (2, 3, 4, 4)])
def test_floats_of_any_shape_become_float32_with_statistics_of_the_training_set(
    dtype: type, shape: tuple[int, ...], tmp_path: Path
) -> None:
    x: np.ndarray[Any, Any] = np.random.default_rng(1).normal(4, 3, (14, *shape)).astype(dtype)
    got = load(write(tmp_path / "own.npz", x_train=x[:10], x_test=x[10:]))
    assert got.x_train.dtype == torch.float32
    assert got.input_shape == shape
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    reference = x[:10].astype(np.float32).astype(np.float64)
    assert got.mean == pytest.approx(reference.mean(axes))
    assert got.std == pytest.approx(reference.std(axes))
    assert torch.isfinite(data.normalise(got.x_test, got.mean, got.std)).all()


def test_channels_last_floats_become_channels_first_too(tmp_path: Path) -> None:
    x = np.random.default_rng(1).random((14, 6, 5, 3), dtype=np.float32)
    assert load(write(tmp_path / "own.npz", x_train=x[:10], x_test=x[10:])).input_shape == (3, 6, 5)


def test_the_number_of_classes_counts_labels_of_the_test_set_too(tmp_path: Path) -> None:
    assert load(write(tmp_path / "own.npz", y_test=np.array([0, 1, 2, 6]))).n_classes == 7


def test_a_compressed_archive_is_read_as_well(tmp_path: Path) -> None:
    plain = write(tmp_path / "own.npz")
    with np.load(plain) as arrays:
        np.savez_compressed(tmp_path / "small.npz", **arrays)
    assert data.test_sha256(load(tmp_path / "small.npz")) == data.test_sha256(load(plain))


NAN_AT_9_4 = np.where(np.arange(50).reshape(10, 5) == 49, np.nan, 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, r"has no y_test.*It holds x_train, y_train, x_test\."),
        ({"x_train": None, "y_train": None}, r"has no x_train and no y_train"),
        (
            {"y_train": np.zeros(9, int)},
            r"has labels in y_train that do not match the samples: 9 labels for 10 samples",
        ),
        (
            {"x_test": np.zeros((0, 6, 5, 3), np.uint8), "y_test": np.zeros(0, int)},
            r"has labels in y_test that do not match the samples: 0 labels for 0 samples",
        ),
        ({"y_train": np.linspace(0, 1, 10)}, r"has labels in y_train that are float64, .*regression targets"),
        (
            {"y_test": np.array([0, np.nan, 1, 2])},
            r"has labels in y_test that are float64 with 1 NaN, first at",
        ),
        ({"y_train": np.zeros(10, bool)}, r"has labels in y_train that are bool\. Convert them"),
        (
            {"y_train": np.eye(10, dtype=int)},
            r"has labels in y_train that are one-hot, .*argmax\(1\), or name the task multilabel",
        ),
        ({"y_train": np.zeros((10, 1), int)}, r"has labels in y_train that have shape \(10, 1\)\. .*ravel"),
        ({"y_test": np.array([0, 1, -1, 2])}, r"has labels in y_test that run from -1 to 2, .*from 0"),
        (
            {"y_test": np.array([0, 1, 2, 2**63], np.uint64)},
            r"has labels in y_test that run from 0 to 9223372036854775808, outside",
        ),
        (
            {"x_train": np.zeros((10, 6, 5, 3), np.int64)},
            r"x_train of type int64 and shape \(10, 6, 5, 3\).*uint8",
        ),
        ({"x_train": np.zeros((10, 30), np.uint8)}, r"x_train of type uint8 and shape \(10, 30\)"),
        ({"x_train": np.zeros(10, np.float32)}, r"x_train of type float32 and shape \(10,\)"),
        ({"x_train": np.zeros((10, 0, 5), np.uint8)}, r"shape \(10, 0, 5\)"),
        ({"x_train": np.zeros((), np.uint8)}, r"x_train of type uint8 and shape \(\)"),
        (
            {"x_test": np.zeros((4, 6, 6, 3), np.uint8)},
            r"shape \(10, 3, 6, 5\) and test inputs .*\(4, 3, 6, 6\)",
        ),
        ({"x_test": np.zeros((4, 6, 5, 3), np.float32)}, r"type uint8 .* test inputs of type float32"),
        ({"x_train": NAN_AT_9_4}, r"1 values in x_train that are NaN or infinite, the first at \(9, 4\)"),
        ({"x_train": np.full((10, 5), 1e300)}, r"50 values in x_train that are NaN or infinite"),
        (
            {"x_train": np.array([{}] * 10, dtype=object)},
            r"cannot be read as a NumPy archive.*Python objects",
        ),
    ],
)
def test_arrays_that_cannot_be_a_data_set_are_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "own.npz", **changes)
    with pytest.raises(
        (ArtefactError, UsageError),
        match=rf"own\.npz {'' if message.startswith(('has', 'cannot')) else '.*'}{message}",
    ):
        load(path)


@pytest.mark.parametrize("keep", [0, 1, 40, 500, -1, -100])
def test_a_truncated_archive_is_named(keep: int, tmp_path: Path) -> None:
    path = write(tmp_path / "own.npz")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtefactError, match=r"own\.npz cannot be read as a NumPy archive"):
        load(path)


@pytest.mark.parametrize("content", [b"garbage not zip", b"PK\x03\x04", b"\x93NUMPY", b"x"])
def test_nobody_is_told_how_to_load_a_file_unsafely(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"own\.npz cannot be read as a NumPy archive: \w+") as caught:
        load(path)
    assert "pickle" not in str(caught.value)
    assert ".." not in str(caught.value)


def test_an_archive_with_a_changed_byte_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "own.npz")
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"own\.npz cannot be read as a NumPy archive.*CRC"):
        load(path)


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [(8, 1, "password"), (10, 97, "compression"), (6, 200, "zip file version")],
    ids=["a password", "a way to compress", "a version"],
)
def test_what_a_zip_asks_for_that_python_has_not_is_told(
    offset: int, value: int, reason: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "own.npz")
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")  # the first entry's fields: x_train
    content[directory + offset] = value
    content[offset - 2] = value  # and again in front of the data
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=rf"own\.npz cannot be read as a NumPy archive: .*{reason}"):
        load(path)


def test_a_file_with_a_single_array_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "own.npy", np.zeros(3))
    with pytest.raises(ArtefactError, match=r"has no x_train.*It holds no named arrays"):
        load(tmp_path / "own.npy")


@pytest.mark.parametrize("place", ["absent.npz", "."])
def test_an_absent_archive_is_not_found_at_the_path_looked_at(place: str, tmp_path: Path) -> None:
    with pytest.raises(DataNotFound, match=rf"{tmp_path}.* is not a file.*--data-dir"):
        data.load(f"npz:{place}", tmp_path)
