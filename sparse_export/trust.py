"""What this user vouches for: digests of files that may run code when they are used."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from sparse_export.errors import ArtefactError, NotTrustedError, UsageError
from sparse_export.files import json_bytes, output_error, write_bytes

_DIGEST = re.compile(r"[0-9a-f]{64}")

Given = str | Sequence[str] | None
"""What the user passed with --trust: one digest, several of which each is some file's, or none."""


def store_path() -> Path:
    """`$XDG_DATA_HOME/sparse-export/trust.json`, under ~/.local/share when that is unset or relative.

    Raises UsageError when it is and there is no home folder.
    """
    base = Path(os.environ.get("XDG_DATA_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".local" / "share"
        except RuntimeError as cause:
            raise UsageError(
                f"There is no place for the trust store: {cause}",
                expected="A home folder, or an absolute path in XDG_DATA_HOME, was expected.",
                do="Set XDG_DATA_HOME to a folder of your own.",
            ) from cause
    return base / "sparse-export" / "trust.json"


def remember(digest: str) -> None:
    """Enter a hex SHA-256 in the store of this user, which is made when absent, readable by nobody else.

    Raises UsageError (not a digest), ArtefactError (a store that cannot be relied on) or OutputError.
    """
    digest = _checked(digest)
    path = store_path()
    known = _read(path)
    if digest in known:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as cause:
        raise output_error(path, cause) from cause
    before = os.umask(0o077)  # the temporary file is private from its first byte
    try:
        write_bytes(path, json_bytes({"schema_version": 1, "sha256": sorted({*known, digest})}))
    finally:
        os.umask(before)


def is_trusted(digest: str) -> bool:
    """Has this user vouched for it? Raises UsageError or ArtefactError, as `remember` does."""
    return _checked(digest) in _read(store_path())


def digests(given: Given) -> tuple[str, ...]:
    """Each of them, in lower case."""
    words = (given,) if isinstance(given, str) else given or ()
    return tuple(word.strip().lower() for word in words)


def is_vouched_for(digest: str, *, given: Given) -> bool:
    """Is it trusted, or among `given`? Then it is remembered. Raises UsageError, ArtefactError or OutputError."""
    digest = _checked(digest)
    if is_trusted(digest):
        return True
    if digest not in digests(given):
        return False
    remember(digest)
    return True


def require(digest: str, what: str, *, given: Given) -> None:
    """Return when `digest` is trusted, or among `given`, which is remembered then.

    digest: of the file that would run code.  what: said in the error, like "the factory a:b in runs/x".
    given: of this file or of others that one command uses; those others vouch for nothing here.
    Raises NotTrustedError, naming the digest to vouch for.
    """
    digest = _checked(digest)
    if is_vouched_for(digest, given=given):
        return
    others = (given,) if isinstance(given, str) else tuple(given or ())
    if others:
        raise NotTrustedError(
            f"{what} has SHA-256 {digest}, not {' or '.join(map(repr, others))}.",
            expected="A digest given with --trust was expected to be that of the file.",
            do="It was changed, or the digest is another file's. Do not use it before you know which; "
            f"when you trust it, pass --trust {digest} too.",
        )
    raise NotTrustedError(
        f"{what} would run code that was not made here.",
        expected="Something that this user made or vouched for was expected.",
        do=f"Look at it, and when you trust it pass --trust {digest} once.",
    )


def _checked(digest: str) -> str:
    digest = digest.strip().lower()
    if not _DIGEST.fullmatch(digest):
        raise UsageError(f"{digest!r} is not a SHA-256.", expected="64 hexadecimal digits were expected.")
    return digest


def _read(path: Path) -> frozenset[str]:
    try:
        with path.open("rb") as stream:
            _require_private(path, os.fstat(stream.fileno()))  # of the opened file: the name may be switched
            content = stream.read()
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()
    except OSError as cause:
        raise ArtefactError(
            f"The trust store {path} cannot be read: {cause.strerror}.",
            expected="A file that this user can read was expected.",
            do=f"Make it readable for yourself, or delete {path}.",
        ) from cause
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as cause:
        raise _corrupt(path, str(cause)) from cause
    found = document.get("sha256") if isinstance(document, dict) else None
    if not isinstance(found, list) or not all(isinstance(d, str) and _DIGEST.fullmatch(d) for d in found):
        raise _corrupt(path, "it holds no list of SHA-256 digests")
    return frozenset(found)


def _require_private(path: Path, fact: os.stat_result) -> None:
    if hasattr(os, "getuid") and fact.st_uid != os.getuid():
        raise ArtefactError(
            f"The trust store {path} belongs to user {fact.st_uid}.",
            expected=f"It was expected to belong to user {os.getuid()}: somebody else could vouch in your name.",
            do="Delete it, or set XDG_DATA_HOME to a folder of your own.",
        )
    if fact.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ArtefactError(
            f"The trust store {path} has mode {stat.S_IMODE(fact.st_mode):04o}.",
            expected="0600 was expected: others could vouch in your name.",
            do=f"Look at its content, then run `chmod 600 {path}`.",
        )


def _corrupt(path: Path, reason: str) -> ArtefactError:
    return ArtefactError(
        f"The trust store {path} is damaged: {reason}.",
        expected="The JSON that sparse-export wrote was expected.",
        do=f"Delete {path}; you will be asked again for what you trusted.",
    )
