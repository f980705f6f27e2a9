"""Times callables against each other in interleaved blocks, so that slow changes of the machine cancel."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np

from sparse_export.errors import UsageError

__all__ = ["Enough", "LatencyResult", "TimeCalls", "check_measurable", "measure_interleaved"]

TimeCalls = Callable[[Callable[[], object], int], list[float]]
"""Makes a number of calls; returns the seconds of each."""

Enough = Callable[[Mapping[str, Sequence[float]]], bool]
"""Gets `samples_ms` so far, by name; says whether they are enough."""

MIN_ROUNDS = 20
_N_WINDOWS = 3
_STEADY_WITHIN = 0.02
_MIN_CALLS_FOR_P99 = 1000


@dataclass(frozen=True, kw_only=True)
class LatencyResult:
    """Times of one candidate.

    Attributes:
        name: of the candidate.
        batch: samples in a call.
        median_ms: over all single calls, as are the next three.
        mean_ms: of a call.
        p90_ms: 90th percentile.
        p99_ms: 99th percentile; None below 1000 calls.
        n_calls: number of single calls.
        n_calls_per_block: of these in a block.
        steady: the last three windows of the warm-up agreed within 2 %.
        samples_ms: one value for each round, the mean of its two block medians; ratios are computed from
            these.
        block_median_ms: for each round, of its block in the order and of that in the mirrored order.
        block_mean_ms: likewise.
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
    enough: Enough | None = None,
    clock: Callable[[], float] = time.perf_counter,
    time_calls: TimeCalls | None = None,
) -> dict[str, LatencyResult]:
    """Time each candidate in every round: all in random order, then all in the mirrored order (A B C C B A).

    A linear drift within a round cancels, and one between rounds is common to all. Warm-up runs a window of
    block_s of each candidate in turn until the last three windows of every candidate are within 2 % of their
    median, or until warmup_limit_s has passed (`steady` says which). Python's cyclic garbage collector is off
    meanwhile.

    Args:
        candidates: by name.
        batch: samples in one call, for the record.
        rounds: 20 at least; with `enough`, the most of them.
        block_s: seconds of a block: as many calls as take about that, one at least, their number fixed after
            warm-up; every call is timed.
        seed: of the order.
        warmup_limit_s: seconds.
        before_round: called, untimed, at the start of every round. The address of a network's weights can
            make one copy of a file slower than another while both stay loaded, which no number of rounds
            averages out; loading all candidates again here, in random order, turns that into noise of the
            round.
        enough: called, untimed, after every round with `samples_ms` so far, by name; when it says so, that
            round was the last. One that looks at the values has to allow for looking again and again, see
            `sparse_export.instruments.looks`.
        clock: seconds, monotonic.
        time_calls: times a number of calls, by default one by one with the clock; for a device that works
            asynchronously see `sparse_export.instruments.device`.

    Returns:
        The results, by name.

    Raises:
        UsageError: fewer than 20 rounds without `enough`, or a block_s that is not positive.
    """
    check_measurable(rounds, block_s, fewest=MIN_ROUNDS if enough is None else 1)
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
            if enough is not None and enough({name: _samples_ms(blocks_s[name]) for name in names}):
                break
    return {name: _result(name, batch, blocks_s[name], steady[name]) for name in names}


def check_measurable(rounds: int, block_s: float, *, fewest: int = MIN_ROUNDS) -> None:
    """Check the size of a measurement.

    Args:
        rounds: number of rounds.
        block_s: seconds of a block.
        fewest: rounds that are enough.

    Raises:
        UsageError: fewer rounds, or blocks that are not longer than 0 s.
    """
    if rounds < fewest or not block_s > 0:
        raise UsageError(
            f"{rounds} rounds of blocks of {block_s} s are too few or too short: below {fewest} rounds "
            "intervals mean little.",
            do=f"Measure {fewest} rounds at least, of blocks above 0 s; shorter blocks save time.",
        )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Turn the cyclic garbage collector off until the block ends."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _timed_calls(call: Callable[[], object], n_calls: int, clock: Callable[[], float]) -> list[float]:
    """Seconds of each call, by the clock."""
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
    """For each candidate, seconds of a call in the last window, and whether the last windows agreed."""
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
    """Are the windows within 2 % of their median?"""
    middle = float(np.median(windows_s))
    return len(windows_s) == _N_WINDOWS and all(abs(w - middle) <= _STEADY_WITHIN * middle for w in windows_s)


def _samples_ms(blocks_s: list[list[float]]) -> tuple[float, ...]:
    """For each round the mean of its two block medians."""
    medians_ms = [1e3 * float(np.median(block)) for block in blocks_s]
    return tuple(0.5 * (a + b) for a, b in zip(medians_ms[::2], medians_ms[1::2], strict=True))


def _result(name: str, batch: int, blocks_s: list[list[float]], steady: bool) -> LatencyResult:
    """The result of one candidate, from the seconds of all calls, by block."""
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
        samples_ms=_samples_ms(blocks_s),
        block_median_ms=block_median_ms,
        block_mean_ms=tuple(zip(means_ms[::2], means_ms[1::2], strict=True)),
    )
