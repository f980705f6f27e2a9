"""What training does to its process while it runs: signals, threads, denormals."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch


class Stop:
    """Has a signal requested the end of the training?"""

    requested = False


@contextmanager
def stop_signals(*, patient: bool = False) -> Iterator[Stop]:
    """Turn SIGINT and SIGTERM into a request.

    Args:
        patient: take further signals as the same request: a launcher sends one after the other to processes
            that are still saving, and has SIGKILL for those that take too long. Otherwise a second one acts
            as it did before.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        if not patient:
            signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def cpu_settings(n_threads: int) -> Iterator[None]:
    """Train with so many threads and without denormals; then as the process was before.

    The momentum of a dead unit decays into denormals and stays there, which slows a CPU down many times.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
