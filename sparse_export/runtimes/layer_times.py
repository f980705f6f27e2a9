"""Times the layers of an engine against those of its dense baseline, built without sparse kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from sparse_export.engines.matching import LayerGroup, match_layers
from sparse_export.engines.tactics import Kernels
from sparse_export.formats.layers import EngineLayer, EngineTimes, LayerTiming, TimingOutcome
from sparse_export.instruments.interleave import LatencyResult, measure_interleaved
from sparse_export.instruments.statistics import Ratio, location, paired_ratio, resolution

__all__ = ["Pass", "TimedLayers", "compare_layers", "time_layers"]

Pass = Callable[[], Sequence[tuple[str, float]]]
"""Runs an engine once and returns the name of each of its layers, and ms. A name may come several times."""


@dataclass(frozen=True, kw_only=True)
class TimedLayers:
    """The times of one engine.

    Attributes:
        whole: all layers of a pass together.
        samples_ms: of each layer, by its name, one value a round.
    """

    whole: LatencyResult
    samples_ms: dict[str, tuple[float, ...]]


def time_layers(
    passes: Mapping[str, Pass],
    *,
    batch: int,
    rounds: int = 24,
    block_s: float = 0.02,
    warmup_limit_s: float = 5.0,
    seed: int = 0,
) -> dict[str, TimedLayers]:
    """Time the layers of several engines in interleaved blocks of passes, by `measure_interleaved`.

    A round's value of a layer is the mean of the medians in its two blocks. Times are the profiler's, not the
    host clock's.

    Args:
        passes: engines, by name.
        batch: batch size of a pass, for the record.
        rounds: number of rounds, 20 at least.
        block_s: shortest time of a block in seconds.
        warmup_limit_s: seconds after which warm-up ends even where times have not settled.
        seed: of the order within a round.

    Returns:
        The times of each engine, by its name.

    Raises:
        UsageError: fewer than 20 rounds.
    """
    passes_ms: dict[str, list[dict[str, float]]] = {name: [] for name in passes}

    def time_calls(call: Callable[[], object], n_calls: int) -> list[float]:
        return [cast("float", call()) for _ in range(n_calls)]  # seconds, by the profiler

    def candidate(name: str) -> Callable[[], float]:
        def once() -> float:
            times: dict[str, float] = {}
            for layer, ms in passes[name]():
                times[layer] = times.get(layer, 0.0) + ms
            passes_ms[name].append(times)
            return sum(times.values()) / 1e3

        return once

    found = measure_interleaved(
        {name: candidate(name) for name in passes},
        batch=batch,
        rounds=rounds,
        block_s=block_s,
        seed=seed,
        warmup_limit_s=warmup_limit_s,
        time_calls=time_calls,
    )
    return {
        name: TimedLayers(whole=whole, samples_ms=_samples(passes_ms[name], rounds, whole.n_calls_per_block))
        for name, whole in found.items()
    }


def _samples(passes_ms: list[dict[str, float]], rounds: int, n_in_block: int) -> dict[str, tuple[float, ...]]:
    """One value of each layer a round. passes_ms: layers of each pass, those of the warm-up first."""
    timed = passes_ms[-2 * rounds * n_in_block :]
    names = list(dict.fromkeys(name for times in timed for name in times))
    ms = np.array([[times.get(name, 0.0) for name in names] for times in timed])
    medians = np.median(ms.reshape(2 * rounds, n_in_block, len(names)), axis=1)
    return {
        name: tuple(map(float, medians[:, at].reshape(rounds, 2).mean(axis=1)))
        for at, name in enumerate(names)
    }


def compare_layers(
    timed: Mapping[str, TimedLayers],
    layers: Sequence[EngineLayer],
    *,
    dense_kernels: Sequence[Kernels],
    sparse_kernels: Sequence[Kernels],
    nodes: Collection[str],
) -> EngineTimes:
    """Compare the layers of two engines that do the same work.

    Args:
        timed: `dense`, `dense again` (the same engine, a second time) and `sparse`.
        layers: what became of the graph's layers in the sparse engine.
        dense_kernels: of the engine without sparse kernels.
        sparse_kernels: of the other.
        nodes: names of all nodes of the graph.

    Returns:
        A row for each group of layers: both times, their ratio, and why sparse kernels did not help.
    """
    groups = match_layers(
        list(timed["dense"].samples_ms),
        list(timed["sparse"].samples_ms),
        dense_kernels=dense_kernels,
        sparse_kernels=sparse_kernels,
        nodes=nodes,
    )
    by_node = {layer.node: layer for layer in layers}
    rows = tuple(
        _row(
            group,
            timed,
            [by_node[node] for node in group.nodes if node in by_node],
            dense_kernels,
            sparse_kernels,
        )
        for group in groups
    )
    whole = _whole(timed)
    return EngineTimes(
        batch=timed["sparse"].whole.batch,
        rows=rows,
        whole=whole,
        rounds=len(timed["sparse"].whole.samples_ms),
        steady=all(one.whole.steady for one in timed.values()),
    )


def _row(
    group: LayerGroup,
    timed: Mapping[str, TimedLayers],
    layers: Sequence[EngineLayer],
    dense_kernels: Sequence[Kernels],
    sparse_kernels: Sequence[Kernels],
) -> LayerTiming:
    """The row of one group."""
    kernels = _names(group.dense, dense_kernels), _names(group.sparse, sparse_kernels)
    series = {
        name: _together(timed[name].samples_ms, group.sparse if name == "sparse" else group.dense)
        for name in ("dense", "dense again", "sparse")
    }
    found = _times(series)
    outcome: TimingOutcome = "not compared"
    if not group.dense or not group.sparse:
        side = "with" if group.sparse else "without"
        verdict = f"Only the engine {side} sparse kernels has it, or its nodes are not known."
    elif found is None:
        verdict = "It is too short for the profiler's clock."
    else:
        outcome, verdict = _verdict(found, layers, *kernels)
    return LayerTiming(
        nodes=group.nodes,
        weights=tuple(layer.weight for layer in layers),
        dense_layers=group.dense,
        sparse_layers=group.sparse,
        dense_kernels=kernels[0],
        sparse_kernels=kernels[1],
        dense_ms=_undisturbed(series["dense"]),
        sparse_ms=_undisturbed(series["sparse"]),
        ratio=None if found is None else found.ratio.estimate,
        low=None if found is None else found.ratio.low,
        high=None if found is None else found.ratio.high,
        floor=None if found is None else found.floor,
        outcome=outcome,
        verdict=verdict,
    )


@dataclass(frozen=True, kw_only=True)
class _Times:
    """A ratio, and how far that of two copies of one engine is from 1."""

    ratio: Ratio
    floor: float

    @property
    def outcome(self) -> TimingOutcome:
        """A direction only where the whole interval lies beyond what two copies of one engine differ by."""
        if self.ratio.low > self.floor:
            return "speed-up"
        return "slow-down" if self.ratio.high < 1 / self.floor else "no speed-up"

    def __str__(self) -> str:
        interval = f"{self.ratio.estimate:.3f} [{self.ratio.low:.3f}, {self.ratio.high:.3f}]"
        return f"dense / sparse is {interval}, resolved to {100 * (self.floor - 1):.1f} %"


def _times(series: Mapping[str, tuple[float, ...]]) -> _Times | None:
    """The ratio of both engines; None where some round has no time at all."""
    if not all(values and min(values) > 0 for values in series.values()):
        return None
    return _Times(
        ratio=paired_ratio(series["dense"], series["sparse"]),
        floor=resolution(paired_ratio(series["dense"], series["dense again"])),
    )


def _together(samples_ms: Mapping[str, tuple[float, ...]], names: Sequence[str]) -> tuple[float, ...]:
    """The sum of some layers in each round."""
    columns = [samples_ms[name] for name in names if name in samples_ms]
    return tuple(math.fsum(row) for row in zip(*columns, strict=True))


def _undisturbed(values: tuple[float, ...]) -> float | None:
    """The time of an undisturbed pass in ms; None where a round has none."""
    return location(values).estimate if values and min(values) > 0 else None


def _names(layers: Sequence[str], kernels: Sequence[Kernels]) -> tuple[str, ...]:
    """The kernels of some layers, each once."""
    wanted = set(layers)
    return tuple(dict.fromkeys(name for one in kernels if one.layer in wanted for name in one.names))


def _verdict(
    found: _Times, layers: Sequence[EngineLayer], dense: tuple[str, ...], sparse: tuple[str, ...]
) -> tuple[TimingOutcome, str]:
    """What a group's times show, and why, in a sentence. dense, sparse: names of its kernels."""
    outcome = found.outcome
    picked = any(layer.state == "picked" for layer in layers) or any(
        "sparse" in name.lower() for name in sparse
    )
    same = bool(dense) and dense == sparse
    reasons = " ".join(dict.fromkeys(layer.text for layer in layers if layer.state != "picked"))
    if outcome == "speed-up":
        because = "" if picked else f" No sparse kernel is known for it. {reasons}".rstrip()
        return outcome, f"Speed-up: {found}.{because}"
    head = "Slow-down" if outcome == "slow-down" else "No speed-up"
    if picked and outcome == "slow-down":
        because = "its sparse kernel is slower here than the dense one, though the builder timed it as faster"
    elif picked:
        because = "its sparse kernel saves less than can be resolved here"
    elif same:
        because = "both engines run the same kernel"
    elif not layers:
        because = "it multiplies by no weight"
    elif all(layer.state == "not eligible" for layer in layers):
        because = "hardware cannot use its zeros"
    else:
        because = "no sparse kernel is known for it"
    return outcome, " ".join(filter(None, (f"{head}, because {because}: {found}.", reasons)))


def _whole(timed: Mapping[str, TimedLayers]) -> LayerTiming:
    """The row of all layers together."""
    series = {name: one.whole.samples_ms for name, one in timed.items()}
    found = _times(series)
    outcome: TimingOutcome = "not compared" if found is None else found.outcome
    return LayerTiming(
        nodes=(),
        weights=(),
        dense_layers=tuple(timed["dense"].samples_ms),
        sparse_layers=tuple(timed["sparse"].samples_ms),
        dense_kernels=(),
        sparse_kernels=(),
        dense_ms=_undisturbed(series["dense"]),
        sparse_ms=_undisturbed(series["sparse"]),
        ratio=None if found is None else found.ratio.estimate,
        low=None if found is None else found.ratio.low,
        high=None if found is None else found.ratio.high,
        floor=None if found is None else found.floor,
        outcome=outcome,
        verdict=(
            f"All layers one by one: {found or 'no time was reported'}. A pass without the profiler "
            "is shorter."
        ),
    )
