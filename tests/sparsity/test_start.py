"""Where training starts: how many weights each layer gets, and which."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_export.sparsity import Distribution, layer_counts, random_masks

Shapes = dict[str, tuple[int, ...]]

LENET_300_100: Shapes = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}

distributions = st.sampled_from(("uniform", "erdos-renyi"))
densities = st.sampled_from((0.0, 0.01, 0.05, 0.5, 0.99, 1.0)) | st.floats(0, 1)


@st.composite
def networks(draw: st.DrawFn, longest_axis: int = 40) -> Shapes:
    axes = st.lists(st.integers(1, longest_axis), min_size=1, max_size=4).map(tuple)
    shapes = draw(st.lists(axes, min_size=1, max_size=6))
    return {f"layer{n}": shape for n, shape in enumerate(shapes)}


@given(networks(), densities, distributions)
def test_the_counts_sum_to_exactly_the_density(
    shapes: Shapes, density: float, distribution: Distribution
) -> None:
    counts = layer_counts(shapes, density, distribution)
    assert sum(counts.values()) == round(density * sum(math.prod(shape) for shape in shapes.values()))


@given(networks(), densities, distributions)
def test_each_count_lies_between_none_and_all(
    shapes: Shapes, density: float, distribution: Distribution
) -> None:
    counts = layer_counts(shapes, density, distribution)
    assert list(counts) == list(shapes)
    assert all(0 <= counts[name] <= math.prod(shape) for name, shape in shapes.items())


@given(networks(), densities)
def test_uniform_gives_every_layer_the_density_to_within_two_weights(shapes: Shapes, density: float) -> None:
    # One from rounding the total, one from rounding the layer.
    for name, count in layer_counts(shapes, density).items():
        assert abs(count - density * math.prod(shapes[name])) <= 2


@given(networks(), densities)
def test_erdos_renyi_gives_thinner_layers_the_higher_density(shapes: Shapes, density: float) -> None:
    counts = layer_counts(shapes, density, "erdos-renyi")
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    thinness = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    for one in shapes:
        for other in shapes:
            if thinness[one] >= thinness[other]:
                # Rounding to whole weights may turn the order round by one weight in each layer.
                slack = 1 / sizes[one] + 1 / sizes[other]
                assert counts[one] / sizes[one] >= counts[other] / sizes[other] - slack


@given(networks(), st.floats(0.01, 0.9))
def test_erdos_renyi_counts_of_layers_with_room_are_in_proportion_to_their_sides(
    shapes: Shapes, density: float
) -> None:
    counts = layer_counts(shapes, density, "erdos-renyi")
    open_layers = [name for name, shape in shapes.items() if counts[name] < math.prod(shape) - 1]
    for one in open_layers:
        for other in open_layers:
            assert (counts[one] - 1) * sum(shapes[other]) <= (counts[other] + 1) * sum(shapes[one])


def test_uniform_and_erdos_renyi_on_a_known_network() -> None:
    assert layer_counts(LENET_300_100, 0.05) == {"fc1": 11760, "fc2": 1500, "fc3": 50}
    # 13,310 weights by 1084 : 400 : 110 are 9,051.47, 3,340.03 and 918.51.
    assert layer_counts(LENET_300_100, 0.05, "erdos-renyi") == {"fc1": 9051, "fc2": 3340, "fc3": 919}


def test_a_layer_that_erdos_renyi_would_overfill_is_full_and_the_rest_shares_what_is_left() -> None:
    # At .10 the last layer would get 1,837 of its 1,000: the others share 25,620 by 1084 : 400.
    assert layer_counts(LENET_300_100, 0.10, "erdos-renyi") == {"fc1": 18714, "fc2": 6906, "fc3": 1000}


@pytest.mark.parametrize("distribution", ["uniform", "erdos-renyi"])
def test_full_density_keeps_everything(distribution: Distribution) -> None:
    counts = layer_counts(LENET_300_100, 1.0, distribution)
    assert counts == {"fc1": 235200, "fc2": 30000, "fc3": 1000}


@given(networks(longest_axis=7), densities, st.integers(0, 2**32 - 1))
def test_random_masks_have_exactly_the_counts(shapes: Shapes, density: float, seed: int) -> None:
    counts = layer_counts(shapes, density)
    masks = random_masks(shapes, counts, torch.Generator().manual_seed(seed))
    assert {name: int(mask.sum()) for name, mask in masks.items()} == counts
    assert {name: tuple(mask.shape) for name, mask in masks.items()} == shapes
    assert all(mask.dtype == torch.bool for mask in masks.values())


def masks_from_seed(seed: int) -> dict[str, torch.Tensor]:
    counts = layer_counts(LENET_300_100, 0.05)
    return random_masks(LENET_300_100, counts, torch.Generator().manual_seed(seed))


def test_the_same_seed_gives_the_same_masks() -> None:
    one, other = masks_from_seed(1), masks_from_seed(1)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_seed_gives_other_masks() -> None:
    one, other = masks_from_seed(1), masks_from_seed(2)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_the_global_random_state_is_not_touched() -> None:
    before = torch.get_rng_state()
    masks_from_seed(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_position_is_equally_likely() -> None:
    generator = torch.Generator().manual_seed(7)
    n_draws = 4000
    hits = torch.zeros(4, 5)
    for _ in range(n_draws):
        hits += random_masks({"fc": (4, 5)}, {"fc": 5}, generator)["fc"]
    # Binomial(4000, 1/4): 1000 expected, standard deviation 27; five of them.
    assert ((hits - n_draws / 4).abs() < 137).all()


@pytest.mark.parametrize("distribution", ["uniform", "erdos-renyi"])
def test_counts_do_not_depend_on_names(distribution: Distribution) -> None:
    renamed = {f"x{n}": shape for n, shape in enumerate(LENET_300_100.values())}
    one = layer_counts(LENET_300_100, 0.07, distribution)
    assert list(one.values()) == list(layer_counts(renamed, 0.07, distribution).values())
