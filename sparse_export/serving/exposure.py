"""Who may reach the server, and what this machine lacks for it."""

from __future__ import annotations

import ipaddress
import re
import shutil
from pathlib import Path

from sparse_export.errors import UsageError

__all__ = ["UNPATCHED", "image_is_patched", "require_loopback", "shortages"]

UNPATCHED = (
    "Triton before 25.07, as the 2.51 that `--install-server` installs, can be crashed by anybody who "
    "reaches it (CVE-2025-23310, CVE-2025-23311, and shapes of 2^31)"
)
_FIRST_PATCHED = (25, 7)
_RELEASE = re.compile(r"(?<![0-9.])(?P<year>[12][0-9])[.](?P<month>0[1-9]|1[0-2])(?![0-9])")
_LEAST_FILES = 256
_LEAST_SHARED_BYTES = 64 << 20
_SHARED_MEMORY = Path("/dev/shm")


def require_loopback(host: str, *, exposed: bool) -> None:
    """Check that only this machine reaches the server.

    Args:
        host: the address that it is bound to.
        exposed: the user wants others to reach it.

    Raises:
        UsageError: they would, and the user did not say so.
    """
    if exposed or host == "localhost":
        return
    try:
        if ipaddress.ip_address(host).is_loopback:
            return
    except ValueError:  # a name: whatever it is looked up to
        pass
    raise UsageError(
        f"--host {host} can be reached by others, and {UNPATCHED}.",
        do="Leave it at 127.0.0.1 with a proxy in front that checks requests, or give "
        "--expose-unpatched-server.",
    )


def image_is_patched(reference: str) -> bool | None:
    """Is the release of Triton that the tag of an image names patched?

    Args:
        reference: of the image.

    Returns:
        None where the tag names no release, as `25.08-py3` does.
    """
    name, _, tag = reference.partition("@")[0].rpartition(":")
    found = _RELEASE.search(tag) if name else None
    return None if found is None else (int(found["year"]), int(found["month"])) >= _FIRST_PATCHED


def shortages() -> tuple[str, ...]:
    """Say what this machine has too little of: open files and shared memory, without which requests fail."""
    import resource

    found = []
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _LEAST_FILES:
        found.append(
            f"only {soft} files may be open at once (`ulimit -n`); below {_LEAST_FILES} connections fail"
        )
    if not _SHARED_MEMORY.is_dir():
        found.append(f"{_SHARED_MEMORY} is missing, by which the Python backend passes tensors")
    elif (room := shutil.disk_usage(_SHARED_MEMORY).free) < _LEAST_SHARED_BYTES:
        found.append(
            f"{_SHARED_MEMORY} has {room >> 20} MiB of room; below {_LEAST_SHARED_BYTES >> 20} MiB requests "
            "fail (--shm-size of a container)"
        )
    return tuple(found)
