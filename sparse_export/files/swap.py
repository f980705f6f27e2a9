"""Exchanges the names of two folders in one step of the kernel (Linux, renameat2)."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
from collections.abc import Callable
from pathlib import Path

__all__ = ["exchange"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# The call's number where the C library has no function for it: glibc before 2.28, musl.
_SYSCALL_NUMBER = {"x86_64": 316, "aarch64": 276, "riscv64": 276, "ppc64le": 357, "s390x": 347}
# Errors of a kernel or file system without the call or its flag, and of a sandbox that forbids it.
_UNKNOWN = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM}


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two files or folders of one file system.

    Args:
        one: path of a file or folder that exists.
        other: likewise.

    Returns:
        False, with nothing changed, where the kernel or the file system cannot.

    Raises:
        OSError: any other failure, with nothing changed.
    """
    call = _renameat2()
    if call is None:
        return False
    ctypes.set_errno(0)
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), os.fspath(one), None, os.fspath(other))


@functools.cache
def _renameat2() -> Callable[[int, bytes, int, bytes, int], int] | None:
    """The function of the C library, or the system call by its number; None on other systems."""
    if platform.system() != "Linux":
        return None
    library = ctypes.CDLL(None, use_errno=True)
    folder, path, flags = ctypes.c_int, ctypes.c_char_p, ctypes.c_uint
    try:
        function = library.renameat2
    except AttributeError:
        number = _SYSCALL_NUMBER.get(platform.machine())
        if number is None:
            return None
        library.syscall.argtypes = (ctypes.c_long, folder, path, folder, path, flags)
        library.syscall.restype = ctypes.c_long
        return functools.partial(library.syscall, number)
    function.argtypes = (folder, path, folder, path, flags)
    function.restype = ctypes.c_int
    return function
