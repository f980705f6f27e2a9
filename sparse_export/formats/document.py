"""Reads the JSON documents of this program into their dataclasses."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from sparse_export.errors import ArtefactError, UsageError
from sparse_export.files import put_back

SCHEMA_VERSION = 1


def _refuse_constant(name: str) -> None:
    """Raise ValueError for NaN and infinities."""
    raise ValueError(f"{name} is not a number of JSON")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError for a repeated key, which other readers may read otherwise."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice!r} comes twice in one object")
    return found


def read_document(path: Path, kind: str, cls: type[Any]) -> Any:
    """Read a JSON document into its dataclass.

    Args:
        path: of the file.
        kind: what the field `kind` of the document has to be.
        cls: the dataclass.

    Returns:
        The dataclass, its types checked.

    Raises:
        ArtefactError: the file cannot be read, is another document, or is damaged.
    """
    import pydantic

    try:
        document = json.loads(
            path.read_bytes(), parse_constant=_refuse_constant, object_pairs_hook=_without_repetition
        )
    except OSError as cause:
        raise ArtefactError(
            f"{path} cannot be read: {cause.strerror or cause}.",
            do="Look at its permissions, or copy the folder again.",
        ) from cause
    except (ValueError, RecursionError) as cause:
        raise ArtefactError(
            f"{path}, the description of a {kind}, is not JSON: {cause}.",
            do=f"Make the {kind} again.",
        ) from cause
    found = document.get("kind") if isinstance(document, dict) else None
    if found != kind:
        raise ArtefactError(f"{path} describes {found!r}, not a {kind}.", do=f"Give the path of a {kind}.")
    version = document.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ArtefactError(
            f"{path} has schema version {version!r}.",
            expected=f"This release reads versions up to {SCHEMA_VERSION}.",
            do="Install a newer sparse-export.",
        )
    try:
        return pydantic.TypeAdapter(cls).validate_python(document)
    except pydantic.ValidationError as cause:
        first = cause.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtefactError(
            f"{path} is damaged at {where!r}: {first['msg']}.", do="Make it again."
        ) from cause


def description_path(path: Path, file: str, kind: str, made_by: str) -> Path:
    """Find the document that describes a folder.

    Args:
        path: of the folder.
        file: name of the document.
        kind: of the folder, for the message.
        made_by: command that makes such a folder, for the message.

    Raises:
        UsageError: there is no folder.
        ArtefactError: it holds no such document.
    """
    put_back(path)
    if not path.exists():
        raise UsageError(
            f"{path} does not exist.", do=f"Give the path of a {kind} folder, made by `{made_by}`."
        )
    if not (path / file).is_file():
        raise ArtefactError(
            f"{path} is not a {kind}: it holds no {file}.",
            expected=f"`{made_by}` makes one.",
            do="Run `sparse-export inspect` on it to see what it is." if path.is_file() else "",
        )
    return path / file
