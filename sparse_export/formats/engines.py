"""The record of an engine in a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparse_export.formats.document import Amount, Digest, Positive
from sparse_export.signature import BATCH

Sizes = tuple[Positive, Positive, Positive]
"""The smallest, the optimal and the largest that a free size may be."""


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
        profiles: of each the bounds of every free size of the inputs, by its name.
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
    profiles: tuple[dict[str, Sizes], ...]
    sparse: bool
    parse_s: Amount
    build_s: Amount
    onnx_sha256: Digest
    timing_cache: str | None = None


def upgraded_engine(document: dict[str, object]) -> dict[str, object]:
    """Make the present record of one of version 1, whose profiles were of the batch alone."""
    profiles = document["profiles"]
    assert isinstance(profiles, list)
    return document | {"profiles": [{BATCH: one} for one in profiles]}
