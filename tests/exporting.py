"""Export takes seconds and is tested elsewhere: here each network is exported once."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import pytest
from torch import nn


@contextmanager
def exported_once() -> Iterator[None]:
    """While it lasts, `building` exports a network of the same weights once, and copies after that."""
    graph: Any = importlib.import_module("sparse_export.building.graph")
    genuine, made = graph.onnx_from_module, {}

    def export(module: nn.Module, *args: Any, **options: Any) -> onnx.ModelProto:
        weights = b"".join(value.numpy().tobytes() for value in module.state_dict().values())
        if weights not in made:
            made[weights] = genuine(module, *args, **options)
        copy = onnx.ModelProto()
        copy.CopyFrom(made[weights])
        return copy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "onnx_from_module", export)
        yield
