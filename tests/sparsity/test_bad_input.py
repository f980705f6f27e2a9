"""What `update_masks` refuses, and what it says then."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from sparse_export.sparsity import MaskUpdate, update_masks

WEIGHT = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
MASK = torch.tensor([[True, True], [False, True]])


def update(**changes: Any) -> MaskUpdate:
    arguments: dict[str, Any] = {
        "weights": {"fc": WEIGHT},
        "scores": {"fc": WEIGHT},
        "masks": {"fc": MASK},
        "prune_rate": 0.5,
    } | changes
    return update_masks(**arguments)


def assert_refused(message: str, **changes: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        update(**changes)


def test_the_input_that_the_others_vary_is_fine() -> None:
    found = update()
    assert int(found.n_removed["fc"]) == int(found.n_grown["fc"]) == 2


def test_no_layers() -> None:
    assert_refused("There are no layers", weights={}, scores={}, masks={})


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan, math.inf, -math.inf])
def test_a_prune_rate_out_of_range(rate: float) -> None:
    assert_refused(f"prune_rate is {rate}; a number from 0 to 1 was expected.", prune_rate=rate)


def test_an_unknown_redistribution() -> None:
    assert_refused(
        "redistribution is 'nonzero'; one of momentum, magnitude, nonzeros, none, own, survivors was "
        "expected.",
        redistribution="nonzero",
    )


@pytest.mark.parametrize("which", ["weights", "scores", "masks"])
def test_layers_of_different_names(which: str) -> None:
    assert_refused("name different layers", **{which: {"fc2": MASK if which == "masks" else WEIGHT}})


def test_layers_in_a_different_order() -> None:
    assert_refused(
        "weights, scores and masks name different layers: ['a', 'b'], ['b', 'a'], ['a', 'b']. "
        "The same names in the same order were expected.",
        weights={"a": WEIGHT, "b": WEIGHT},
        scores={"b": WEIGHT, "a": WEIGHT},
        masks={"a": MASK, "b": MASK},
    )


@pytest.mark.parametrize("which", ["weights", "scores", "masks"])
def test_tensors_of_different_shapes(which: str) -> None:
    wrong = (MASK if which == "masks" else WEIGHT)[:1]
    assert_refused("one shape with at least one entry was expected.", **{which: {"fc": wrong}})


def test_the_shapes_are_named() -> None:
    assert_refused(
        "fc: weight, score and mask have shapes (2, 2), (2, 2) and (4,)", masks={"fc": MASK.flatten()}
    )


def test_a_layer_without_entries() -> None:
    nothing = WEIGHT[:0]
    assert_refused(
        "fc: weight, score and mask have shapes (0, 2), (0, 2) and (0, 2)",
        weights={"fc": nothing},
        scores={"fc": nothing},
        masks={"fc": MASK[:0]},
    )


@pytest.mark.parametrize(
    ("changes", "received"),
    [
        ({"weights": {"fc": WEIGHT.int()}}, "torch.int32, torch.float32 and torch.bool"),
        ({"scores": {"fc": WEIGHT.long()}}, "torch.float32, torch.int64 and torch.bool"),
        ({"masks": {"fc": MASK.float()}}, "torch.float32, torch.float32 and torch.float32"),
        ({"masks": {"fc": MASK.to(torch.uint8)}}, "torch.float32, torch.float32 and torch.uint8"),
        ({"weights": {"fc": WEIGHT.to(torch.complex64)}}, "torch.complex64, torch.float32 and torch.bool"),
    ],
    ids=["int-weight", "int-score", "float-mask", "uint8-mask", "complex-weight"],
)
def test_tensors_of_the_wrong_kind(changes: dict[str, Any], received: str) -> None:
    assert_refused(
        f"fc: weight, score and mask are {received}; float, float and bool were expected.", **changes
    )


@pytest.mark.parametrize("which", ["weights", "scores", "masks"])
def test_tensors_on_different_devices(which: str) -> None:
    elsewhere = (MASK if which == "masks" else WEIGHT).to("meta")
    assert_refused("fc is not on one device with the other layers", **{which: {"fc": elsewhere}})


def test_layers_on_different_devices() -> None:
    assert_refused(
        "b is not on one device with the other layers (cpu).",
        weights={"a": WEIGHT, "b": WEIGHT.to("meta")},
        scores={"a": WEIGHT, "b": WEIGHT.to("meta")},
        masks={"a": MASK, "b": MASK.to("meta")},
    )


def changed(position: tuple[int, int], value: float) -> dict[str, torch.Tensor]:
    tensor = WEIGHT.clone()
    tensor[position] = value
    return {"fc": tensor}


def test_nan_among_the_active_weights() -> None:
    assert_refused("hold NaN", weights=changed((0, 0), math.nan))


def test_nan_among_the_scores_that_may_grow() -> None:
    assert_refused("hold NaN", scores=changed((1, 0), math.nan))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_spoils_the_shares(value: float) -> None:
    # At (1, 1) lies the largest weight: it survives, so its score decides the shares and nothing else.
    assert_refused("Active weights or scores of fc hold NaN or infinity", scores=changed((1, 1), value))


def test_nan_at_an_inactive_weight_decides_nothing() -> None:
    with_nan, without = update(weights=changed((1, 0), math.nan)), update()
    assert all(torch.equal(mask, without.masks[name]) for name, mask in with_nan.masks.items())
