"""Targets of another task, or of none: refused before any work, with the task that fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from torch import nn

from sparse_export.building.bundle import build
from sparse_export.cli.main import cli
from sparse_export.errors import ArtefactError, UsageError
from sparse_export.evaluate.validate import validate
from sparse_export.graph.example import example_of_shape
from sparse_export.graph.export import onnx_from_module
from sparse_export.graph.model import save_model
from sparse_export.oneshot import sparsify
from sparse_export.tasks.class_names import repeated_names
from sparse_export.tasks.data import npz, own
from sparse_export.tasks.shipped import task_named

X = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
MULTI_HOT = (np.arange(120).reshape(40, 3) % 2).astype(np.int64)
ONE_HOT = np.eye(3, dtype=np.int64)[np.arange(40) % 3]
FLOATS = np.arange(40) / 7


def network(folder: Path, n_outputs: int = 3) -> Path:
    made = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, n_outputs)).eval()
    save_model(onnx_from_module(made, example_of_shape((8,)), masks={}), folder / "net.onnx")
    return folder / "net.onnx"


def call(*words: object) -> Any:
    return CliRunner().invoke(cli, [str(word) for word in words], prog_name="sparse-export")


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (MULTI_HOT, "are multi-hot, int64 of shape (40, 3). Name the task multilabel"),
        (
            ONE_HOT,
            "are one-hot, int64 of shape (40, 3). Convert them to class numbers with argmax(1), or name",
        ),
        (FLOATS, "are float64, which means regression targets. Convert them to int64 if they are class"),
    ],
)
@pytest.mark.parametrize("where", ["train", "sparsify"])
def test_targets_of_another_task_than_classification_are_wrong_usage(
    where: str, targets: Any, said: str, tmp_path: Path
) -> None:
    if where == "sparsify":
        np.savez(tmp_path / "data.npz", input=X, targets=targets)
        words = ["sparsify", network(tmp_path), "--task", "classification"]
        done = call(*words, "--data", f"npz:{tmp_path / 'data.npz'}", "--out", tmp_path / "run")
    else:
        np.savez(tmp_path / "data.npz", x_train=X, y_train=targets, x_test=X, y_test=targets)
        recipe = f'model = "lenet5"\ndata = "npz:{tmp_path / "data.npz"}"\nepochs = 1\n'
        (tmp_path / "recipe.toml").write_text(recipe)
        done = call("train", tmp_path / "recipe.toml", "--out", tmp_path / "run")
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("prefix", ["npz:", "imagefolder:"])
def test_data_that_are_named_and_not_there_are_wrong_usage_like_inputs(prefix: str, tmp_path: Path) -> None:
    words = ["sparsify", network(tmp_path), "--out", tmp_path / "run"]
    codes = [
        call(*words, "--task", "classification", "--data", f"{prefix}{tmp_path / 'absent'}").exit_code,
        call(*words, "--inputs", tmp_path / "absent.npz").exit_code,
    ]
    assert codes == [2, 2]


@pytest.mark.parametrize(
    ("task", "targets"), [("regression", FLOATS), ("embedding", np.ones((40, 3), np.float32))]
)
def test_targets_that_are_not_finite_are_counted_and_the_first_is_named(task: str, targets: Any) -> None:
    wrong = targets.copy()
    wrong[[5, 9]] = np.nan
    n = 2 if targets.ndim == 1 else 6
    first = "5" if targets.ndim == 1 else r"\(5, 0\)"
    problem = task_named(task).problem(wrong, None)
    assert problem is not None
    assert problem.startswith(f"hold {n} that are NaN or infinite, the first at ")
    assert problem.endswith(first.replace("\\", ""))


def test_a_target_of_an_archive_that_is_not_finite_is_counted_and_named(tmp_path: Path) -> None:
    wrong = FLOATS.copy()
    wrong[7] = np.inf
    np.savez(tmp_path / "data.npz", x_train=X, y_train=wrong, x_test=X, y_test=FLOATS)
    with pytest.raises(
        ArtefactError, match=r"1 values in y_train that are NaN or infinite, the first at \(7,\)"
    ):
        npz.load("npz", tmp_path / "data.npz", classes=False)


@pytest.mark.parametrize(
    ("task", "shape", "targets", "said"),
    [
        ("classification", (8,), np.arange(40) % 4, "run from 0 to 3, outside the class numbers 0 to 2"),
        (
            "segmentation",
            (4, 6, 6),
            np.full((40, 6, 6), 3),
            "hold the class 3, and the network has the classes 0",
        ),
    ],
)
def test_classes_that_a_network_has_not_are_refused_before_a_layer_is_pruned(
    task: str, shape: tuple[int, ...], targets: Any, said: str, tmp_path: Path
) -> None:
    if task == "classification":
        file = network(tmp_path)
    else:
        made = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1))
        file = tmp_path / "net.onnx"
        save_model(onnx_from_module(made.eval(), example_of_shape(shape), masks={}), file)
    np.savez(tmp_path / "data.npz", input=np.zeros((40, *shape), np.float32), targets=targets)
    layers: list[object] = []
    with pytest.raises(UsageError, match=said):
        sparsify(
            file,
            tmp_path / "run",
            task=task,
            data=f"npz:{tmp_path / 'data.npz'}",
            finished=lambda *layer: layers.append(layer),
        )
    assert not layers and not (tmp_path / "run").exists()


OWN = """
import numpy as np

calls, reads = [], []

class Rows:
    def __len__(self): return 600

    def __getitem__(self, at):
        reads.append(at)
        return np.full(8, at, "float32"), float(at)

def data():
    calls.append(1)
    return {"test": Rows(), "train": Rows()}
"""


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    def made(name: str) -> Any:
        (tmp_path / f"{name}.py").write_text(OWN)
        monkeypatch.syspath_prepend(str(tmp_path))
        return __import__(name)

    return made


def test_own_data_are_opened_once_and_their_targets_read_with_their_inputs(
    counted: Callable[[str], Any], tmp_path: Path
) -> None:
    module = counted("counted_rows")
    file = network(tmp_path, n_outputs=1)
    done = sparsify(file, tmp_path / "run", task="regression", data="counted_rows:data").run
    assert len(module.calls) == 1
    bundle = build(done, tmp_path / "bundle")
    module.calls.clear()
    module.reads.clear()
    found = validate(bundle, n_threads=1)
    assert found.score is not None and found.score.n_samples == 600
    assert len(module.calls) == 1
    # A pass for the file and one for its reference; 256 samples for the digest and the check of the targets.
    assert len(module.reads) <= 2 * 600 + 2 * 256 + 2


def test_targets_that_were_read_with_their_samples_are_not_read_again() -> None:
    reads = []

    class Rows:
        def __len__(self) -> int:
            return 100

        def __getitem__(self, at: int) -> tuple[Any, float]:
            reads.append(at)
            return np.zeros(2), float(at)

    part = own.Part(name="it", samples=Rows())
    targets = own.PartTargets(part)
    for start in range(0, 100, 10):
        for at in range(start, start + 10):
            part.sample(at)
        assert targets[start : start + 10].tolist() == list(range(start, start + 10))
    assert reads == list(range(100))


def test_names_that_several_classes_have_are_told(tmp_path: Path) -> None:
    assert repeated_names(["crane", "cat", "crane"]) == ("crane",)
    (tmp_path / "names.txt").write_text("crane\ncat\ncrane\n")
    words = ["build", network(tmp_path), "--labels", tmp_path / "names.txt", "--out", tmp_path / "bundle"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        done = call(*words)
    assert done.exit_code == 0, done.stderr
    assert "several classes one name: crane" in " ".join(done.stderr.split())
