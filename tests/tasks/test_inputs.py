"""Inputs from files fit the network, or are refused in words before they are run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sparse_export.errors import ArtefactError, UsageError
from sparse_export.files import sha256_file
from sparse_export.signature import Array, Signature, TensorInfo, class_signature
from sparse_export.tasks.inputs import INPUTS_BATCH, read_inputs
from tests.tagging import SIGNATURE

ONE = class_signature((3,), 2, names=("x", "y"))
FIXED = Signature(
    inputs=(
        TensorInfo(name="x", dtype="float32", shape=(1, 3)),
        TensorInfo(name="rate", dtype="int64", shape=()),
    ),
    outputs=(),
    batch=None,
)


def _tokens(n: int = 4, length: int = 5) -> dict[str, Array]:
    generator = np.random.default_rng(n * length)
    return {
        "ids": generator.integers(0, 5, (n, length)),
        "mask": generator.random((n, length), dtype=np.float32),
    }


def _saved(file: Path, **arrays: Array) -> Path:
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file


def test_arrays_by_name_come_in_one_batch(tmp_path: Path) -> None:
    wanted = _tokens()
    file = _saved(tmp_path / "in.npz", **wanted)
    found = read_inputs(file, SIGNATURE)
    (batch,) = found.batches
    for name in wanted:
        np.testing.assert_array_equal(batch[name], wanted[name])
    assert (found.n_samples, found.n_available) == (4, 4)
    assert found.files == {"in.npz": sha256_file(file)}


def test_one_array_goes_for_the_one_input(tmp_path: Path) -> None:
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.save(tmp_path / "x.npy", x)
    (batch,) = read_inputs(tmp_path / "x.npy", ONE).batches
    np.testing.assert_array_equal(batch["x"], x)


def test_files_of_a_folder_with_other_lengths_come_in_batches_of_their_own(tmp_path: Path) -> None:
    for at, length in enumerate((5, 7, 5)):
        _saved(tmp_path / f"{at}.npz", **_tokens(at + 1, length))
    found = read_inputs(tmp_path, SIGNATURE)
    assert [batch["ids"].shape for batch in found.batches] == [(4, 5), (2, 7)]
    assert sorted(found.files) == ["0.npz", "1.npz", "2.npz"]


def test_of_too_many_some_are_chosen_by_the_seed_in_their_order(tmp_path: Path) -> None:
    x = np.arange(1000, dtype=np.float32)[:, None] * np.ones(3, np.float32)
    np.save(tmp_path / "x.npy", x)
    first, again, other = (
        read_inputs(tmp_path / "x.npy", ONE, n_samples=200, seed=seed) for seed in (0, 0, 1)
    )
    assert [len(batch["x"]) for batch in first.batches] == [100, 100]
    assert INPUTS_BATCH >= 100
    assert (first.n_samples, first.n_available) == (200, 1000)
    chosen, same, others = (
        np.concatenate([batch["x"] for batch in one.batches])[:, 0] for one in (first, again, other)
    )
    assert (np.diff(chosen) > 0).all()
    np.testing.assert_array_equal(chosen, same)
    assert not np.array_equal(chosen, others)


def test_without_a_batch_axis_a_file_may_hold_several_calls(tmp_path: Path) -> None:
    x = np.arange(9, dtype=np.float32).reshape(3, 3)
    for name, given in (("first", x), ("before", x[:, None])):
        found = read_inputs(_saved(tmp_path / f"{name}.npz", x=given, rate=np.arange(3)), FIXED)
        assert found.n_samples == 3
        assert [batch["x"].tolist() for batch in found.batches] == [[row] for row in x.tolist()]
        assert [batch["rate"].tolist() for batch in found.batches] == [0, 1, 2]
    with pytest.raises(UsageError, match="different numbers of calls: 3 of x, 2 of rate"):
        read_inputs(_saved(tmp_path / "uneven.npz", x=x, rate=np.arange(2)), FIXED)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mask": None}, r"in\.npz: The inputs are ids: mask .* is missing\. ids int64 .* was expected"),
        ({"position": np.zeros((4, 5))}, "The inputs are ids, mask, position"),
        ({"ids": np.zeros((4, 5), np.int32)}, "The input ids is int32, not int64"),
        ({"mask": np.zeros((4, 5))}, "The input mask is float64, not float32"),
        ({"mask": np.zeros(4, np.float32)}, r"mask has shape \(4,\), not \(batch, sequence\)"),
        ({"mask": np.zeros((4, 6), np.float32)}, "sequence is 6 in mask and 5 in another input"),
        ({"mask": np.full((4, 5), np.nan, np.float32)}, "the input mask holds NaN or infinity"),
        (
            {"ids": np.full((4, 5), 5)},
            "the values of ids are from 5 to 5. The network takes those from 0 to 4",
        ),
        ({"ids": np.full((4, 5), -1)}, "the values of ids are from -1 to -1"),
        ({"ids": np.zeros((0, 5), int), "mask": np.zeros((0, 5), np.float32)}, "holds no samples"),
    ],
)
def test_arrays_that_are_not_the_inputs_are_refused(
    change: dict[str, Array | None], told: str, tmp_path: Path
) -> None:
    arrays = {name: one for name, one in {**_tokens(), **change}.items() if one is not None}
    with pytest.raises(UsageError, match=told):
        read_inputs(_saved(tmp_path / "in.npz", **arrays), SIGNATURE)


def test_what_is_no_file_of_inputs_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    np.save(tmp_path / "one.npy", np.zeros((2, 5), np.float32))
    for name, told in (
        ("absent.npz", "neither a file nor a folder"),
        ("empty", r"has no \.npz file"),
        ("notes.txt", r"no file of inputs by its name.*numpy\.savez"),
        ("one.npy", r"is one array, and the network takes ids int64 .*, mask float32"),
    ):
        with pytest.raises(UsageError, match=told):
            read_inputs(tmp_path / name, SIGNATURE)
    with pytest.raises(UsageError, match="0 samples were asked for"):
        read_inputs(tmp_path / "one.npy", ONE, n_samples=0)


def test_a_damaged_file_or_one_with_objects_is_refused(tmp_path: Path) -> None:
    whole = _saved(tmp_path / "in.npz", **_tokens()).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:-40])
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "objects.npy", np.array([{}, {}], dtype=object))
    for name in ("cut.npz", "text.npz", "text.npy", "objects.npy"):
        with pytest.raises(
            ArtefactError, match=rf"{name.replace('.', '[.]')} cannot be read as arrays of NumPy"
        ):
            read_inputs(tmp_path / name, ONE)
    with pytest.raises(ArtefactError, match="Python objects, which are not read"):
        read_inputs(tmp_path / "objects.npy", ONE)
