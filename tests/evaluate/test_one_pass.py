"""Data of one's own are read once, however many networks are scored on them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sparse_export.building import build
from sparse_export.evaluate.compare import compare
from sparse_export.evaluate.test_set import test_set_of
from sparse_export.evaluate.validate import validate
from tests.exporting import exported_once
from tests.making_runs import digits_run

MODULE = """
from sparse_export.tasks import data

digits = data.load("digits")
x = data.normalise(digits.x_test, digits.mean, digits.std)
reads = []


class Counted:
    targets = digits.y_test

    def __len__(self):
        return len(x)

    def __getitem__(self, at):
        reads.append(at)
        return x[at], self.targets[at]


test = Counted()
"""
N = 400
N_ODD = 3  # the first sample tells the sizes


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    (tmp_path / "counted_data.py").write_text(MODULE + "data = {'test': test}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("counted_data", None)
    import importlib

    found: list[int] = importlib.import_module("counted_data").reads
    return found


def test_validate_and_compare_read_each_sample_once(tmp_path: Path, reads: list[int]) -> None:
    with exported_once():
        run = digits_run(tmp_path / "run")
        dense = build(run.path, tmp_path / "dense")
        sparse = build(run.path, tmp_path / "sparse")
    found = validate(sparse.path, against=dense.path, data="counted_data:data", task="classification")
    assert found.score == found.torch_score == run.info.test
    assert found.against is not None and found.against.score == run.info.test
    assert sorted(set(reads)) == list(range(N))
    assert len(reads) <= N + N_ODD
    del reads[:]
    test = test_set_of(sparse, data="counted_data:data", task="classification")
    compared = compare(dense.path, sparse.path, samples=test, batches=(1,), rounds=8, block_s=0.005)
    assert compared.difference is not None and compared.difference.amount == 0
    assert len(reads) <= N + N_ODD
