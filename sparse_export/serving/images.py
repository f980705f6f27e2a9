"""Check references of container images."""

from __future__ import annotations

import re

from sparse_export.errors import UsageError

__all__ = ["require_image"]

_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
# A registry has a dot or a port in its name, or is localhost; else the first part belongs to the repository.
_REGISTRY = rf"(?:localhost|{_LABEL}(?:\.{_LABEL})+|{_LABEL}(?=:[0-9]))(?::[0-9]{{1,5}})?"
_PART = "[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_REFERENCE = re.compile(
    rf"(?:{_REGISTRY}/)?{_PART}(?:/{_PART})*"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_LONGEST = 512
_EXAMPLE = "as in registry.example.com/net:1.0"


def require_image(reference: str, option: str) -> str:
    """Return an image reference that names one image for good.

    Args:
        reference: `[REGISTRY/]REPOSITORY:TAG`, `[REGISTRY/]REPOSITORY@sha256:DIGEST`, or both.
        option: name of the option that it was given by, for the error.

    Raises:
        UsageError: it is no image reference, or has neither a digest nor a tag other than `latest`.
    """
    if not reference:
        raise UsageError(f"{option} is empty.", do=f"Give a repository and a tag, {_EXAMPLE}.")
    shown = f"{option} {reference[:_LONGEST]!r}"
    if re.search(r"\s", reference):
        raise UsageError(f"{shown} contains white space.", do=f"Give a repository and a tag, {_EXAMPLE}.")
    match = _REFERENCE.fullmatch(reference) if len(reference) <= _LONGEST else None
    if match is None:
        if len(reference) <= _LONGEST and _REFERENCE.fullmatch(reference.lower()):
            raise UsageError(
                f"{shown} has upper-case letters in its repository.", do="Write it in lower case."
            )
        raise UsageError(f"{shown} is no image reference.", do=f"Give a repository and a tag, {_EXAMPLE}.")
    if match["digest"] is None and match["tag"] is None:
        raise UsageError(f"{shown} has no tag.", do=f"Add a tag or a digest, {_EXAMPLE}.")
    if match["digest"] is None and match["tag"] == "latest":
        raise UsageError(
            f"{shown} names another image tomorrow.", do="Give another tag than latest, or a digest."
        )
    return reference
