"""What is wrong with a sample of one's own data is told with its number, when a network is scored on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparse_export.errors import UsageError
from sparse_export.signature import Signature, TensorInfo
from sparse_export.tasks.data.own import Part, PartSamples, PartTargets
from sparse_export.tasks.shipped import TASKS

SIGNATURE = Signature(
    inputs=(TensorInfo(name="x", dtype="float32", shape=("batch", "length", 8)),),
    outputs=(TensorInfo(name="y", dtype="float32", shape=("batch", 1)),),
)


def part(odd: Any, target: Any = 1.0) -> Part:
    rows = [(np.ones((3, 8)), 1.0) for _ in range(9)]
    rows[5] = (odd, target)
    return Part(name="the part test of mine:data", samples=rows)


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        (
            np.ones((3, 5)),
            r"Sample 5 of the part test .* has x of shape \(3, 5\)\. \(length, 8\) was expected",
        ),
        (np.ones(8), r"Sample 5 .* of shape \(8,\)"),
        (np.full((3, 8), np.nan), "Sample 5 of the part test of mine:data holds NaN in x"),
    ],
)
def test_an_input_that_the_network_does_not_take_is_told_with_its_sample(odd: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        list(PartSamples(part=part(odd), signature=SIGNATURE).batches(4))


def test_another_free_size_and_infinity_are_taken() -> None:
    found = list(PartSamples(part=part(np.full((4, 8), -np.inf)), signature=SIGNATURE).batches(4))
    assert [len(one["x"]) for one in found] == [4, 1, 1, 3]


def test_a_target_that_is_no_number_is_told_with_its_place() -> None:
    targets = PartTargets(part(np.ones((3, 8)), "seven"))[0:9]
    with pytest.raises(UsageError, match="Target 5 of these 9 is a value of type str, and others are numb"):
        TASKS["regression"].statistics({"y": np.ones((9, 1))}, targets)
