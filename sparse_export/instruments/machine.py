"""The properties of this machine that a measured time depends on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["machine_facts", "n_usable_cores"]

_SMI_QUERY = ("--query-gpu=name,driver_version", "--format=csv,noheader")
_SMI_TIMEOUT_S = 10.0


def n_usable_cores() -> int:
    """Count the cores that this process may be scheduled on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_facts() -> dict[str, Any]:
    """Read CPU, memory, load, system and GPUs.

    Returns:
        A dictionary for JSON; what cannot be read is None. `load_average` is over 1, 5 and 15 minutes, in
        running processes; `cpu_quota_cores` is a container's limit, in cores; `governor` is that of the first
        core; `gpus` are by `nvidia-smi`, or by torch when that is imported already and there is no
        `nvidia-smi`.
    """
    return {
        "cpu_model": _cpu_model(),
        "n_cores": os.cpu_count(),
        "n_cores_usable": n_usable_cores(),
        "cpu_quota_cores": _cpu_quota(),
        "governor": _text(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "memory_bytes": _memory_bytes("MemTotal"),
        "memory_available_bytes": _memory_bytes("MemAvailable"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "gpus": _gpus(),
    }


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _colon_value(text: str | None, key: str) -> str | None:
    for line in (text or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def _cpu_model() -> str | None:
    return _colon_value(_text(Path("/proc/cpuinfo")), "model name") or platform.processor() or None


def _memory_bytes(key: str) -> int | None:
    value = _colon_value(_text(Path("/proc/meminfo")), key)
    return int(value.split()[0]) * 1024 if value else None


def _cpu_quota() -> float | None:
    quota, _, period = (_text(Path("/sys/fs/cgroup/cpu.max")) or "max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _gpus() -> list[dict[str, str]]:
    smi = shutil.which("nvidia-smi")
    if smi:
        try:
            done = subprocess.run(
                [smi, *_SMI_QUERY], check=True, capture_output=True, text=True, timeout=_SMI_TIMEOUT_S
            )
        except (OSError, subprocess.SubprocessError):
            return []
        rows = [line.rpartition(",") for line in done.stdout.splitlines()]
        return [{"name": name.strip(), "driver": driver.strip()} for name, _, driver in rows if name]
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [{"name": torch.cuda.get_device_name(i)} for i in range(torch.cuda.device_count())]
