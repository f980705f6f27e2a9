"""Reads from the builder's log and the inspector which layers got sparse kernels.

Sources. The log lines of TensorRT 8 to 10: "(Sparsity) Layers eligible for sparse math: A, B" and "(Sparsity)
TRT inference plan picked sparse implementation for layers: A" (NVIDIA/TensorRT issues 1403, 2169, 4056); of
later releases: "(Sparsity) Found N layer(s) eligible to use sparse tactics: A, B" and "(Sparsity) Chose N
layer(s) using sparse tactics: A", as the strings in the library of TensorRT for RTX 1.7 have them. The
inspector's JSON names kernels at detailed verbosity; those of sparse kernels hold `sparse`, as in
sm80_xmma_fprop_sparse_conv.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_export.formats.layers import EngineLayer, GraphLayer
from sparse_export.graph.eligibility import MEANINGS

__all__ = [
    "Kernels",
    "SparsityLog",
    "engine_layers",
    "kernels_from_inspection",
    "parts_of_name",
    "read_sparsity",
]

_MARK = "(Sparsity)"
_FOUND = (
    re.compile(r"Layers eligible for sparse math:(?P<names>.*)"),
    re.compile(r"Found (?P<count>\d+) layer\(s\) eligible to use sparse tactics(?::(?P<names>.*))?"),
)
_CHOSEN = (
    re.compile(r"TRT inference plan picked sparse implementation for layers:(?P<names>.*)"),
    re.compile(r"Chose (?P<count>\d+) layer\(s\) using sparse tactics(?::(?P<names>.*))?"),
)
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]\x1e\x1f]+)\]")
_FUSED = re.compile(r" \+ | \|\| ")
_REGION = re.compile(r"\{?ForeignNode\[")


@dataclass(frozen=True, kw_only=True)
class SparsityLog:
    """What the builder's log says about sparse kernels.

    Attributes:
        eligible: layers that sparse kernels fit, as the builder names them, fused ones split; None without
            such a line.
        picked: layers with sparse kernels, likewise.
        n_eligible: number of the first; more than there are names where the log gives only a number; None
            without such a line.
        n_picked: number of the second, likewise.
        unread: lines on sparsity that are in no known wording.
    """

    eligible: frozenset[str] | None
    picked: frozenset[str] | None
    n_eligible: int | None
    n_picked: int | None
    unread: tuple[str, ...]


def read_sparsity(lines: Iterable[str]) -> SparsityLog:
    """Read the log lines that contain `(Sparsity)`. Never raises.

    Args:
        lines: of the log; others are ignored. A line may come several times, once for each part of the
            network, and the names add up.
    """
    found: list[tuple[list[str], int]] = []
    chosen: list[tuple[list[str], int]] = []
    unread = []
    for line in lines:
        _, mark, text = line.partition(_MARK)
        if not mark:
            continue
        for patterns, entries in ((_FOUND, found), (_CHOSEN, chosen)):
            match = next(filter(None, (pattern.search(text) for pattern in patterns)), None)
            if match is not None:
                entries.append(_names_and_count(match))
                break
        else:
            unread.append(line.strip())
    return SparsityLog(
        eligible=_union(found),
        picked=_union(chosen),
        n_eligible=sum(count for _, count in found) if found else None,
        n_picked=sum(count for _, count in chosen) if chosen else None,
        unread=tuple(unread),
    )


def _names_and_count(match: re.Match[str]) -> tuple[list[str], int]:
    """The layers that a line names, and how many it counts."""
    layers = [name.strip() for name in (match["names"] or "").split(", ")]
    layers = [name.rstrip(",") for name in layers if name.rstrip(",")]
    count = match.groupdict().get("count")
    return layers, len(layers) if count is None else int(count)


def _union(entries: Sequence[tuple[list[str], int]]) -> frozenset[str] | None:
    """The names of all lines, fused layers split; None without a line."""
    return (
        frozenset(part for names, _ in entries for name in names for part in parts_of_name(name))
        if entries
        else None
    )


def parts_of_name(name: str) -> Iterator[str]:
    """Yield the nodes that a layer was fused of.

    Args:
        name: of the layer, fused one after the other ("conv + relu") or side by side ("conv1 || conv2"). A
            region of many nodes names only its two ends, which says nothing about either, so that it yields
            none.
    """
    if _REGION.search(name):
        return
    yield from (part.strip() for part in _FUSED.split(name))


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The kernels of one layer of an engine.

    Attributes:
        layer: its name in the engine.
        nodes: of the ONNX graph, those that it executes.
        names: of its kernels, as the inspector has them.
    """

    layer: str
    nodes: frozenset[str]
    names: tuple[str, ...]

    @property
    def sparse(self) -> tuple[str, ...]:
        """The names of sparse kernels among them."""
        return tuple(name for name in self.names if "sparse" in name.lower())


def kernels_from_inspection(text: str | None) -> tuple[Kernels, ...]:
    """Read the inspector's JSON, of TensorRT 10 or 11.

    Args:
        text: None where there is none.

    Returns:
        One entry for each layer; none for a text that is not such JSON.
    """
    try:
        document = json.loads(text or "")
    except (ValueError, RecursionError):
        return ()
    layers = document.get("Layers") if isinstance(document, dict) else None
    if not isinstance(layers, list):
        return ()
    return tuple(_kernels(one) for one in layers if isinstance(one, dict))


def _kernels(layer: Mapping[str, Any]) -> Kernels:
    """The kernels of a layer, from its object in the inspector's JSON."""
    name, metadata = (
        value if isinstance(value := layer.get(key), str) else "" for key in ("Name", "Metadata")
    )
    nodes = frozenset({*parts_of_name(name), *(one.strip() for one in _ONNX_LAYER.findall(metadata))})
    return Kernels(layer=name, nodes=nodes, names=tuple(_kernel_names(layer)))


def _kernel_names(layer: Mapping[str, Any]) -> Iterator[str]:
    """The values of keys like TacticName and Kernels; not of Name, since a layer may have any name."""
    for key, value in layer.items():
        if re.search(r"tactic|kernel", key, re.IGNORECASE):
            yield from (
                one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)
            )


def engine_layers(
    layers: Sequence[GraphLayer],
    *,
    target: str,
    sparse: bool,
    lines: Iterable[str],
    inspection: str | None,
) -> tuple[EngineLayer, ...]:
    """Determine for each layer whether an engine runs it on a sparse kernel.

    What the builder reports takes precedence over what the graph lets expect.

    Args:
        layers: of the graph that the engine was built from.
        target: `tensorrt` or `tensorrt-rtx`.
        sparse: sparse kernels were allowed.
        lines: of the builder's log.
        inspection: the inspector's JSON, None where there is none.

    Returns:
        One row for each layer, in their order.
    """
    log = read_sparsity(lines)
    kernels = kernels_from_inspection(inspection)
    with_weights = {layer.node for layer in layers if layer.constant}
    return tuple(_engine_layer(layer, target, sparse, log, kernels, with_weights) for layer in layers)


def _engine_layer(
    layer: GraphLayer,
    target: str,
    sparse: bool,
    log: SparsityLog,
    kernels: Sequence[Kernels],
    with_weights: set[str],
) -> EngineLayer:
    """The row of one layer. with_weights: nodes of all layers that multiply by a constant."""

    def row(state: Any, text: str, names: tuple[str, ...] = ()) -> EngineLayer:
        return EngineLayer(node=layer.node, weight=layer.weight, state=state, text=text, kernels=names)

    mine = [one for one in kernels if layer.node in one.nodes]
    alone = [one for one in mine if not one.nodes & (with_weights - {layer.node})]
    sparse_names = tuple(name for one in alone for name in one.sparse)
    if sparse_names:
        return row("picked", "The inspector names a sparse kernel.", sparse_names)
    if log.picked is not None and layer.node in log.picked:
        return row("picked", "The builder's log names it among those with a sparse kernel.")
    reasons = " ".join(reason.text for reason in layer.reasons)
    if layer.eligible == "no":
        decisive = [reason.text for reason in layer.reasons if MEANINGS[reason.code][0] == "no"]
        return row("not eligible", " ".join(decisive) or reasons)
    if not sparse:
        return row("not picked", "The engine was built without sparse kernels.")
    if any(one.sparse for one in mine):
        return row("unknown", "A sparse kernel is in a part of the engine that holds other layers too.")
    if log.eligible is not None and layer.node in log.eligible and log.picked is not None:
        if len(log.picked) < (log.n_picked or 0):
            return row("unknown", "The builder's log gives the number of sparse kernels, not their layers.")
        return row("not picked", "The builder timed sparse kernels for it, and a dense one was faster.")
    if log.n_picked == 0:
        return row("not picked", "The builder's log says that it picked no sparse kernel at all.")
    if layer.eligible == "unproven":
        return row("unproven", reasons)
    if target == "tensorrt-rtx":
        return row(
            "unknown",
            "TensorRT for RTX does not report it: its engine is byte for byte the same "
            "whether sparse kernels are allowed or not.",
        )
    if log.eligible is not None and len(log.eligible) >= (log.n_eligible or 0):
        return row("not picked", "The builder does not count it among the layers that sparse kernels fit.")
    return row("unknown", "Neither the builder's log nor the inspector reports it.")
