"""Runs a program that does not outlive its parent: python -I -S launch.py PARENT_PID PROGRAM [ARGUMENT]...

The kernel kills the program the moment its parent ends, however that ends. Needs the standard library alone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(words: list[str]) -> int:
    """Replace this process by the program; returns only where that fails, or the parent has ended.

    Args:
        words: process id of the parent, path of the program, and its arguments.

    Returns:
        1, as exit code.
    """
    parent, program = int(words[0]), words[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        return 1
    if os.getppid() != parent:  # it ended before prctl
        return 1
    os.execv(program[0], program)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
