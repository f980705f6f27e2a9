from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest

from sparse_export.errors import UsageError
from sparse_export.instruments.interleave import measure_interleaved
from sparse_export.instruments.statistics import paired_ratio


class FakeClock:
    """Seconds that pass only when a simulated call takes them."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now_s

    def call(self, name: str, duration_s: Callable[[float], float]) -> Callable[[], None]:
        """A callable that takes duration_s(time) seconds."""

        def run() -> None:
            self.log.append(name)
            self.now_s += duration_s(self.now_s)

        return run


def _noisy(seed: int, mean_s: float, spread: float) -> Callable[[float], float]:
    rng = np.random.default_rng(seed)
    return lambda _: mean_s * float(np.exp(spread * rng.standard_normal()))


def test_a_known_ratio_is_recovered_while_the_machine_gets_slower() -> None:
    clock = FakeClock()
    noise_a, noise_b = _noisy(1, 1.2e-3, 0.02), _noisy(2, 1.0e-3, 0.02)
    found = measure_interleaved(
        {
            "a": clock.call("a", lambda t: (1 + 0.3 * t) * noise_a(t)),
            "b": clock.call("b", lambda t: (1 + 0.3 * t) * noise_b(t)),
        },
        batch=1,
        clock=clock,
    )
    ratio = paired_ratio(found["a"].samples_ms, found["b"].samples_ms)
    assert ratio.low < 1.2 < ratio.high
    assert ratio.high - ratio.low < 0.02
    assert found["a"].samples_ms[-1] > 1.3 * found["a"].samples_ms[0]


def test_equal_candidates_have_a_ratio_of_one() -> None:
    clock = FakeClock()
    calls = {name: clock.call(name, _noisy(seed, 1e-3, 0.05)) for seed, name in enumerate(("first", "again"))}
    found = measure_interleaved(calls, batch=1, clock=clock)
    ratio = paired_ratio(found["first"].samples_ms, found["again"].samples_ms)
    assert ratio.low < 1.0 < ratio.high


def test_every_round_is_an_order_and_its_mirror_and_orders_differ() -> None:
    clock = FakeClock()
    calls = {name: clock.call(name, lambda _: 0.02) for name in "abc"}
    measure_interleaved(calls, batch=1, rounds=20, block_s=0.02, clock=clock)
    blocks = clock.log[-6 * 20 :]
    rounds = ["".join(blocks[i : i + 6]) for i in range(0, len(blocks), 6)]
    assert all(order == order[::-1] and set(order) == set("abc") for order in rounds)
    assert len(set(rounds)) >= 4


def test_a_linear_drift_within_a_round_cancels() -> None:
    clock = FakeClock()
    calls = {name: clock.call(name, lambda t: 0.01 * (1 + 0.1 * t)) for name in "ab"}
    found = measure_interleaved(calls, batch=1, block_s=0.01, warmup_limit_s=0.1, clock=clock)
    ratios = np.array(found["a"].samples_ms) / np.array(found["b"].samples_ms)
    within_round = [second / first for first, second in found["a"].block_median_ms]
    assert max(within_round) > 1.002
    assert ratios == pytest.approx(np.ones(24), abs=1e-5)


def test_the_same_seed_gives_the_same_order() -> None:
    logs = []
    for seed in (4, 4, 5):
        clock = FakeClock()
        calls = {name: clock.call(name, lambda _: 0.01) for name in "abc"}
        measure_interleaved(calls, batch=1, seed=seed, clock=clock)
        logs.append(clock.log)
    assert logs[0] == logs[1] != logs[2]


def test_blocks_last_about_as_long_as_asked_whatever_a_call_takes() -> None:
    clock = FakeClock()
    calls = {"quick": clock.call("quick", lambda _: 1e-4), "slow": clock.call("slow", lambda _: 5e-3)}
    found = measure_interleaved(calls, batch=1, block_s=0.02, clock=clock)
    assert (found["quick"].n_calls_per_block, found["slow"].n_calls_per_block) == (200, 4)
    assert (found["quick"].n_calls, found["slow"].n_calls) == (24 * 2 * 200, 24 * 2 * 4)


def test_percentiles_are_those_of_single_calls() -> None:
    clock = FakeClock()
    cycle = iter(range(10**9))
    calls = {"a": clock.call("a", lambda _: 1e-3 * (5.0 if next(cycle) % 20 == 0 else 1.0))}
    found = measure_interleaved(calls, batch=8, block_s=0.06, clock=clock)["a"]
    assert (found.median_ms, found.p90_ms, found.p99_ms) == pytest.approx((1.0, 1.0, 5.0))
    assert found.mean_ms == pytest.approx(1.2, rel=0.02)
    assert found.batch == 8
    assert found.samples_ms == pytest.approx([1.0] * 24)


def test_a_99th_percentile_needs_a_thousand_calls() -> None:
    clock = FakeClock()
    found = measure_interleaved({"a": clock.call("a", lambda _: 1e-2)}, batch=1, clock=clock)["a"]
    assert found.n_calls < 1000
    assert found.p99_ms is None


def test_warm_up_waits_until_times_are_steady() -> None:
    clock = FakeClock()
    calls = {"a": clock.call("a", lambda t: 1e-3 * (1 + 4 * np.exp(-t / 0.1)))}
    found = measure_interleaved(calls, batch=1, clock=clock)["a"]
    assert found.steady
    assert max(found.samples_ms) < 1.1


def test_times_that_never_settle_are_marked() -> None:
    clock = FakeClock()
    calls = {
        "settled": clock.call("settled", lambda _: 1e-3),
        "restless": clock.call("restless", lambda t: 1e-3 * (1 + t)),
    }
    found = measure_interleaved(calls, batch=1, warmup_limit_s=0.5, clock=clock)
    assert found["settled"].steady
    assert not found["restless"].steady


def test_what_is_done_before_each_round_is_not_timed() -> None:
    clock = FakeClock()
    calls = {"a": clock.call("a", lambda _: 0.02)}
    found = measure_interleaved(
        calls, batch=1, rounds=20, before_round=clock.call("renew", lambda _: 3.0), clock=clock
    )
    assert clock.log[-3 * 20 :] == ["renew", "a", "a"] * 20
    assert found["a"].samples_ms == pytest.approx([20.0] * 20)


def test_a_bias_that_lasts_as_long_as_a_network_is_loaded_does_not_fake_a_difference_when_renewed() -> None:
    gc.collect()
    gc.freeze()  # what earlier tests left: each of the sixty measurements below collects garbage first
    rng = np.random.default_rng(8)
    bias = {"a": 0.0, "b": 0.0}

    def load() -> None:
        bias.update({name: 0.02 * float(rng.standard_normal()) for name in bias})

    def biased(name: str) -> Callable[[float], float]:
        return lambda _: 0.01 * float(np.exp(bias[name] + 0.002 * rng.standard_normal()))

    false_claims = {"kept": 0, "renewed": 0}
    for _ in range(30):
        for case in false_claims:
            load()
            clock = FakeClock()
            found = measure_interleaved(
                {name: clock.call(name, biased(name)) for name in bias},
                batch=1,
                warmup_limit_s=0.1,
                before_round=load if case == "renewed" else None,
                clock=clock,
            )
            ratio = paired_ratio(found["a"].samples_ms, found["b"].samples_ms)
            false_claims[case] += not ratio.low <= 1.0 <= ratio.high
    assert false_claims["kept"] > 20
    assert false_claims["renewed"] <= 4


def test_garbage_collection_waits_and_comes_back_after_an_error() -> None:
    seen = []

    def fail() -> None:
        seen.append(gc.isenabled())
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        measure_interleaved({"a": fail}, batch=1)
    assert seen == [False]
    assert gc.isenabled()


@pytest.mark.parametrize(("rounds", "block_s"), [(19, 0.02), (20, 0.0), (20, float("nan"))])
def test_too_little_to_measure_is_refused(rounds: int, block_s: float) -> None:
    with pytest.raises(UsageError, match=f"{rounds} rounds of blocks of {block_s} s"):
        measure_interleaved({"a": lambda: None}, batch=1, rounds=rounds, block_s=block_s)
