"""Work that is killed at one of its file operations, again and again, and done once more each time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from sparse_export.errors import SparseExportError

_OPERATIONS = frozenset(("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"))
_kill: dict[str, int] = {}


def _at_operation(event: str, arguments: tuple[Any, ...]) -> None:
    """Count changes of the file system, and end the process by SIGKILL right before one of them."""
    if not _kill:
        return
    writes = event == "open" and isinstance(arguments[1], str) and bool(set(arguments[1]) & set("wxa+"))
    if writes or event in _OPERATIONS:
        _kill["n"] += 1
        if _kill["n"] == _kill["at"]:
            os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(_at_operation)


@dataclass(frozen=True)
class Command:
    """Something that is killed.

    Attributes:
        work: into a folder.
        state: what is there, whole, in a word; "" for nothing. Raises for what is torn.
        left: the process's id and the folder -> what is still there of it once the work was done again.
        orphans: the same -> processes that it left behind.
    """

    work: Callable[[Path], object]
    state: Callable[[Path], str]
    left: Callable[[int, Path], list[str]] = lambda pid, folder: []
    orphans: Callable[[int, Path], list[str]] = lambda pid, folder: []


@dataclass(frozen=True)
class Ended:
    """How a process ended. n: how many operations there were; 0 where it was killed."""

    exit_code: int
    n: int
    pid: int


def _child(work: Callable[[Path], object], folder: Path, at: int, told: Connection) -> None:
    """Do work, and tell how many operations there were; the process is killed at one of them, 0 for none."""
    torch.set_num_threads(1)
    _kill.update(n=0, at=at)
    try:
        work(folder)
    except SparseExportError as error:
        os.write(2, f"{error}\n".encode())
        sys.exit(1)
    finally:
        told.send(_kill["n"])


def forked(work: Callable[[Path], object], folder: Path, at: int) -> Ended:
    """Do work in a process of its own, which is killed at one of its operations, 0 for none.

    It is forked from a server that never computed a gradient: torch cannot in a fork of one that did.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    here, there = server.Pipe(duplex=False)
    process = server.Process(target=_child, args=(work, folder, at, there))
    process.start()
    there.close()
    try:
        n = here.recv()
    except EOFError:
        n = 0
    process.join()
    assert process.exitcode is not None
    assert process.pid is not None
    return Ended(process.exitcode, n, process.pid)


def processes_that_name(text: str) -> list[str]:
    """Command lines, zombies apart, in which a text stands."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if text in line:
            found.append(f"{path.parent.name}: {line}")
    return found


def killed(command: Command, folder: Path, wanted: int) -> int:
    """Kill a command at so many of its operations, spread over all; how many times it was."""
    whole = folder / "whole"
    ended = forked(command.work, whole, at=0)
    assert ended.exit_code == 0
    n, right = ended.n, command.state(whole)
    assert right
    n_killed = 0
    for i in range(wanted):
        at = 1 + i * (n - 1) // max(wanted - 1, 1)
        out = folder / f"at{at}" / "out"
        out.parent.mkdir(exist_ok=True)
        ended = forked(command.work, out, at=at)
        n_killed += ended.exit_code == -signal.SIGKILL
        assert command.state(out) in ("", right), at
        again = forked(command.work, out, at=0)
        assert again.exit_code == 0, at
        assert command.state(out) == right, at
        left = [entry.name for entry in out.parent.iterdir() if entry.name.endswith(".tmp")]
        assert left + command.left(ended.pid, out) == [], at
        _none_lives(lambda: [*command.orphans(ended.pid, out), *command.orphans(again.pid, out)])  # noqa: B023
    return n_killed


def _none_lives(orphans: Callable[[], list[str]], limit_s: float = 20.0) -> None:
    """Wait until there are none."""
    deadline = time.monotonic() + limit_s
    while (found := orphans()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found == []
