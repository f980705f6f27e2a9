"""`layers.json`: the layers of a graph, and what became of each in an engine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparse_export.errors import ArtefactError
from sparse_export.formats.document import _refuse_constant

LAYERS_FILE = "layers.json"
Eligible = Literal["yes", "no", "unproven"]
ReasonCode = Literal[
    "groups-over",
    "indivisible",
    "depthwise",
    "grouped",
    "vector",
    "empty",
    "float32",
    "other-type",
    "zero-point",
    "sparse-initializer",
    "not-constant",
    "activations",
    "int8",
    "weight-only",
    "unaligned",
    "kernel-unknown",
    "masked-in-graph",
    "computed",
    "overridable",
    "subgraph",
    "not-evaluated",
    "not-looked-into",
    "shared",
]


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why hardware cannot use a layer's zeros, or may not. code: for machines; text: one sentence for people."""

    code: ReasonCode
    text: str


@dataclass(frozen=True, kw_only=True)
class GraphLayer:
    """One Conv, ConvTranspose, Gemm or MatMul of an ONNX graph, or a node with weights that was not looked into.

    weight: name of the stored tensor; where there is none, of the value multiplied by.  constant: is it one?
    through: the operators between node and stored tensor, from the node up; empty when it is used as stored.
    shape, dtype: of the weight as the node multiplies by it; () and None when not known.  reduction_axis: the
    axis of that shape that is summed over (input channels for Conv).  stored_axis: the same axis in the
    stored tensor, None where it is not one axis of it.
    macs: multiply-accumulates by weights for one sample, every weight counted; nonzero_macs: with zero
    weights left out. Both are None when the shapes are not known, 0 where nothing constant is multiplied by.

    pattern_holds: 2:4 along the reduction axis; None when the weight is not known.  n_groups, n_groups_over:
    groups of four, and those with more than two nonzeros; None where four does not divide the axis.
    obeys: the tightest N:M that hold, M of 2, 4, 8, 16, without those that follow from another.
    eligible: can hardware that knows 2:4 use the zeros?  reasons: why not, or what there is to know.
    """

    node: str
    op_type: str
    weight: str
    shape: tuple[int, ...]
    reduction_axis: int
    n_weights: int
    n_nonzero: int
    macs: int | None
    nonzero_macs: int | None
    # Documents older than these fields are read with the defaults.
    constant: bool = True
    through: tuple[str, ...] = ()
    dtype: str | None = None
    stored_axis: int | None = None
    pattern_holds: bool | None = None
    n_groups: int | None = None
    n_groups_over: int | None = None
    obeys: tuple[str, ...] = ()
    eligible: Eligible = "unproven"
    reasons: tuple[Reason, ...] = ()


EngineState = Literal["picked", "not picked", "not eligible", "unknown", "unproven"]


@dataclass(frozen=True, kw_only=True)
class EngineLayer:
    """What became of one layer of the graph in an engine: does it run on a sparse kernel?

    state: `unknown` where the builder does not tell, `unproven` where the graph alone leaves it open.  text: why.
    kernels: the sparse ones that the inspector named.
    """

    node: str
    weight: str
    state: EngineState
    text: str
    kernels: tuple[str, ...] = ()


def read_engine_layers(file: Path, engine: str) -> tuple[EngineLayer, ...]:
    """The rows of an engine in a `layers.json`, none when it has none. Raises ArtefactError."""
    rows: tuple[EngineLayer, ...] = _told_of_engine(file, "engines", engine, tuple[EngineLayer, ...])
    return rows


def _told_of_engine(file: Path, key: str, engine: str, cls: Any) -> Any:
    import pydantic

    try:
        document = json.loads(file.read_bytes(), parse_constant=_refuse_constant)
        engines = document.get(key, {}) if isinstance(document, dict) else {}
        return pydantic.TypeAdapter(cls).validate_python(engines.get(engine, ()))
    except (OSError, ValueError, RecursionError, AttributeError) as cause:
        raise ArtefactError(
            f"{file} cannot be read: {str(cause).strip().partition(chr(10))[0]}.",
            expected="The table of layers that a build writes was expected.",
            do="Build the bundle again.",
        ) from cause


TimingOutcome = Literal["speed-up", "slow-down", "no speed-up", "not compared"]


@dataclass(frozen=True, kw_only=True)
class LayerTiming:
    """The time of the same work in two engines of one graph: one built without sparse kernels, one with them.

    nodes: of the graph, all that the work is; empty for a layer of the engine's own.  weights: that these multiply by.
    dense_layers, sparse_layers: names in the engines; dense_kernels, sparse_kernels: those that the inspector names.
    dense_ms, sparse_ms: of an undisturbed pass, None where an engine has no such layer, or one too short to time.
    ratio: dense / sparse, with its 95 % interval low to high.  floor: the farthest that the same ratio of the dense
    engine and a second copy of it comes from 1.
    """

    nodes: tuple[str, ...]
    weights: tuple[str, ...]
    dense_layers: tuple[str, ...]
    sparse_layers: tuple[str, ...]
    dense_kernels: tuple[str, ...]
    sparse_kernels: tuple[str, ...]
    dense_ms: float | None
    sparse_ms: float | None
    ratio: float | None
    low: float | None
    high: float | None
    floor: float | None
    outcome: TimingOutcome
    verdict: str


@dataclass(frozen=True, kw_only=True)
class EngineTimes:
    """Layers of an engine timed against its twin without sparse kernels, at one batch size.

    rows: empty where nothing was timed, and `note` says why.  whole: all layers of a pass together.  rounds: of
    interleaved blocks; steady: whether times had settled when warm-up ended.
    """

    batch: int
    rows: tuple[LayerTiming, ...]
    whole: LayerTiming | None
    rounds: int
    steady: bool
    note: str = ""


def read_engine_times(file: Path, engine: str) -> tuple[EngineTimes, ...]:
    """Likewise the times of its layers, one entry a batch size, none where they were not measured."""
    times: tuple[EngineTimes, ...] = _told_of_engine(file, "times", engine, tuple[EngineTimes, ...])
    return times
