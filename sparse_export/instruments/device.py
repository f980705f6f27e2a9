"""Time stamps on the device that does the work: the host's clock, or events in a CUDA stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol

__all__ = ["CudaStamps", "HostStamps", "Stamps", "captured", "replayed", "stamps_for"]


class Stamps(Protocol):
    """Takes time stamps and measures the time between them."""

    def now(self) -> Any:
        """Take a stamp at this point of the work."""
        ...

    def seconds(self, first: Any, last: Any) -> float:
        """Return the seconds between two stamps; call `wait` before, once for all of them."""
        ...

    def wait(self) -> None:
        """Wait until the device has finished all work."""
        ...


class HostStamps:
    """Stamps of the host's clock, for work that is finished when a call returns."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def now(self) -> float:
        return self._clock()

    def seconds(self, first: float, last: float) -> float:
        return last - first

    def wait(self) -> None:
        pass


class CudaStamps:
    """CUDA events, for work that the host only launches; they never make the host wait."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda

    def now(self) -> Any:
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: Any, last: Any) -> float:
        return float(first.elapsed_time(last)) / 1e3

    def wait(self) -> None:
        self._cuda.synchronize()

    def time_calls(self, call: Callable[[], object], n_calls: int) -> list[float]:
        """Time calls on the device, launched without a pause, as `measure_interleaved` needs it.

        Args:
            call: launches the work.
            n_calls: how often.

        Returns:
            Seconds of each call.
        """
        stamps = [self.now()]
        for _ in range(n_calls):
            call()
            stamps.append(self.now())
        self.wait()
        return [self.seconds(a, b) for a, b in pairwise(stamps)]


def stamps_for(device_type: str) -> HostStamps | CudaStamps:
    """Choose the stamps of a device.

    Args:
        device_type: of a torch device, `cpu` or `cuda`.
    """
    if device_type == "cpu":
        return HostStamps()
    import torch

    return CudaStamps(torch.cuda)


def captured(calls: Sequence[Callable[[], object]], pool: Any = None) -> Callable[[], object]:
    """Capture calls, one after another, in a CUDA graph, so that launching them costs nothing.

    Each is called twice before, on a stream of its own as capture requires, for what allocates or chooses at
    first.

    Args:
        calls: launch the work.
        pool: memory shared with other graphs that are not replayed at the same time, by
            `torch.cuda.graph_pool_handle()`.

    Returns:
        A function that replays the graph.

    Raises:
        RuntimeError: something in the calls cannot be captured.
    """
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for call in calls:
            call()
    return graph.replay


def replayed(call: Callable[[], object], pool: Any = None) -> Callable[[], object]:
    """Capture a call in a CUDA graph, where that is possible.

    Args:
        call: launches the work.
        pool: as of `captured`.

    Returns:
        A function that replays the graph, else the call itself.
    """
    import torch

    try:
        return captured([call], pool)
    except RuntimeError:
        torch.cuda.synchronize()
        return call
