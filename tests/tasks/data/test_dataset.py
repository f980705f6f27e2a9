"""What can be asked of any data set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_export.errors import UsageError
from sparse_export.tasks.data import DataSet, normalise, split, test_sha256
from sparse_export.tasks.data.dataset import channel_statistics


def small(
    n_train: int = 20, *, x_test: torch.Tensor | None = None, y_test: torch.Tensor | None = None
) -> DataSet:
    return DataSet(
        name="small",
        x_train=torch.arange(n_train * 12).remainder(256).to(torch.uint8).view(n_train, 3, 2, 2),
        y_train=torch.arange(n_train) % 3,
        x_test=torch.arange(48, dtype=torch.uint8).view(4, 3, 2, 2) if x_test is None else x_test,
        y_test=torch.tensor([0, 1, 2, 0]) if y_test is None else y_test,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        n_classes=3,
    )


def test_bytes_are_scaled_to_0_1_before_mean_and_std() -> None:
    x = torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8).view(2, 2, 1, 1)
    got = normalise(x, (0.5, 0.2), (0.25, 0.4))
    expected = torch.tensor([[-2.0, 2.0], [-1.2, 0.5]]).view(2, 2, 1, 1)
    torch.testing.assert_close(got, expected)


def test_floats_are_not_scaled_and_the_input_is_left_as_it_is() -> None:
    x = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    before = x.clone()
    torch.testing.assert_close(normalise(x, (10, 20), (2, 4)), torch.tensor([[0.0, 0.0], [10.0, 5.0]]))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_normalised_inputs_have_the_type_asked_for_and_are_rounded_once(dtype: torch.dtype) -> None:
    x = torch.arange(256, dtype=torch.uint8).view(256, 1)
    got = normalise(x, (0.1307,), (0.3081,), dtype=dtype)
    assert got.dtype == dtype
    exact = (x.double() / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(got, exact.to(dtype), rtol=torch.finfo(dtype).eps * 2, atol=1e-6)


@pytest.mark.parametrize("shape", [(4,), (4, 2, 5, 5)])
def test_a_mean_for_another_number_of_channels_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"3 means.*every channel \(axis 1\)"):
        normalise(torch.zeros(shape), (0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_inputs_normalised_by_their_own_statistics_have_mean_0_and_std_1(dtype: torch.dtype) -> None:
    x = torch.randint(0, 256, (50, 3, 7, 5)).mul(torch.tensor([1, 0.5, 0.1]).view(3, 1, 1)).to(dtype)
    z = normalise(x, *channel_statistics(x), dtype=torch.float64)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("x", [torch.full((9, 2, 3, 3), 7, dtype=torch.uint8), torch.full((9, 2), 0.1)])
def test_a_channel_that_never_changes_becomes_zero_not_nan(x: torch.Tensor) -> None:
    mean, std = channel_statistics(x)
    assert std == (1.0, 1.0)
    torch.testing.assert_close(normalise(x, mean, std), torch.zeros(x.shape))


@given(n=st.integers(2, 300), fraction=st.floats(0, 0.9))
def test_training_and_validation_are_the_training_set_cut_in_two(n: int, fraction: float) -> None:
    data = small(n)
    try:
        (x_train, y_train), (x_validation, y_validation) = split(data, fraction)
    except UsageError:
        assert round(n * fraction) >= n
        return
    assert torch.equal(torch.cat([x_train, x_validation]), data.x_train)
    assert torch.equal(torch.cat([y_train, y_validation]), data.y_train)
    assert len(x_train) == len(y_train) > 0
    assert abs(len(y_validation) - n * fraction) <= (0.5 if n * fraction > 0.5 else 1)


def test_validation_is_the_last_tenth_unless_said_otherwise() -> None:
    data = small(20)
    _, (x, y) = split(data)
    assert torch.equal(x, data.x_train[18:])
    assert torch.equal(y, data.y_train[18:])


def test_a_share_of_nothing_validates_nothing_and_a_small_share_one_sample() -> None:
    assert len(split(small(20), 0.0)[1][1]) == 0
    assert len(split(small(20), 0.001)[1][1]) == 1


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan"), 0.99])
def test_a_share_that_leaves_nothing_to_train_on_is_refused(fraction: float) -> None:
    with pytest.raises(UsageError, match=r"20 training samples of small.*Choose a smaller share"):
        split(small(20), fraction)


def test_the_hash_of_a_test_set_changes_with_every_part_of_it() -> None:
    base = small()
    pixel = base.x_test.clone()
    pixel[3, 2, 1, 1] += 1
    variants = [
        base,
        small(x_test=pixel),
        small(x_test=base.x_test.view(4, 3, 1, 4)),
        small(x_test=base.x_test.float()),
        small(y_test=torch.tensor([0, 1, 2, 1])),
        small(y_test=base.y_test.int()),
    ]
    assert len({test_sha256(data) for data in variants}) == len(variants)


def test_the_hash_of_a_test_set_does_not_hang_on_the_training_set_or_on_memory_layout() -> None:
    base = small()
    strided = base.x_test.to(memory_format=torch.channels_last)
    assert not strided.is_contiguous()
    assert test_sha256(small(30, x_test=strided)) == test_sha256(base)


@pytest.mark.parametrize(
    ("y_test", "why"),
    [
        ([0, 1, 3, 0], "run from 0 to 3, outside the class numbers 0 to 2"),
        ([0, -1, 2, 0], "run from -1 to 2"),
        ([0, 1, 2], "3 labels for 4 samples"),
        ([0.0, 1.0, 2.0, 0.0], "are float32"),
        ([[1, 0], [0, 1], [1, 0], [0, 1]], "are one-hot"),
    ],
)
def test_no_data_set_holds_labels_that_are_not_class_numbers(y_test: list[object], why: str) -> None:
    with pytest.raises(UsageError, match=f"The labels of the test set of small .*{why}"):
        small(y_test=torch.tensor(y_test))


def test_printing_a_data_set_prints_no_pixels() -> None:
    assert len(repr(small())) < 200
