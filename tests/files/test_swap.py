"""Two names swap in one step, or nothing happens."""

from __future__ import annotations

import ctypes
import errno
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparse_export.files import swap as module
from sparse_export.files.swap import exchange


@pytest.fixture(autouse=True)
def _anew() -> None:
    module._renameat2.cache_clear()


def _folders(tmp_path: Path) -> tuple[Path, Path]:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / folder.name).touch()
    return one, other


class _OldLibrary:
    """A C library without the function; it has the system call."""

    def __init__(self, *_: object, **__: object) -> None:
        self.syscall = CDLL(None, use_errno=True).syscall


CDLL = ctypes.CDLL


@pytest.mark.skipif(platform.system() != "Linux", reason="renameat2 is Linux's")
@pytest.mark.parametrize("library", [CDLL, _OldLibrary])
def test_two_folders_swap_names(
    library: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", library)
    one, other = _folders(tmp_path)
    assert exchange(one, other)
    assert [path.name for path in (*one.iterdir(), *other.iterdir())] == ["other", "one"]


@pytest.mark.skipif(platform.system() != "Linux", reason="renameat2 is Linux's")
def test_a_name_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    one, _ = _folders(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        exchange(one, tmp_path / "absent")


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
def test_what_a_kernel_or_a_file_system_does_not_know_changes_nothing(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> int:
        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(module, "_renameat2", lambda: unknown)
    assert not exchange(*_folders(tmp_path))
    monkeypatch.setattr(module, "_renameat2", lambda: None)  # another system
    assert not exchange(tmp_path / "one", tmp_path / "other")


def test_another_failure_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        ctypes.set_errno(errno.ENOSPC)
        return -1

    monkeypatch.setattr(module, "_renameat2", lambda: full)
    with pytest.raises(OSError, match="No space left"):
        exchange(*_folders(tmp_path))
