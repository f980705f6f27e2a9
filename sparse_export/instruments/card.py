"""Clocks, power, temperature and throttling of NVIDIA cards, read through NVML and never changed."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CardLog", "CardSample", "read_cards", "watched_cards"]

# Bits of nvmlDeviceGetCurrentClocksEventReasons, from NVIDIA's nvml.h; an idle card is not throttled.
_REASONS = {
    0x2: "application-clocks",
    0x4: "power-cap",
    0x8: "hardware-slowdown",
    0x10: "sync-boost",
    0x20: "software-thermal",
    0x40: "hardware-thermal",
    0x80: "power-brake",
    0x100: "display-clocks",
}
_HOLDING = frozenset(name for name in _REASONS.values() if name not in ("application-clocks", "sync-boost"))


@dataclass(frozen=True, kw_only=True)
class CardSample:
    """The state of one GPU at one moment; None for what it does not report.

    Attributes:
        seconds: since the log began.
        index: number of the GPU.
        name: of the GPU.
        sm_clock_mhz: present clock of the multiprocessors.
        max_sm_clock_mhz: its maximum.
        memory_clock_mhz: present clock of the memory.
        power_w: present power.
        power_limit_w: enforced limit.
        temperature_c: of the chip.
        throttle: reasons why its clock is held down.
    """

    seconds: float
    index: int
    name: str
    sm_clock_mhz: int | None
    max_sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    power_w: float | None
    power_limit_w: float | None
    temperature_c: int | None
    throttle: tuple[str, ...]


@dataclass(kw_only=True)
class CardLog:
    """The samples taken while a measurement ran.

    Attributes:
        samples: of all GPUs, in the order of time.
        why_empty: why there are none; None where there are.
    """

    samples: list[CardSample] = field(default_factory=list)
    why_empty: str | None = None

    @property
    def throttled(self) -> tuple[str, ...]:
        """The reasons, other than settings, that held a clock down at some moment."""
        return tuple(sorted({reason for sample in self.samples for reason in sample.throttle} & _HOLDING))


def read_cards() -> CardLog:
    """Sample every GPU once."""
    log = CardLog()
    nvml = _start_nvml(log)
    if nvml is not None:
        try:
            log.samples += _samples(nvml, 0.0)
        finally:
            nvml.nvmlShutdown()
    return log


@contextmanager
def watched_cards(interval_s: float = 0.1) -> Iterator[CardLog]:
    """Sample every GPU from another thread until the block ends, and once more then.

    Args:
        interval_s: seconds between two samples.

    Yields:
        The log, complete after the block.
    """
    log = CardLog()
    nvml = _start_nvml(log)
    if nvml is None:
        yield log
        return
    begin, done = time.monotonic(), threading.Event()

    def watch() -> None:
        while True:
            log.samples.extend(_samples(nvml, time.monotonic() - begin))
            if done.wait(interval_s):
                return

    thread = threading.Thread(target=watch, name="watched-cards", daemon=True)
    thread.start()
    try:
        yield log
    finally:
        done.set()
        thread.join()
        log.samples.extend(_samples(nvml, time.monotonic() - begin))
        nvml.nvmlShutdown()


def _start_nvml(log: CardLog) -> Any:
    """NVML after its initialisation; None, with the reason in the log, where it cannot be used."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        log.why_empty = "nvidia-ml-py is not installed"
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as cause:
        log.why_empty = f"NVML does not start: {cause}"
        return None
    return nvml


def _samples(nvml: Any, seconds: float) -> list[CardSample]:
    """One sample of each GPU."""
    return [_sample(nvml, index, seconds) for index in range(nvml.nvmlDeviceGetCount())]


def _sample(nvml: Any, index: int, seconds: float) -> CardSample:
    """One sample of one GPU."""
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def ask(function: str, *arguments: int) -> Any:
        try:
            return getattr(nvml, function)(handle, *arguments)
        except (nvml.NVMLError, AttributeError):  # a GPU or a library that does not report it
            return None

    name = ask("nvmlDeviceGetName")
    power, limit = ask("nvmlDeviceGetPowerUsage"), ask("nvmlDeviceGetEnforcedPowerLimit")
    bits = ask("nvmlDeviceGetCurrentClocksEventReasons")
    if bits is None:
        bits = ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
    return CardSample(
        seconds=round(seconds, 3),
        index=index,
        name=name.decode() if isinstance(name, bytes) else str(name or "unknown"),
        sm_clock_mhz=ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
        max_sm_clock_mhz=ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
        memory_clock_mhz=ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
        power_w=None if power is None else power / 1e3,
        power_limit_w=None if limit is None else limit / 1e3,
        temperature_c=ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        throttle=tuple(word for bit, word in _REASONS.items() if bits & bit),
    )
