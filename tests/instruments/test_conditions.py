from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from sparse_export.evaluate.comparison import Comparison
from sparse_export.evaluate.latency import Bench
from sparse_export.evaluate.training_step import StepBench
from sparse_export.instruments import conditions as conditions_module
from sparse_export.instruments.conditions import Conditions, measuring


@pytest.mark.parametrize("result", [Bench, Comparison, StepBench])
def test_every_timed_result_has_the_conditions_for_fields(result: Any) -> None:
    assert {one.name for one in fields(Conditions)} <= {one.name for one in fields(result)}


def test_a_measurement_is_dated_when_it_ended_and_keeps_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moments = ["begun"]
    monkeypatch.setattr(conditions_module, "now", lambda: moments[-1])
    with measuring(n_threads=1, rounds=20, block_s=0.5, seed=3) as conditions:
        moments.append("ended")
    found = conditions()
    assert found.created == "ended"
    assert len(found.cores) <= 1
    assert (found.n_threads, found.rounds, found.block_s, found.seed) == (1, 20, 0.5, 3)
    assert found.machine["n_cores_usable"] >= 1
