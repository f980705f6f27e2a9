"""Where onnxruntime's TensorRT provider keeps the engines that it builds, and which of them may be read back.

A cached engine is native code. So a cache within a bundle is used only where nobody else may write, and only
with the content that this user left there: its digest is in the trust store. Anything else is neither read
nor changed: a session of another process may be about to vouch for it.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_export import trust
from sparse_export.errors import SparseExportError
from sparse_export.files import cache_folder, output_error, sha256_file, temporary_folder
from sparse_export.formats.bundle import BUNDLE_FILE, CACHE_FOLDER

__all__ = ["EngineCache", "cache_for", "open_cache"]

_SALT = "cache of onnxruntime's TensorRT provider"
# Folders that this process opened: several of its sessions may share one, and the first has not vouched for
# it before it is closed.
_opened: set[Path] = set()


@dataclass(frozen=True, kw_only=True)
class EngineCache:
    """A folder for the engines of one ONNX file.

    Attributes:
        path: the folder.
        in_bundle: it is within the bundle; only then is its content checked against the trust store.
        note: why it is not in the bundle; None where it is, or where there is no bundle.
    """

    path: Path
    in_bundle: bool
    note: str | None

    def keep(self) -> None:
        """Vouch for its content. Where that cannot be stored, the next session builds the engines again."""
        if self.in_bundle and self.path.is_dir():
            try:
                trust.remember(_digest(self.path))
            except (SparseExportError, OSError):  # it may change while it is read
                return


def cache_for(model_path: Path) -> EngineCache:
    """Choose the folder for the engines of an ONNX file. Nothing is created.

    It is the bundle's `cache/onnxruntime-tensorrt`, where this user and nobody else may write there, and this
    user left what is there; otherwise the user's cache folder.

    Args:
        model_path: the ONNX file.
    """
    bundle = model_path.absolute().parent
    digest = sha256_file(model_path)
    note = None
    if (bundle / BUNDLE_FILE).is_file():
        path = bundle / CACHE_FOLDER / digest
        why = _why_not_there((bundle, path.parent.parent, path.parent, path))
        if why is None and (path in _opened or not path.is_dir() or _is_own(path)):
            return EngineCache(path=path, in_bundle=True, note=None)
        note = f"{bundle} {why}" if why else f"this user did not leave what is in {path}"
    base = cache_folder() or Path(tempfile.gettempdir()) / f"sparse-export-{os.getuid()}"
    path = base / "onnxruntime-tensorrt" / digest
    reason = None if note is None else f"onnxruntime's TensorRT engines are kept in {path}, since {note}."
    return EngineCache(path=path, in_bundle=False, note=reason)


def open_cache(model_path: Path) -> EngineCache:
    """Create the folder of `cache_for`; where others may write to it, one for this session alone.

    Args:
        model_path: the ONNX file.

    Raises:
        OutputError: the folder cannot be created.
    """
    cache = cache_for(model_path)
    try:
        cache.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        why = (
            None
            if cache.in_bundle
            else _why_not_there((cache.path.parent.parent, cache.path.parent, cache.path))
        )
        if why is not None:
            until_the_end = contextlib.ExitStack()
            alone = until_the_end.enter_context(temporary_folder("engines"))
            atexit.register(until_the_end.close)
            note = f"onnxruntime's TensorRT engines are built again each time, since {cache.path} {why}."
            cache = EngineCache(path=alone, in_bundle=False, note=note)
    except OSError as cause:
        raise output_error(cache.path, cause) from cause
    _opened.add(cache.path)
    return cache


def _why_not_there(folders: Sequence[Path]) -> str | None:
    """Why a bundle is no place for native code, None where it is one. folders: it, and those within."""
    for folder in folders:
        try:
            fact = folder.lstat()
        except FileNotFoundError:
            continue
        if not stat.S_ISDIR(fact.st_mode):
            return f"has a {folder.name} that is no folder"
        if fact.st_uid != os.getuid():
            return "belongs to another user"
        if fact.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return "may be written to by others"
        if not os.access(folder, os.W_OK):
            return "cannot be written to"
    return None


def _is_own(folder: Path) -> bool:
    """Did this user leave what is in a folder?"""
    try:
        return not any(folder.iterdir()) or trust.is_trusted(_digest(folder))
    except (SparseExportError, OSError):
        return False


def _digest(folder: Path) -> str:
    """Hash the names and contents of its files; anything else in it gives a random digest."""
    lines = [_SALT, folder.name]
    for path in sorted(folder.iterdir()):
        plain = stat.S_ISREG(path.lstat().st_mode)
        lines.append(f"{path.name} {sha256_file(path) if plain else os.urandom(32).hex()}")
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()
