"""Without targets a task of a user's own holds a sparse network against what the dense one gives."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

import sparse_export as se
from sparse_export.errors import GateFailed, UsageError
from sparse_export.evaluate.compare import compare
from sparse_export.evaluate.gate import check_gate, gate
from sparse_export.evaluate.test_set import judge_of
from sparse_export.evaluate.validate import validate
from sparse_export.signature import Signature, TensorInfo
from sparse_export.tasks.agreement import agreement_of, agreement_text, as_targets, require_judge
from sparse_export.tasks.task import Task
from tests.oneshot.choosable import LAYERS, choosable, write_data
from tests.tagging import TABLE, tagger_bundle

CODE = """
from sparse_export.tasks import Task
import numpy as np


class SameTop(Task):
    score_name = "same largest output"
    is_share = True

    def per_sample(self, outputs, targets):
        return outputs.argmax(-1) == np.asarray(targets).argmax(-1)


class SameTags(Task):
    score_name = "same tags"
    is_share = True

    def per_sample(self, outputs, targets):
        return [(row == target["tags"]).mean() for row, target in zip(outputs["tags"], targets)]


class Apart(Task):
    score_name = "distance"
    higher_is_better = False

    def per_sample(self, outputs, targets):
        return np.abs(outputs - targets).mean(1)


same_top, same_tags, apart = SameTop(), SameTags(), Apart()
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "judging.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "judging", raising=False)


class _SameTop(Task):
    name, score_name, is_share = "same_top", "same largest output", True

    def per_sample(self, outputs: Any, targets: Any) -> Any:
        return outputs.argmax(-1) == np.asarray(targets).argmax(-1)


def _signature(*shape: int | str) -> Signature:
    return Signature(inputs=(), outputs=(TensorInfo(name="y", dtype="float32", shape=shape),), batch="batch")


def test_the_score_of_the_task_is_the_agreement_whatever_the_cosine_says() -> None:
    dense = np.array([[100.0, 101.0], [100.0, 99.0], [50.0, 51.0], [50.0, 49.0]])
    sparse = dense[:, ::-1].copy()
    sparse[0] = dense[0]
    pairs = [({"y": dense[:3]}, {"y": sparse[:3]}), ({"y": dense[3:]}, {"y": sparse[3:]})]
    found = agreement_of(pairs, _signature("batch", 2), inputs="4 samples", judge=_SameTop())
    assert found.percent == pytest.approx(25.0)
    assert found.low < 25.0 < found.high <= 100.0
    assert (found.task, found.score_name, found.n_samples) == ("same_top", "same largest output", 4)
    assert agreement_text(found).startswith("25.00 % by same largest output [")
    assert found.outputs[0].cosine is not None
    assert found.outputs[0].cosine > 0.999


def test_what_a_network_gave_becomes_one_target_for_each_sample() -> None:
    turned = as_targets({"y": np.arange(6).reshape(2, 3)}, _signature(2, "batch"))
    assert [list(one) for one in turned] == [[0, 3], [1, 4], [2, 5]]
    (alone,) = as_targets({"y": np.array([1.0, 2.0])}, _signature(2))
    assert list(alone) == [1.0, 2.0]
    two = Signature(
        inputs=(),
        outputs=tuple(TensorInfo(name=name, dtype="float32", shape=("batch", 2)) for name in "ab"),
        batch="batch",
    )
    several = as_targets({"a": np.zeros((2, 2)), "b": np.ones((2, 2))}, two)
    assert [{name: one.tolist() for name, one in row.items()} for row in several] == [
        {"a": [0, 0], "b": [1, 1]}
    ] * 2


@pytest.mark.parametrize(
    "changed", [{"is_share": False}, {"higher_is_better": False}, {"scores_pairs": True}]
)
def test_a_score_that_says_nothing_of_agreement_is_refused(changed: dict[str, bool]) -> None:
    task = _SameTop()
    vars(task).update(changed)
    with pytest.raises(UsageError, match="does not say how far two networks agree"):
        require_judge(task)


def _taggers(folder: Path) -> SimpleNamespace:
    table = TABLE.copy()
    table[:, 0] = 0  # pruned
    dense, sparse = tagger_bundle(folder / "dense"), tagger_bundle(folder / "sparse", table=table)
    return SimpleNamespace(dense=dense, sparse=sparse)


def test_validate_and_compare_ask_the_task(tmp_path: Path) -> None:
    made = _taggers(tmp_path)
    found = validate(made.sparse, against=made.dense.path, task="judging:same_tags", max_drop=1.0)
    assert found.agreement is not None
    tags = next(one for one in found.agreement.outputs if one.name == "tags")
    assert tags.equal_share is not None
    assert found.agreement.percent == pytest.approx(100 * tags.equal_share)
    assert "% by same tags" in " ".join(str(found).split())
    with pytest.raises(UsageError, match=r"to score the task judging:same_tags on.*--against"):
        validate(made.sparse, task="judging:same_tags")
    judge = judge_of(made.dense, "judging:same_tags", None)
    quick: dict[str, Any] = {
        "rounds": 8,
        "block_s": 0.001,
        "warmup_limit_s": 0.05,
        "n_threads": 1,
        "batches": (1,),
    }
    compared = compare(made.dense, made.sparse, judge=judge, **quick)
    assert compared.agreement is not None
    assert compared.agreement.percent == pytest.approx(found.agreement.percent)
    assert compared.drop == pytest.approx(100 - found.agreement.percent)


def test_a_shipped_task_still_needs_targets(tmp_path: Path) -> None:
    made = _taggers(tmp_path)
    with pytest.raises(UsageError, match="no data set with test samples to score the task regression on"):
        validate(made.sparse, against=made.dense.path, task="regression")


def test_layers_are_chosen_and_reported_by_the_task(tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    onnx.save(choosable(), file)
    write_data(file)
    done = se.sparsify(
        file, tmp_path / "run", inputs=tmp_path / "inputs.npz", task="judging:same_top", max_drop=0.5
    )
    choice = done.report.choice
    assert choice is not None
    assert choice.dense.name == "same largest output, held against the dense network"
    assert choice.dense.value == 1.0
    chosen = {layer.name for layer in done.report.layers if layer.pattern is not None}
    assert chosen == set(LAYERS) - {"w1"}
    agreement = done.report.stages[-1].agreement
    assert agreement is not None
    assert agreement.task == "judging:same_top"
    assert agreement.percent > 98.0


def test_without_a_bound_the_task_judges_the_result_and_the_gate_asks_it(tmp_path: Path) -> None:
    file, inputs = tmp_path / "net.onnx", tmp_path / "inputs.npz"
    onnx.save(choosable(), file)
    write_data(file)
    done = se.sparsify(file, tmp_path / "run", inputs=inputs, task="judging:same_top")
    agreement = done.report.stages[-1].agreement
    assert agreement is not None
    assert (agreement.task, agreement.score_name) == ("judging:same_top", "same largest output")
    assert agreement.percent < 90
    sparse, dense = se.build(done.run, "sparse"), se.build(tmp_path / "run-dense", "dense")
    words: dict[str, Any] = {"task": "judging:same_top", "inputs": inputs}
    with pytest.raises(GateFailed, match="Agreement with the dense bundle was lost"):
        check_gate(gate(sparse.path, dense.path, max_drop=1.0, **words))
    assert gate(sparse.path, dense.path, max_drop=101 - agreement.percent + 10, **words).passed
    with pytest.raises(UsageError, match="does not say how far two networks agree"):
        se.sparsify(file, tmp_path / "b", inputs=tmp_path / "inputs.npz", task="judging:apart")
