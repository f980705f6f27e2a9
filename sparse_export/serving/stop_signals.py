"""The signals that end and reload a server."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from sparse_export.errors import UsageError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(kw_only=True)
class ReceivedSignals:
    """The signals received. n_stops: number of SIGTERM and SIGINT so far; reload: SIGHUP came."""

    n_stops: int = 0
    reload: bool = False


@contextmanager
def received_signals() -> Iterator[ReceivedSignals]:
    """Record signals in place of their effect until the block ends."""
    if threading.current_thread() is not threading.main_thread():
        raise UsageError("`serve` was called outside the main thread.", do="Call it from the main thread.")
    signals = ReceivedSignals()

    def stop(number: int, frame: FrameType | None) -> None:
        signals.n_stops += 1

    def reload(number: int, frame: FrameType | None) -> None:
        signals.reload = True

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    before[signal.SIGHUP] = signal.signal(signal.SIGHUP, reload)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
