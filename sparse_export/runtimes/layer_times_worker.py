"""Times the layers of engines in a child process, so that a crash of the library ends nothing else.

The worker of `building/dense_baseline.py`, whose engines were built a moment ago.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pydantic

from sparse_export.child import answer
from sparse_export.formats.engines import EngineInfo
from sparse_export.runtimes.layer_times import TimedLayers, time_layers
from sparse_export.runtimes.tensorrt import EngineSession
from sparse_export.signature import INTEGERS, Signature

__all__ = ["time_engines", "timed_from_document"]


def time_engines(request: dict[str, Any]) -> dict[str, Any]:
    """Time the engines of a request.

    Args:
        request: `engines` (file by name), `engine` (the record), `signature`, `sizes`, `rounds` and
            `block_s`.

    Returns:
        A document for `timed_from_document`.

    Raises:
        SparseExportError: an engine cannot be loaded or run.
    """
    info: EngineInfo = pydantic.TypeAdapter(EngineInfo).validate_python(request["engine"])
    signature: Signature = pydantic.TypeAdapter(Signature).validate_python(request["signature"])
    sizes = request["sizes"]
    batch = sizes.get(signature.batch, 1)
    feeds = _drawable(signature).draw(batch, 0, sizes)
    with contextlib.ExitStack() as stack:
        passes = {}
        for name, file in request["engines"].items():
            content = Path(file).read_bytes()
            session = stack.enter_context(EngineSession(content, info, signature, cuda_graphs=False))
            passes[name] = session.profiled_pass(feeds)
        found = time_layers(passes, batch=batch, rounds=request["rounds"], block_s=request["block_s"])
    return {name: asdict(one) for name, one in found.items()}


def _drawable(signature: Signature) -> Signature:
    """With integers of an unknown range as zeros, which take as long as others."""
    inputs = tuple(
        replace(one, low=0, high=0) if one.dtype in INTEGERS and None in (one.low, one.high) else one
        for one in signature.inputs
    )
    return replace(signature, inputs=inputs)


def timed_from_document(document: Mapping[str, Any]) -> dict[str, TimedLayers]:
    """Read the result of `time_engines`.

    Args:
        document: by engine.
    """
    found: dict[str, TimedLayers] = pydantic.TypeAdapter(dict[str, TimedLayers]).validate_python(document)
    return found


if __name__ == "__main__":
    sys.exit(answer(sys.argv[1:], time_engines))
