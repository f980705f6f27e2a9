"""Archives that unpack to more than they are worth."""

from __future__ import annotations

import errno
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_export.errors import ArtefactError, OutputError
from sparse_export.signature import Signature, TensorInfo
from sparse_export.tasks import archives
from sparse_export.tasks.data import npz
from sparse_export.tasks.inputs import read_inputs, some_arrays

SIGNATURE = Signature(
    inputs=(TensorInfo(name="x", dtype="float32", shape=("batch", 4)),),
    outputs=(TensorInfo(name="y", dtype="float32", shape=("batch", 2)),),
    batch="batch",
)


def bomb(folder: Path, n_zeros: int) -> Path:
    """Arrays of zeros, deflated."""
    file = folder / "bomb.npz"
    arrays: dict[str, Any] = {name: np.zeros((n_zeros // 16, 4), np.float32) for name in ("x", *npz.KEYS)}
    np.savez_compressed(file, **arrays)
    return file


def header_only(folder: Path) -> Path:
    """Arrays whose headers say 4 TB, and hold nothing."""
    file = folder / "header.npz"
    header = io.BytesIO()
    fields = {"descr": "<f4", "fortran_order": False, "shape": (2**38, 4)}
    np.lib.format.write_array_header_1_0(header, fields)
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("x", *npz.KEYS):
            archive.writestr(f"{name}.npy", header.getvalue())
    return file


READERS: dict[str, Callable[[Path], object]] = {
    "inputs": lambda file: read_inputs(file, SIGNATURE),
    "some arrays": some_arrays,
    "data": lambda file: npz.load("npz", file),
}


@pytest.mark.parametrize("use", READERS)
def test_a_bomb_is_refused_by_what_its_directory_declares(
    use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MOST_BYTES", 2**20)
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(ArtefactError, match=r"unpacks to 5,2\d\d,\d+ bytes, and has \d\d?,\d+"):
        READERS[use](bomb(tmp_path, 2**20))


@pytest.mark.parametrize("use", READERS)
def test_a_header_that_says_more_than_there_is_is_refused(use: str, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="is shorter than its shape"):
        READERS[use](header_only(tmp_path))


def test_compressed_inputs_are_read(tmp_path: Path) -> None:
    file = tmp_path / "x.npz"
    np.savez_compressed(file, x=np.zeros((5000, 4), np.float32))
    assert read_inputs(file, SIGNATURE).n_samples == 512


def test_a_full_temporary_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAPPED_BYTES", 1000)
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros((1000, 4), np.float32))

    def full(_file: int, _start: int, _size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"16,000 bytes .* temporary folder .*: No space left .* TMPDIR"):
        archives.open_arrays(tmp_path / "x.npz")
