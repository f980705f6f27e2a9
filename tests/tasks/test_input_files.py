"""Inputs from files: checked by their headers, chosen by a seed, batched by their sizes."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from sparse_export.errors import ArtefactError, UsageError
from sparse_export.signature import Array, Signature, TensorInfo
from sparse_export.tasks import inputs as calibration
from sparse_export.tasks.inputs import InputFiles, read_inputs
from tests.oneshot.graphs import drawn

TEXT = Signature(
    inputs=(
        TensorInfo(name="ids", dtype="int64", shape=("batch", "length"), low=0, high=99),
        TensorInfo(name="mask", dtype="bool", shape=("batch", "length")),
        TensorInfo(name="rate", dtype="int64", shape=()),
        TensorInfo(name="state", dtype="float32", shape=(2, "batch", 3)),
    ),
    outputs=(TensorInfo(name="y", dtype="float32", shape=("batch", 4)),),
)
PICTURE = Signature(
    inputs=(TensorInfo(name="x", dtype="float32", shape=("batch", 3, "h", "w")),),
    outputs=(TensorInfo(name="y", dtype="float32", shape=("batch", 4)),),
)
FIXED = Signature(
    inputs=(
        TensorInfo(name="x", dtype="float32", shape=(1, 4)),
        TensorInfo(name="scale", dtype="float32", shape=(2,)),
    ),
    outputs=(TensorInfo(name="y", dtype="float32", shape=(1, 4)),),
    batch=None,
)


def texts(n: int, length: int = 5, rate: int = 16) -> dict[str, Array]:
    return {
        "ids": np.arange(n * length).reshape(n, length) % 100,
        "mask": np.ones((n, length), bool),
        "rate": np.array(rate),
        "state": np.tile(np.arange(n, dtype=np.float32)[None, :, None], (2, 1, 3)),
    }


def written(path: Path, arrays: Mapping[str, Array]) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def check(found: InputFiles, signature: Signature) -> None:
    for batch in found.batches:
        signature.require_feeds(batch)
    assert sum(map(signature.n_samples, found.batches)) == found.n_samples


def test_samples_are_taken_together_along_the_batch_axis_of_each_input(tmp_path: Path) -> None:
    file = written(tmp_path / "a.npz", texts(300))
    found = read_inputs(file, TEXT)
    check(found, TEXT)
    assert [len(batch["ids"]) for batch in found.batches] == [100, 100, 100]
    for name, axis in (("ids", 0), ("mask", 0), ("state", 1)):
        assert np.array_equal(
            np.concatenate([batch[name] for batch in found.batches], axis), texts(300)[name]
        )
    assert found.files == {"a.npz": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert (found.n_samples, found.n_available) == (300, 300)


def test_the_choice_of_samples_hangs_on_the_seed_alone(tmp_path: Path) -> None:
    file = written(tmp_path / "a.npz", texts(300))
    first, second, other = (read_inputs(file, TEXT, n_samples=40, seed=seed) for seed in (1, 1, 2))
    check(first, TEXT)
    chosen = [
        [int(n) for batch in one.batches for n in batch["state"][0, :, 0]] for one in (first, second, other)
    ]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == first.n_samples == 40
    assert chosen[0] != list(range(40))
    assert first.n_available == 300
    # The samples of one number are taken from each input alike.
    for batch in first.batches:
        assert np.array_equal(batch["ids"][:, 0], batch["state"][0, :, 0] * 5 % 100)


def test_files_of_a_folder_share_batches_where_sizes_and_constant_inputs_are_equal(tmp_path: Path) -> None:
    for name, arrays in {
        "1": texts(3, 5),
        "2": texts(2, 7),
        "3": texts(4, 5),
        "4": texts(1, 5, rate=8),
    }.items():
        written(tmp_path / f"{name}.npz", arrays)
    (tmp_path / "notes.txt").write_text("not looked at")
    found = read_inputs(tmp_path, TEXT)
    check(found, TEXT)
    assert sorted((*batch["ids"].shape, int(batch["rate"])) for batch in found.batches) == [
        (1, 5, 8),
        (2, 7, 16),
        (7, 5, 16),
    ]
    assert list(found.files) == ["1.npz", "2.npz", "3.npz", "4.npz"]


def test_one_array_is_the_input_of_a_network_that_has_one(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", drawn(5, 3, 6, 4))
    found = read_inputs(tmp_path / "x.npy", PICTURE, n_samples=4)
    check(found, PICTURE)
    assert found.n_samples == 4
    with pytest.raises(UsageError, match=r"one array, and the network takes ids int64 \(batch, length\), "):
        read_inputs(tmp_path / "x.npy", TEXT)


def test_batches_of_large_samples_have_few_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_BATCH_VALUES", 3 * 6 * 4 * 2)
    file = written(tmp_path / "a.npz", {"x": drawn(5, 3, 6, 4)})
    assert [len(batch["x"]) for batch in read_inputs(file, PICTURE).batches] == [1, 2, 2]


@pytest.mark.parametrize("shape", [(6, 1, 4), (6, 4)])
def test_a_network_without_a_free_batch_size_is_called_once_for_each_sample(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    x, scale = drawn(*shape), drawn(2)
    found = read_inputs(written(tmp_path / "a.npz", {"x": x, "scale": scale}), FIXED)
    check(found, FIXED)
    assert found.n_samples == 6
    for batch, row in zip(found.batches, x.reshape(6, 1, 4), strict=True):
        assert np.array_equal(batch["x"], row)
        assert np.array_equal(batch["scale"], scale)


def test_calls_are_as_many_of_each_input(tmp_path: Path) -> None:
    file = written(tmp_path / "a.npz", {"x": drawn(6, 4), "scale": drawn(5, 2)})
    with pytest.raises(UsageError, match="different numbers of calls: 6 of x, 5 of scale"):
        read_inputs(file, FIXED)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ids": np.zeros((4, 5), np.int32)}, "ids is int32, not int64"),
        ({"ids": np.zeros((3, 5), np.int64)}, "batch is 4 in mask and 3 in another input"),
        ({"state": np.zeros((2, 4, 9), np.float32)}, r"state has shape \(2, 4, 9\), not \(2, batch, 3\)"),
        ({"more": np.zeros(3)}, "inputs are ids, mask, rate, state, more"),
        ({"state": np.full((2, 4, 3), np.nan, np.float32)}, "state holds NaN or infinity"),
        ({"ids": np.full((4, 5), 100)}, "values of ids are from 100 to 100"),
    ],
)
def test_arrays_that_are_not_the_inputs_are_refused_with_the_file(
    change: dict[str, Array], words: str, tmp_path: Path
) -> None:
    file = written(tmp_path / "a.npz", texts(4) | change)
    with pytest.raises(UsageError, match=words) as refused:
        read_inputs(file, TEXT)
    assert "a.npz" in str(refused.value)


def test_a_size_is_checked_before_the_array_is_read(tmp_path: Path) -> None:
    """A header may claim any size."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 7), }"
    header = header.ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(ArtefactError, match=r"x\.npy is shorter than its shape \(1000000000000, 7\)"):
        read_inputs(tmp_path / "a.npz", PICTURE)


class Opens:
    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, ("opened", "w")


def test_pickles_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    objects = np.empty(1, dtype=object)
    objects[0] = Opens()
    np.savez(tmp_path / "a.npz", x=objects)
    np.save(tmp_path / "x.npy", objects)
    for name in ("a.npz", "x.npy"):
        with pytest.raises(ArtefactError, match=f"{name} cannot be read .* holds Python objects"):
            read_inputs(tmp_path / name, PICTURE)
    assert not (tmp_path / "opened").exists()


def test_files_that_are_none_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK no archive")
    with pytest.raises(
        ArtefactError, match=r"a\.npz cannot be read as arrays of NumPy: File is not a zip file"
    ):
        read_inputs(tmp_path / "a.npz", PICTURE)
    whole = written(tmp_path / "b.npz", {"x": drawn(5, 3, 6, 4)}).read_bytes()
    damaged = bytearray(whole)
    damaged[400] ^= 1
    (tmp_path / "b.npz").write_bytes(damaged)
    with pytest.raises(ArtefactError, match=r"b\.npz cannot be read as arrays of NumPy: Bad CRC"):
        read_inputs(tmp_path / "b.npz", PICTURE)
    (tmp_path / "c.txt").write_text("")
    with pytest.raises(UsageError, match="no file of inputs by its name"):
        read_inputs(tmp_path / "c.txt", PICTURE)
    with pytest.raises(UsageError, match="neither a file nor a folder"):
        read_inputs(tmp_path / "absent.npz", PICTURE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"has no \.npz file"):
        read_inputs(tmp_path / "empty", PICTURE)
    with pytest.raises(UsageError, match="holds no samples"):
        read_inputs(written(tmp_path / "d.npz", {"x": drawn(0, 3, 6, 4)}), PICTURE)
    with pytest.raises(UsageError, match="0 samples were asked for"):
        read_inputs(tmp_path / "d.npz", PICTURE, n_samples=0)


def test_the_names_that_are_missing_and_unknown_are_told_apart(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", picture=np.zeros((2, 7), np.float32))
    with pytest.raises(UsageError, match=r"is missing; the network has no input picture"):
        read_inputs(tmp_path / "a.npz", PICTURE)
