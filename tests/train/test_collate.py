"""Samples of differing shapes: padded in training by a user's function, scored as they are, up to the gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparse_export.building.bundle import build
from sparse_export.errors import RecipeError, UsageError
from sparse_export.evaluate.validate import validate
from sparse_export.evaluate.validation import check_gates
from sparse_export.train.loop import train
from sparse_export.train.recipe import Recipe, recipe_from_table

CODE = """
import numpy as np
import torch
from torch import nn

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.first = nn.Linear(16, 32)
        self.last = nn.Linear(32, 3)

    def forward(self, ids, mask):
        seen = self.words(ids) * mask[..., None]
        mean = seen.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return self.last(torch.relu(self.first(mean)))

def words(): return Words()

def example_inputs():
    return {"ids": torch.zeros((2, 5), dtype=torch.int64), "mask": torch.ones((2, 5))}

free_sizes = {"ids": ("batch", "length"), "mask": ("batch", "length")}

class Texts:
    def __init__(self, n, seed):
        generator = np.random.default_rng(seed)
        self.lengths = generator.integers(3, 9, n)
        self.rows = [generator.integers(0, 20, length) for length in self.lengths]
        self.targets = np.array([int(one[0]) % 3 for one in self.rows])

    def __len__(self): return len(self.rows)

    def __getitem__(self, at):
        row = self.rows[at]
        return {"ids": row, "mask": np.ones(len(row), "float32")}, self.targets[at]

data = {"train": Texts(300, 0), "test": Texts(100, 1)}

def padded(samples):
    longest = max(len(inputs["ids"]) for inputs, _ in samples)
    batch = {
        name: torch.stack([
            nn.functional.pad(inputs[name], (0, longest - len(inputs[name]))) for inputs, _ in samples
        ])
        for name in ("ids", "mask")
    }
    return batch, torch.stack([target for _, target in samples])

def without_targets(samples): return padded(samples)[0]
def without_mask(samples): return {"ids": padded(samples)[0]["ids"]}, padded(samples)[1]
def too_few(samples): return padded(samples[1:])
def broken(samples): raise KeyError("ids")
def no_tensors(samples): return padded(samples)[0], [0] * len(samples)
"""
FIXED = CODE.replace("free_sizes = ", "sizes = ")


@pytest.fixture(autouse=True)
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "word_nets.py").write_text(CODE)
    (tmp_path / "fixed_nets.py").write_text(FIXED)
    monkeypatch.syspath_prepend(str(tmp_path))


def recipe(module: str = "word_nets", **changes: Any) -> Recipe:
    table = {
        "model": f"{module}:words",
        "data": f"{module}:data",
        "collate": f"{module}:padded",
        "epochs": 3,
        "batch_size": 30,
        "optimizer": {"name": "adam", "lr": 0.02},
        "sparsity": {"density": 0.5, "pattern": "2:4", "small_share": 0.0},
    }
    return recipe_from_table(table | changes, source="of the test")


@pytest.mark.parametrize("workers", [0, 2])
def test_texts_of_any_length_are_trained_on_and_scored(workers: int, tmp_path: Path) -> None:
    run = train(recipe(workers=workers), tmp_path / "run", device="cpu")
    assert run.info.test is not None and run.info.test.n_samples == 100
    assert run.info.signature.free == ("batch", "length")
    bundle = build(run, tmp_path / "bundle")
    found = validate(bundle, max_drop=0)
    check_gates(found)
    assert found.score == run.info.test


def test_without_the_function_the_message_names_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has inputs of shape .*set collate = .package\.module:function"):
        train(recipe(collate=""), tmp_path / "run", device="cpu")


def test_sizes_that_nothing_names_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing names the sizes.*free_sizes beside the factory"):
        train(recipe("fixed_nets"), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("without_targets", "gives a"),
        ("without_mask", "gives the inputs ids. ids, mask were expected"),
        ("too_few", "another number of samples than 2 in ids, mask, the targets"),
        ("broken", "failed for 2 samples with KeyError: 'ids'"),
        ("no_tensors", "type dict and a value of type list"),
        ("missing", "has no"),
    ],
)
def test_a_function_that_gives_something_else_is_told(function: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        train(recipe(collate=f"word_nets:{function}"), tmp_path / "run", device="cpu")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"collate": "padded"}, "a function of your own was expected"),
        ({"data": "digits"}, "package.module:data"),
        ({"cuda_graph": True}, "cuda_graph"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(**changes)


def test_a_target_that_is_no_number_is_told_with_its_sample(tmp_path: Path) -> None:
    code = (
        "import numpy as np\n"
        "rows = [(np.ones(8, 'float32'), 1.0 if at != 17 else 'seven') for at in range(40)]\n"
        "data = {'train': rows}\n"
        "def net():\n"
        "    from torch import nn\n"
        "    return nn.Linear(8, 1)\n"
    )
    (tmp_path / "odd_targets.py").write_text(code)
    table = {"model": "odd_targets:net", "data": "odd_targets:data", "task": "regression", "epochs": 1}
    with pytest.raises(UsageError, match=r"Sample 17 of the part train .* for a target a value of type str"):
        train(
            recipe_from_table(table | {"batch_size": 10, "dense": True}, source="t"),
            tmp_path / "run",
            device="cpu",
        )
