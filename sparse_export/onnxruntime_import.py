"""The one place that imports onnxruntime, with its telemetry off."""

from __future__ import annotations

import importlib
from typing import Any

from sparse_export.telemetry import turn_telemetry_off

__all__ = ["load_onnxruntime"]


def load_onnxruntime(module: str = "onnxruntime") -> Any:
    """Import onnxruntime, which reports to its maker only where the user's environment asks for that.

    In a process that has imported onnxruntime before, by itself, its telemetry stays as it is.

    Args:
        module: full name of the module, `onnxruntime` or one inside it.

    Returns:
        The module. Any: onnxruntime has no types.

    Raises:
        ImportError: onnxruntime is not installed, or one of its libraries is missing.
    """
    turn_telemetry_off()
    return importlib.import_module(module)
