"""The check that a bundle replaces nothing but a bundle."""

from __future__ import annotations

import json
import os
from pathlib import Path

from sparse_export.errors import UsageError
from sparse_export.formats.bundle import BUNDLE_FILE, CACHE_FOLDER, SUMS_FILE

__all__ = ["require_replaceable"]


def require_replaceable(out: Path) -> None:
    """Check that a bundle may be written to `out` without losing anything else.

    Args:
        out: a path at which there is nothing, an empty folder, or a bundle that holds only files of its
            manifest.

    Raises:
        UsageError: there is something else.
    """
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
        do="Choose a new or empty folder, or a bundle to replace, with --out.",
    )


def _listed_files(folder: Path) -> set[str] | None:
    """The files that a bundle's manifest lists, with itself and the sums; None where there is no bundle."""
    try:
        document = json.loads((folder / BUNDLE_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or document.get("kind") != "bundle":
        return None
    files = document.get("files")
    return {BUNDLE_FILE, SUMS_FILE, *(files if isinstance(files, dict) else ())}


def _require_nothing_else(out: Path, listed: set[str]) -> None:
    """Raise UsageError for the first file that is not listed."""
    for folder, folders, files in os.walk(out):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for path in sorted(Path(folder) / name for name in (*files, *links)):
            if path.is_relative_to(out / CACHE_FOLDER):  # what running it left there
                continue
            if path.relative_to(out).as_posix() not in listed:
                raise UsageError(
                    f"The bundle {out} holds {path}, which its {BUNDLE_FILE} does not list.",
                    do="Move that file away, or choose another place with --out.",
                )
