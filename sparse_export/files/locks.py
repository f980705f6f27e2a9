"""Locks by which one process at a time writes a folder; the kernel releases them when their holder ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING

from sparse_export.errors import FolderInUse, output_error

if TYPE_CHECKING:
    from filelock import FileLock

__all__ = ["SHORT_WAIT_S", "abandoned", "held_here", "lock_path", "lock_temporary", "locked"]

SHORT_WAIT_S = 0.1  # long enough where another process only looks, or has just ended
_POLL_S = 0.02
# Errors of a file system without locks, such as Lustre mounted without them.
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK}
# (process, thread, lock file) of the locks held here. A forked child also has its parent's, which it does not
# hold.
_held: set[tuple[int, int, Path]] = set()


def lock_path(folder: Path) -> Path:
    """Locate the lock of a folder: `.NAME.lock` beside it, links followed.

    Args:
        folder: need not exist.
    """
    real = Path(os.path.realpath(folder))
    return real.with_name(f".{real.name}.lock")


def held_here(folder: Path) -> bool:
    """Does a thread of this very process hold the lock of a folder?

    Args:
        folder: need not exist.
    """
    file = lock_path(folder)
    return any((process, held) == (os.getpid(), file) for process, _, held in _held)


@contextmanager
def locked(folder: Path, *, wait_s: float = SHORT_WAIT_S) -> Iterator[bool]:
    """Hold the lock of a folder, which need not exist; within one thread it may be taken again.

    The lock file is removed when the lock is released. One that a killed process left does no harm: the
    kernel has released its lock.

    Args:
        folder: what is to be written.
        wait_s: how long to wait for another process that holds it.

    Yields:
        True when it is held; False where the file system has no locks, with a warning.

    Raises:
        FolderInUse: another process, or another thread, holds it; the message names it.
        OutputError: the lock file cannot be made or opened.
    """
    file = lock_path(folder)
    me = (os.getpid(), threading.get_ident(), file)
    if me in _held:
        yield True
        return
    lock = _acquire(folder, file, wait_s)
    if lock is None:
        yield False
        return
    _held.add(me)
    try:
        yield True
    finally:
        _held.discard(me)
        if os.getpid() == me[0]:
            with contextlib.suppress(OSError):
                file.unlink()  # still locked: who opened it meanwhile finds it nameless, and retries
            lock.release()


def _acquire(folder: Path, file: Path, wait_s: float) -> FileLock | None:
    """Take the lock and write a note of its holder; None where the file system has no locks."""
    from filelock import FileLock, Timeout  # the import takes longer than `--help`

    lock = FileLock(file, thread_local=False, fallback_to_soft=False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=wait_s, poll_interval=_POLL_S)
    except Timeout as cause:
        raise _in_use(folder, file) from cause
    except OSError as cause:
        if cause.errno in _NO_LOCKS:
            warnings.warn(
                f"{file.parent} lies on a file system without locks: nothing keeps a second process from "
                f"writing {file.name.removeprefix('.').removesuffix('.lock')} at the same time.",
                RuntimeWarning,
                stacklevel=4,
            )
            return None
        raise output_error(file, cause) from cause
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a note
        file.write_text(json.dumps(_note()))
    return lock


def _note() -> dict[str, str | int]:
    """What other processes are to know about this one."""
    program = Path(sys.argv[0])
    name = "sparse-export" if program.name == "__main__.py" else program.name
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([name, *sys.argv[1:]]),
    }


def _in_use(folder: Path, file: Path) -> FolderInUse:
    """The error that names the holder."""
    try:
        note = json.loads(file.read_bytes())
        holder = "process {pid} on {host} since {since}: {command}".format_map(note)
    except (OSError, ValueError, TypeError, KeyError):
        holder = f"another process, which left no note in {file}"
    return FolderInUse(
        f"{folder} is being written by {holder}.",
        do="Wait until that has ended, or choose another place with --out.",
    )


def lock_temporary(stream: IO[bytes]) -> bool:
    """Lock a temporary file while it is open, so that `abandoned` sees that its writer is alive.

    Args:
        stream: the open file. A file system without locks leaves it unlocked.

    Returns:
        False when another process has just removed the file.
    """
    with contextlib.suppress(OSError):
        fcntl.flock(stream, fcntl.LOCK_EX)
    return os.fstat(stream.fileno()).st_nlink > 0


@contextmanager
def abandoned(file: Path) -> Iterator[bool]:
    """Check whether the writer of a temporary file has ended.

    Args:
        file: the temporary file.

    Yields:
        True when it has; no other process then reuses the file while the block runs.
    """
    try:
        stream = file.open("rb+")  # a network file system locks only what can be written
    except OSError:
        yield False
        return
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
