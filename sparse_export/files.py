"""Files written whole or not at all, and their hashes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparse_export.errors import OutputError


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def output_error(path: Path, cause: OSError) -> OutputError:
    """An OutputError for a failed write to `path`, with the system's reason."""
    return OutputError(
        f"Cannot write {path}: {cause.strerror or cause}.",
        expected="A folder with room that this user may write to was expected.",
        do="Choose another place with --out, or make room there.",
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write to a temporary name in the same folder, flush to disk, rename.

    Whoever reads `path` at any moment, a crash included, sees the old content or the new, never a part.
    Raises OutputError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as cause:
        if temporary.is_file():
            temporary.unlink(missing_ok=True)
        raise output_error(path, cause) from cause


def move_file(source: Path, path: Path) -> None:
    """As `write_bytes`, of what is in another file, which is gone then. Raises OutputError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(source, temporary)  # a rename, or a copy to another file system
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as cause:
        if temporary.is_file():
            temporary.unlink(missing_ok=True)
        raise output_error(path, cause) from cause


def json_bytes(value: Any) -> bytes:
    """Indented JSON with a final newline. NaN and infinities are refused: they are not JSON."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document by `write_bytes`."""
    write_bytes(path, json_bytes(value))


def cache_folder() -> Path | None:
    """`$XDG_CACHE_HOME/sparse-export`, under ~/.cache when that is unset or relative; not made here.

    None where there is no home folder either.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            return None
    return base / "sparse-export"


def require_writable(folder: Path) -> None:
    """Raise OutputError now rather than after the work, when nothing can be written into `folder`.

    Creates the folder, with its parents, when it is absent.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as cause:
        raise output_error(folder, cause) from cause


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its name when the block ends without an error.

    A folder that stood there before is replaced in that moment; on an error it is left as it was, and the
    unfinished one is removed. Raises OutputError.
    """
    target = target.absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    except OSError as cause:
        raise output_error(target, cause) from cause
    try:
        stage.chmod(0o755)  # mkdtemp's 0700 would shut out a server that runs as another user
        yield stage
        old = stage.with_name(stage.name + ".old.tmp")
        try:
            if target.exists():
                target.rename(old)
            stage.rename(target)
        finally:  # an interruption may fall between the two renames, or after them
            if old.exists() and not target.exists():
                old.rename(target)
            shutil.rmtree(old, ignore_errors=True)
    except OSError as cause:
        raise output_error(target, cause) from cause
    finally:
        shutil.rmtree(stage, ignore_errors=True)
