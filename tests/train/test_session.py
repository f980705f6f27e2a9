"""What a recipe can ask of a training run beyond the plain one: precision, memory order, compilation,
streaming.
"""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import sparse_export as se
from sparse_export.errors import DataNotFound, Interrupted, MissingCapability, RecipeError, UsageError
from sparse_export.train import session as session_module
from sparse_export.train.layers import maskable_parameters
from sparse_export.train.loop import train
from sparse_export.train.metrics import read_metrics
from sparse_export.train.optimizer import make_optimizer
from sparse_export.train.recipe import OptimizerRecipe, Recipe, load_recipe
from sparse_export.train.sparse_training import SparseTraining
from sparse_export.train.stepper import Stepper
from tests.train.test_loop import InterruptAtStep, outcome, small


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> se.Run:
    return train(small(), tmp_path_factory.mktemp("plain") / "run", device="cpu")


def percent(run: se.Run) -> float:
    assert run.info.test is not None
    return run.info.test.figure


def test_bf16_trains_float32_weights_about_as_well(plain: se.Run, tmp_path: Path) -> None:
    run = train(small(precision="bf16"), tmp_path / "run", device="cpu")
    weights = load_file(run.path / "model.safetensors")
    assert {value.dtype for name, value in weights.items() if name.endswith("weight")} == {torch.float32}
    assert outcome(run.path)[0] != outcome(plain.path)[0]
    assert abs(percent(run) - percent(plain)) < 6.0


def test_channels_last_keeps_the_order_through_a_resume_and_changes_only_rounding(
    plain: se.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    step = Stepper.step_weights

    def watched(self: Stepper, done: int) -> None:
        step(self, done)
        weights = {name: value for name, value in maskable_parameters(self.model).items() if value.ndim == 4}
        assert self.sparse is not None
        for name, weight in weights.items():
            momentum = self.optimizer.state[weight]["momentum_buffer"]
            assert self.sparse.masks[name].stride() == weight.stride()
            if weight.shape[1] > 1:
                seen.append(weight.is_contiguous(memory_format=torch.channels_last))
                seen.append(momentum.is_contiguous(memory_format=torch.channels_last))

    monkeypatch.setattr(Stepper, "step_weights", watched)
    run = train(small(channels_last=True), tmp_path / "run", device="cpu")
    assert seen
    assert all(seen)
    assert abs(percent(run) - percent(plain)) < 3.0
    bundle = se.build(run, tmp_path / "bundle")
    assert se.validate(bundle, max_drop=0.0).parity_ok


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a compiler"
)
def test_a_compiled_network_trains_the_same(plain: se.Run, tmp_path: Path) -> None:
    run = train(small(compile=True), tmp_path / "run", device="cpu")
    assert abs(percent(run) - percent(plain)) < 3.0
    assert (
        load_file(run.path / "model.safetensors").keys() == load_file(plain.path / "model.safetensors").keys()
    )


def test_without_a_compiler_compile_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MissingCapability, match="no compiler is there: looked for no-such-compiler"):
        train(small(compile=True), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_batch_norm_over_processes_is_refused_on_the_cpu(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sync_batch_norm is set, and the device is cpu"):
        train(small(sync_batch_norm=True), tmp_path / "run", device="cpu")


def test_biases_and_norms_decay_only_where_the_recipe_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    (every,) = make_optimizer(OptimizerRecipe(weight_decay=0.1), model).param_groups
    assert len(every["params"]) == 6
    decaying, still = make_optimizer(
        OptimizerRecipe(weight_decay=0.1, decay_vectors=False), model
    ).param_groups
    assert (decaying["weight_decay"], still["weight_decay"]) == (0.1, 0.0)
    assert {value.ndim for value in decaying["params"]} == {2, 4}
    assert {value.ndim for value in still["params"]} == {1}


def test_what_a_network_draws_hangs_on_the_step_and_not_on_what_was_drawn_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a run resumes to the same bits with no random state saved."""
    drawn: dict[str, list[float]] = {"a": [], "b": []}
    step = Stepper.step_weights

    def noting(key: str) -> Any:
        def noted(self: Stepper, done: int) -> None:
            drawn[key].append(float(torch.rand(())))
            if key == "b":
                torch.rand(done)  # somebody draws more than before
            step(self, done)

        return noted

    for key in drawn:
        monkeypatch.setattr(Stepper, "step_weights", noting(key))
        train(small(epochs=1), tmp_path / key, device="cpu")
    assert drawn["a"] == drawn["b"]
    assert len(set(drawn["a"])) == len(drawn["a"])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that brightness tells apart, 24 + 6 pictures each."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for part, n in (("train", 24), ("val", 6)):
        for kind, low in (("dark", 0), ("light", 150)):
            (root / part / kind).mkdir(parents=True)
            for index in range(n):
                noise = rng.integers(low, low + 100, (24, 30, 3), dtype=np.uint8)
                Image.fromarray(noise).save(root / part / kind / f"{index}.png")
    return root


def streamed(pictures: Path, **changes: Any) -> Recipe:
    return load_recipe(
        "digits",
        changes={
            "model": "wrn-28-2",
            "data": f"imagefolder:{pictures}",
            "image_size": [16, 16],
            "epochs": 2,
            "batch_size": 8,
            "workers": 1,
            "augment": "random-resized-crop",
            "optimizer": {"lr": 0.02},
            **changes,
        },
    )


@pytest.mark.slow
def test_streamed_pictures_train_build_and_validate_and_resume_with_other_workers(
    pictures: Path, tmp_path: Path
) -> None:
    run = train(streamed(pictures), tmp_path / "run", device="cpu")
    assert run.info.data is not None
    assert (run.info.data.crop_ratio, run.info.signature.input_shape) == (0.875, (3, 16, 16))
    assert run.info.n_steps == 2 * (43 // 8)
    assert run.info.task.labels == ("dark", "light")
    bundle = se.build(run, tmp_path / "bundle")
    validation = se.validate(bundle, max_drop=0.0)
    assert validation.score == run.info.test
    again = train(streamed(pictures), tmp_path / "again", device="cpu", workers=2)
    assert outcome(again.path)[0] == outcome(run.path)[0]


def test_workers_need_pictures_and_random_crops_need_workers(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="workers is 2, but digits is read into memory"):
        train(small(), tmp_path / "a", device="cpu", workers=2)
    with pytest.raises(UsageError, match="cuts pictures while they are decoded"):
        train(streamed(pictures, workers=0), tmp_path / "b", device="cpu")
    with pytest.raises(DataNotFound, match="not a folder"):
        train(streamed(tmp_path / "absent"), tmp_path / "c", device="cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [-1, 1000])
def test_a_number_of_workers_that_no_recipe_could_have_is_refused(
    workers: int, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=f"workers is {workers}"):
        train(streamed(pictures), tmp_path / "run", device="cpu", workers=workers)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        pytest.param("resnet50", marks=pytest.mark.full),
        pytest.param("vit-b-16", marks=pytest.mark.full),
        "timm:resnet10t",
        "own_nets.factory:small",
    ],
)
def test_networks_of_every_origin_train_build_and_validate_on_real_pictures(
    model: str, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few steps on a few pictures: the path works; what comes out is no accuracy to speak of."""
    if model.startswith("timm:"):
        pytest.importorskip("timm")
    home = tmp_path / "project"  # a user's project with a package `models` of its own
    (home / "models").mkdir(parents=True)
    (home / "models" / "__init__.py").write_text("raise ImportError('not this one')\n")
    (home / "own_nets").mkdir()
    (home / "own_nets" / "__init__.py").touch()
    (home / "own_nets" / "factory.py").write_text(
        "from torch import nn\n\n\ndef small(n_classes=10):\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), "
        "nn.AdaptiveAvgPool2d(4),\n"
        "                         nn.Flatten(), nn.Linear(128, n_classes))\n"
    )
    monkeypatch.chdir(home)
    source = shared_data / "imagenette-mini"
    for part, n in (("train", 3), ("val", 1)):
        for kind in sorted((source / part).iterdir())[:4]:
            target = home / "imagenet" / part / kind.name
            target.mkdir(parents=True)
            for file in sorted(kind.iterdir())[:n]:
                (target / file.name).symlink_to(file.resolve())
    recipe = load_recipe(
        "imagenet-resnet50-10",
        changes={
            "model": model,
            "epochs": 1,
            "batch_size": 5,
            "workers": 1,
            "precision": "fp32",
            "validation_fraction": 0.1,
            **({"image_size": [32, 32]} if model.startswith("own_nets") else {}),
        },
    )
    run = train(recipe, tmp_path / "run", data_dir=home, device="cpu")
    assert run.info.n_steps == 2
    assert run.info.n_active == round(0.15626087 * run.info.n_masked)
    bundle = se.build(run, tmp_path / "bundle")
    validation = se.validate(bundle, data_dir=home, max_drop=0.0)
    assert validation.parity_ok
    assert validation.score == run.info.test


UNUSUAL = """
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 10)
    def forward(self, x):
        return self.b(input=self.norm(input=self.a(input=x.flatten(1))).relu())

def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(32), nn.ReLU(), nn.LazyLinear(10))

def weighted():
    return nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(64, 32)), nn.ReLU(), nn.Linear(32, 10))

def spectral():
    return nn.Sequential(nn.Flatten(), spectral_norm(nn.Linear(64, 32)), nn.ReLU(), nn.Linear(32, 10))

def old():
    return nn.Sequential(nn.Flatten(), nn.utils.spectral_norm(nn.Linear(64, 32)), nn.ReLU(), nn.Linear(32, 10))
"""


@pytest.fixture
def unusual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "unusual_nets.py").write_text(UNUSUAL)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("unusual_nets", None)


@pytest.mark.usefixtures("unusual")
@pytest.mark.parametrize("factory", ["Keyword", "weighted", "spectral", "old"])
def test_networks_with_computed_weights_or_calls_by_keyword_are_trained_to_the_end(
    factory: str, tmp_path: Path
) -> None:
    most_is_computed = factory != "Keyword"
    with pytest.warns(UserWarning, match="2,048 stay dense") if most_is_computed else nullcontext():
        run = train(small(model=f"unusual_nets:{factory}", epochs=2), tmp_path / "run", device="cpu")
    assert run.info.speed is not None
    assert run.info.speed.n_moments == 2
    assert run.info.speed.left_out == {}
    assert run.info.speed.all_layers_estimate_macs is not None
    assert percent(run) > 50
    if factory == "Keyword":
        assert se.validate(se.build(run.path, tmp_path / "bundle")).parity_ok


@pytest.mark.usefixtures("unusual")
def test_lazy_layers_get_through_from_training_to_validation(tmp_path: Path) -> None:
    run = train(small(model="unusual_nets:lazy", epochs=1), tmp_path / "run", device="cpu")
    bundle = se.build(run.path, tmp_path / "bundle")
    assert [layer.shape for layer in bundle.info.layers] == [(32, 64), (10, 32)]
    assert se.validate(bundle, max_drop=0.0).parity_ok


def test_a_damaged_record_of_epochs_does_not_cost_the_training(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(small(epochs=3), out, device="cpu", observer=InterruptAtStep(45, signal.SIGINT))
    damaged = (out / "metrics.jsonl").read_bytes()
    assert damaged.count(b"\n") == 2
    (out / "metrics.jsonl").write_bytes(b"\xff{" + damaged[2:])
    run = train(None, out, device="cpu", resume=True)
    assert (run.info.status, len(read_metrics(out))) == ("complete", 2)
    assert run.info.speed is not None
    assert run.info.speed.n_moments == 2


def test_the_weights_are_written_before_anything_is_estimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise RuntimeError("an estimate failed")

    monkeypatch.setattr(session_module, "speed_of", breaks)
    with pytest.raises(RuntimeError, match="an estimate failed"):
        train(small(epochs=1), tmp_path / "run", device="cpu")
    run = se.open_run(tmp_path / "run")
    assert run.info.speed is None
    assert run.info.test is not None


@pytest.mark.parametrize("update_every", [0, 5])
def test_an_update_once_an_epoch_is_timed_apart_from_the_steps(
    update_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = SparseTraining.update

    def slow(self: SparseTraining) -> None:
        time.sleep(0.1)
        update(self)

    monkeypatch.setattr(SparseTraining, "update", slow)
    recipe = small(epochs=2, batch_size=128, sparsity={"update_every": update_every})
    run = train(recipe, tmp_path / "run", device="cpu")
    lines = read_metrics(run.path)
    n_steps = lines[0]["step"]
    n_within = n_steps // update_every if update_every else 0
    assert lines[0]["step_ms"] * n_steps > 100 * n_within
    assert lines[1]["update_ms"] is None
    assert run.info.speed is not None
    if update_every:
        assert n_within
        assert lines[0]["update_ms"] is None
    else:
        assert lines[0]["update_ms"] >= 100
        charged = lines[0]["step_ms"] + lines[0]["update_ms"] / n_steps
        assert run.info.speed.step_ms == pytest.approx((charged + lines[1]["step_ms"]) / 2)
