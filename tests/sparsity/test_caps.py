"""Masks under an N:M cap: what is kept, what may grow, and that the choice is the best there is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparse_export.sparsity import (
    Distribution,
    NMPattern,
    Redistribution,
    layer_counts,
    random_masks,
    update_masks,
)
from sparse_export.sparsity.caps import Cap, capacity, growth_candidates, room, under_cap
from sparse_export.sparsity.eligible import capped_layers
from sparse_export.sparsity.pattern import groups_over, obeys
from sparse_export.sparsity.schedule import cap_size
from tests.sparsity.strategies import REDISTRIBUTIONS, TIED_VALUES

TWO_FOUR = NMPattern(n=2, m=4)


@st.composite
def patterns(draw: st.DrawFn, largest_m: int = 8) -> NMPattern:
    m = draw(st.integers(2, largest_m))
    return NMPattern(n=draw(st.integers(1, m - 1)), m=m)


@st.composite
def capped(draw: st.DrawFn, largest_m: int = 8, n_groups: int = 6) -> tuple[Tensor, Tensor, Cap]:
    """Values full of ties, a mask that may be over the cap, and the cap, along any axis."""
    pattern = draw(patterns(largest_m))
    shape = draw(st.lists(st.integers(1, 2), min_size=0, max_size=2))
    axis = draw(st.integers(0, len(shape)))
    shape.insert(axis, pattern.m * draw(st.integers(1, max(1, n_groups // (math.prod(shape) or 1)))))
    size = math.prod(shape)
    values = torch.tensor(draw(st.lists(st.sampled_from(TIED_VALUES), min_size=size, max_size=size)))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=torch.bool)
    return values.view(shape), mask.view(shape), Cap(pattern=pattern, axis=axis)


def groups_of(tensor: Tensor, cap: Cap) -> list[list[int]]:
    """The flat indices of every group's members, by plain loops."""
    found: dict[tuple[int, ...], list[int]] = {}
    for flat, place in enumerate(itertools.product(*(range(size) for size in tensor.shape))):
        key = (*place[: cap.axis], place[cap.axis] // cap.pattern.m, *place[cap.axis + 1 :])
        found.setdefault(key, []).append(flat)
    return list(found.values())


@given(capped())
def test_what_is_over_the_cap_goes_smallest_first(drawn: tuple[Tensor, Tensor, Cap]) -> None:
    values, mask, cap = drawn
    kept = under_cap(values, mask, cap)
    for members in groups_of(values, cap):
        active = [i for i in members if mask.flatten()[i]]
        best = sorted(active, key=lambda i: (-abs(float(values.flatten()[i])), i))[: cap.pattern.n]
        assert sorted(best) == [i for i in members if kept.flatten()[i]]
    assert torch.equal(under_cap(values, kept, cap), kept)


@given(capped())
def test_room_is_counted_group_by_group(drawn: tuple[Tensor, Tensor, Cap]) -> None:
    values, mask, cap = drawn
    expected = sum(
        max(cap.pattern.n - sum(bool(mask.flatten()[i]) for i in members), 0)
        for members in groups_of(values, cap)
    )
    assert int(room(mask, cap)) == expected
    below = under_cap(values, mask, cap)
    assert int(room(below, cap)) + int(below.sum()) == capacity(tuple(values.shape), cap)


@given(capped(largest_m=4, n_groups=3), st.integers(0, 12))
def test_growth_is_the_best_of_all_choices_under_the_cap(
    drawn: tuple[Tensor, Tensor, Cap], wanted: int
) -> None:
    scores, mask, cap = drawn
    mask = under_cap(scores, mask, cap)
    k = min(wanted, int(room(mask, cap)))
    candidates = growth_candidates(scores, mask, cap)
    assert not (candidates & mask).any()
    assert int(candidates.sum()) >= k
    ranked = scores.abs()[candidates].sort(descending=True).values
    free = [i for i, active in enumerate(mask.flatten().tolist()) if not active]
    best = -1.0
    for choice in itertools.combinations(free, k):
        grown = mask.flatten().clone()
        grown[list(choice)] = True
        if obeys(grown.view(mask.shape), cap.axis, cap.pattern):
            best = max(best, sum(abs(float(scores.flatten()[i])) for i in choice))
    assert float(ranked[:k].sum()) == best


@pytest.mark.parametrize("size", [4, 32, 33, 64], ids="m={}".format)
def test_long_groups_are_ranked_like_short_ones(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    cap = Cap(pattern=NMPattern(n=size // 2, m=size), axis=1)
    values = torch.randint(-3, 4, (50, 2 * size), generator=generator).float()
    mask = torch.rand(values.shape, generator=generator) < 0.7
    kept = under_cap(values, mask, cap)
    order = torch.where(mask, values.abs(), -1.0).view(-1, size).argsort(dim=1, descending=True, stable=True)
    expected = torch.zeros_like(mask).view(-1, size).scatter_(1, order[:, : size // 2], True)
    assert torch.equal(kept, expected.view_as(mask) & mask)


@st.composite
def networks(
    draw: st.DrawFn,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, Cap]]:
    """Layers with and without a cap; masks may be over it."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    pattern = draw(patterns())
    weights, scores, masks, caps = {}, {}, {}, {}
    for n in range(draw(st.integers(1, 4))):
        shape = (draw(st.integers(1, 5)), pattern.m * draw(st.integers(1, 3)), draw(st.integers(1, 2)))
        weights[f"layer{n}"] = torch.randn(shape, generator=generator)
        scores[f"layer{n}"] = torch.randn(shape, generator=generator)
        masks[f"layer{n}"] = torch.rand(shape, generator=generator) < draw(st.sampled_from((0.0, 0.2, 0.6)))
        if draw(st.booleans()):
            caps[f"layer{n}"] = Cap(pattern=pattern, axis=1)
    return weights, scores, masks, caps


@given(networks(), st.floats(0, 1), st.sampled_from(REDISTRIBUTIONS), st.booleans())
def test_an_update_obeys_every_cap_and_keeps_the_count(
    network: tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, Cap]],
    rate: float,
    redistribution: Redistribution,
    starts_within: bool,
) -> None:
    weights, scores, masks, caps = network
    if starts_within:
        masks |= {name: under_cap(weights[name], masks[name], cap) for name, cap in caps.items()}
    n_before = sum(int(mask.sum()) for mask in masks.values())
    limit = sum(
        capacity(tuple(mask.shape), caps[name]) if name in caps else mask.numel()
        for name, mask in masks.items()
    )
    n_active = min(n_before, limit)
    result = update_masks(
        weights,
        scores,
        masks,
        prune_rate=rate,
        redistribution=redistribution,
        caps=caps,
        n_active=n_active,
    )
    assert sum(int(mask.sum()) for mask in result.masks.values()) == n_active
    for name, cap in caps.items():
        assert obeys(result.masks[name], cap.axis, cap.pattern)
        assert not (result.pruned[name] & ~masks[name]).any()
    if n_active == n_before:
        same = update_masks(
            weights,
            scores,
            masks,
            prune_rate=rate,
            redistribution=redistribution,
            caps=caps,
        )
        assert all(torch.equal(same.masks[name], result.masks[name]) for name in masks)


def test_a_full_layer_swaps_within_its_groups() -> None:
    cap = Cap(pattern=TWO_FOUR, axis=1)
    weight = torch.tensor([[5.0, 0.1, 0.0, 0.0, 3.0, 4.0, 0.0, 0.0]])
    score = torch.tensor([[0.0, 0.0, 1.0, 9.0, 0.0, 0.0, 99.0, 99.0]])
    mask = weight != 0
    result = update_masks({"fc": weight}, {"fc": score}, {"fc": mask}, prune_rate=0.25, caps={"fc": cap})
    assert result.masks["fc"].tolist() == [[True, False, False, True, True, True, False, False]]


def test_a_layer_without_a_cap_is_updated_as_if_there_were_none_elsewhere() -> None:
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(8, 16, generator=generator) for name in ("a", "b")}
    scores = {name: torch.randn(8, 16, generator=generator) for name in ("a", "b")}
    masks = {name: torch.rand(8, 16, generator=generator) < 0.1 for name in ("a", "b")}
    wide = {"a": Cap(pattern=NMPattern(n=15, m=16), axis=1)}
    with_cap = update_masks(weights, scores, masks, prune_rate=0.3, caps=wide)
    without = update_masks(weights, scores, masks, prune_rate=0.3)
    assert torch.equal(with_cap.masks["b"], without.masks["b"])
    assert torch.equal(with_cap.masks["a"], without.masks["a"])


@pytest.mark.parametrize("poisoned", ["weight", "score"])
def test_nan_in_a_capped_layer_is_an_error_and_not_a_choice(poisoned: str) -> None:
    weight, score = torch.ones(2, 8), torch.ones(2, 8)
    mask = torch.tensor([[True, True, False, False] * 2] * 2)
    if poisoned == "weight":
        weight[0, 1] = torch.nan
    else:
        score[1, 3] = torch.nan  # the groups of the other row lose nothing
    with pytest.raises(ValueError, match=r"NaN|finite"):
        update_masks(
            {"fc": weight},
            {"fc": score},
            {"fc": mask},
            prune_rate=0.5,
            caps={"fc": Cap(pattern=TWO_FOUR, axis=1)},
        )


@pytest.mark.parametrize(
    ("caps", "n_active", "said"),
    [
        ({"other": Cap(pattern=TWO_FOUR, axis=1)}, None, "other"),
        ({"fc": Cap(pattern=NMPattern(n=2, m=3), axis=1)}, None, "multiple of 3"),
        ({"fc": Cap(pattern=TWO_FOUR, axis=2)}, None, "axis 2"),
        ({"fc": Cap(pattern=TWO_FOUR, axis=1)}, 9, "room"),
        ({}, 0, "to be grown"),
    ],
    ids=["unknown-layer", "indivisible", "no-such-axis", "too-many", "too-few"],
)
def test_caps_that_cannot_be_kept_are_refused(caps: dict[str, Cap], n_active: int | None, said: str) -> None:
    ones = torch.ones(2, 8)
    mask = torch.tensor([[True, True, False, False] * 2] * 2)
    with pytest.raises(ValueError, match=said):
        update_masks({"fc": ones}, {"fc": ones}, {"fc": mask}, prune_rate=0.1, caps=caps, n_active=n_active)


def test_a_capped_update_needs_no_value_on_the_host() -> None:
    weight = torch.ones(8, 16, device="meta")
    result = update_masks(
        {"fc": weight},
        {"fc": weight},
        {"fc": torch.zeros(8, 16, dtype=torch.bool, device="meta")},
        prune_rate=0.5,
        caps={"fc": Cap(pattern=TWO_FOUR, axis=1)},
        n_active=32,
    )
    assert result.masks["fc"].device.type == "meta"


# How training starts


@given(networks(), st.floats(0, 1), st.sampled_from(("uniform", "erdos-renyi")))
def test_start_masks_obey_the_caps_with_the_exact_count(
    network: tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, Cap]],
    share: float,
    distribution: Distribution,
) -> None:
    caps = network[3]
    shapes = {name: tuple(weight.shape) for name, weight in network[0].items()}
    limits = {name: capacity(shapes[name], cap) for name, cap in caps.items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    most = sum(limits.get(name, size) for name, size in sizes.items())
    density = math.floor(share * most) / sum(sizes.values())
    counts = layer_counts(shapes, density, distribution, limits=limits)
    assert sum(counts.values()) == round(density * sum(sizes.values()))
    masks = random_masks(shapes, counts, torch.Generator().manual_seed(0), caps=caps)
    for name, mask in masks.items():
        assert int(mask.sum()) == counts[name] <= limits.get(name, sizes[name])
        if name in caps:
            assert obeys(mask, caps[name].axis, caps[name].pattern)


def test_more_than_the_caps_allow_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 32"):
        layer_counts({"fc": (4, 16)}, 0.6, limits={"fc": 32})


def test_every_position_of_a_capped_start_is_equally_likely() -> None:
    cap = Cap(pattern=TWO_FOUR, axis=1)
    masks = random_masks({"fc": (4000, 8)}, {"fc": 8000}, torch.Generator().manual_seed(5), caps={"fc": cap})
    share = masks["fc"].float().mean(0)
    # A quarter of each column; 4000 draws have a standard deviation of 0.0068.
    assert share.tolist() == pytest.approx([0.25] * 8, abs=5 * 0.0068)


# How a cap is approached


@pytest.mark.parametrize(("step", "n"), [(0, 4), (16, 4), (17, 3), (32, 3), (33, 2), (100, 2)])
def test_a_cap_is_approached_in_even_steps(step: int, n: int) -> None:
    assert cap_size(step, 100, TWO_FOUR, (1 / 6, 1 / 3)) == n


def test_an_approach_may_be_one_cut_or_none() -> None:
    assert [cap_size(step, 10, TWO_FOUR, (0.5, 0.5)) for step in (4, 5)] == [4, 2]
    assert cap_size(0, None, TWO_FOUR) == 2
    assert [cap_size(step, 9, NMPattern(n=3, m=4), (0.0, 1.0)) for step in (0, 9)] == [3, 3]


@pytest.mark.parametrize("approach", [(0.5, 0.2), (-0.1, 0.2), (0.2, 1.1), (math.nan, 0.5)])
def test_an_approach_that_runs_backwards_or_out_of_the_training_is_refused(
    approach: tuple[float, float],
) -> None:
    with pytest.raises(ValueError, match="approach"):
        cap_size(1, 10, TWO_FOUR, approach)


def test_an_approach_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="total number of steps"):
        cap_size(1, None, TWO_FOUR, (0.1, 0.2))


# Which layers get a cap


def test_layers_get_a_cap_or_one_reason() -> None:
    shapes = {
        "stem": (64, 3, 7, 7),
        "conv": (128, 64, 3, 3),
        "depthwise": (128, 1, 3, 3),
        "tiny": (4, 8),
        "named": (64, 128),
        "bias_like": (64,),
        "head": (255, 128),
    }
    axes: dict[str, int | None] = dict.fromkeys(shapes, 1) | {"bias_like": None}
    caps, reasons = capped_layers(shapes, axes, TWO_FOUR, outputs=["head"], keep_dense=["named"])
    assert caps == {"conv": Cap(pattern=TWO_FOUR, axis=1)}
    assert list(reasons) == ["stem", "depthwise", "tiny", "named", "bias_like", "head"]
    assert "3 channels, and 2:4 needs a multiple of 4" in reasons["stem"]
    assert "1 channel," in reasons["depthwise"]
    assert "1% of the weights" in reasons["tiny"]
    assert "outputs" in reasons["head"]


@pytest.mark.parametrize(
    ("shape", "axis", "parts", "is_capped"),
    [
        ((255, 64), 1, 1, False),
        ((256, 64), 1, 1, True),
        ((64, 1000), 1, 1, False),
        ((512, 255, 2, 2), 0, 1, False),
        ((512, 256, 2, 2), 0, 1, True),
        ((512, 128, 2, 2), 0, 2, True),  # a transposed convolution of two groups
        ((1000, 64, 1, 1), 1, 1, True),
    ],
)
def test_a_last_layer_of_many_outputs_gets_a_cap_like_any_other(
    shape: tuple[int, ...], axis: int, parts: int, is_capped: bool
) -> None:
    caps, _ = capped_layers(
        {"last": shape}, {"last": axis}, TWO_FOUR, parts={"last": parts}, outputs=["last"]
    )
    assert ("last" in caps) == is_capped


def test_the_axis_that_is_summed_over_counts_and_not_the_other() -> None:
    caps, reasons = capped_layers({"transposed": (8, 3, 2, 2)}, {"transposed": 0}, TWO_FOUR, small_share=0)
    assert caps == {"transposed": Cap(pattern=TWO_FOUR, axis=0)}
    assert not reasons


def test_the_smallest_layers_stay_dense_only_while_they_are_little_together() -> None:
    shapes = {f"small{n}": (4, 4) for n in range(3)} | {"large": (60, 40)}
    caps, reasons = capped_layers(shapes, dict.fromkeys(shapes, 1), TWO_FOUR)
    assert list(reasons) == ["small0"]  # 16 of 2,448 are under 1 %, 32 are over
    assert "large" in caps
    assert int(groups_over(torch.ones(4, 4), 1, TWO_FOUR)) == 4
