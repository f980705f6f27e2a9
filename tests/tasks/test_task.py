"""Shipped tasks against scikit-learn and arithmetic by hand, and tasks of one's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, confusion_matrix, f1_score, r2_score

from sparse_export.errors import UnknownNameError, UsageError
from sparse_export.formats.score import Score
from sparse_export.instruments.paired_scores import paired_bootstrap_difference, paired_mean_difference
from sparse_export.instruments.rank_correlation import rank_correlations
from sparse_export.signature import Array
from sparse_export.tasks import TASKS, Task, task_named
from sparse_export.tasks.shipped import IGNORED

RANDOM = np.random.default_rng(3)


def _score(name: str, outputs: Array, targets: Array) -> Score:
    """In two batches, as it is measured."""
    task, half = task_named(name), len(targets) // 3
    parts = [
        task.statistics({"y": outputs[rows]}, targets[rows]) for rows in (slice(half), slice(half, None))
    ]
    return task.score(np.concatenate(parts))


def test_shares_of_right_answers() -> None:
    logits = RANDOM.standard_normal((60, 8))
    labels = RANDOM.integers(0, 8, 60)
    order = np.argsort(-logits, axis=1)
    top1, top5 = (order[:, :n] == labels[:, np.newaxis] for n in (1, 5))
    assert _score("classification", logits, labels) == Score(n_correct=int(top1.any(1).sum()), n_samples=60)
    found = _score("classification:top5", logits, labels)
    assert (found.n_correct, found.name) == (int(top5.any(1).sum()), "top-5 accuracy")
    yes = RANDOM.integers(0, 2, 60)
    right = int(((logits[:, 0] > 0) == (yes > 0)).sum())
    assert _score("binary", logits[:, :1], yes).n_correct == right


def test_scores_of_many_labels_are_those_of_scikit_learn() -> None:
    logits, labels = RANDOM.standard_normal((50, 4)), RANDOM.integers(0, 2, (50, 4))
    found = _score("multilabel", logits, labels)
    assert found.value == pytest.approx(average_precision_score(labels, logits, average="macro"))
    found = _score("multilabel:f1", logits, labels)
    assert found.value == pytest.approx(f1_score(labels, logits > 0, average="micro"))


def test_scores_of_numbers() -> None:
    x, y = RANDOM.standard_normal((40, 3)), RANDOM.standard_normal((40, 3)) * (1, 2, 5)
    rmse = _score("regression", x, y)
    assert rmse.value == pytest.approx(np.sqrt(np.square(x - y).mean()))
    assert (
        rmse.higher_is_better,
        rmse.is_share,
        rmse.worse_by(Score(name="RMSE", value=1.0, n_samples=1, is_share=False, higher_is_better=False)) > 0,
    ) == (False, False, True)
    one = _score("regression:r2", x[:, 0], y[:, 0])
    assert one.value == pytest.approx(r2_score(y[:, 0], x[:, 0]))


def test_the_mean_iou_is_of_all_pixels_but_the_ignored_ones() -> None:
    logits, true = RANDOM.standard_normal((6, 3, 5, 4)), RANDOM.integers(0, 3, (6, 5, 4))
    true[:, 0] = IGNORED
    known = true != IGNORED
    matrix = confusion_matrix(true[known], logits.argmax(1)[known])
    iou = np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    assert _score("segmentation", logits, true).value == pytest.approx(iou.mean())


def test_the_cosine_to_reference_vectors() -> None:
    a = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    b = np.array([[2.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert _score("embedding", a, b).value == pytest.approx((1 + 1 / np.sqrt(2) + 0) / 3)


def _scored_pairs(n: int) -> tuple[Array, Array, Array]:
    """Vectors of n pairs in any order, their targets, and the cosine and score of each pair."""
    numbers = RANDOM.permutation(np.repeat(np.arange(n) * 3, 2))
    scores = RANDOM.integers(0, 6, n) / 5  # with ties
    vectors = RANDOM.standard_normal((2 * n, 4)) + 2 * scores[numbers // 3, np.newaxis]
    pairs = [vectors[numbers == number] for number in np.arange(n) * 3]
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]
    targets = np.stack([numbers, scores[numbers // 3]], axis=1)
    return vectors, targets, np.stack([cosines, scores], axis=1)


def test_similarities_of_pairs_are_ranked_as_scipy_ranks_them() -> None:
    vectors, targets, pairs = _scored_pairs(40)
    found = _score("embedding:spearman", vectors, targets)  # in two batches, which part some pairs
    assert found.value == pytest.approx(spearmanr(*pairs.T).statistic)
    assert (found.n_samples, found.name, found.is_share) == (40, "Spearman correlation", False)
    worse = vectors + RANDOM.standard_normal(vectors.shape)
    task = task_named("embedding:spearman")
    a, b = (task.statistics({"y": one}, targets) for one in (vectors, worse))
    apart = task.difference(a, b)
    assert apart.amount == pytest.approx(task.over(b) - task.over(a))
    assert apart.low < apart.amount < apart.high
    assert (apart.n_samples, apart.n_resamples) == (40, 10_000)
    assert task.over(np.concatenate([a[:1] * 0 - 1, a])) == pytest.approx(
        task.over(a)
    )  # one without the other


def test_rank_correlations_of_resampled_sets_are_those_of_scipy() -> None:
    pairs = RANDOM.integers(0, 7, (30, 2)).astype(float)
    counts = RANDOM.multinomial(30, np.full(30, 1 / 30), size=20).astype(np.float64)
    wanted = [spearmanr(*np.repeat(pairs, one.astype(int), axis=0).T).statistic for one in counts]
    np.testing.assert_allclose(rank_correlations(pairs, counts), wanted, rtol=1e-12)
    flat = np.stack([np.ones(5), np.arange(5.0)], axis=1)
    assert rank_correlations(flat) == 0.0
    assert np.isnan(rank_correlations(flat[:, ::-1]))


def test_the_output_that_holds_the_vectors_is_found_among_several() -> None:
    tokens, ids = np.ones((2, 5, 3), np.float32), np.ones((2, 3), np.int64)
    vectors = np.array([[1.0, 0, 0], [0, 1, 0]], np.float32)
    outputs: dict[str, Array] = {
        "ids": ids,
        "tokens": tokens,
        "other": np.ones((2, 4), np.float32),
        "pooled": vectors,
    }
    embedding = task_named("embedding")
    assert embedding.statistics(outputs, vectors).tolist() == [[1.0], [1.0]]
    del outputs["other"]
    ranks = task_named("embedding:spearman").statistics(outputs, np.array([[0, 1], [0, 1]]))
    assert ranks.tolist() == [[1, 0, 0, 0, 1], [0, 1, 0, 0, 1]]
    with pytest.raises(
        UsageError, match=r"outputs of shapes \(2, 3\), \(2, 5, 3\)\. An output of floats \(s"
    ):
        embedding.statistics({"ids": ids, "tokens": tokens}, vectors)


@pytest.mark.parametrize(
    ("name", "targets", "said"),
    [
        ("classification", np.array([0.5, 1.25]), "or name the task regression"),
        ("classification", np.array([[1, 1, 0], [0, 0, 0]]), "ame the task multilabel"),
        ("classification", np.zeros((2, 4, 4), dtype=int), "They fit the task segmentation"),
        ("classification", np.array([-1, 1]), "number the classes from 0, one per output"),
        ("binary", np.array([0, 2]), "no zeros and ones, one a sample. They fit the task classification"),
        ("multilabel", np.array([0, 1, 2]), "They fit the task classification"),
        ("regression:r2", np.array([2.5, 2.5]), "all the same number"),
        ("regression", np.array([np.nan]), "hold 1 that are NaN or infinite, the first at 0"),
        ("multilabel", np.array([0, 1]), "zeros and ones of shape"),
        ("segmentation", np.array([0, 1]), "class numbers of shape"),
        ("embedding", np.array([0, 1]), "no vectors"),
        ("embedding:spearman", np.array([0.5, 1.0]), "no pair numbers and scores of shape"),
        ("embedding:spearman", np.array([[0, 1], [0, 1], [1, 2.0]]), "the pair 1 for 1 samples, not for two"),
        ("embedding:spearman", np.array([[0, 1], [0, 2], [1, 2], [1, 2.0]]), "two scores to the pair 0"),
        ("embedding:spearman", np.array([[0, 1], [0, 1], [1, 1], [1, 1.0]]), "all pairs one score"),
        ("embedding:spearman", np.array([[0, np.nan], [0, 1]]), "no finite numbers"),
    ],
)
def test_targets_of_another_task_are_told(name: str, targets: Array, said: str) -> None:
    problem = TASKS[name].problem(targets, None)
    assert problem is not None
    assert said in problem
    assert ".." not in problem and "; N" not in problem and not problem.endswith(".")


@pytest.mark.parametrize(
    ("name", "outputs", "targets"),
    [
        ("classification", (4, 3), torch.tensor([0, 1, 2, 0])),
        ("binary", (4, 1), torch.tensor([0, 1, 1, 0])),
        ("multilabel", (4, 3), torch.tensor([[0, 1, 1]] * 4)),
        ("regression", (4,), torch.tensor([0.0, 1.0, 2.0, 3.0])),
        ("segmentation", (4, 3, 2, 2), torch.zeros((4, 2, 2), dtype=torch.int64)),
        ("embedding", (4, 3), torch.ones((4, 3))),
    ],
)
def test_every_shipped_loss_goes_down_along_its_gradient(
    name: str, outputs: tuple[int, ...], targets: torch.Tensor
) -> None:
    torch.manual_seed(0)
    x = torch.randn(outputs, requires_grad=True)
    loss = task_named(name).loss(x, targets)
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss.ndim == 0
    assert float(task_named(name).loss(x.detach() - 0.05 * gradient, targets)) < float(loss.detach())


OWN = """
import numpy as np
from sparse_export.tasks import Task

class Reading(Task):
    score_name = "letters read right"
    is_share = True

    def per_sample(self, outputs, targets):
        return [np.mean([a == b for a, b in zip(row, word)]) for row, word in zip(outputs, targets)]

reading = Reading()
other = 3
"""


def test_a_task_of_ones_own_is_some_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_tasks_a.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    for name in ("own_tasks_a:reading", "own_tasks_a:Reading"):
        task = task_named(name)
        found = task.score(task.statistics({"y": np.array([[1, 2], [3, 4]])}, [[1, 2], [3, 3]]))
        assert (found.name, found.figure, task.name) == ("letters read right", 75.0, name)
    with pytest.raises(UsageError, match=r"other is a value of type int, not a task"):
        task_named("own_tasks_a:other")
    with pytest.raises(UsageError, match="has no loss, so nothing can be trained"):
        task_named("own_tasks_a:reading").loss(None, None)
    for wrong in ("regresion", "regression:mae"):
        with pytest.raises(UnknownNameError, match="regression"):
            task_named(wrong)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([1.0], r"gives shape \(1,\) for 2 samples"),
        ([1.0, np.nan], "not finite"),
        (1.0, "gives a value of type float"),
        (None, "gives None for 2"),
    ],
)
def test_what_a_task_gives_is_checked(given: object, said: str) -> None:
    class Wrong(Task):
        name = "wrong"

        def per_sample(self, outputs: object, targets: object) -> object:
            return given

    with pytest.raises(UsageError, match=said):
        Wrong().statistics({"y": np.zeros((2, 1))}, [0, 1])


def test_what_a_task_raises_is_told_with_the_shapes() -> None:
    class Failing(Task):
        name = "failing"

        def per_sample(self, outputs: object, targets: object) -> object:
            raise KeyError("boxes")

    with pytest.raises(UsageError, match=r"failing cannot score outputs of shapes {'y': \(2, 1\)}: KeyError"):
        Failing().statistics({"y": np.zeros((2, 1))}, [0, 1])


class _ByRows(Task):
    """A mean, as a score that needs all samples."""

    def over(self, statistics: Array) -> float:
        return float(statistics.mean())


class _BySums(Task):
    """The same, of sums."""

    of_sums = True

    def over(self, statistics: Array) -> float:
        return float(statistics[0] / statistics[1])


def test_average_precisions_of_resampled_sets_are_those_of_scikit_learn() -> None:
    task = task_named("multilabel")
    labels = RANDOM.integers(0, 2, (30, 3))
    statistics = task.statistics({"y": RANDOM.integers(-3, 4, (30, 3)).astype(float)}, labels)  # with ties
    counts = RANDOM.multinomial(30, np.full(30, 1 / 30), size=20).astype(np.float64)
    wanted = [task.over(np.repeat(statistics, one.astype(int), axis=0)) for one in counts]
    np.testing.assert_allclose(task.resampled(statistics, counts), wanted, rtol=1e-12)


def test_a_bootstrap_of_a_mean_is_as_wide_as_students_interval() -> None:
    a = RANDOM.standard_normal((400, 1))
    b = a + 0.1 + 0.3 * RANDOM.standard_normal((400, 1))
    exact = paired_mean_difference(a[:, 0], b[:, 0])
    by_rows = paired_bootstrap_difference(_ByRows().resampled, a, b, n_resamples=2000)
    with_n = [np.concatenate([one, np.ones((400, 1))], axis=1) for one in (a, b)]
    by_sums = paired_bootstrap_difference(_BySums().resampled, *with_n)
    for found in (by_rows, by_sums):
        assert found.amount == pytest.approx(exact.amount)
        assert found.high - found.low == pytest.approx(exact.high - exact.low, rel=0.1)
    assert (by_rows.n_resamples, by_sums.n_resamples) == (2000, 10_000)
    again = paired_bootstrap_difference(_BySums().resampled, *with_n)
    assert again == by_sums  # the same samples are drawn every time


def test_a_bootstrap_ends_with_its_time() -> None:
    a = RANDOM.standard_normal((50, 1))
    found = paired_bootstrap_difference(_ByRows().resampled, a, a, budget_s=0.0)
    assert found.n_resamples == 200
    assert (found.amount, found.low, found.high) == (0.0, 0.0, 0.0)


def test_the_interval_of_rmse_covers_the_true_difference() -> None:
    """0.95 +- 4 standard errors of a share over 150 sets: an interval of 0.87 or less would be seen."""
    task, covered, n_sets = task_named("regression"), 0, 150
    true = np.sqrt(1.2**2) - 1.0
    for seed in range(n_sets):
        draw = np.random.default_rng(seed)
        noise = draw.standard_normal((200, 1))
        other = 1.2 * (0.8 * noise + 0.6 * draw.standard_normal((200, 1)))
        zero = np.zeros((200, 1))
        statistics = [task.statistics({"y": one}, zero) for one in (noise, other)]
        found = paired_bootstrap_difference(task.resampled, *statistics, n_resamples=200)
        covered += found.low <= true <= found.high
    assert abs(covered / n_sets - 0.95) < 4 * np.sqrt(0.95 * 0.05 / n_sets)


def test_class_numbers_for_a_network_of_classes_are_no_regression() -> None:
    problem = TASKS["regression"].problem(np.arange(10) % 10, 10)
    assert problem is not None and problem.endswith("They fit the task classification")
    other = TASKS["regression"].problem(np.linspace(0, 1, 10), 10)
    assert other is not None and "classification" not in other


@pytest.mark.filterwarnings("error")
def test_targets_that_never_change_have_no_r2_and_say_so() -> None:
    task = TASKS["regression:r2"]
    for constant in (0.0, 0.1, 1e6):
        outputs, targets = np.linspace(0, 1, 7), np.full(7, constant)
        with pytest.raises(UsageError, match="7 targets are all the same number"):
            task.score(task.statistics({"y": outputs}, targets))
    targets = 1e6 + np.arange(7)
    found = task.score(task.statistics({"y": targets.copy()}, targets))
    assert found.value == 1.0


@pytest.mark.filterwarnings("error")
def test_a_regression_of_another_width_is_refused_in_words() -> None:
    task = TASKS["regression"]
    outputs, targets = torch.zeros((2, 3)), torch.tensor([0, 2])
    said = "gives 3 numbers a sample, and the targets have 1"
    with pytest.raises(UsageError, match=said) as caught:
        task.loss(outputs, targets)
    assert "name the task classification" in str(caught.value)
    with pytest.raises(UsageError, match=said):
        task.statistics({"y": outputs.numpy()}, targets.numpy())


class _Seeing(Task):
    """Tells whether it got an array of targets."""

    def per_sample(self, outputs: Array, targets: object) -> Array:
        return np.full(len(outputs), isinstance(targets, np.ndarray))


@pytest.mark.parametrize(
    ("targets", "is_array"),
    [
        ([np.array([1, 2]), np.array([0, 1])], True),
        ([np.array([1, 2]), np.array([0])], False),
        ([1, 2.5], True),
        (["a", "b"], False),
    ],
)
def test_targets_of_one_shape_come_as_an_array(targets: list[object], is_array: bool) -> None:
    assert (_Seeing().statistics({"y": np.zeros((2, 3))}, targets) == is_array).all()
