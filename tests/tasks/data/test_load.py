"""Names of data sets, and where they are looked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sparse_export.errors import DataNotFound, UnknownNameError, UsageError
from sparse_export.tasks import data


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "folder" / "own.npz"
    path.parent.mkdir()
    x = rng.integers(0, 256, (6, 5, 4), dtype=np.uint8)
    np.savez(path, x_train=x, y_train=np.arange(6), x_test=x, y_test=np.arange(6))
    return path


def test_every_name_is_known_and_the_digits_need_no_folder(tmp_path: Path) -> None:
    assert data.names() == ("digits", "mnist", "fashion-mnist", "cifar10")
    for name in data.names()[1:]:
        with pytest.raises(DataNotFound):
            data.load(name, tmp_path)
    assert data.load("digits", tmp_path / "absent").name == "digits"


@pytest.mark.parametrize("name", ["minst", "npz", "NPZ:own.npz", "csv:own.csv", "", ":"])
def test_an_unknown_name_is_answered_with_the_known_ones(name: str) -> None:
    with pytest.raises(
        UnknownNameError, match=r"no data set named.*digits.*imagefolder:DIR.*mnist.*npz:FILE"
    ):
        data.load(name)


@pytest.mark.parametrize("name", ["npz:", "imagefolder:"])
def test_a_form_without_a_path_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"has no path after the colon"):
        data.load(name)


@pytest.mark.parametrize("name", ["npz:~nobody-of-that-name/own.npz", "imagefolder:~nobody-of-that-name"])
def test_a_path_in_an_unknown_home_is_told(name: str) -> None:
    with pytest.raises(UsageError, match=r"~nobody-of-that-name.*home folder.*whole path"):
        data.load(name)


def test_a_relative_file_starts_at_the_data_folder_when_one_is_given(archive: Path) -> None:
    assert data.load("npz:own.npz", archive.parent).name == "npz:own.npz"


def test_a_relative_file_starts_at_the_current_folder_when_none_is_given(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(archive.parent)
    assert data.load("npz:own.npz").n_classes == 6


def test_an_absolute_file_is_taken_as_it_is(archive: Path, tmp_path: Path) -> None:
    assert data.load(f"npz:{archive}", tmp_path / "elsewhere").n_classes == 6


def test_the_environment_names_the_data_folder_at_the_time_of_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("first", "second"):
        monkeypatch.setenv("SPARSE_EXPORT_DATA", str(tmp_path / place))
        assert data.default_data_dir() == tmp_path / place
        with pytest.raises(DataNotFound, match=f"{place}/MNIST/raw/train-images-idx3-ubyte does not exist"):
            data.load("mnist")


@pytest.mark.parametrize("value", [None, ""])
def test_without_the_environment_the_users_cache_is_the_data_folder(
    value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    if value is None:
        monkeypatch.delenv("SPARSE_EXPORT_DATA", raising=False)
    else:
        monkeypatch.setenv("SPARSE_EXPORT_DATA", value)
    assert data.default_data_dir() == tmp_path / ".cache/sparse-export/data"


def test_images_of_a_fixed_size_cannot_be_had_in_another() -> None:
    assert data.load("digits", image_size=(8, 8)).input_shape == (1, 8, 8)
    with pytest.raises(UsageError, match=r"\(28, 28\) were requested, but those of digits are \(8, 8\)"):
        data.load("digits", image_size=(28, 28))


@pytest.mark.parametrize("name", ["digits", "npz:own.npz"])
def test_sets_that_torchvision_does_not_read_do_not_wait_for_its_import(name: str, archive: Path) -> None:
    code = f"import sys; from sparse_export.tasks import data; data.load({name!r}); sys.exit('torchvision' in sys.modules)"
    root = Path(data.__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r}); {code}"],
        cwd=archive.parent,
        check=False,
    )
    assert done.returncode == 0


def test_a_data_folder_in_an_unknown_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_EXPORT_DATA", "~nobody-of-that-name/data")
    with pytest.raises(UsageError, match=r"~nobody-of-that-name/data.*Set SPARSE_EXPORT_DATA"):
        data.default_data_dir()
