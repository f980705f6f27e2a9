"""The check that a bundle replaces nothing but a bundle."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path

from sparse_export.errors import UsageError
from sparse_export.formats.bundle import BUNDLE_FILE, CACHE_FOLDER, SUMS_FILE

__all__ = ["require_replaceable"]


def require_replaceable(
    out: Path, *, kind: str = "bundle", description: str = BUNDLE_FILE, own: Collection[str] = (SUMS_FILE,)
) -> None:
    """Check that a folder of this kind may be written to `out` without losing anything else.

    Args:
        out: a path at which there is nothing, an empty folder, or one of this kind that holds only files that
            its description lists.
        kind: as the description has it.
        description: the JSON document that lists the folder's files.
        own: files that belong to such a folder without being listed.

    Raises:
        UsageError: there is something else.
    """
    if not out.exists() and not out.is_symlink():
        return
    if out.is_dir():
        if not any(out.iterdir()):
            return
        listed = _listed_files(out, kind, description)
        if listed is not None:
            _require_nothing_else(out, listed | {description, *own}, f"{kind} {out}", description)
            return
    raise UsageError(
        f"{out} exists and is not a {kind}.",
        do=f"Choose a new or empty folder, or a {kind} to replace, with --out.",
    )


def _listed_files(folder: Path, kind: str, description: str) -> set[str] | None:
    """The files that the description of a folder lists; None where it is not of this kind."""
    try:
        document = json.loads((folder / description).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or document.get("kind") != kind:
        return None
    files = document.get("files")
    return set(files) if isinstance(files, dict) else set()


def _require_nothing_else(out: Path, listed: set[str], what: str, description: str) -> None:
    """Raise UsageError for the first file that is not listed."""
    for folder, folders, files in os.walk(out):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for path in sorted(Path(folder) / name for name in (*files, *links)):
            if path.is_relative_to(out / CACHE_FOLDER):  # what running it left there
                continue
            if path.relative_to(out).as_posix() not in listed:
                raise UsageError(
                    f"The {what} holds {path}, which its {description} does not list.",
                    do="Move that file away, or choose another place with --out.",
                )
