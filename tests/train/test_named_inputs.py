"""Networks with several named inputs, trained by recipes: from their data to the gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparse_export.building.bundle import build
from sparse_export.errors import ArtefactError, Interrupted, UsageError
from sparse_export.evaluate.bench_train import bench_training_step
from sparse_export.evaluate.gate import gate
from sparse_export.evaluate.validate import validate
from sparse_export.formats.run import open_run
from sparse_export.models.run_network import network_of_run
from sparse_export.oneshot import layer_sensitivities, sparsify
from sparse_export.tasks.named_data import calibration_of
from sparse_export.train.captured import N_LAUNCHED, CapturedStep
from sparse_export.train.inputs import called
from sparse_export.train.loop import train
from sparse_export.train.observer import SilentObserver
from sparse_export.train.recipe import Recipe, recipe_from_table

CODE = """
import numpy as np
import torch
from torch import nn

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.first = nn.Linear(16 + 8, 32)
        self.last = nn.Linear(32, 3)

    def forward(self, ids, features):
        both = torch.cat([self.words(ids).mean(1), features], 1)
        return self.last(torch.relu(self.first(both)))

def pair(): return Pair()

class Rows:
    def __init__(self, first, last):
        generator = np.random.default_rng(0)
        self.ids = generator.integers(0, 20, (last, 5))[first:]
        self.features = generator.standard_normal((last, 8)).astype("float32")[first:]
        self.targets = (self.ids.sum(1) + (self.features[:, 0] > 0)) % 3

    def __len__(self): return len(self.ids)

    def __getitem__(self, at):
        return {"ids": self.ids[at], "features": self.features[at].astype("float64")}, self.targets[at]

data = {"train": Rows(0, 300), "test": Rows(300, 400)}

def row(): return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))

def rows():
    whole = [Rows(0, 300)[at] for at in range(300)]
    return {"train": [(one["features"], one["features"][:1].astype("float32")) for one, _ in whole]}
"""


@pytest.fixture(autouse=True)
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pair_nets.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))


def recipe(data: str = "pair_nets:data", **changes: Any) -> Recipe:
    table = {
        "model": "pair_nets:pair",
        "data": data,
        "epochs": 2,
        "batch_size": 30,
        "optimizer": {"name": "adam", "lr": 0.01},
        "sparsity": {"density": 0.5, "pattern": "2:4", "small_share": 0.0},
    }
    return recipe_from_table(table | changes, source="of the test")


def archive(folder: Path, **changes: np.ndarray[Any, Any]) -> Path:
    import pair_nets  # type: ignore[import-not-found]

    rows = {"train": pair_nets.Rows(0, 300), "test": pair_nets.Rows(300, 400)}
    arrays: dict[str, Any] = {}
    for part, one in rows.items():
        arrays |= {f"ids_{part}": one.ids, f"features_{part}": one.features, f"y_{part}": one.targets}
    np.savez(folder / "pair.npz", **(arrays | changes))
    return folder / "pair.npz"


@pytest.mark.parametrize("kind", ["own", "npz"])
def test_two_named_inputs_go_from_a_recipe_to_the_gate(kind: str, tmp_path: Path) -> None:
    data = "pair_nets:data" if kind == "own" else f"npz:{archive(tmp_path)}"
    run = train(recipe(data), tmp_path / "run", device="cpu")
    ids, features = run.info.signature.inputs
    assert (ids.name, ids.dtype, ids.shape, ids.low, ids.high) == ("ids", "int64", ("batch", 5), 0, 19)
    assert (features.name, features.dtype, features.shape) == ("features", "float32", ("batch", 8))
    assert run.info.test is not None and run.info.test.n_samples == 100
    assert run.info.data is not None and (run.info.data.n_train, run.info.data.n_validation) == (270, 30)
    assert {layer.pattern for layer in run.info.layers if layer.name == "first.weight"} == {"2:4"}

    sparse = build(open_run(run.path), tmp_path / "b-sparse")
    dense = build(train(recipe(data, dense=True), tmp_path / "dense", device="cpu"), tmp_path / "b-dense")
    found = validate(sparse, against=dense.path, n_threads=1)
    assert found.score is not None and found.score.figure == run.info.test.figure
    assert gate(sparse.path, dense.path, max_drop="90%", n_threads=1).exit_code == 0
    batches = calibration_of(data, run.info.signature, None, 7)
    assert batches is not None and [len(one["ids"]) for one in batches] == [7]


def test_a_run_with_named_inputs_resumes_to_the_bit(tmp_path: Path) -> None:
    class StopsAt(SilentObserver):
        def stepped(self, step: int, loss: Tensor) -> None:
            if step == 12:
                raise KeyboardInterrupt

    whole = train(recipe(ema=0.5), tmp_path / "whole", device="cpu")
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        train(recipe(ema=0.5), tmp_path / "cut", device="cpu", observer=StopsAt())
    resumed = train(None, tmp_path / "cut", device="cpu", resume=True)
    states = [network_of_run(open_run(one.path)).state_dict() for one in (whole, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert whole.info.test == resumed.info.test


@pytest.mark.parametrize("changes", [{"accumulate": 3}, {"workers": 1}, {"sparsity": {"products": "csr"}}])
def test_what_a_recipe_can_say_holds_for_named_inputs(changes: dict[str, Any], tmp_path: Path) -> None:
    run = train(recipe(epochs=1, **changes), tmp_path / "run", device="cpu")
    assert run.info.test is not None and run.info.speed is not None


def test_a_captured_step_takes_named_inputs() -> None:
    def work(x: dict[str, Tensor], y: Tensor) -> Tensor:
        return x["a"].sum() + 10 * x["b"].sum() + y.sum()

    def capture(call: Any) -> Any:
        result = call()
        return lambda: result.copy_(call()), result

    step = CapturedStep(work, capture)
    for n in range(N_LAUNCHED + 2):
        x = {"a": torch.full((2,), float(n)), "b": torch.ones(1)}
        assert step(x, torch.zeros(1)).item() == 2 * n + 10
    with pytest.raises(UsageError, match=r"inputs of shape \(3,\)"):
        step({"a": torch.ones(3), "b": torch.ones(1)}, torch.zeros(1))


def test_a_trained_network_of_several_inputs_is_sparsified_as_a_graph(tmp_path: Path) -> None:
    run = train(recipe(epochs=1, dense=True), tmp_path / "run", device="cpu")
    made = sparsify(run.path, tmp_path / "sparse").run  # on the data and for the task of the run
    assert made.info.model.form == "onnx" and made.info.test is not None
    assert made.info.data is not None and made.info.data.name == "pair_nets:data"
    assert layer_sensitivities(run.path).held_back == "samples of pair_nets:data, a part of the test set"


def test_a_factory_of_several_inputs_is_sparsified_as_a_graph_on_data_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    beside = (
        "def example_inputs():\n"
        "    return {'ids': torch.zeros((2, 5), dtype=torch.int64), 'features': torch.zeros(2, 8)}\n"
        "free_sizes = {'ids': ('batch', None), 'features': ('batch', None)}\n"
    )
    (tmp_path / "told_nets.py").write_text(CODE + beside)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    made = sparsify(
        *("told_nets:pair", tmp_path / "sparse"),
        weights=None,
        data="told_nets:data",
        task="classification",
        method="reconstruction",
        device="cpu",
    )
    assert made.run.info.model.form == "onnx" and made.run.info.test is not None
    assert made.report.n_calibration == 300
    assert [layer.pattern for layer in made.report.layers if layer.name == "first.weight"] == ["2:4"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ids_test": None}, "has no ids_test"),
        (
            {"features_train": np.full((300, 8), "word"), "features_test": np.full((100, 8), "word")},
            "is an array of str",
        ),
        ({"features_train": np.zeros((7, 8), np.float32)}, "7 samples in features_train"),
        (
            {"features_test": np.full((100, 8), np.nan, np.float32)},
            "800 values in features_test that are NaN or infinite, the first at",
        ),
    ],
)
def test_an_archive_that_is_not_whole_says_what_it_lacks(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    file = archive(tmp_path)
    arrays = dict(np.load(file)) | changes
    np.savez(file, **{key: one for key, one in arrays.items() if one is not None})
    with pytest.raises((ArtefactError, UsageError), match=said):
        train(recipe(f"npz:{file}", validation_fraction=0), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_network_without_such_an_input_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    changed = (tmp_path / "pair_nets.py").read_text().replace('"ids":', '"words":')
    (tmp_path / "other_pair.py").write_text(changed)
    with pytest.raises(
        UsageError,
        match=r"words of shape \(5,\) and type int64, features .*forward\(ids, features\) was expected",
    ):
        train(recipe("other_pair:data"), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


class _Several(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return x, {"more": 2 * x}


def test_outputs_of_a_network_in_training_have_the_names_of_its_graph() -> None:
    from sparse_export.graph.named_network import named_tensors

    assert list(named_tensors(_Several()(torch.ones(1)))) == ["output_0", "output_1.more"]


def test_a_step_of_a_network_with_named_inputs_is_timed_on_its_own_data() -> None:
    quick: dict[str, Any] = {"rounds": 20, "block_s": 0.001, "warmup_limit_s": 0.05, "n_threads": 1}
    found = bench_training_step(recipe(), **quick, device="cpu")
    assert (found.input_shape, found.inputs) == ((), {"ids": (5,), "features": (8,)})
    assert found.density < 0.6
    assert "ids (5,), features (8,)" in str(found)
    single = recipe(model="pair_nets:row", data="pair_nets:rows", task="regression")
    found = bench_training_step(single, **quick, device="cpu")  # with the loss of its task
    assert (found.input_shape, found.inputs) == ((8,), {})
    with pytest.raises(UsageError, match="cannot take the inputs ids, features"):
        bench_training_step(recipe(model="pair_nets:row"), **quick, device="cpu")


def test_an_integer_outside_a_table_is_named_with_its_input() -> None:
    table = nn.Embedding(4, 2)
    with pytest.raises(UsageError, match=r"index out of range.*holds input from 0 to 4.*num_embeddings"):
        called(table, {"input": torch.tensor([0, 4])})
    with pytest.raises(IndexError):  # which says nothing of integers that it was given
        called(lambda x: x[9], torch.zeros(3))
