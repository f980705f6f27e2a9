"""What there is to see in an ONNX file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx

from sparse_export.formats.run import LayerInfo
from sparse_export.graph.finite import not_finite
from sparse_export.graph.if_pruned import LayerIfPruned
from sparse_export.graph.layers import (
    broken_patterns,
    count_parameters,
    layers_if_pruned,
    promised_patterns,
)
from sparse_export.graph.model import open_model

__all__ = ["Overview", "overview_of"]


@dataclass(frozen=True, kw_only=True)
class Overview:
    """What a graph holds.

    Attributes:
        model: as `open_model` opens it.
        layers: in graph order.
        broken: a clause for each promised pattern that the graph does not keep.
        not_finite: names of stored tensors with NaN or infinity, in words; empty where there are none.
        n_parameters: entries of all float initializers.
    """

    model: onnx.ModelProto
    layers: tuple[LayerIfPruned, ...]
    broken: tuple[str, ...]
    not_finite: str
    n_parameters: int


def overview_of(path: Path, *, links: bool = True, promising: Iterable[LayerInfo] = ()) -> Overview:
    """Look at an ONNX file.

    Args:
        path: of the file.
        links: as of `open_model`.
        promising: the record of layers, with the patterns that they promise.

    Raises:
        UsageError: there is no such file.
        ArtefactError: it, or a promise, cannot be read.
    """
    promised = promised_patterns(promising)
    model = open_model(path, links=links)
    return Overview(
        model=model,
        layers=layers_if_pruned(model),
        broken=broken_patterns(model, promised),
        not_finite=not_finite(model),
        n_parameters=count_parameters(model)[0],
    )
