"""One process writes a folder at a time, and whoever is refused learns which."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import pytest

from sparse_export.errors import FolderInUse, OutputError
from sparse_export.files.locks import lock_path, locked

CHECKOUT = Path(__file__).resolve().parents[2]

_HOLDING = """
import os, sys
from pathlib import Path
from sparse_export.files.locks import locked
with locked(Path(sys.argv[1])):
    if len(sys.argv) > 2 and os.fork() == 0:  # as a worker that reads pictures: it outlives a killed parent
        sys.stdin.read()
        os._exit(0)
    print(flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_elsewhere(folder: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds the lock of a folder until its stdin ends, or it is killed."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDING, str(folder), *words],
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def test_a_second_process_is_refused_and_told_who_holds_the_lock(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with held_elsewhere(folder) as process:
        with pytest.raises(FolderInUse) as caught, locked(folder):
            pass
        told = rf"{folder} is being written by process {process.pid} on {socket.gethostname()} since 20"
        assert str(caught.value).startswith(told)
        assert f": -c {folder}." in str(caught.value)  # its command
        assert caught.value.exit_code == 2
        with locked(tmp_path / "another"):
            pass
    with locked(folder):
        pass


def test_the_lock_lies_beside_the_folder_while_it_is_held_and_no_longer(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with locked(folder) as is_held:
        assert is_held
        assert [path.name for path in tmp_path.iterdir()] == [".run.lock"]
    assert list(tmp_path.iterdir()) == []


def test_two_spellings_of_a_folder_have_one_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    found = {lock_path(Path(name)) for name in ("real", "link", "./real/", "real/../real")}
    assert found == {tmp_path / ".real.lock"}


@pytest.mark.parametrize("child", [(), ("and a child of its own",)])
def test_a_process_that_is_killed_leaves_no_lock(child: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with held_elsewhere(folder, *child) as process:
        process.kill()
        process.wait()
        assert lock_path(folder).exists()  # its file, which does no harm
        with locked(folder):
            pass
        assert not lock_path(folder).exists()


def test_within_a_thread_it_is_taken_again_and_held_to_the_end(tmp_path: Path) -> None:
    folder, refused = tmp_path / "run", []

    def other() -> None:
        try:
            with locked(folder, wait_s=0.0):
                pass
        except FolderInUse as error:
            refused.append(str(error))

    with locked(folder):
        with locked(folder), locked(folder):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert f"process {os.getpid()} " in refused[0]


_CONTENDING = """
import sys, time
from pathlib import Path
from sparse_export.files.locks import locked
folder = Path(sys.argv[1])
for _ in range(60):
    with locked(folder, wait_s=30.0):
        (folder / "held").touch(exist_ok=False)
        time.sleep(0.0005)
        (folder / "held").unlink()
"""


def test_processes_that_wait_for_a_lock_whose_file_is_removed_hold_it_one_after_the_other(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    words = [sys.executable, "-c", _CONTENDING, str(folder)]
    processes = [subprocess.Popen(words, cwd=CHECKOUT) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]


def test_a_file_system_without_locks_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(filelock.FileLock, "acquire", unknown)
    with (
        pytest.warns(RuntimeWarning, match=f"{tmp_path} lies on a file system without locks.* run "),
        locked(tmp_path / "run") as is_held,
    ):
        assert not is_held


def test_a_lock_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot write"), locked(tmp_path / "file" / "run"):
        pass


def test_a_lock_of_another_user_that_may_not_be_opened_is_an_output_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(filelock.FileLock, "acquire", refused)
    with pytest.raises(OutputError, match=r"Cannot write .*\.run\.lock: Permission denied"):
        locked(tmp_path / "run").__enter__()
