"""A comparison of two small bundles whose runs have a record of their epochs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from sparse_export.building import build
from sparse_export.evaluate.compare import compare
from sparse_export.evaluate.comparison import Comparison
from sparse_export.formats.bundle import Bundle
from sparse_export.tasks import data
from tests.exporting import exported_once
from tests.making_runs import digits_run

QUICK_ROUNDS = 20


@dataclass(frozen=True)
class Made:
    dense: Bundle
    sparse: Bundle
    comparison: Comparison


@pytest.fixture(scope="package")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp("report") / "<img src=x onerror=alert(1)>"
    with exported_once():
        bundles = []
        for name, density in (("dense", 1.0), ("sparse", 0.3)):
            run = digits_run(folder / f"{name}-run", density=density)
            lines = [
                {
                    "epoch": epoch,
                    "train_loss": 2.0 / epoch,
                    "validation_score": 90.0 + epoch,
                    "flip_rate": 0.1 / epoch if density < 1 and epoch < 3 else None,
                }
                for epoch in (1, 2, 3)
            ]
            (run.path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
            bundles.append(build(run))
        dense, sparse = bundles
        assert dense.info.data is not None
        comparison = compare(
            dense,
            sparse,
            batches=(1, 8),
            rounds=QUICK_ROUNDS,
            block_s=0.001,
            warmup_limit_s=0.05,
            n_threads=1,
            samples=data.load_test_set(dense.info.data, dense.info.signature.input_shape),
        )
        yield Made(dense, sparse, comparison)
