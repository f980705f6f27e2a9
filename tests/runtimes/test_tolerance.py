"""Answers are held together by the spread of the logits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sparse_export.runtimes.tolerance import OutputDifference, differences, spread


def _compared(found: np.ndarray, wanted: np.ndarray, *, atol: float, rtol: float) -> OutputDifference:
    (one,) = differences({"y": found}, {"y": wanted}, atol=atol, rtol=rtol)
    return one


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
    assert not _compared(turned, wanted, atol=0.0, rtol=0.2).ok


def test_one_logit_a_sample_is_held_to_how_samples_differ() -> None:
    wanted = np.array([[1.0], [-1.0]])
    assert spread(wanted) == 1
    assert _compared(wanted + 0.01, wanted, atol=0.0, rtol=0.1).ok


def test_what_is_just_within_is_in_and_just_beyond_is_out() -> None:
    wanted = np.array([[1.0, -1.0], [-1.0, 1.0]])  # a spread of 1
    for difference, outside in ((0.0999, False), (0.1001, True)):
        found = wanted.copy()
        found[1, 0] += difference
        compared = _compared(found, wanted, atol=0.0, rtol=0.1)
        assert compared.max_abs_difference == pytest.approx(difference)
        assert compared.max_relative_difference == pytest.approx(difference)
        assert compared.ok is not outside


def test_an_error_that_a_large_offset_would_hide_is_found() -> None:
    wanted = 1000 + np.array([[0.0, 1.0], [1.0, 0.0]])
    swapped = wanted[::-1]
    assert not _compared(swapped, wanted, atol=1e-6, rtol=1.0).ok
    assert np.abs(swapped - wanted).max() < 2e-3 * np.abs(wanted).max()


def test_equal_logits_are_held_to_the_absolute_part_and_nan_to_nothing() -> None:
    wanted = np.zeros((3, 4))
    assert _compared(wanted, wanted, atol=1e-6, rtol=1e-4).ok
    assert not _compared(wanted + 2e-6, wanted, atol=1e-6, rtol=1e-4).ok
    nan = wanted.copy()
    nan[0, 0] = np.nan
    assert not _compared(nan, wanted, atol=1.0, rtol=1.0).ok
    assert not _compared(wanted, nan, atol=1.0, rtol=1.0).ok


@pytest.mark.parametrize("n_samples", [1, 5])
def test_a_peak_among_thousands_of_zeros_is_not_measured_by_the_zeros(n_samples: int) -> None:
    """As of a softmax over many classes, whose deviation is a hundredth of its peak."""
    wanted = np.zeros((n_samples, 10_000))
    wanted[:, 7] = 1.0
    assert np.std(wanted) == pytest.approx(0.01, rel=1e-3)
    assert spread(wanted) == pytest.approx(0.1, rel=1e-3)
    found = wanted.copy()
    found[:, 7] -= 1e-3  # what float16 rounds of such a value
    (one,) = differences({"y": found}, {"y": wanted}, atol=0.0, rtol=2e-2)
    assert one.ok
    (one,) = differences({"y": np.roll(found, 1, axis=1)}, {"y": wanted}, atol=0.0, rtol=2e-2)
    assert not one.ok


def test_the_root_mean_square_is_held_to_a_limit_of_its_own() -> None:
    """One value far out is allowed by the largest difference; all of them half as far out are not."""
    wanted = np.tile([1.0, -1.0], (4, 500))
    one, all_of_them = wanted.copy(), wanted + 0.05
    one[0, 0] += 0.09
    for found, largest, typical, ok in (
        (one, 0.09, 0.09 / 4000**0.5, True),
        (all_of_them, 0.05, 0.05, False),
    ):
        (compared,) = differences({"y": found}, {"y": wanted}, atol=0.0, rtol=0.1, rms=0.02)
        assert compared.max_relative_difference == pytest.approx(largest)
        assert compared.rms_difference == pytest.approx(typical)
        assert compared.ok is ok
    assert _compared(all_of_them, wanted, atol=0.0, rtol=0.1).ok
    (nan,) = differences({"y": wanted * np.nan}, {"y": wanted}, atol=0.0, rtol=np.inf, rms=np.inf)
    assert not nan.ok


def test_no_sample_at_all_has_no_spread() -> None:
    nothing = np.zeros((0, 4))
    assert spread(nothing) == 0
    compared = _compared(nothing, nothing, atol=0.0, rtol=0.0)
    assert (compared.max_abs_difference, compared.ok) == (0.0, True)


# ---- several outputs


def test_each_output_is_held_to_its_own_spread() -> None:
    wanted = {"large": np.array([[1e3, -1e3]] * 2), "small": np.array([[1.0, -1.0]] * 2)}
    found = {name: one + 0.5 for name, one in wanted.items()}
    large, small = differences(found, wanted, atol=0.0, rtol=0.1)
    assert (large.name, large.ok) == ("large", True)
    assert (small.name, small.ok) == ("small", False)
    assert small.max_relative_difference == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.bool_])
def test_of_integers_and_truth_values_the_share_that_differs_counts(dtype: type[np.generic]) -> None:
    wanted = np.arange(8).reshape(2, 4).astype(dtype)
    found = wanted.copy()
    found[1, 3] = 0
    for rtol, ok in ((0.125, True), (0.12, False)):
        compared = _compared(found, wanted, atol=100.0, rtol=rtol)
        assert compared.ok is ok
        assert compared.equal_share == 7 / 8
        assert compared.max_abs_difference is None
        assert compared.max_relative_difference is None
        assert compared.rms_difference is None


def test_another_shape_or_no_output_is_never_within_tolerance() -> None:
    wanted = {"boxes": np.zeros((2, 4)), "classes": np.zeros((2, 4), np.int64)}
    for found in ({}, {name: one[:, :3] for name, one in wanted.items()}):
        boxes, classes = differences(found, wanted, atol=1e9, rtol=1.0)
        assert (boxes.ok, boxes.max_abs_difference) == (False, np.inf)
        assert (classes.ok, classes.equal_share) == (False, 0.0)


def test_a_part_is_held_to_the_spread_of_the_whole() -> None:
    whole = {"y": np.array([[1.0, -1.0], [-3.0, 3.0]])}
    part, off = {"y": whole["y"][:1]}, {"y": whole["y"][:1] + 0.15}
    assert not differences(off, part, atol=0.0, rtol=0.1)[0].ok
    assert differences(off, part, atol=0.0, rtol=0.1, spread_of=whole)[0].ok


def test_bfloat16_is_compared_as_floats() -> None:
    import ml_dtypes

    wanted = np.array([[1.0, -1.0]]).astype(ml_dtypes.bfloat16)
    compared = _compared(wanted + np.array(0.5, ml_dtypes.bfloat16), wanted, atol=0.0, rtol=0.6)
    assert (compared.ok, compared.max_abs_difference) == (True, 0.5)
