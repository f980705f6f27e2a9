"""The record of an engine in a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """An engine of a bundle: a plan of native code for one library and certain GPUs.

    file: relative to the bundle.  target: `tensorrt` or `tensorrt-rtx`; version: of that library.  gpu,
    architecture: what it was built on, None without a GPU.  architectures: what TensorRT for RTX was told to build
    for, empty for its own choice.  hardware, version_compatible: what else it is to run on.  profiles: batch sizes
    (min, opt, max).  sparse: sparse kernels were allowed.  parse_s, build_s: seconds in the library.
    onnx_sha256: of the dense graph that was parsed.  timing_cache: its file, if any.
    """

    file: str
    target: Literal["tensorrt", "tensorrt-rtx"]
    precision: str
    version: str
    gpu: str | None
    architecture: str | None
    architectures: tuple[str, ...]
    hardware: str
    version_compatible: bool
    profiles: tuple[tuple[int, int, int], ...]
    sparse: bool
    parse_s: float
    build_s: float
    onnx_sha256: str
    timing_cache: str | None = None
