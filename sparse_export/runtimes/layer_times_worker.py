"""Times the layers of engines in a process of its own, so that a crash of the library costs nothing else.

    python -m sparse_export.runtimes.layer_times_worker REQUEST.json RESULT.json

REQUEST.json: as `twin.py` writes it, with the engines' files beside it. They were built by whoever asks, a moment ago.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pydantic

from sparse_export.errors import MissingCapability, SparseExportError
from sparse_export.files import write_json
from sparse_export.formats.engines import EngineInfo
from sparse_export.runtimes.layer_times import TimedLayers, time_layers
from sparse_export.runtimes.tensorrt import EngineSession

__all__ = ["main", "timed_from_document"]


def main(words: list[str]) -> int:
    """Time what a request asks for; 0, or 1 with the reason in the result."""
    request = json.loads(Path(words[0]).read_bytes())
    out = Path(words[1])
    fact: EngineInfo = pydantic.TypeAdapter(EngineInfo).validate_python(request["fact"])
    try:
        with contextlib.ExitStack() as stack:
            passes = {}
            for name, file in request["engines"].items():
                plan = Path(words[0]).with_name(file).read_bytes()
                session = stack.enter_context(EngineSession(plan, fact, cuda_graphs=False))
                passes[name] = session.profiled_pass(request["batch"])
            found = time_layers(
                passes, batch=request["batch"], rounds=request["rounds"], block_s=request["block_s"]
            )
    except SparseExportError as error:
        write_json(
            out,
            {
                "missing": isinstance(error, MissingCapability),
                "failed": {"what": error.what, "expected": error.expected, "do": error.do},
            },
        )
        return 1
    write_json(out, {"timed": {name: asdict(one) for name, one in found.items()}})
    return 0


def timed_from_document(document: Mapping[str, Any]) -> dict[str, TimedLayers]:
    """What a result tells of each engine."""
    found: dict[str, TimedLayers] = pydantic.TypeAdapter(dict[str, TimedLayers]).validate_python(document)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
