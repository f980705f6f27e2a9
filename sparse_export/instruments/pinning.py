"""Keeps the threads of a measurement on the same few cores."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["cores_to_use", "pinned"]

_TOPOLOGY = Path("/sys/devices/system/cpu")


@contextmanager
def pinned(n_threads: int) -> Iterator[tuple[int, ...]]:
    """Hold this thread, and those that are started meanwhile, to n_threads cores; then let go again.

    A thread inherits the cores of the one that starts it, so what is to be pinned has to be created inside.
    Yields the cores, () where nothing was pinned: where the system cannot, or there are no more cores than threads.
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
    """The cores to pin to: one of each physical core first, since two threads of one core share its units.

    () where pinning is not possible, or would leave no choice.
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
