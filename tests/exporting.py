"""Export takes seconds and is tested elsewhere: here each network is exported once."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx
import pytest
from torch import Tensor, nn

from sparse_export.graph.example import Example
from sparse_export.graph.named_network import NamedNetwork


@contextmanager
def exported_once() -> Iterator[None]:
    """While it lasts, `building` exports a network of the same weights and masks once, and copies after
    that.
    """
    graph: Any = importlib.import_module("sparse_export.building.graph")
    genuine, made = graph.onnx_from_module, {}

    def export(
        module: nn.Module, example: Example, *, masks: Mapping[str, Tensor], named: NamedNetwork | None = None
    ) -> onnx.ModelProto:
        weights, kept = (
            b"".join(value.numpy().tobytes() for value in tensors.values())
            for tensors in (module.state_dict(), masks)
        )
        key = weights, kept, tuple((name, one.shape) for name, one in example.tensors.items())
        if key not in made:
            made[key] = genuine(module, example, masks=masks, named=named)
        copy = onnx.ModelProto()
        copy.CopyFrom(made[key])
        return copy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "onnx_from_module", export)
        yield
