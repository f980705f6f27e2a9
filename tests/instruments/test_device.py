from __future__ import annotations

import pytest
import torch

from sparse_export.instruments.device import CudaStamps, HostStamps, stamps_for
from sparse_export.instruments.interleave import measure_interleaved


class FakeCuda:
    """A stream whose work takes milliseconds that pass only when the host waits."""

    def __init__(self) -> None:
        self.queued_ms = 0.0
        self.waits = 0
        stream = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.at_ms = -1.0

            def record(self) -> None:
                self.at_ms = stream.queued_ms

            def elapsed_time(self, later: Event) -> float:
                return later.at_ms - self.at_ms

        self.Event = Event

    def synchronize(self) -> None:
        self.waits += 1


def test_calls_are_timed_by_the_device_and_waited_for_once_a_block() -> None:
    cuda = FakeCuda()

    def launch() -> None:
        cuda.queued_ms += 2.0

    stamps = CudaStamps(cuda)
    assert stamps.time_calls(launch, 5) == pytest.approx([0.002] * 5)
    assert cuda.waits == 1


def test_a_measurement_takes_the_times_of_the_device_not_of_the_host() -> None:
    cuda = FakeCuda()
    stamps = CudaStamps(cuda)

    def launches(milliseconds: float) -> object:
        cuda.queued_ms += milliseconds
        return None

    found = measure_interleaved(
        {"a": lambda: launches(3.0), "b": lambda: launches(2.0)},
        batch=1,
        block_s=0.01,
        warmup_limit_s=0.2,
        time_calls=stamps.time_calls,
    )
    assert found["a"].samples_ms == pytest.approx([3.0] * 24)
    assert (found["a"].n_calls_per_block, found["b"].n_calls_per_block) == (3, 5)


def test_the_cpu_has_the_hosts_clock() -> None:
    stamps = stamps_for("cpu")
    assert isinstance(stamps, HostStamps)
    first = stamps.now()
    stamps.wait()
    assert stamps.seconds(first, stamps.now()) >= 0.0


@pytest.mark.gpu
def test_events_see_a_product_that_the_host_has_only_launched() -> None:
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    stamps = stamps_for("cuda")
    assert isinstance(stamps, CudaStamps)
    stamps.time_calls(lambda: x @ x, 3)
    assert min(stamps.time_calls(lambda: x @ x, 10)) > 2 * 4096**3 / 5e15  # no card reaches five petaflops
