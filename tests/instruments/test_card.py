from __future__ import annotations

import sys
import time
from types import ModuleType
from typing import Any

import pytest

from sparse_export.instruments.card import read_cards, watched_cards


class NVMLError(Exception):
    pass


def _fake_nvml(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[str]:
    """Put a module in pynvml's place that knows one card and only questions; gives the list of what was
    called.
    """
    called: list[str] = []

    def answer(name: str, value: Any) -> Any:
        def function(*_: object) -> Any:
            called.append(name)
            if isinstance(value, Exception):
                raise value
            return value() if callable(value) else value

        return function

    answers: dict[str, Any] = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": "handle",
        "nvmlDeviceGetName": "NVIDIA H200",
        "nvmlDeviceGetClockInfo": 1500,
        "nvmlDeviceGetMaxClockInfo": 1980,
        "nvmlDeviceGetPowerUsage": 312_500,
        "nvmlDeviceGetEnforcedPowerLimit": 700_000,
        "nvmlDeviceGetTemperature": 54,
        "nvmlDeviceGetCurrentClocksEventReasons": 0x1,
    }
    fake: Any = ModuleType("pynvml")
    fake.NVMLError, fake.NVML_CLOCK_SM, fake.NVML_CLOCK_MEM, fake.NVML_TEMPERATURE_GPU = NVMLError, 1, 2, 0
    for name, value in (answers | changes).items():
        if value is not AttributeError:
            setattr(fake, name, answer(name, value))
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return called


def test_a_card_is_described_in_watts_degrees_and_megahertz(monkeypatch: pytest.MonkeyPatch) -> None:
    called = _fake_nvml(monkeypatch)
    log = read_cards()
    (sample,) = log.samples
    assert (sample.name, sample.sm_clock_mhz, sample.max_sm_clock_mhz) == ("NVIDIA H200", 1500, 1980)
    assert (sample.power_w, sample.power_limit_w, sample.temperature_c) == (312.5, 700.0, 54)
    assert (sample.throttle, log.throttled, log.why_empty) == ((), (), None)
    assert called[-1] == "nvmlShutdown"


def test_nothing_but_questions_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    called = _fake_nvml(monkeypatch)
    with watched_cards(0.001):
        time.sleep(0.01)
    assert {name for name in called if "Get" not in name} == {"nvmlInit", "nvmlShutdown"}


def test_a_clock_that_is_held_down_for_a_moment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = iter([0x0, 0x4 | 0x40])
    _fake_nvml(monkeypatch, nvmlDeviceGetCurrentClocksEventReasons=lambda: next(reasons, 0x2))
    with watched_cards(0.001) as log:
        while len(log.samples) < 3:
            time.sleep(0.001)
    assert log.throttled == ("hardware-thermal", "power-cap")
    assert log.samples[-1].throttle == ("application-clocks",)
    assert [sample.seconds for sample in log.samples] == sorted(sample.seconds for sample in log.samples)


def test_an_older_library_is_asked_by_its_older_name(monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_nvml(
        monkeypatch,
        nvmlDeviceGetCurrentClocksEventReasons=AttributeError,
        nvmlDeviceGetCurrentClocksThrottleReasons=0x20,
        nvmlDeviceGetName=b"Tesla T4",
    )
    (sample,) = read_cards().samples
    assert (sample.name, sample.throttle) == ("Tesla T4", ("software-thermal",))


def test_a_card_that_does_not_answer_a_question_leaves_it_open(monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_nvml(
        monkeypatch,
        nvmlDeviceGetPowerUsage=NVMLError("Not Supported"),
        nvmlDeviceGetTemperature=NVMLError("Not Supported"),
    )
    (sample,) = read_cards().samples
    assert (sample.power_w, sample.temperature_c, sample.sm_clock_mhz) == (None, None, 1500)


def test_without_the_library_or_the_driver_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with watched_cards() as log:
        pass
    assert (log.samples, log.why_empty) == ([], "nvidia-ml-py is not installed")
    _fake_nvml(monkeypatch, nvmlInit=NVMLError("Driver Not Loaded"))
    assert read_cards().why_empty == "NVML does not start: Driver Not Loaded"
