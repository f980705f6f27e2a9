"""Times of an engine's layers against its dense baseline, as `layers.json` keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparse_export.formats.layers import _told_of_engine

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
