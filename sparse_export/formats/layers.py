"""`layers.json`: the layers of a graph, and what became of each in an engine."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
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
    "quantized",
    "small",
    "not-finite",
]


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why hardware cannot use a layer's zeros, or may not be able to.

    Attributes:
        code: for machines.
        text: one sentence for people.
    """

    code: ReasonCode
    text: str


@dataclass(frozen=True, kw_only=True)
class GraphLayer:
    """A Conv, ConvTranspose, Gemm or MatMul of an ONNX graph, or a node with weights that was not examined.

    Attributes:
        node: its name in the graph.
        op_type: its operator.
        weight: name of the stored tensor; where there is none, of the value multiplied by.
        shape: of the weight as the node multiplies by it; () when not known.
        reduction_axis: the axis of that shape that is summed over (input channels for Conv).
        n_weights: entries of the weight.
        n_nonzero: nonzero entries.
        macs: multiply-accumulates by weights for one sample, every weight counted; None when shapes are not
            known, 0 where nothing constant is multiplied by.
        nonzero_macs: likewise without zero weights.
        constant: the weight is a stored tensor, or computed of stored ones.
        through: the operators between node and stored tensor, from the node up; empty when it is used as
            stored.
        dtype: of the weight as the node multiplies by it; None when not known.
        stored_axis: the reduction axis in the stored tensor, None where it is not one axis of it.
        pattern_holds: 2:4 holds along the reduction axis; None when the weight is not known.
        n_groups: groups of four; None where four does not divide the axis.
        n_groups_over: those with more than two nonzeros; None likewise.
        obeys: the tightest N:M that hold, M of 2, 4, 8, 16, without those that follow from another.
        eligible: can hardware that knows 2:4 use the zeros?
        reasons: why not, or what there is to know.
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
    """Does one layer of the graph run on a sparse kernel of an engine?

    Attributes:
        node: of the graph.
        weight: of the layer.
        state: `unknown` where the builder does not report it, `unproven` where the graph alone leaves it
            open.
        text: the reason, for people.
        kernels: the sparse ones that the inspector names.
    """

    node: str
    weight: str
    state: EngineState
    text: str
    kernels: tuple[str, ...] = ()


def read_engine_layers(file: Path, engine: str) -> tuple[EngineLayer, ...]:
    """Read the rows of an engine in a `layers.json`.

    Args:
        file: the document.
        engine: path of the engine within the bundle.

    Returns:
        The rows; none for an engine that has none.

    Raises:
        ArtefactError: the document cannot be read, or is damaged.
    """
    rows: tuple[EngineLayer, ...] = _read_engine_part(file, "engines", engine, tuple[EngineLayer, ...])
    return rows


def _read_engine_part(file: Path, key: str, engine: str, cls: Any) -> Any:
    """What a key of the document holds for an engine, as `cls`."""
    import pydantic

    try:
        document = json.loads(file.read_bytes(), parse_constant=_refuse_constant)
        engines = document.get(key, {}) if isinstance(document, dict) else {}
        return pydantic.TypeAdapter(cls).validate_python(engines.get(engine, ()))
    except (OSError, ValueError, RecursionError, AttributeError) as cause:
        raise ArtefactError(
            f"{file} cannot be read: {str(cause).strip().partition(chr(10))[0]}.",
            do="Build the bundle again.",
        ) from cause


TimingOutcome = Literal["speed-up", "slow-down", "no speed-up", "not compared"]


@dataclass(frozen=True, kw_only=True)
class LayerTiming:
    """The time of the same work in two engines of one graph: one built without sparse kernels, one with them.

    Attributes:
        nodes: of the graph, all that the work consists of; empty for a layer of the engine's own.
        weights: that these multiply by.
        dense_layers: names of its layers in the first engine.
        sparse_layers: likewise in the second.
        dense_kernels: names of its kernels in the first engine, by the inspector.
        sparse_kernels: likewise in the second.
        dense_ms: of an undisturbed pass; None where the engine has no such layer, or one too short to time.
        sparse_ms: likewise.
        ratio: dense / sparse time.
        low: of its 95 % interval.
        high: of its 95 % interval.
        floor: the farthest that the same ratio of the dense engine and a second copy of it is from 1.
        outcome: what the ratio shows.
        verdict: a sentence for people.
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
    """Layers of an engine timed against its dense baseline without sparse kernels, at one profile's optimum.

    Attributes:
        batch: number of samples; 1 where no size counts them.
        rows: empty where nothing was timed.
        whole: all layers of a pass together.
        rounds: number of rounds of interleaved blocks.
        steady: times had settled when warm-up ended.
        note: why nothing was timed; empty otherwise.
        sizes: the other free sizes, by name.
    """

    batch: int
    rows: tuple[LayerTiming, ...]
    whole: LayerTiming | None
    rounds: int
    steady: bool
    note: str = ""
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def sizes_text(self) -> str:
        """The sizes as in `batch 8, sequence 128`."""
        return ", ".join(f"{name} {size}" for name, size in {"batch": self.batch, **self.sizes}.items())


def read_engine_times(file: Path, engine: str) -> tuple[EngineTimes, ...]:
    """Read the times of an engine's layers in a `layers.json`.

    Args:
        file: the document.
        engine: path of the engine within the bundle.

    Returns:
        One entry for each batch size; none where they were not measured.

    Raises:
        ArtefactError: the document cannot be read, or is damaged.
    """
    times: tuple[EngineTimes, ...] = _read_engine_part(file, "times", engine, tuple[EngineTimes, ...])
    return times
