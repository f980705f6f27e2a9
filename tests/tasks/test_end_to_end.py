"""Each task from its data to the gate: trained, built, validated, compared, let pass and stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits, make_multilabel_classification
from torch import nn

from sparse_export.building.bundle import build
from sparse_export.errors import ArtefactError, GateFailed, NotTrustedError, UsageError
from sparse_export.evaluate.compare import compare
from sparse_export.evaluate.gate import gate
from sparse_export.evaluate.test_set import test_set_of as samples_of
from sparse_export.evaluate.validate import validate
from sparse_export.evaluate.validation import check_gates
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import Bundle, open_bundle
from sparse_export.formats.document import DIGEST
from sparse_export.graph.example import example_of_shape
from sparse_export.graph.export import onnx_from_module
from sparse_export.graph.model import save_model
from sparse_export.oneshot import sparsify
from sparse_export.train import SparseTraining
from sparse_export.train.loop import train
from sparse_export.train.recipe import Recipe, recipe_from_table
from tests.sealing import write_sealed

NETS = """
from torch import nn

def _net(n_in, n_out):
    return nn.Sequential(nn.Flatten(), nn.Linear(n_in, 64), nn.ReLU(), nn.Linear(64, n_out))

def even(): return _net(64, 1)
def digit(): return _net(64, 1)
def labels(): return _net(20, 5)
def where():
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 2, 1))
"""


def _digits() -> tuple[np.ndarray, np.ndarray]:
    found = load_digits()
    return (found.images[:, np.newaxis] / 16).astype(np.float32), found.target


def _data(task: str) -> tuple[np.ndarray, np.ndarray]:
    if task == "multilabel":
        x, y = make_multilabel_classification(900, 20, n_classes=5, random_state=0)
        return x.astype(np.float32), y
    x, y = _digits()
    if task == "binary":
        return x, (y % 2 == 0).astype(np.int64)
    if task == "segmentation":  # where there is ink, at twice the size, under noise
        large = x.repeat(2, axis=2).repeat(2, axis=3)[:300]
        noise = np.random.default_rng(0).standard_normal(large.shape).astype(np.float32)
        return large + 0.2 * noise, (large[:, 0] > 0.4).astype(np.int64)
    return x, y.astype(np.float32)


def _recipe(task: str, file: Path, **changes: Any) -> Recipe:
    model = {"binary": "even", "regression": "digit", "multilabel": "labels", "segmentation": "where"}[task]
    table = {
        "model": f"task_nets:{model}",
        "data": f"npz:{file}",
        "task": task,
        "epochs": 6,
        "batch_size": 50,
        "optimizer": {"name": "adam", "lr": 0.003},
        "sparsity": {"density": 0.5, "pattern": "2:4"},
    }
    return recipe_from_table(table | changes, source="of the test")


@pytest.fixture(autouse=True)
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "task_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("task", "score_name", "least"),
    [
        ("binary", "accuracy", 85.0),
        ("regression", "RMSE", 2.5),
        ("multilabel", "mean average precision", 60.0),
        ("segmentation", "mean IoU", 80.0),
    ],
)
def test_a_task_goes_the_whole_way(task: str, score_name: str, least: float, tmp_path: Path) -> None:
    x, y = _data(task)
    n = len(x) * 4 // 5
    np.savez(tmp_path / "data.npz", x_train=x[:n], y_train=y[:n], x_test=x[n:], y_test=y[n:])
    recipe = _recipe(task, tmp_path / "data.npz")
    sparse = build(train(recipe, tmp_path / "sparse", device="cpu"), tmp_path / "b-sparse")
    dense = build(
        train(recipe.model_copy(update={"dense": True}), tmp_path / "dense", device="cpu"),
        tmp_path / "b-dense",
    )
    score = sparse.info.score
    assert score is not None
    assert (score.name, score.n_samples, sparse.info.task.name) == (score_name, len(x) - n, task)
    assert (
        score.worse_by(
            type(score)(**vars(score) | {"n_correct": None, "value": least / (100 if score.is_share else 1)})
        )
        < 0
    )

    found = validate(sparse, against=dense.path, n_threads=1)
    assert found.score is not None and found.score.figure == pytest.approx(score.figure, rel=1e-4)
    assert found.against is not None
    assert found.against.difference.low <= found.against.difference.amount <= found.against.difference.high
    assert score_name in str(found)
    compared = compare(
        dense, sparse, samples=samples_of(sparse), rounds=20, block_s=1e-3, batches=(1,), n_threads=1
    )
    assert compared.difference == found.against.difference
    assert f"{score_name[0].upper()}{score_name[1:]}: measured with these files" in " ".join(
        str(compared).split()
    )

    lost = found.against.drop
    wide = f"{abs(lost) / abs(found.against.score.figure) * 100 + 1:.3f}%"
    passed = gate(sparse.path, dense.path, max_drop=wide, n_threads=1)
    assert (passed.passed, passed.exit_code) == (True, 0)
    worse = _spoiled(tmp_path, recipe)
    stopped = gate(worse.path, dense.path, max_drop="1%", n_threads=1)
    assert (stopped.passed, stopped.exit_code) == (False, 3)
    assert "of it" in stopped.verdict


def _spoiled(tmp_path: Path, recipe: Recipe) -> Bundle:
    """A network of the same task that was hardly trained."""
    table = recipe.model_dump(mode="json", exclude_none=True) | {"epochs": 1, "optimizer": {"lr": 1e-6}}
    run = train(recipe_from_table(table, source="of the test"), tmp_path / "worse", device="cpu")
    return build(run, tmp_path / "b-worse")


def test_outputs_that_are_no_logits_are_not_called_so_and_take_no_softmax(tmp_path: Path) -> None:
    x, y = _data("regression")
    np.savez(tmp_path / "data.npz", x_train=x[:200], y_train=y[:200], x_test=x[200:300], y_test=y[200:300])
    run = train(_recipe("regression", tmp_path / "data.npz", epochs=1), tmp_path / "run", device="cpu")
    assert run.info.signature.output_names == ("output",)
    with pytest.raises(
        UsageError, match=r"softmax was given for a run of the task regression, whose outputs"
    ):
        build(run, tmp_path / "none", postprocess=("softmax",))
    with pytest.raises(UsageError, match=r"--labels .* of the task regression, which has no classes"):
        build(run, tmp_path / "none", labels=tmp_path / "names.txt")
    assert build(run, tmp_path / "bundle").info.signature.output_names == ("output",)
    file = tmp_path / "run" / "run.json"
    document = json.loads(file.read_text().replace('"output"', '"logits"'))  # as runs were written before
    write_sealed(file, {key: one for key, one in document.items() if key != DIGEST})
    trust = sha256_file(file)
    earlier = build(tmp_path / "run", tmp_path / "earlier", trust=trust)
    assert earlier.info.signature.output_names == ("logits",)
    found = validate(earlier, n_threads=1, trust=trust)
    assert found.parity_ok and found.parity is not None


@pytest.mark.parametrize(
    ("task", "steps", "said"),
    [
        (
            "binary",
            ("softmax",),
            r"softmax was given .* task binary, which it does not fit\. Use sigmoid, or",
        ),
        (
            "multilabel",
            ("sigmoid", "argmax"),
            r"argmax .* task multilabel, .* Use sigmoid or topk:K, or leave",
        ),
    ],
)
def test_a_postprocess_that_does_not_fit_the_task_is_refused(
    task: str, steps: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    x, y = _data(task)
    np.savez(tmp_path / "data.npz", x_train=x[:200], y_train=y[:200], x_test=x[200:300], y_test=y[200:300])
    run = train(_recipe(task, tmp_path / "data.npz", epochs=1), tmp_path / "run", device="cpu")
    assert run.info.signature.output_names == ("logits",)
    with pytest.raises(UsageError, match=said):
        build(run, tmp_path / "none", postprocess=steps)


def test_targets_of_another_task_are_refused_before_training(tmp_path: Path) -> None:
    x, y = _data("regression")
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y + 0.5, x_test=x, y_test=y + 0.5)
    with pytest.raises(
        UsageError, match=r"targets of npz:.* no zeros and ones, one a sample\. They fit the task regr"
    ):
        train(_recipe("binary", tmp_path / "data.npz"), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("per_sample", "loss", "said"),
    [
        ("[1.0]", "outputs.mean()", r"gives shape \(1,\) for 2 samples"),
        ("[1.0, 1.0]", "outputs.nothing", "has no attribute 'nothing'"),
        ("[1.0, 1.0]", "outputs", "The loss of the task .* gives shape"),
    ],
)
def test_a_task_that_cannot_score_or_be_trained_is_told_before_the_first_step(
    per_sample: str, loss: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"own_tasks_{abs(hash((per_sample, loss))) % 10**8}"
    (tmp_path / f"{module}.py").write_text(
        "from sparse_export.tasks import Task\n"
        "class Broken(Task):\n"
        f"    def loss(self, outputs, targets): return {loss}\n"
        f"    def per_sample(self, outputs, targets): return {per_sample}\n"
    )
    x, y = _data("regression")
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    table = _recipe("regression", tmp_path / "data.npz").model_dump(mode="json", exclude_none=True)
    recipe = recipe_from_table(table | {"task": f"{module}:Broken"}, source="of the test")
    with pytest.raises(UsageError, match=said):
        train(recipe, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_masks_of_another_size_than_the_outputs_are_told_before_the_first_step(tmp_path: Path) -> None:
    x, y = _data("segmentation")
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y[:, ::2], x_test=x, y_test=y[:, ::2])
    with pytest.raises(
        UsageError, match="The loss of the task segmentation cannot be computed on two samples"
    ):
        train(_recipe("segmentation", tmp_path / "data.npz"), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_sample_of_ones_own_that_fails_or_has_another_shape_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, body in (
        ("raises", "raise ValueError('disk gone')"),
        ("odd", "return np.zeros((1, 8, 8 - (at == 7)), 'float32'), 0.5"),
    ):
        (tmp_path / f"own_data_{name}.py").write_text(
            "import numpy as np\n"
            "class Some:\n"
            "    targets = [0.5] * 100\n"
            "    def __len__(self): return 100\n"
            "    def __getitem__(self, at):\n"
            f"        if at == 7: {body}\n"
            "        return np.zeros((1, 8, 8), 'float32'), 0.5\n"
            "data = {'train': Some(), 'test': Some()}\n"
        )
        recipe = _recipe("regression", tmp_path, data=f"own_data_{name}:data", validation_fraction=0.0)
        said = "Sample 7 of the part (train|test) of own_data_"
        with pytest.raises(
            UsageError, match=said + f"{name}:data (cannot be read: ValueError|has inputs of)"
        ):
            train(recipe, tmp_path / f"run-{name}", device="cpu")


def _diabetes(folder: Path) -> tuple[Path, Path, Path]:
    """A regression network as an ONNX file, calibration inputs, and test samples with targets."""
    x, y = load_diabetes(return_X_y=True)
    x, y = (x * 20).astype(np.float32), ((y - y.mean()) / y.std()).astype(np.float32)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    train_x, train_y = torch.from_numpy(x[:300]), torch.from_numpy(y[:300])
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(train_x)[:, 0], train_y).backward()
        optimizer.step()
    model = onnx_from_module(net.eval(), example_of_shape((10,)), masks={})
    save_model(model, folder / "net.onnx")
    name = model.graph.input[0].name
    np.savez(folder / "inputs.npz", **{name: x[:300]})
    np.savez(folder / "test.npz", targets=y[300:], **{name: x[300:]})
    return folder / "net.onnx", folder / "inputs.npz", folder / "test.npz"


def test_an_onnx_file_is_scored_by_its_own_task_from_end_to_end(tmp_path: Path) -> None:
    file, inputs, test = _diabetes(tmp_path)
    done = sparsify(
        file,
        tmp_path / "run",
        method="reconstruction",
        inputs=inputs,
        task="regression",
        data=f"npz:{test}",
        calibration_samples=200,
    )
    first, last = (stage.test for stage in done.report.stages)
    assert first is not None and last is not None
    assert (first.name, last.n_samples) == ("RMSE", 142)
    assert "test RMSE" in str(done.report)
    sparse = build(done.run, tmp_path / "sparse")
    dense = build(tmp_path / "run-dense", tmp_path / "dense")
    assert sparse.info.reference_score == first == dense.info.score
    found = validate(sparse, task="regression", data=f"npz:{test}", max_drop="100%", n_threads=1)
    assert found.score is not None and found.recorded == first
    assert found.drop == pytest.approx(found.score.figure - first.figure)
    assert "RMSE, dense network, recorded" in " ".join(str(found).split())
    assert gate(sparse.path, dense.path, max_drop="100%", n_threads=1).passed
    np.savez(tmp_path / "test.npz", targets=np.zeros(3), input=np.zeros((3, 10), np.float32))
    with pytest.raises(ArtefactError, match="differ from those that the run was tested on"):
        validate(sparse, n_threads=1)


def test_ranks_of_similarities_go_from_sparsify_to_the_gate(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    save_model(onnx_from_module(net, example_of_shape((16,)), masks={}), tmp_path / "net.onnx")
    draw = np.random.default_rng(0)
    scores, first = draw.random(60), draw.standard_normal((60, 16))
    second = scores[:, np.newaxis] * first + (1 - scores[:, np.newaxis]) * draw.standard_normal((60, 16))
    x = np.concatenate([first, second]).astype(np.float32)
    targets = np.stack([np.tile(np.arange(60), 2), np.tile(scores, 2)], axis=1)
    np.savez(tmp_path / "test.npz", input=x, targets=targets)
    done = sparsify(
        tmp_path / "net.onnx",
        tmp_path / "run",
        task="embedding:spearman",
        data=f"npz:{tmp_path / 'test.npz'}",
    )
    dense, sparse = done.report.stages[0].test, done.report.stages[-1].test
    assert dense is not None and sparse is not None
    assert (dense.name, dense.n_samples, dense.figure > 0.5) == ("Spearman correlation", 60, True)
    bundle = build(done.run, tmp_path / "sparse")
    reference = build(tmp_path / "run-dense", tmp_path / "dense")
    found = gate(bundle.path, reference.path, max_drop=1.0, n_threads=1)
    assert found.passed and found.validation is not None and found.validation.against is not None
    assert found.validation.score is not None
    assert found.validation.score.figure == pytest.approx(sparse.figure, abs=1e-4)
    assert found.validation.against.difference.n_samples == 60
    assert gate(bundle.path, reference.path, max_drop=0.0, n_threads=1).exit_code == 3


def test_data_given_at_validation_are_scored_in_place_of_those_on_record(tmp_path: Path) -> None:
    file, _, test = _diabetes(tmp_path)
    done = sparsify(file, tmp_path / "run")
    sparse, dense = build(done.run, tmp_path / "sparse"), build(tmp_path / "run-dense", tmp_path / "dense")
    with pytest.raises(UsageError, match="names no task, so nothing tells how its outputs are scored"):
        validate(sparse, data=f"npz:{test}", n_threads=1)
    with pytest.raises(
        UsageError, match="names no data set with test samples to score the task regression on"
    ):
        validate(sparse, task="regression", n_threads=1)
    found = validate(
        sparse, task="regression:r2", data=f"npz:{test}", against=dense.path, max_drop=0.0, n_threads=1
    )
    assert found.score is not None and found.score.name == "R²"
    assert (found.recorded, found.drop) == (None, None)
    with pytest.raises(
        GateFailed, match=r"R² is .* below the dense bundle's, more than 0 \(sparse minus dense"
    ):
        check_gates(found)


OWN = """
import numpy as np
from sparse_export.tasks import Task

class Near(Task):
    score_name = "share within one"
    is_share = True

    def loss(self, outputs, targets):
        return (outputs[:, 0] - targets).abs().mean()

    def per_sample(self, outputs, targets):
        return np.abs(outputs[:, 0] - targets) < 1

task = Near()

class _Digits:
    def __init__(self, rows):
        from sklearn.datasets import load_digits
        found = load_digits()
        self.x, self.y = found.images[rows], found.target[rows]
    def __len__(self): return len(self.y)
    def __getitem__(self, at): return (self.x[at][None] / 16).astype("float32"), float(self.y[at])

def data():
    return {"train": _Digits(slice(0, 1500)), "test": _Digits(slice(1500, None))}
"""


def test_a_task_and_data_of_ones_own_go_the_whole_way_and_are_trusted_like_factories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_tasks_b.py").write_text(OWN)
    recipe = recipe_from_table(
        {
            "model": "task_nets:digit",
            "data": "own_tasks_b:data",
            "task": "own_tasks_b:task",
            "epochs": 4,
            "batch_size": 50,
            "optimizer": {"name": "adam", "lr": 0.003},
            "sparsity": {"density": 0.5, "pattern": "2:4"},
        },
        source="of the test",
    )
    run = train(recipe, tmp_path / "run", device="cpu")
    assert run.info.test is not None
    assert (run.info.test.name, run.info.test.n_samples) == ("share within one", 297)
    assert run.info.validation is not None and run.info.validation.n_samples == 150
    bundle = build(run, tmp_path / "bundle", precision="int8")  # calibrated on the part that is trained on
    found = validate(bundle, n_threads=1)
    assert found.score is not None and abs(found.score.figure - run.info.test.figure) < 5
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "of another user"))
    with pytest.raises(NotTrustedError, match="The task own_tasks_b:task in "):
        validate(open_bundle(bundle.path), n_threads=1)


def test_a_bundle_whose_data_have_no_test_part_is_held_against_the_dense_outputs(tmp_path: Path) -> None:
    (tmp_path / "own_tasks_c.py").write_text(OWN.replace(', "test": _Digits(slice(1500, None))', ""))
    recipe = _recipe("regression", tmp_path, data="own_tasks_c:data", epochs=1)
    sparse = build(train(recipe, tmp_path / "run", device="cpu"), tmp_path / "sparse")
    assert sparse.info.data is not None and sparse.info.data.n_test == 0
    found = validate(sparse, against=sparse.path, n_threads=1)
    assert found.score is None and found.agreement is not None
    assert found.agreement.percent == pytest.approx(100.0)
    with pytest.raises(
        UsageError, match="names no data set with test samples, so nothing tells what is lost"
    ):
        validate(sparse, max_drop=1.0, n_threads=1)


def test_a_loop_of_ones_own_attaches_its_task_and_its_data(tmp_path: Path) -> None:
    x, y = _data("regression")
    np.savez(tmp_path / "test.npz", targets=y[1500:], input=x[1500:])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    trainer = SparseTraining(net, optimizer, density=0.5, pattern="2:4", total_steps=60)
    inputs, targets = torch.from_numpy(x[:1500]), torch.from_numpy(y[:1500])
    for at in range(60):
        rows = slice(at * 25, at * 25 + 25)
        optimizer.zero_grad()
        nn.functional.mse_loss(net(inputs[rows])[:, 0], targets[rows]).backward()
        trainer.step()
    run = trainer.run(
        tmp_path / "run", input_shape=(1, 8, 8), task="regression", data=f"npz:{tmp_path / 'test.npz'}"
    )
    assert run.info.test is not None and run.info.test.name == "RMSE"
    with torch.no_grad():
        wanted = torch.sqrt(
            nn.functional.mse_loss(net(torch.from_numpy(x[1500:]))[:, 0], torch.from_numpy(y[1500:]))
        )
    assert run.info.test.value == pytest.approx(float(wanted), rel=1e-5)
    bundle = build(run, tmp_path / "bundle")
    found = validate(bundle, max_drop=0.01, n_threads=1)
    check_gates(found)
    assert found.drop == pytest.approx(0.0, abs=1e-4)
