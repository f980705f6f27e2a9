"""Explains, layer by layer, why an engine that was built elsewhere runs on sparse kernels or on dense ones.

What is known of the likely reasons: sparse convolutions and products win from about 256 input and output
channels (NVIDIA/TensorRT issues 3849, 4065); a plugin that computes a product keeps it out of the choice of
kernels (NVIDIA/Model-Optimizer issues 603, 1974); int8 kernels are sparse only where what a layer puts out is
quantized too (its pull request 1664).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sparse_export.engines.foreign_log import BuilderLog
from sparse_export.engines.tactics import (
    Kernels,
    SparsityLog,
    engine_layers,
    kernels_from_inspection,
    read_sparsity,
)
from sparse_export.formats.layers import EngineLayer, GraphLayer
from sparse_export.graph.eligibility import MEANINGS, verdict
from sparse_export.graph.quantized_ends import quantized_ends

if TYPE_CHECKING:
    import onnx

__all__ = ["Explained", "explain", "nodes_with_float_output"]

NOT_ALLOWED = (
    "The builder was not allowed sparse kernels: pass --sparsity=enable or set BuilderFlag.SPARSE_WEIGHTS."
)
_LARGE = 256  # channels from which sparse kernels win, by TensorRT's engineers
_PLUGIN = re.compile(r"plugin", re.IGNORECASE)
_REGION = re.compile(r"ForeignNode\[|__my[el]|^Myelin$|^kgen$")
_REFORMAT = "Reformatting CopyNode for "
_LOW_PRECISION = re.compile(
    r"FP16|\bHalf\b|Int8|BF16|BFloat16|FP8|f16f16|h\d{3,}|i8i8|bf16bf16|e4m3|hmma|imma", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True)
class Explained:
    """What is known of the layers of an engine that was built elsewhere.

    Attributes:
        layers: a row for each layer of the graph, in its order.
        notes: sentences on the build as a whole.
    """

    layers: tuple[EngineLayer, ...]
    notes: tuple[str, ...]


def explain(
    layers: Sequence[GraphLayer],
    *,
    log: BuilderLog | None,
    engine: Sequence[Mapping[str, Any]],
    float_output: Collection[str] = (),
) -> Explained:
    """Determine for each layer of a graph whether a foreign engine runs it on a sparse kernel, and why not.

    Args:
        layers: of the graph.
        log: of the engine's build, None where there is none.
        engine: layers of the engine, as `layers_from_file` returns them; may be empty.
        float_output: nodes whose output is not quantized.

    Returns:
        The rows, and what holds for all of them.
    """
    lines = log.sparsity_lines if log else ()
    described = [one for one in (*engine, *(log.layers if log else ())) if not _is_reformat(one)]
    inspection = json.dumps({"Layers": described})
    kernels = list(zip(described, kernels_from_inspection(inspection), strict=True))
    sparsity = read_sparsity(lines)
    named = {*(sparsity.eligible or ()), *(sparsity.picked or ())}
    named.update(node for _, one in kernels for node in one.nodes)
    asked = [_as_the_engine_sees_it(layer, log, kernels, sparsity, named) for layer in layers]
    case = _Case(
        sparsity=sparsity,
        kernels=kernels,
        allowed=_allowed(log, kernels),
        strange=bool(named)
        and not named & {layer.node for layer in asked}
        and not any(_is(_REGION, entry) for entry in described),
        float_output=float_output,
    )
    rows = engine_layers(
        asked, target="tensorrt", sparse=case.allowed is not False, lines=lines, inspection=inspection
    )
    explained = (
        replace(_explained(row, layer, case), node=before.node)
        for row, layer, before in zip(rows, asked, layers, strict=True)
    )
    return Explained(layers=tuple(explained), notes=_notes(log, case))


@dataclass(frozen=True, kw_only=True)
class _Case:
    """What is known of the engine as a whole.

    allowed: sparse kernels, None where nothing tells.  strange: no name in the engine is one of the graph.
    """

    sparsity: SparsityLog
    kernels: Sequence[tuple[Mapping[str, Any], Kernels]]
    allowed: bool | None
    strange: bool
    float_output: Collection[str]


def _is_reformat(layer: Mapping[str, Any]) -> bool:
    """Does the layer only change the memory format? Its name holds that of the layer it is for."""
    return str(layer.get("Name", "")).startswith(_REFORMAT)


def _allowed(log: BuilderLog | None, kernels: Sequence[tuple[Mapping[str, Any], Kernels]]) -> bool | None:
    """Whether the builder was allowed sparse kernels."""
    if any(one.sparse for _, one in kernels) or (log and log.sparsity_lines):
        return True
    if log is None:
        return None
    if log.option is not None:
        return log.option != "Disabled"
    return False if log.verbose else None


def _as_the_engine_sees_it(
    layer: GraphLayer,
    log: BuilderLog | None,
    kernels: Sequence[tuple[Mapping[str, Any], Kernels]],
    sparsity: SparsityLog,
    named: Collection[str],
) -> GraphLayer:
    """The layer by its name in the engine, and without what the builder decided otherwise.

    A node without a name goes by its output, which TensorRT's parser calls `node_of_OUTPUT`. Up to TensorRT
    10 the builder may compute a float32 graph in 16 or 8 bits.
    """
    if layer.node not in named and f"node_of_{layer.node}" in named:
        layer = replace(layer, node=f"node_of_{layer.node}")
    if layer.eligible != "no":
        return layer
    if sparsity.eligible is not None and layer.node in sparsity.eligible:
        return replace(layer, eligible="yes", reasons=())
    described = [entry for entry, one in kernels if layer.node in one.nodes]
    if (log is not None and log.low_precision) or any(map(_in_low_precision, described)):
        left = tuple(reason for reason in layer.reasons if reason.code != "float32")
        return replace(layer, reasons=left, eligible=verdict(left))
    return layer


def _in_low_precision(layer: Mapping[str, Any]) -> bool:
    """Does a layer of the engine read 16- or 8-bit values, by its inputs or the name of its kernel?"""
    inputs, tactic = layer.get("Inputs", ""), layer.get("TacticName", "")
    return _LOW_PRECISION.search(f"{json.dumps(inputs)} {tactic}") is not None


def _explained(row: EngineLayer, layer: GraphLayer, case: _Case) -> EngineLayer:
    """The row with the likely reason."""
    if row.state == "picked" and row.kernels:
        return replace(row, text=f"The engine runs it on a sparse kernel: {', '.join(row.kernels)}.")
    if row.state in ("picked", "not eligible"):
        return row
    if case.strange:
        return replace(row, state="unknown", text="No layer of the engine has a name of this graph.")
    if case.allowed is False:
        return replace(row, text=NOT_ALLOWED)
    mine = [(entry, one) for entry, one in case.kernels if layer.node in one.nodes]
    if case.kernels and (placed := _out_of_reach(row, mine, case)) is not None:
        return placed
    if row.state != "not picked" and (names := _dense_kernels(mine)):
        row = replace(
            row, state="not picked", text=f"The engine runs it on a dense kernel: {', '.join(names)}."
        )
    if row.state == "unproven":
        return replace(row, text=" ".join(_unproven(layer, case)))
    if row.state != "not picked":
        return row
    return replace(row, text=" ".join((row.text, *_unproven(layer, case), *_small(layer))))


def _out_of_reach(
    row: EngineLayer, mine: Sequence[tuple[Mapping[str, Any], Kernels]], case: _Case
) -> EngineLayer | None:
    """The row of a node that no ordinary layer of the engine computes; None where one does."""
    plugins = [one.layer for entry, one in mine if _is(_PLUGIN, entry)]
    if plugins:
        text = f"The plugin layer {plugins[0]} computes it, so the builder chose no kernel for it."
        return replace(row, state="not picked", text=text)
    if mine:
        return None
    named = case.sparsity.eligible is not None and row.node in case.sparsity.eligible
    if named:  # the builder knew it, whatever the layer is called now
        return None
    regions = [one.layer for entry, one in case.kernels if _is(_REGION, entry)]
    if regions:
        text = (
            f"No layer of the engine has its name; it is probably inside {_first(regions)}, which Myelin "
            "compiled as one piece without reporting its kernels node by node."
        )
        return replace(row, text=text)
    plugins = [one.layer for entry, one in case.kernels if _is(_PLUGIN, entry)]
    if plugins:
        text = (
            f"No layer of the engine has its name; a plugin probably computes it ({_first(plugins)}), "
            "so the builder chose no kernel for it."
        )
        return replace(row, state="not picked", text=text)
    text = "No layer of the engine has its name: it was removed, folded or replaced."
    return replace(row, state="unknown", text=text)


def _is(pattern: re.Pattern[str], layer: Mapping[str, Any]) -> bool:
    """Does the type of a layer, or its name, say that it is of a kind?"""
    kind = layer.get("LayerType")
    if pattern is _PLUGIN:
        return isinstance(kind, str) and pattern.search(kind) is not None
    return any(isinstance(text, str) and pattern.search(text) for text in (kind, layer.get("Name")))


def _first(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} or {len(names) - 1} more"


def _dense_kernels(mine: Sequence[tuple[Mapping[str, Any], Kernels]]) -> list[str]:
    """The kernels of the layers that compute a node, where these have names and none is sparse."""
    names = [name for _, one in mine for name in one.names if not re.fullmatch(r"(0x)?[0-9a-fA-F]*", name)]
    return [] if any(one.sparse for _, one in mine) else list(dict.fromkeys(names))


def _unproven(layer: GraphLayer, case: _Case) -> list[str]:
    """Sentences on why perhaps no sparse kernel fits."""
    found = [reason.text for reason in layer.reasons if MEANINGS[reason.code][0] == "unproven"]
    if any(reason.code == "int8" for reason in layer.reasons) and layer.node in case.float_output:
        found = [text for text in found if text != _general("int8")]
        found.append(
            "Likely: its output is not quantized. TensorRT takes sparse int8 kernels only where a layer "
            "reads and writes int8: put QuantizeLinear and DequantizeLinear behind it too."
        )
    return found


def _small(layer: GraphLayer) -> list[str]:
    """A sentence on a product that is too small for sparse kernels to win."""
    channels = _channels(layer)
    if channels is None or min(channels) >= _LARGE:
        return []
    return [
        (
            f"Likely: {channels[0]} input and {channels[1]} output channels; below {_LARGE} of either, dense "
            "kernels are usually faster."
        )
    ]


def _general(code: Any) -> str:
    text: str = MEANINGS[code][1]
    return f"{text[0].upper()}{text[1:]}."


def _channels(layer: GraphLayer) -> tuple[int, int] | None:
    """K and N of the product: input channels and output channels."""
    if len(layer.shape) < 2 or not -len(layer.shape) <= layer.reduction_axis < len(layer.shape):
        return None
    axis = layer.reduction_axis % len(layer.shape)
    other = 1 - axis if layer.op_type.startswith("Conv") else 2 * len(layer.shape) - 3 - axis
    return layer.shape[axis], layer.shape[other]


def _notes(log: BuilderLog | None, case: _Case) -> tuple[str, ...]:
    """What holds for the build as a whole."""
    notes = []
    if case.allowed is False:
        how = "lists Sparsity: Disabled" if log and log.option else 'never mentions "(Sparsity)"'
        notes.append(f"The log {how}. {NOT_ALLOWED}")
    elif log is not None and not log.sparsity_lines:
        notes.append(
            'The log never mentions "(Sparsity)", and it is not verbose, so it cannot tell more: build '
            "again with trtexec --sparsity=enable --verbose."
            if not log.verbose
            else 'The log allows sparse kernels, but never mentions "(Sparsity)".'
        )
    if case.sparsity.unread:
        notes.append(f"A line on sparsity is in no known wording: {case.sparsity.unread[0]}")
    if log is not None and log.option == "Forced":
        notes.append(
            "--sparsity=force overwrote the weights: this engine does not compute what the file says."
        )
    if case.strange:
        notes.append(
            "No layer of the engine has a name of this graph: it was built from another file, or, as "
            "Torch-TensorRT does, from no file. Give the .onnx file that the builder read."
        )
    return tuple(notes)


def nodes_with_float_output(model: onnx.ModelProto) -> frozenset[str]:
    """Find the layers whose output is used by something else than a QuantizeLinear.

    Element-wise operators and changes of layout between the two are looked through, as TensorRT fuses them.

    Args:
        model: its weights are not looked at.
    """
    return frozenset(one.node for one in quantized_ends(model) if not one.writes)
