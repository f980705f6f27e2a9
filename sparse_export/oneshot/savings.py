"""What a layer saves as 2:4: multiply-adds of the graph, or time that was measured on one GPU."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from sparse_export.errors import UsageError
from sparse_export.formats.layers import GraphLayer
from sparse_export.formats.timings import Timings, read_timings
from sparse_export.graph.concrete import free_sizes
from sparse_export.graph.layers import graph_layers
from sparse_export.instruments.statistics import location, paired_ratio
from sparse_export.signature import Signature

__all__ = ["MACS", "MS", "WEIGHTS", "Savings", "savings_of"]

MACS, WEIGHTS, MS = "multiply-adds", "weights", "ms"


@dataclass(frozen=True, kw_only=True)
class Savings:
    """What layers save.

    Attributes:
        unit: `MACS`, `WEIGHTS` where these are not known of every layer, or `MS`.
        saved: of each layer, in that unit; of multiply-adds all of its own, half of which 2:4 saves.
        work: multiply-adds of each layer for a sample, or its weights.
        whole: the same of all layers of the graph; None where it is not known.
        why_none: of layers that save nothing.
    """

    unit: str
    saved: dict[str, float]
    work: dict[str, float]
    whole: float | None
    why_none: dict[str, str] = field(default_factory=dict)

    def share(self, names: Collection[str]) -> float:
        """Of the work of all these layers, that of some."""
        return sum(self.work[name] for name in names) / (sum(self.work.values()) or 1.0)


def savings_of(
    model: onnx.ModelProto, signature: Signature, names: Collection[str], timings: Path | None
) -> Savings:
    """Work out what layers save.

    Args:
        model: the graph.
        signature: of it, with an example of each free size.
        names: of the stored weights.
        timings: file of `plan --keep-timings`; None to count multiply-adds.

    Raises:
        UsageError: no size of a layer was timed.
        ArtefactError: the file is damaged.
    """
    layers = [one for one in graph_layers(_at_sizes(model, signature)) if one.macs != 0]
    by_name: dict[str, list[GraphLayer]] = {name: [] for name in names}
    for one in layers:
        if one.weight in by_name:
            by_name[one.weight].append(one)
    macs = {name: _sum([one.macs for one in own]) for name, own in by_name.items()}
    known = {name: float(one) for name, one in macs.items() if one}
    if len(known) == len(by_name):
        unit, work, total = MACS, known, _sum([one.macs for one in layers])
        whole = None if total is None else float(total)
    else:
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        unit, whole = WEIGHTS, None
        work = {name: float(_n_entries(stored[name])) for name in by_name}
    if timings is None:
        return Savings(unit=unit, saved=dict(work), work=work, whole=whole)
    found = read_timings(timings)
    saved, why_none = _by_time(by_name, found)
    if not saved:
        raise UsageError(
            f"By {timings} ({len(found.products)} sizes at batch {found.batch}), 2:4 makes no layer faster: "
            f"{next(iter(why_none.values()), 'it has no layer')}.",
            do="Give timings of this network, or leave out --timings.",
        )
    return Savings(unit=MS, saved=saved, work=work, whole=whole, why_none=why_none)


def _by_time(
    by_name: dict[str, list[GraphLayer]], timings: Timings
) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds at the low end of the interval, as a layer plan counts them; and why a layer saves none."""
    timed = {product.size: product for product in timings.products}
    saved: dict[str, float] = {}
    why_none: dict[str, str] = {}
    for name, own in by_name.items():
        for one in own:
            product = timed.get(_size(one, timings.batch))
            if product is None:
                why_none[name] = f"its size {' x '.join(map(str, _size(one, timings.batch)))} was not timed"
                break
            ratio = paired_ratio(product.dense_ms, product.sparse_ms)
            if ratio.low <= 1:
                why_none[name] = f"it is not faster there: dense / 2:4 is {ratio}"
                break
            saved[name] = saved.get(name, 0.0) + location(product.dense_ms).estimate * (1 - 1 / ratio.low)
        if name in why_none:
            saved.pop(name, None)
    return saved, why_none


def _size(layer: GraphLayer, batch: int) -> tuple[int, int, int]:
    """Outputs, inputs and rows of the product at a batch."""
    n_outputs = (
        layer.shape[0] if layer.op_type == "Conv" else layer.n_weights // layer.shape[layer.reduction_axis]
    )
    rows = batch * (layer.macs or 0) // max(1, layer.n_weights)
    return n_outputs, layer.n_weights // max(1, n_outputs), rows


def _at_sizes(model: onnx.ModelProto, signature: Signature) -> onnx.ModelProto:
    """The graph with the example of each free size but for the batch; itself where there is none."""
    places = {
        at: signature.sizes[name]
        for name, found in free_sizes(model).items()
        if name in signature.sizes and name != signature.batch
        for at in found
    }
    if not places:
        return model
    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    del sized.graph.value_info[:]
    for value in sized.graph.input:
        for axis, size in enumerate(value.type.tensor_type.shape.dim):
            if (value.name, axis) in places:
                size.dim_value = places[value.name, axis]
    for value in sized.graph.output:
        value.type.tensor_type.ClearField("shape")
    return sized


def _n_entries(tensor: onnx.TensorProto) -> int:
    n = 1
    for size in tensor.dims:
        n *= size
    return n


def _sum(counts: list[int | None]) -> int | None:
    return None if not counts or None in counts else sum(one or 0 for one in counts)
