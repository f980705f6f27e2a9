"""Times callables against each other in interleaved blocks, so that slow changes of the machine cancel."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np

from sparse_export.errors import UsageError

__all__ = ["LatencyResult", "TimeCalls", "check_measurable", "measure_interleaved"]

TimeCalls = Callable[[Callable[[], object], int], list[float]]
"""Makes so many calls; gives seconds of each."""

MIN_ROUNDS = 20
_N_WINDOWS = 3
_STEADY_WITHIN = 0.02
_MIN_CALLS_FOR_P99 = 1000


@dataclass(frozen=True, kw_only=True)
class LatencyResult:
    """Times of one candidate, in ms for a call of `batch` samples.

    median_ms, mean_ms, p90_ms, p99_ms: over all n_calls single calls; p99_ms is None below 1000 calls.
    steady: whether the last three windows of the warm-up agreed within 2 %.
    samples_ms: one value for each round, the mean of its two block medians; what ratios are made of.
    block_median_ms, block_mean_ms: for each round, its block in the order and the one in the mirrored order.
    """

    name: str
    batch: int
    median_ms: float
    mean_ms: float
    p90_ms: float
    p99_ms: float | None
    n_calls: int
    n_calls_per_block: int
    steady: bool
    samples_ms: tuple[float, ...]
    block_median_ms: tuple[tuple[float, float], ...]
    block_mean_ms: tuple[tuple[float, float], ...]


def measure_interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    batch: int,
    rounds: int = 24,
    block_s: float = 0.02,
    seed: int = 0,
    warmup_limit_s: float = 5.0,
    before_round: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    time_calls: TimeCalls | None = None,
) -> dict[str, LatencyResult]:
    """Time each candidate in every round: all in random order, then all in the mirrored order (A B C C B A).

    A linear drift within a round so cancels, and one between rounds is common to all. A block is as many
    calls as take about block_s, at least one, the number being fixed after warm-up; every call is timed.
    Warm-up runs a window of block_s of each candidate in turn until the last three windows of every
    candidate lie within 2 % of their median, or until warmup_limit_s seconds have gone by (`steady` says
    which). Python's cyclic garbage collector is held off meanwhile.

    before_round: called, untimed, at the start of every round. Where a network's weights come to lie in
    memory can make one copy of a file slower than another for as long as both stay loaded, which no number
    of rounds averages out; loading all candidates anew here, in random order, makes that noise of the round.
    batch: samples in one call, for the record.  seed: of the order.  clock: seconds, monotonic.
    time_calls: how so many calls of a candidate are timed, by default one by one with the clock; for a device that
    runs on while the host goes ahead, see `measure.device`.
    Returns the results by name. Raises UsageError for fewer than 20 rounds or a block_s that is not positive.
    """
    check_measurable(rounds, block_s)
    order = np.random.default_rng(seed)
    timed = time_calls or partial(_timed_calls, clock=clock)
    names = list(candidates)
    blocks_s: dict[str, list[list[float]]] = {name: [] for name in names}
    with _no_garbage_collection():
        call_s, steady = _warm_up(candidates, block_s, warmup_limit_s, clock, timed)
        n_calls = {name: max(1, round(block_s / call_s[name])) for name in names}
        for _ in range(rounds):
            if before_round:
                before_round()
            shuffled = [names[i] for i in order.permutation(len(names))]
            for name in (*shuffled, *reversed(shuffled)):
                blocks_s[name].append(timed(candidates[name], n_calls[name]))
    return {name: _result(name, batch, blocks_s[name], steady[name]) for name in names}


def check_measurable(rounds: int, block_s: float) -> None:
    """Raise UsageError for fewer than 20 rounds or blocks that are not longer than 0 s."""
    if rounds < MIN_ROUNDS or not block_s > 0:
        raise UsageError(
            f"{rounds} rounds of blocks of {block_s} s were asked for.",
            expected=f"At least {MIN_ROUNDS} rounds of a positive length were expected, or the intervals mean little.",
            do="Ask for more rounds; shorter blocks save time.",
        )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _timed_calls(call: Callable[[], object], n_calls: int, clock: Callable[[], float]) -> list[float]:
    times_s = []
    for _ in range(n_calls):
        start = clock()
        call()
        times_s.append(clock() - start)
    return times_s


def _warm_up(
    candidates: Mapping[str, Callable[[], object]],
    block_s: float,
    limit_s: float,
    clock: Callable[[], float],
    timed: TimeCalls,
) -> tuple[dict[str, float], dict[str, bool]]:
    """Seconds of a call in the last window, and whether the last windows agreed, for each candidate."""
    windows: dict[str, list[float]] = {name: [] for name in candidates}
    begin = clock()
    while True:
        for name, call in candidates.items():
            times_s, start = timed(call, 1), clock()
            while clock() - start < block_s:
                times_s += timed(call, 1)
            windows[name].append(float(np.median(times_s)))
        steady = {name: _is_steady(values[-_N_WINDOWS:]) for name, values in windows.items()}
        if all(steady.values()) or clock() - begin >= limit_s:
            floor_s = 1e-7  # for a call that a coarse clock cannot see
            return {name: max(values[-1], floor_s) for name, values in windows.items()}, steady


def _is_steady(windows_s: list[float]) -> bool:
    middle = float(np.median(windows_s))
    return len(windows_s) == _N_WINDOWS and all(abs(w - middle) <= _STEADY_WITHIN * middle for w in windows_s)


def _result(name: str, batch: int, blocks_s: list[list[float]], steady: bool) -> LatencyResult:
    calls_ms = 1e3 * np.concatenate(blocks_s)
    medians_ms = [1e3 * float(np.median(block)) for block in blocks_s]
    means_ms = [1e3 * float(np.mean(block)) for block in blocks_s]
    block_median_ms = tuple(zip(medians_ms[::2], medians_ms[1::2], strict=True))
    return LatencyResult(
        name=name,
        batch=batch,
        median_ms=float(np.median(calls_ms)),
        mean_ms=float(calls_ms.mean()),
        p90_ms=float(np.percentile(calls_ms, 90)),
        p99_ms=float(np.percentile(calls_ms, 99)) if calls_ms.size >= _MIN_CALLS_FOR_P99 else None,
        n_calls=calls_ms.size,
        n_calls_per_block=len(blocks_s[0]),
        steady=steady,
        samples_ms=tuple(0.5 * (first + second) for first, second in block_median_ms),
        block_median_ms=block_median_ms,
        block_mean_ms=tuple(zip(means_ms[::2], means_ms[1::2], strict=True)),
    )
