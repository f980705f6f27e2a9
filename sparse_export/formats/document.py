"""JSON documents of ours, read into their dataclasses."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from sparse_export.errors import ArtefactError, UsageError
from sparse_export.files import put_back

SCHEMA_VERSION = 1


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; a key that comes twice would be read by others as the other one."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice!r} comes twice in one object")
    return found


def read_document(path: Path, kind: str, cls: type[Any]) -> Any:
    """Read a JSON document of ours into its dataclass, which has `kind` and `schema_version`. Raises ArtefactError."""
    import pydantic

    try:
        document = json.loads(
            path.read_bytes(), parse_constant=_refuse_constant, object_pairs_hook=_without_repetition
        )
    except OSError as cause:
        raise ArtefactError(
            f"{path} cannot be read: {cause.strerror or cause}.",
            expected=f"A {kind} description that this user may read was expected.",
            do="Look at its permissions, or copy the folder again.",
        ) from cause
    except (ValueError, RecursionError) as cause:
        raise ArtefactError(
            f"{path} is not JSON: {cause}.",
            expected=f"A {kind} description was expected.",
            do="Make it again.",
        ) from cause
    found = document.get("kind") if isinstance(document, dict) else None
    if found != kind:
        raise ArtefactError(f"{path} describes {found!r}.", expected=f"A {kind} was expected.")
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
    """The path of the document that describes a folder. Raises UsageError or ArtefactError where there is none."""
    put_back(path)
    if not path.exists():
        raise UsageError(
            f"{path} does not exist.", expected=f"A {kind} folder, made by `{made_by}`, was expected."
        )
    if not (path / file).is_file():
        raise ArtefactError(
            f"{path} is not a {kind}: it holds no {file}.",
            expected=f"A folder made by `{made_by}` was expected.",
            do="Run `sparse-export inspect` on it to see what it is." if path.is_file() else "",
        )
    return path / file
