"""Reads the JSON documents of this program into their dataclasses, and seals those of runs and bundles.

Every number has a range, and a sealed document its own digest, so that no flipped bit is taken for a fact.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Interval, Len

from sparse_export.errors import ArtefactError, UsageError
from sparse_export.files import json_bytes, put_back

SCHEMA_VERSION = 1
"""Of the documents that are not sealed."""

SEALED_VERSION = 2
"""Of `run.json` and `manifest.json`. Version 1 had no signature and no digest."""

DIGEST = "digest"

Count = Annotated[int, Ge(0)]
Positive = Annotated[int, Ge(1)]
Share = Annotated[float, Interval(ge=0.0, le=1.0)]
Amount = Annotated[float, Ge(0.0)]
Digest = Annotated[str, Len(64, 64)]


def sealed(info: Any) -> dict[str, Any]:
    """Make the JSON object of a run or a bundle, with its digest.

    Args:
        info: a dataclass with a field `digest`.

    Returns:
        The object; `digest` is the SHA-256 of all the others, as compact JSON with sorted keys.
    """
    document: dict[str, Any] = json.loads(json_bytes(asdict(info)))
    return document | {DIGEST: document_digest(document)}


def document_digest(document: Mapping[str, Any]) -> str:
    """Compute the digest that seals the object of a run or a bundle.

    Args:
        document: its JSON object; the field `digest` does not count.
    """
    others = {key: value for key, value in document.items() if key != DIGEST}
    text = json.dumps(others, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


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


def read_document(
    path: Path,
    kind: str,
    cls: type[Any],
    *,
    newest: int = SCHEMA_VERSION,
    content: bytes | None = None,
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Any:
    """Read a JSON document into its dataclass.

    Args:
        path: of the file.
        kind: what the field `kind` of the document has to be.
        cls: the dataclass.
        newest: the version that this release writes.
        content: of the file, where it was read already; None to read it.
        upgrade: makes the present object of one of version 1; None where that is the newest.

    Returns:
        The dataclass, its types, ranges and digest checked.

    Raises:
        ArtefactError: the file cannot be read, is another document, or is damaged.
    """
    import pydantic

    try:
        document = json.loads(
            path.read_bytes() if content is None else content,
            parse_constant=_refuse_constant,
            object_pairs_hook=_without_repetition,
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
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= newest:
        raise ArtefactError(
            f"{path} has schema version {version!r}.",
            expected=f"This release reads versions up to {newest}.",
            do="Install a newer sparse-export.",
        )
    try:
        if upgrade is not None:
            if version == 1:
                document = upgrade(document)
            elif document.get(DIGEST) != document_digest(document):
                raise ArtefactError(
                    f"{path} was changed or damaged: its digest is not that of what it says.",
                    do=f"Copy the {kind} again, or make it again.",
                )
        return pydantic.TypeAdapter(cls).validate_json(json.dumps(document), strict=True)
    except (KeyError, TypeError, ValueError) as cause:
        if not isinstance(cause, pydantic.ValidationError):  # of version 1, without what every one had
            raise ArtefactError(f"{path} is damaged: it lacks {cause}.", do="Make it again.") from cause
        first = cause.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtefactError(
            f"{path} is damaged at {where!r}: {first['msg']}.", do="Make it again."
        ) from cause


def require_there(path: Path, kind: str, made_by: str) -> None:
    """Check that a folder is there, after putting back one whose swap was cut short.

    Args:
        path: of the folder.
        kind: of the folder, for the message.
        made_by: command that makes such a folder, for the message.

    Raises:
        UsageError: there is nothing at this path.
    """
    put_back(path)
    if not path.exists():
        raise UsageError(
            f"{path} does not exist.", do=f"Give the path of a {kind} folder, made by `{made_by}`."
        )


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
    require_there(path, kind, made_by)
    if not (path / file).is_file():
        raise ArtefactError(
            f"{path} is not a {kind}: it holds no {file}.",
            expected=f"`{made_by}` makes one.",
            do="Run `sparse-export inspect` on it to see what it is." if path.is_file() else "",
        )
    return path / file
