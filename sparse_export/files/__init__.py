"""Writes files and folders whole or not at all, removes what killed processes left, and hashes files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from sparse_export.errors import ArtefactError, FolderInUse, OutputError, output_error
from sparse_export.files.locks import SHORT_WAIT_S, abandoned, held_here, lock_temporary, locked
from sparse_export.files.swap import exchange

__all__ = [
    "cache_folder",
    "claimed",
    "is_leftover",
    "json_bytes",
    "move_file",
    "output_error",
    "put_back",
    "remove_leftovers",
    "require_plain",
    "require_writable",
    "sha256_file",
    "staged_folder",
    "temporary_folder",
    "write_bytes",
    "write_json",
]

_TOKEN = r"\.(?:[a-z0-9_]{8}|\d+)"  # of earlier versions too, which put a process id there
_ASIDE = ".old.tmp"
_REPLACING_S = 2.0  # more than a process that lives needs between two renames


def sha256_file(path: Path) -> str:
    """Compute the hex SHA-256 of a file's bytes.

    Args:
        path: of the file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def require_plain(path: Path) -> None:
    """Check that a path is a file with bytes: a pipe or a device could be read for ever.

    Args:
        path: links are followed.

    Raises:
        OSError: there is none, or it is something else.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "It is no plain file", str(path))


def _sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_temporary(path: Path) -> tuple[Path, BinaryIO]:
    """Create a locked temporary file beside `path`, after removing those that dead processes left."""
    _remove_left_files(path.parent, re.escape(path.name))
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        stream = temporary.open("xb")
        if lock_temporary(stream):
            return temporary, stream
        stream.close()


def write_bytes(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Write a file under a temporary name in the same folder, flush it to disk, and rename it.

    Readers of `path` see the old content or the new one at any moment, a crash included.

    Args:
        path: of the file; its folder is created where absent.
        content: all of it, or its parts in order.

    Raises:
        OutputError: it cannot be written.
    """
    parts = (content,) if isinstance(content, bytes) else content
    _write(path, lambda stream: stream.writelines(parts))


def _write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write a file as `write_bytes` does, its content by a function."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, stream = _open_temporary(path)
        with stream:
            fill(stream)
            stream.flush()
            os.fsync(stream.fileno())
            temporary.replace(path)
        temporary = None
        _sync_folder(path.parent)
    except OSError as cause:
        raise output_error(path, cause) from cause
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def move_file(source: Path, path: Path) -> None:
    """Move a file as `write_bytes` writes one, also to another file system.

    Args:
        source: the file.
        path: its new path.

    Raises:
        OutputError: it cannot be moved.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as content:
            os.fsync(content.fileno())
            try:
                source.replace(path)
                _sync_folder(path.parent)
            except OSError as cause:
                if cause.errno != errno.EXDEV:  # another file system
                    raise
                _write(path, lambda stream: shutil.copyfileobj(content, stream))
                source.unlink()
    except OSError as cause:
        raise output_error(path, cause) from cause


def json_bytes(value: Any) -> bytes:
    """Encode indented JSON with a final newline.

    Args:
        value: made of dict, list, tuple, str, numbers, bool and None.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not have.
    """
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document by `write_bytes`.

    Args:
        path: of the file.
        value: as of `json_bytes`.

    Raises:
        OutputError: it cannot be written.
    """
    write_bytes(path, json_bytes(value))


def cache_folder() -> Path | None:
    """Locate `$XDG_CACHE_HOME/sparse-export`, under ~/.cache where that is unset or relative.

    Returns:
        The folder, which is not created here; None where there is no home folder either.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            return None
    return base / "sparse-export"


def require_writable(folder: Path) -> None:
    """Check before the work that a folder can be written to; it is created where absent.

    Args:
        folder: for the results.

    Raises:
        OutputError: it cannot be created, or nothing can be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as cause:
        raise output_error(folder, cause) from cause


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder of this program.

    Args:
        folder: a run or the like; files that are being written stay.
    """
    _remove_left_files(folder, ".+")


def is_leftover(name: str) -> bool:
    """Is this the name of a temporary file, which is being written or was left by a killed process?

    Args:
        name: without its folder.
    """
    return re.fullmatch(rf"\..+{_TOKEN}\.tmp", name) is not None


def _remove_left_files(folder: Path, name: str) -> None:
    """Remove abandoned temporary files. name: a pattern of the names that they were to get."""
    for entry in _entries(folder):
        if re.fullmatch(rf"\.{name}{_TOKEN}\.tmp", entry.name) and entry.is_file(follow_symlinks=False):
            with abandoned(Path(entry.path)) as is_abandoned, contextlib.suppress(OSError):
                if is_abandoned:
                    Path(entry.path).unlink()


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder; none where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


@contextmanager
def claimed(target: Path, *, wait_s: float = SHORT_WAIT_S) -> Iterator[Path]:
    """Hold the lock of a folder that is to be written, after cleaning up what killed processes left.

    A folder that one of them had set aside is put back, and its temporary folders and files are removed.

    Args:
        target: the folder; links are followed.
        wait_s: how long to wait for another process that writes there; by default it is refused at once.

    Yields:
        The folder, absolute and without links.

    Raises:
        FolderInUse: another process is writing there; the message names it.
        OutputError: nothing can be written beside it.
    """
    real = Path(os.path.realpath(target))
    with locked(real, wait_s=wait_s) as is_held:
        aside = _staged(real, _ASIDE)
        if aside and not os.path.lexists(real):
            try:
                aside.pop().rename(real)
                _sync_folder(real.parent)
            except OSError as cause:
                raise output_error(real, cause) from cause
        if is_held:
            for path in [*aside, *_staged(real)]:
                _remove(path)
        yield real


def _staged(target: Path, suffix: str = "") -> list[Path]:
    """The temporary folders of `target`, oldest first: unfinished ones, or with _ASIDE replaced ones."""
    wanted = re.compile(rf"\.{re.escape(target.name)}{_TOKEN}\.tmp{re.escape(suffix)}")
    found = (Path(entry.path) for entry in _entries(target.parent) if wanted.fullmatch(entry.name))
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=_changed_ns)


def _changed_ns(path: Path) -> int:
    """When a path was last changed, in ns; 0 where it is gone."""
    try:
        return path.stat().st_ctime_ns
    except OSError:  # gone by now
        return 0


def _remove(path: Path) -> None:
    """Remove a folder or file as far as possible, without an error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def put_back(path: Path) -> None:
    """Give a folder back its name, where a killed process had set it aside to replace it. Readers call this.

    Nothing is done, nor locked, where the folder exists, or none was set aside.

    Args:
        path: of the folder.

    Raises:
        ArtefactError: it cannot be put back; the message says where it is.
    """
    if path.exists():
        return
    real = Path(os.path.realpath(path))
    aside = _staged(real, _ASIDE)
    if not aside:
        return
    try:
        with claimed(real, wait_s=_REPLACING_S):
            pass
    except (FolderInUse, OutputError) as cause:
        if real.exists():  # a live process has put its new one there
            return
        raise ArtefactError(
            f"{path} is gone: a process ended while it replaced it. The old folder is {aside[-1]}, "
            f"and cannot be put back. {cause.what}",
            do=f"Rename it to {real}, as a user who may write there.",
        ) from cause


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its name when the block ends without an error.

    An existing folder is replaced at that moment; on an error it stays as it was, and the unfinished one is
    removed. Where the process is killed at that moment, the old or the new folder is there; or, where the
    file system cannot exchange names, the next process that reads or writes it puts the old one back.

    Args:
        target: of the folder; links are followed.

    Yields:
        The temporary folder.

    Raises:
        FolderInUse: another process writes there.
        OutputError: the folder cannot be written.
    """
    with claimed(target) as real:
        try:
            stage = real.with_name(f".{real.name}.{secrets.token_hex(4)}.tmp")
            stage.mkdir(mode=0o755)
            stage.chmod(0o755)  # whatever the umask: a server may run as another user
        except OSError as cause:
            raise output_error(target, cause) from cause
        try:
            yield stage
            _replace(real, stage)
        except OSError as cause:
            raise output_error(target, cause) from cause
        finally:
            shutil.rmtree(
                stage, ignore_errors=True
            )  # the unfinished folder, or after an exchange the old one


def _replace(target: Path, stage: Path) -> None:
    """Give the stage the name of the target, replacing what is there."""
    if not os.path.lexists(target):
        stage.rename(target)
    elif not exchange(stage, target):
        aside = stage.with_name(stage.name + _ASIDE)
        try:
            target.rename(aside)
            stage.rename(target)
        finally:  # an interruption may fall between the two renames, or after them
            if aside.exists() and not target.exists():
                aside.rename(target)
            _remove(aside)
    _sync_folder(target.parent)


@contextmanager
def temporary_folder(kind: str = "work", base: Path | None = None) -> Iterator[Path]:
    """Create an empty private folder in the system's temporary folder, and remove it at the end.

    Where this process is killed before that, the next one that creates a folder of the same kind removes it.

    Args:
        kind: a word in its name, `sparse-export-KIND-…`.
        base: another folder to create it in.

    Yields:
        The folder.

    Raises:
        OutputError: it cannot be created.
    """
    base = Path(tempfile.gettempdir()) if base is None else base
    _remove_left_folders(base, kind)
    path = base / f"sparse-export-{kind}-{secrets.token_hex(4)}"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path))  # before it exists: an unlocked one counts as abandoned
            path.mkdir(mode=0o700)
        except (OSError, OutputError) as cause:
            reason = cause.strerror if isinstance(cause, OSError) else cause.what
            raise OutputError(
                f"Cannot make a folder in {base}: {reason}.",
                do="Make room there, or set TMPDIR to another place.",
            ) from cause
        stack.callback(shutil.rmtree, path, ignore_errors=True)
        yield path


def _remove_left_folders(base: Path, kind: str) -> None:
    """Remove the temporary folders of this user whose lock nobody holds."""
    for entry in _entries(base):
        match = re.fullmatch(rf"\.(sparse-export-{re.escape(kind)}-[0-9a-f]{{8}})\.lock", entry.name)
        with contextlib.suppress(OSError, OutputError, FolderInUse):
            if match and entry.stat(follow_symlinks=False).st_uid == os.getuid():
                path = base / match[1]
                if held_here(path):  # a lock can be taken again by who has it
                    continue
                with locked(path, wait_s=0.0) as is_held:
                    if is_held:
                        shutil.rmtree(path, ignore_errors=True)
