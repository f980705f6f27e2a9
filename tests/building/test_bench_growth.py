"""The growth benchmark finds the exponent of what it times, and every case runs at a small size."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks import bench_growth
from benchmarks.bench_growth import CASES, Case, measured


def test_the_exponent_is_that_of_what_is_timed() -> None:
    def waiting(size: int) -> bench_growth.Work:
        def work() -> None:
            until = time.process_time() + 0.01 * size**2
            while time.process_time() < until:
                pass

        return work

    case = Case(name="squares", sizes=(1, 2, 3), work=lambda size, _: waiting(size))
    assert measured(case, rounds=1)["exponent"] == pytest.approx(2, abs=0.3)
    over_squares = Case(name="weights", sizes=(1, 2, 3), work=case.work, counts=lambda size: size**2)
    assert measured(over_squares, rounds=1)["exponent"] == pytest.approx(1, abs=0.15)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_runs(case: Case, tmp_path: Path) -> None:
    work = case.work(min(16, case.sizes[0]), tmp_path)
    work()
    assert work() is not None or case.name.startswith("train")
