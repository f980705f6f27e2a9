"""Every shipped task on real data, from training to the gate: scores of dense and 2:4, with intervals.

    python -m benchmarks.tasks [--data-dir DIR] [--epochs N] [--json FILE]
    python -m benchmarks.tasks --networks PICTURES [--serve] [--row NAME ...] [--json FILE]

Digits of MNIST by class, by "is it even" and as a number; the labels of scikit-learn's synthetic documents;
the course of a disease (scikit-learn's diabetes data); the foreground of MNIST digits on pictures of CIFAR-10.
Each network is trained dense and under 2:4 by the same recipe. DIR holds MNIST/raw and cifar10.npz, as
`sparse-export train --download` leaves them. The second form takes published networks in place of these,
see benchmarks/task_networks.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_diabetes, make_multilabel_classification
from torch import nn

from benchmarks import task_networks
from sparse_export.building.bundle import build
from sparse_export.evaluate.gate import gate
from sparse_export.signature import Array
from sparse_export.tasks import data
from sparse_export.tasks.data.places import default_data_dir
from sparse_export.tasks.scores import difference_text, value_text
from sparse_export.train.loop import train
from sparse_export.train.recipe import recipe_from_table
from sparse_export.version import library_versions, now

Parts = tuple[Array, Array, Array, Array]
"""x_train, y_train, x_test, y_test."""


def rows(n_outputs: int) -> nn.Module:
    """A network of three layers for what is no picture, or a picture as a row."""
    return nn.Sequential(
        nn.Flatten(), nn.LazyLinear(256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, n_outputs)
    )


def even() -> nn.Module:
    return rows(1)


def classes() -> nn.Module:
    return rows(10)


def number() -> nn.Module:
    return rows(1)


def labels() -> nn.Module:
    return rows(6)


def pixels() -> nn.Module:
    """A class for each pixel."""
    width = 32
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=2, dilation=2),
        nn.ReLU(),
        nn.Conv2d(width, 2, 1),
    )


def _digits(folder: Path) -> Parts:
    found = data.load("mnist", folder)
    arrays = (found.x_train, found.y_train, found.x_test, found.y_test)
    x_train, y_train, x_test, y_test = (one.numpy() for one in arrays)
    return x_train[:20_000], y_train[:20_000], x_test, y_test


def _even(folder: Path) -> Parts:
    x, y, x_test, y_test = _digits(folder)
    return x, (y % 2 == 0).astype(np.int64), x_test, (y_test % 2 == 0).astype(np.int64)


def _number(folder: Path) -> Parts:
    x, y, x_test, y_test = _digits(folder)
    return x, y.astype(np.float32), x_test, y_test.astype(np.float32)


def _labels(_: Path) -> Parts:
    x, y = make_multilabel_classification(6000, 40, n_classes=6, n_labels=2, random_state=0)
    return x[:5000].astype(np.float32), y[:5000], x[5000:].astype(np.float32), y[5000:]


def _disease(_: Path) -> Parts:
    x, y = load_diabetes(return_X_y=True)
    y = (y - y[:342].mean()) / y[:342].std()
    x = np.concatenate([20 * x, np.zeros((len(x), 2))], axis=1).astype(np.float32)  # a width that 4 divides
    return x[:342], y[:342].astype(np.float32), x[342:], y[342:].astype(np.float32)


def _foreground(folder: Path) -> Parts:
    """Digits laid over pictures, at a place drawn for each; the target is where the digit is."""
    digits, pictures = data.load("mnist", folder), data.load("cifar10", folder)
    generator, parts = np.random.default_rng(0), []
    for x, behind, n in (
        (digits.x_train, pictures.x_train, 4000),
        (digits.x_test, pictures.x_test, 1000),
    ):
        ink, shown = x[:n, 0].numpy(), behind[:n].numpy().copy()
        target = np.zeros((n, 32, 32), dtype=np.int64)
        for row, (top, left) in enumerate(generator.integers(0, 5, (n, 2))):
            place = np.s_[top : top + 28, left : left + 28]
            target[row][place] = ink[row] > 100
            colour = generator.integers(0, 256, (3, 1))
            shown[row][:, target[row] > 0] = colour
        parts += [shown, target]
    x_train, y_train, x_test, y_test = parts
    return x_train, y_train, x_test, y_test


CASES: dict[str, tuple[str, Callable[[Path], Parts], int]] = {
    "classification": ("classes", _digits, 1),
    "binary": ("even", _even, 1),
    "regression": ("number", _number, 1),
    "multilabel": ("labels", _labels, 2),
    "regression:r2": ("number", _disease, 5),
    "segmentation": ("pixels", _foreground, 2),
}
"""Factory, data, and by how much the epochs are multiplied."""


def measure(task: str, folder: Path, epochs: int, work: Path) -> dict[str, Any]:
    """Train dense and under 2:4, build both, and put the gate's questions to them."""
    factory, made, times = CASES[task]
    x_train, y_train, x_test, y_test = made(folder)
    np.savez(work / "data.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    table = {
        "model": f"benchmarks.tasks:{factory}",
        "data": f"npz:{work / 'data.npz'}",
        "task": task,
        "epochs": epochs * times,
        "batch_size": 100,
        "validation_fraction": 0.0,
        "optimizer": {"name": "adam", "lr": 0.001, "weight_decay": 0.0},
        "learning_rate": {"schedule": "cosine"},
        "sparsity": {"pattern": "2:4", "density": 0.5},
    }
    bundles = {}
    for name, dense in (("dense", True), ("sparse", False)):
        run = train(recipe_from_table(table | {"dense": dense}, source=name), work / name, device="cpu")
        bundles[name] = build(run, work / f"b-{name}")
    gates = {}
    for bound in ("10%", "0"):
        found = gate(bundles["sparse"].path, bundles["dense"].path, max_drop=bound, n_threads=1)
        gates[bound] = found.exit_code
    assert found.validation is not None
    against, score = found.validation.against, found.validation.score
    assert against is not None
    assert score is not None
    print(
        f"{task:16} {score.name:24} dense {value_text(against.score):>9} sparse {value_text(score):>9} "
        f"{difference_text(against.difference, is_share=score.is_share, p_value=True)}; gates {gates}",
        file=sys.stderr,
    )
    return {
        "task": task,
        "n_train": len(x_train),
        "dense": asdict(against.score),
        "sparse": asdict(score),
        "difference": asdict(against.difference),
        "exit_codes": gates,
        "recipe": table | {"data": "npz"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--networks", type=Path, metavar="PICTURES", help="folder with train and val")
    parser.add_argument("--serve", action="store_true", help="let Triton answer too")
    parser.add_argument("--row", action="append", choices=[*CASES, *task_networks.ROWS])
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    torch.manual_seed(0)
    found, pictures = [], None if words.networks is None else words.networks.absolute()
    rows = CASES if pictures is None else task_networks.ROWS
    for row in words.row or rows:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            if pictures is not None:
                found.append(task_networks.measure(row, work, pictures, serve=words.serve))
            else:
                found.append(measure(row, words.data_dir or default_data_dir(), words.epochs, work))
    if words.json:
        document = {"versions": library_versions(), "created": now(), "rows": found}
        words.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
