"""Stamps of time on the device that does the work: the host's clock, or events in a CUDA stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol

__all__ = ["CudaStamps", "HostStamps", "Stamps", "captured", "replayed", "stamps_for"]


class Stamps(Protocol):
    """Takes stamps, whatever they are, and says how far they lie apart."""

    def now(self) -> Any:
        """A stamp at this place in the work."""
        ...

    def seconds(self, first: Any, last: Any) -> float:
        """Between two stamps; call `wait` before, once for all of them."""
        ...

    def wait(self) -> None:
        """Return when the device has done everything."""
        ...


class HostStamps:
    """For work that is done when a call returns."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def now(self) -> float:
        return self._clock()

    def seconds(self, first: float, last: float) -> float:
        return last - first

    def wait(self) -> None:
        pass


class CudaStamps:
    """For work that a host only launches: CUDA events, which time the device and never make the host wait."""

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
        """Seconds of each call on the device, launched without a pause, as `measure_interleaved` asks for them."""
        stamps = [self.now()]
        for _ in range(n_calls):
            call()
            stamps.append(self.now())
        self.wait()
        return [self.seconds(a, b) for a, b in pairwise(stamps)]


def stamps_for(device_type: str) -> HostStamps | CudaStamps:
    """The stamps of a torch device's type: `cpu` or `cuda`."""
    if device_type == "cpu":
        return HostStamps()
    import torch

    return CudaStamps(torch.cuda)


def captured(calls: Sequence[Callable[[], object]], pool: Any = None) -> Callable[[], object]:
    """A replay of one CUDA graph that makes these calls one after another, so that launching them costs nothing.

    pool: memory shared with other graphs that are not replayed at the same time, by `torch.cuda.graph_pool_handle()`.

    Each is called twice before, on a stream of its own as capturing asks, for what allocates or chooses at first.
    Raises RuntimeError where something in them cannot be captured.
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
    """A replay of the call where it can be captured, else the call itself."""
    import torch

    try:
        return captured([call], pool)
    except RuntimeError:
        torch.cuda.synchronize()
        return call
