"""Keeps libraries from reporting to their makers, unless the user asks for it.

onnxruntime writes a device id and a database into the user's cache folder as soon as it is imported, and
later looks for its maker's collector (1.31.1, Linux). It reads its variable only while it is imported:
`disable_telemetry_events` comes too late for the files, and does not stop the uploads. huggingface_hub, by
which timm downloads weights, tells in every request which torch and which coding agent are there, unless its
variable is set before its import (2.4.0).
"""

from __future__ import annotations

import os

__all__ = ["OFF", "ONNXRUNTIME_VARIABLE", "telemetry_environment", "turn_telemetry_off"]

ONNXRUNTIME_VARIABLE = "ORT_DISABLE_TELEMETRY"
OFF = "1"
_VARIABLES = (ONNXRUNTIME_VARIABLE, "HF_HUB_DISABLE_TELEMETRY")


def telemetry_environment() -> dict[str, str]:
    """The variables that decide about telemetry, for the environment of a child process.

    Returns:
        Each variable with the user's own value where the environment has one, even an empty one, else `OFF`.
    """
    return {name: os.environ.get(name, OFF) for name in _VARIABLES}


def turn_telemetry_off() -> None:
    """Set these variables to `OFF` in this process, which its children inherit. The user's own values stay.

    It has to run before such a library is imported.
    """
    for name in _VARIABLES:
        os.environ.setdefault(name, OFF)
