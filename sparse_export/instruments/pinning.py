"""Pins the threads of a measurement to the same few cores."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["cores_to_use", "pinned"]

_TOPOLOGY = Path("/sys/devices/system/cpu")


@contextmanager
def pinned(n_threads: int) -> Iterator[tuple[int, ...]]:
    """Pin this thread, and those started in the block, to n_threads cores until the block ends.

    A thread inherits the cores of the one that starts it, so that threads have to be created in the block.

    Args:
        n_threads: number of cores.

    Yields:
        The cores; () where nothing is pinned, since the system cannot or there are no more cores than
        threads.
    """
    cores = cores_to_use(n_threads)
    if not cores:
        yield ()
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield cores
    finally:
        os.sched_setaffinity(0, before)


def cores_to_use(n_threads: int, topology: Path = _TOPOLOGY) -> tuple[int, ...]:
    """Choose the cores to pin to, one of each physical core first: two threads of one share its units.

    Args:
        n_threads: number of cores.
        topology: the system's folder on cores.

    Returns:
        Their numbers; () where pinning is impossible, or would exclude no core.
    """
    if not hasattr(os, "sched_getaffinity"):
        return ()
    usable = sorted(os.sched_getaffinity(0))
    if n_threads >= len(usable):
        return ()
    first = [core for core in usable if core == min(_siblings(core, usable, topology))]
    rest = [core for core in usable if core not in first]
    return tuple(sorted((first + rest)[:n_threads]))


def _siblings(core: int, usable: Collection[int], topology: Path) -> set[int]:
    """The usable logical cores of the same physical core; itself alone where the system does not say."""
    try:
        text = (topology / f"cpu{core}" / "topology" / "thread_siblings_list").read_text()
        listed = {
            number
            for part in text.strip().split(",")
            for first, _, last in [part.partition("-")]
            for number in range(int(first), int(last or first) + 1)
        }
    except (OSError, ValueError):
        listed = set()
    return (listed & set(usable)) | {core}
