"""The record of an engine in a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """An engine of a bundle: native code for one library and certain GPUs.

    Attributes:
        file: path within the bundle.
        target: the library.
        precision: of the graph.
        version: of the library.
        gpu: name of the GPU that it was built on, None without one.
        architecture: of that GPU, as in `sm90`.
        architectures: what TensorRT for RTX was to build for; empty for its own choice.
        hardware: which other GPUs TensorRT was to make it run on.
        version_compatible: later releases of TensorRT can load it.
        profiles: batch sizes (min, opt, max).
        sparse: sparse kernels were allowed.
        parse_s: seconds that the library took to parse the graph.
        build_s: seconds that it took to build.
        onnx_sha256: of the dense graph that was parsed.
        timing_cache: its path within the bundle, if any.
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
