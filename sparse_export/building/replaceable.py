"""Whether what stands where a bundle is to be written may be replaced."""

from __future__ import annotations

import json
import os
from pathlib import Path

from sparse_export.errors import UsageError
from sparse_export.formats.bundle import BUNDLE_FILE, CACHE_FOLDER, SUMS_FILE

__all__ = ["require_replaceable"]


def require_replaceable(out: Path) -> None:
    """Raise UsageError unless nothing stands there, an empty folder, or a bundle of nothing but its own files."""
    if not out.exists() and not out.is_symlink():
        return
    if out.is_dir():
        if not any(out.iterdir()):
            return
        listed = _listed_files(out)
        if listed is not None:
            _require_nothing_else(out, listed)
            return
    raise UsageError(
        f"{out} exists and is not a bundle.",
        expected="A new or empty folder, or a bundle to replace, was expected, so that nothing else is lost.",
        do="Choose another place with --out.",
    )


def _listed_files(folder: Path) -> set[str] | None:
    """What the manifest of a bundle lists, itself and the sums included; None for what is no bundle."""
    try:
        document = json.loads((folder / BUNDLE_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or document.get("kind") != "bundle":
        return None
    files = document.get("files")
    return {BUNDLE_FILE, SUMS_FILE, *(files if isinstance(files, dict) else ())}


def _require_nothing_else(out: Path, listed: set[str]) -> None:
    for folder, folders, files in os.walk(out):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for path in sorted(Path(folder) / name for name in (*files, *links)):
            if path.is_relative_to(out / CACHE_FOLDER):  # what running it left there
                continue
            if path.relative_to(out).as_posix() not in listed:
                raise UsageError(
                    f"The bundle {out} holds {path}, which its {BUNDLE_FILE} does not list.",
                    expected="A bundle of nothing but its own files was expected, so that nothing else is lost.",
                    do="Move that file away, or choose another place with --out.",
                )
