"""A data set of uint8 takes about the memory of its file while a network is trained on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_export.tasks import data
from sparse_export.train import batches
from sparse_export.train.distributed import World
from sparse_export.train.recipe import recipe_from_table

N, MIB = 40_000, 2**20

CHILD = """
import sys
from pathlib import Path

import torch

from sparse_export.train.batches import batch_loader
from sparse_export.train.distributed import World
from sparse_export.train.recipe import recipe_from_table


def anonymous():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024


def epoch(name):
    recipe = recipe_from_table({"model": "digits-cnn", "data": name, "epochs": 1}, source="test")
    loader = batch_loader(recipe, None, False, torch.device("cpu"), World())
    seen = sum(len(x) for x, _ in loader.training(torch.randperm(loader.info.n_train), 100, 0, 0))
    for part in ("validation", "test"):
        seen += sum(len(x) for x, _ in loader.part(part, 500))
    return loader, seen


kept = epoch("digits")  # so that all that is imported is
before = anonymous()
kept = epoch(sys.argv[1])
print(kept[1], anonymous() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_set_of_uint8_takes_less_than_twice_its_file(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (N, 28, 28), dtype=np.uint8)
    y = np.arange(N) % 10
    file = tmp_path / "set.npz"
    np.savez(file, x_train=x, y_train=y, x_test=x[:5000], y_test=y[:5000])
    call = [sys.executable, "-c", CHILD, f"npz:{file}"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, check=True)
    n, mib = done.stdout.split()
    assert int(n) == N + 5000
    assert float(mib) < 2 * file.stat().st_size / MIB


@pytest.mark.parametrize("limit", [0, 2**30])
def test_batches_are_the_same_bits_normalised_at_once_or_one_by_one(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batch() -> Tensor:
        recipe = recipe_from_table({"model": "digits-cnn", "data": "digits", "epochs": 1}, source="test")
        loader = batches.batch_loader(recipe, None, False, torch.device("cpu"), World())
        x, _ = next(loader.training(torch.arange(300).flip(0), 100, 0, 0))
        assert isinstance(x, Tensor)
        return x

    monkeypatch.setattr(batches, "_NORMALISED_BYTES", limit)
    digits = data.load("digits")
    assert torch.equal(batch(), data.normalise(digits.x_train[:300].flip(0)[:100], digits.mean, digits.std))
