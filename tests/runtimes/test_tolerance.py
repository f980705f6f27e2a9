"""Answers are held together by the spread of the logits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sparse_export.runtimes.tolerance import outside_tolerance, spread

LOGITS = arrays(
    np.float64, st.tuples(st.integers(2, 5), st.integers(2, 5)), elements=st.integers(-100, 100).map(float)
)


@given(LOGITS, st.integers(-1000, 1000), st.integers(1, 8))
def test_an_offset_changes_nothing_and_a_scale_scales(wanted: np.ndarray, offset: int, scale: int) -> None:
    assert spread(wanted + offset) == pytest.approx(spread(wanted), abs=1e-9)
    assert spread(wanted * scale) == pytest.approx(scale * spread(wanted))


@given(LOGITS, st.integers(1, 6))
def test_more_samples_of_the_same_kind_allow_no_more(wanted: np.ndarray, n: int) -> None:
    assert spread(np.tile(wanted, (n, 1))) == pytest.approx(spread(wanted))


def test_an_offset_of_its_own_for_every_sample_hides_no_error() -> None:
    generator = np.random.default_rng(0)
    logits = generator.standard_normal((20, 10))
    wanted = logits + generator.uniform(-100, 100, (20, 1))
    assert spread(wanted) == pytest.approx(spread(logits))
    turned = logits[:, ::-1] + (wanted - logits)
    assert outside_tolerance(turned, wanted, atol=0.0, rtol=0.2)[1]


def test_one_logit_a_sample_is_held_to_how_samples_differ() -> None:
    wanted = np.array([[1.0], [-1.0]])
    assert spread(wanted) == 1
    assert not outside_tolerance(wanted + 0.01, wanted, atol=0.0, rtol=0.1)[1]


def test_what_is_just_within_is_in_and_just_beyond_is_out() -> None:
    wanted = np.array([[1.0, -1.0], [-1.0, 1.0]])  # a spread of 1
    for difference, outside in ((0.0999, False), (0.1001, True)):
        found = wanted.copy()
        found[1, 0] += difference
        largest, beyond = outside_tolerance(found, wanted, atol=0.0, rtol=0.1)
        assert largest == pytest.approx(difference)
        assert beyond == outside


def test_an_error_that_a_large_offset_would_hide_is_found() -> None:
    wanted = 1000 + np.array([[0.0, 1.0], [1.0, 0.0]])
    swapped = wanted[::-1]
    assert outside_tolerance(swapped, wanted, atol=1e-6, rtol=1.0)[1]
    assert np.abs(swapped - wanted).max() < 2e-3 * np.abs(wanted).max()


def test_equal_logits_are_held_to_the_absolute_part_and_nan_to_nothing() -> None:
    wanted = np.zeros((3, 4))
    assert not outside_tolerance(wanted, wanted, atol=1e-6, rtol=1e-4)[1]
    assert outside_tolerance(wanted + 2e-6, wanted, atol=1e-6, rtol=1e-4)[1]
    nan = wanted.copy()
    nan[0, 0] = np.nan
    assert outside_tolerance(nan, wanted, atol=1.0, rtol=1.0)[1]
    assert outside_tolerance(wanted, nan, atol=1.0, rtol=1.0)[1]


def test_no_sample_at_all_has_no_spread() -> None:
    nothing = np.zeros((0, 4))
    assert spread(nothing) == 0
    assert outside_tolerance(nothing, nothing, atol=0.0, rtol=0.0) == (0.0, False)
