"""The digits of scikit-learn."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from sparse_export.tasks import data


@pytest.fixture(scope="module")
def digits() -> data.DataSet:
    return data.load("digits")


def test_there_are_1397_images_to_train_on_and_400_to_test(digits: data.DataSet) -> None:
    assert digits.x_train.shape == (1397, 1, 8, 8)
    assert digits.x_test.shape == (400, 1, 8, 8)
    assert digits.x_train.dtype == digits.x_test.dtype == torch.uint8
    assert digits.y_train.dtype == digits.y_test.dtype == torch.int64
    assert (digits.input_shape, digits.n_classes) == ((1, 8, 8), 10)
    assert digits.class_names == tuple("0123456789")


def test_every_class_is_in_each_part_as_often_as_ever(digits: data.DataSet) -> None:
    assert digits.y_train.bincount().tolist() == [145, 140, 137, 141, 140, 145, 130, 132, 144, 143]
    assert digits.y_test.bincount().tolist() == [33, 42, 40, 42, 41, 37, 51, 47, 30, 37]
    assert data.split(digits)[1][1].bincount().min() > 5


def test_the_split_is_the_same_as_in_every_release(digits: data.DataSet) -> None:
    assert data.test_sha256(digits) == "c417569dafaaa96e547604942ad16a2be0ffa89d51a8cff9d81ca61546f17bee"


def test_pixels_span_the_range_of_a_byte_and_give_back_the_17_levels(digits: data.DataSet) -> None:
    pixels = torch.cat([digits.x_train, digits.x_test])
    assert sorted(set(pixels.flatten().tolist())) == [round(255 * level / 16) for level in range(17)]


def test_all_scans_of_the_source_are_there_once_with_their_labels(digits: data.DataSet) -> None:
    def rows(x: torch.Tensor, y: torch.Tensor) -> list[tuple[int, ...]]:
        return sorted(tuple(row) for row in torch.cat([x.flatten(1).long(), y[:, None]], 1).tolist())

    x = torch.cat([digits.x_train, digits.x_test])
    y = torch.cat([digits.y_train, digits.y_test])
    source = load_digits()
    levels = (x.double() * 16 / 255).round()
    assert rows(levels, y) == rows(torch.from_numpy(source.data), torch.from_numpy(source.target).long())


def test_no_image_is_both_trained_on_and_tested(digits: data.DataSet) -> None:
    train = {image.numpy().tobytes() for image in digits.x_train}
    test = {image.numpy().tobytes() for image in digits.x_test}
    assert len(train) == 1397 and len(test) == 400 and not train & test


def test_mean_and_std_are_those_of_the_training_images(digits: data.DataSet) -> None:
    scaled = digits.x_train.double() / 255
    assert digits.mean == pytest.approx((scaled.mean().item(),), abs=1e-12)
    assert digits.std == pytest.approx((scaled.std(correction=0).item(),), abs=1e-12)
