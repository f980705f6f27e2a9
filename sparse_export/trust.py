"""The trust store: digests of files that may run code when used, and that this user vouches for."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_export.errors import ArtefactError, NotTrustedError, OutputError, UsageError
from sparse_export.files import json_bytes, output_error, require_plain, require_writable, write_bytes

_DIGEST = re.compile(r"[0-9a-f]{64}")

TrustedDigests = str | Sequence[str] | None
"""The digests passed with --trust: one, several, each of another file, or none."""


def store_path() -> Path:
    """Locate the store: `$XDG_DATA_HOME/sparse-export/trust.json`.

    Under ~/.local/share where XDG_DATA_HOME is unset or relative.

    Raises:
        UsageError: it is, and there is no home folder.
    """
    base = Path(os.environ.get("XDG_DATA_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".local" / "share"
        except RuntimeError as cause:
            raise UsageError(
                f"There is no place for the trust store: {cause}",
                do="Set XDG_DATA_HOME to the absolute path of a folder of your own.",
            ) from cause
    return base / "sparse-export" / "trust.json"


def remember(digest: str) -> None:
    """Add a digest to the store of this user, which is created where absent, readable by nobody else.

    Args:
        digest: hex SHA-256.

    Raises:
        UsageError: it is no SHA-256.
        ArtefactError: the store is damaged, or others could have written to it.
        OutputError: the store cannot be written.
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


def require_usable() -> None:
    """Check before the work that a digest can be remembered at its end.

    Raises:
        UsageError: there is no place for the store.
        ArtefactError: the store is damaged, or others could have written to it.
        OutputError: it cannot be written.
    """
    path = store_path()
    _read(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        require_writable(path.parent)
    except (OSError, OutputError) as cause:
        reason = (
            cause.what.rstrip(".") if isinstance(cause, OutputError) else f"{cause.strerror}: {path.parent}"
        )
        raise OutputError(
            f"The trust store {path}, which knows what you built yourself, cannot be written: {reason}.",
            do="Set XDG_DATA_HOME to the absolute path of a folder that you may write to.",
        ) from cause


def is_trusted(digest: str) -> bool:
    """Has this user vouched for a digest?

    Args:
        digest: hex SHA-256.

    Raises:
        UsageError: it is no SHA-256.
        ArtefactError: the store is damaged, or others could have written to it.
    """
    return _checked(digest) in _read(store_path())


def digests(trusted: TrustedDigests) -> tuple[str, ...]:
    """List the digests passed with --trust.

    Args:
        trusted: as passed.

    Returns:
        Each, in lower case.
    """
    words = (trusted,) if isinstance(trusted, str) else trusted or ()
    return tuple(word.strip().lower() for word in words)


def is_vouched_for(digest: str, *, trusted: TrustedDigests) -> bool:
    """Does this user vouch for a digest, by the store or now? One that is vouched for now is remembered.

    Args:
        digest: hex SHA-256.
        trusted: digests passed with --trust.

    Raises:
        SparseExportError: as `remember`.
    """
    digest = _checked(digest)
    if is_trusted(digest):
        return True
    if digest not in digests(trusted):
        return False
    remember(digest)
    return True


@dataclass(frozen=True, kw_only=True)
class RunsCode:
    """A file that would run code when it is used.

    Attributes:
        sha256: of the file that vouches for it, in hex.
        what: names it in an error, like "The factory a:b in runs/x".
    """

    sha256: str
    what: str


def require(digest: str, what: str, *, trusted: TrustedDigests) -> None:
    """Check that this user vouches for a file, by the store or now.

    Args:
        digest: hex SHA-256 of the file that would run code.
        what: names it in the error, like "The factory a:b in runs/x".
        trusted: digests passed with --trust, of this file or of others that the command uses; those others
            vouch for nothing here.

    Raises:
        NotTrustedError: this user does not; the message has the digest to pass.
        SparseExportError: as `remember`.
    """
    require_all([RunsCode(sha256=digest, what=what)], trusted=trusted)


def require_all(files: Sequence[RunsCode], *, trusted: TrustedDigests) -> None:
    """Check that this user vouches for every file that a command will use, by the store or now.

    Args:
        files: those that would run code.
        trusted: digests passed with --trust, as for `require`.

    Raises:
        NotTrustedError: this user does not vouch for one or more; the message has all the digests to pass.
        SparseExportError: as `remember`.
    """
    lacking: dict[str, list[str]] = {}
    for one in files:
        digest = _checked(one.sha256)
        if not is_vouched_for(digest, trusted=trusted):
            lacking.setdefault(digest, []).append(one.what)
    if not lacking:
        return
    named = {digest: " and ".join(dict.fromkeys(what)) for digest, what in lacking.items()}
    options = " ".join(f"--trust {digest}" for digest in named)
    it = "it" if len(named) == 1 else "them"
    passed = (trusted,) if isinstance(trusted, str) else tuple(trusted or ())
    if passed:
        found = "; ".join(f"{what} has SHA-256 {digest}" for digest, what in named.items())
        raise NotTrustedError(
            f"{found}, not {' or '.join(map(repr, passed))}.",
            do=f"{'It was' if it == 'it' else 'They were'} changed, or the digest is another file's. Do not "
            f"use {it} before you know which; when you trust {it}, pass {options} too.",
        )
    raise NotTrustedError(
        f"{'; '.join(named.values())} would run code that was not made here.",
        do=f"Look at {it}, and when you trust {it} pass {options} once.",
    )


def _checked(digest: str) -> str:
    """A digest in lower case. Raises UsageError for anything else."""
    digest = digest.strip().lower()
    if not _DIGEST.fullmatch(digest):
        raise UsageError(f"{digest!r} is not a SHA-256.", do="Give its 64 hexadecimal digits.")
    return digest


def _read(path: Path) -> frozenset[str]:
    """The digests of a store; none where there is no store."""
    try:
        require_plain(path)
        with path.open("rb") as stream:
            _require_private(path, os.fstat(stream.fileno()))  # of the opened file: the name may be switched
            content = stream.read()
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()
    except OSError as cause:
        raise ArtefactError(
            f"The trust store {path} cannot be read: {cause.strerror}.",
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


def _require_private(path: Path, status: os.stat_result) -> None:
    """Raise ArtefactError for a store that others own or can access."""
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        raise ArtefactError(
            f"The trust store {path} belongs to user {status.st_uid}, not to you, user {os.getuid()}: "
            "somebody else could vouch in your name.",
            do="Delete it, or set XDG_DATA_HOME to a folder of your own.",
        )
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ArtefactError(
            f"The trust store {path} has mode {stat.S_IMODE(status.st_mode):04o}, not 0600: "
            "others could vouch in your name.",
            do=f"Look at its content, then run `chmod 600 {path}`.",
        )


def _corrupt(path: Path, reason: str) -> ArtefactError:
    """The error for a damaged store."""
    return ArtefactError(
        f"The trust store {path} is damaged: {reason}.",
        do=f"Delete {path}; you will be asked again for what you trusted.",
    )
