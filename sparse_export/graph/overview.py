"""What there is to see in an ONNX file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx

from sparse_export.formats.run import LayerInfo
from sparse_export.graph.finite import not_finite
from sparse_export.graph.if_pruned import LayerIfPruned
from sparse_export.graph.layers import layers_if_pruned, n_parameters
from sparse_export.graph.model import open_mapped
from sparse_export.graph.promises import promised_patterns

__all__ = ["Overview", "overview_of"]


@dataclass(frozen=True, kw_only=True)
class Overview:
    """What a graph holds.

    Attributes:
        model: as `open_mapped` opens it, without the data of its large tensors.
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
    model, read = open_mapped(path, links=links)
    layers, broken = layers_if_pruned(model, promised, read=read)
    # A weight that is multiplied by as it is stored, and whose magnitude is known, is finite.
    finite = {layer.weight for layer in layers if layer.magnitude is not None and not layer.through}
    return Overview(
        model=model,
        layers=layers,
        broken=broken,
        not_finite=not_finite(model, read=read, finite=finite),
        n_parameters=n_parameters(model),
    )
