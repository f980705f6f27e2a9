"""Labels are class numbers of the network's outputs, or no score is computed."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparse_export.errors import UsageError
from sparse_export.tasks.labels import (
    correct_predictions,
    count_correct,
    label_problem,
    predicted_classes,
    require_labels,
    require_outputs,
)

CHECKOUT = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "uint64"])
@pytest.mark.parametrize("form", [np.asarray, torch.tensor, list])
def test_class_numbers_of_every_integer_type_and_form_are_taken(dtype: str, form: Any) -> None:
    given = np.array([0, 2, 1, 2], dtype=dtype)
    found = require_labels(
        form(given.tolist()) if form is list else form(given), n_samples=4, n_outputs=3, of="x"
    )
    assert found.dtype == np.int64
    assert found.tolist() == [0, 2, 1, 2]


REFUSED: list[tuple[Any, str]] = [
    (
        np.array([0.0, 3.0, 1.0, 2.0]),
        r"are float64, which means regression targets\. Convert them to int64 if",
    ),
    (torch.tensor([0.5, 1, 0, 1], dtype=torch.bfloat16), r"are bfloat16, which means regression"),
    (np.array([0, 1, np.nan, 2], np.float32), r"are float32 with 1 NaN, first at sample 2"),
    (np.array([[0.1], [0.2], [0.3], [0.4]]), r"are float64, which means regression"),
    (np.array([True, False, True, True]), r"are bool\. Convert them to int64"),
    (torch.tensor([True, False, True, True]), r"are bool\. Convert them to int64"),
    (
        np.eye(4, 3, dtype=np.uint8)[[0, 1, 2, 0]],
        r"are one-hot, uint8 of shape \(4, 3\)\. Convert .*argmax\(1\)",
    ),
    (torch.eye(3)[[0, 1, 2, 0]], r"are one-hot, float32 of shape \(4, 3\)\. Convert .*argmax\(1\)"),
    (np.array([[0], [1], [2], [0]]), r"have shape \(4, 1\)\. Flatten them with ravel\(\)"),
    (
        np.array([[1, 1], [0, 0], [1, 0], [0, 1]]),
        r"are multi-hot, int64 of shape \(4, 2\)\. Name the task multilabel",
    ),
    (np.array(2), r"have shape \(\)\. Give one class number per sample"),
    (np.array(["cat", "dog", "cat", "dog"]), r"are of type str96\. Give one integer per sample"),
    (np.array([0, 1, None, 2]), r"are of type object"),
    ([[0], [1, 2], [0], [1]], r"are not an array: .*Give one integer per sample"),
    (np.array([0, 1, 2]), r"do not match the samples: 3 labels for 4 samples\. Give one label per sample"),
    (
        np.array([0, 1, -1, 2]),
        r"run from -1 to 2, and class numbers begin at 0\. Number the classes from 0",
    ),
    (
        np.array([0, 1, 3, 2]),
        r"run from 0 to 3, outside the class numbers 0 to 2\. Number the classes from 0",
    ),
    (np.array([1, 2, 3, 1]), r"run from 1 to 3, outside the class numbers 0 to 2\. Subtract 1"),
    (np.array([0, 1, 2, 2**64 - 1], np.uint64), r"run from 0 to 18446744073709551615, outside"),
]


@pytest.mark.parametrize(("labels", "message"), REFUSED)
def test_labels_that_are_not_class_numbers_of_the_outputs_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(UsageError, match=rf"^The labels of the test set {message}"):
        require_labels(labels, n_samples=4, n_outputs=3, of="the test set")


def test_no_labels_for_no_samples_are_refused() -> None:
    problem = label_problem(np.array([], np.int64), n_samples=0, n_classes=3)
    assert problem is not None
    assert problem.what == "do not match the samples: 0 labels for 0 samples"


def test_a_network_with_one_output_has_no_top_1_accuracy() -> None:
    require_outputs(2, "It", do="")
    with pytest.raises(
        UsageError, match=r"^The network has one output, so its top-1 .*needs one per class\. Stop\.$"
    ):
        require_outputs(1, "The network", do="Stop.")


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 2, 3), (4, 0)])
@pytest.mark.parametrize("of", [np.zeros, torch.zeros])
def test_outputs_without_classes_to_choose_among_predict_none(shape: tuple[int, ...], of: Any) -> None:
    with pytest.raises(UsageError, match=r"outputs of shape \(4,.*two classes or more"):
        predicted_classes(of(shape))


def test_a_prediction_is_correct_where_the_largest_output_is_that_of_the_label_and_all_are_finite() -> None:
    logits = np.array([[0, 2, 1], [3, 2, 1], [1, 1, 0], [np.nan, 0, 1], [np.inf, 0, 1]], np.float32)
    labels = np.array([1, 2, 0, 0, 0])
    wanted = [True, False, True, False, False]
    assert correct_predictions(logits, labels).tolist() == wanted
    assert correct_predictions(torch.from_numpy(logits), torch.from_numpy(labels)).tolist() == wanted


@pytest.mark.parametrize(
    "labels", [np.array([[1], [0]]), np.array([1.0, 0.0]), np.array([True, False]), np.array([1])]
)
def test_labels_that_would_only_broadcast_or_convert_score_nothing(labels: np.ndarray) -> None:
    logits = np.eye(2, dtype=np.float32)
    with pytest.raises(UsageError, match="The labels of the samples"):
        correct_predictions(logits, labels)
    with pytest.raises(UsageError, match="The labels of the samples"):
        correct_predictions(torch.from_numpy(logits), torch.from_numpy(labels))


def test_no_other_module_takes_the_largest_output_for_a_prediction() -> None:
    """Outside of the rooms that see weights alone, `argmax` along an axis would be a score without a
    check.
    """
    found = set()
    for room in ("sparse_export", "train", "models", "cli"):
        for path in (CHECKOUT / room).rglob("*.py"):
            name = path.relative_to(CHECKOUT).as_posix()
            text = path.read_text()
            if "argmax" in text and not name.startswith(("sparse_export/graph/", "sparse_export/sparsity/")):
                calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
                named = [call for call in calls if getattr(call.func, "attr", "") == "argmax"]
                if any(call.args or call.keywords for call in named):
                    found.add(name)
    after_a_check = {"sparse_export/tasks/shipped.py", "sparse_export/building/postprocess.py"}
    assert found == {"sparse_export/tasks/labels.py", *after_a_check}


def test_correct_predictions_are_counted_over_all_batches() -> None:
    weight = torch.eye(3)
    x = torch.eye(3)[[0, 1, 2, 1]]
    y = torch.tensor([0, 1, 0, 1])
    found = count_correct(lambda one: one @ weight, [(x[:3], y[:3]), (x[3:], y[3:])], torch.device("cpu"))
    assert (found.dtype, int(found)) == (torch.int64, 3)
    correct = correct_predictions(x.numpy(), y.numpy())
    assert correct.tolist() == [True, True, False, True]
