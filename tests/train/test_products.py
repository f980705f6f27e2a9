"""A training run whose recipe asks for CSR products."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import sparse_export as se
from sparse_export.errors import Interrupted, MissingCapability, RecipeError, UsageError
from sparse_export.formats.run import ProductInfo
from sparse_export.train import products as products_module
from sparse_export.train import step24
from sparse_export.train.csr_choice import choose_products
from sparse_export.train.device_limits import require_possible
from sparse_export.train.distributed import ALONE
from sparse_export.train.layers import maskable_parameters
from sparse_export.train.loop import train
from sparse_export.train.recipe import Recipe, load_recipe
from sparse_export.train.step_csr import StepCsr
from sparse_export.train.stepper import Stepper
from tests.train.test_loop import InterruptAtStep, outcome


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 pictures of 28 x 28, each bright where its class has a spot."""
    rng = np.random.default_rng(0)
    y = np.arange(200) % 10
    x = rng.integers(0, 60, (200, 28, 28, 1), dtype=np.uint8)
    for place, label in enumerate(y):
        x[place, 2 * label : 2 * label + 4, 5:20] += 150
    path = tmp_path_factory.mktemp("data") / "d.npz"
    np.savez(path, x_train=x, y_train=y, x_test=x[:50], y_test=y[:50])
    return path


def _recipe(pictures: Path, **sparsity: Any) -> Recipe:
    changes = {
        "data": f"npz:{pictures}",
        "epochs": 3,
        "batch_size": 20,
        "sparsity": {"density": 0.05, "products": "csr", "window": 3} | sparsity,
    }
    return load_recipe("mnist-lenet300-100", changes=changes)


def _forced(by: dict[str, str]) -> Callable[..., tuple[ProductInfo, ...]]:
    """Choices that hang on no clock."""

    def choose(*args: Any) -> tuple[ProductInfo, ...]:
        facts = choose_products(*args)
        return tuple(replace(fact, by="csr" if by.get(fact.name) == "csr" else "dense") for fact in facts)

    return choose


@pytest.fixture
def fc1_by_csr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products_module, "choose_products", _forced({"fc1.weight": "csr"}))


@pytest.fixture
def narrow_steps(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each step of a run, whether it trained active weights alone."""
    seen: list[bool] = []
    real = Stepper.step_weights

    def watched(self: Stepper, step: int) -> None:
        assert isinstance(self.products, StepCsr)
        seen.append(self.products.is_narrow)
        real(self, step)

    monkeypatch.setattr(Stepper, "step_weights", watched)
    return seen


def test_layers_that_are_called_by_keyword_are_timed_and_others_are_told_why_not() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused = nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.b(input=self.a(input=x)))

    model = ByKeyword()
    masks = {
        name: torch.zeros_like(value, dtype=torch.bool) for name, value in maskable_parameters(model).items()
    }
    for mask in masks.values():
        mask[0, 0] = True
    facts = {fact.name: fact for fact in choose_products(model, masks, torch.ones(5, 8), most_density=1.0)}
    assert {name: fact.n_rows for name, fact in facts.items()} == {
        "a.weight": 5,
        "b.weight": 5,
        "unused.weight": None,
    }
    assert facts["b.weight"].csr_ms is not None
    assert facts["unused.weight"].reason == "the network does not call its layer with a tensor"


@pytest.mark.usefixtures("fc1_by_csr")
def test_a_run_trains_active_weights_alone_but_for_windows_before_updates(
    pictures: Path, narrow_steps: list[bool], tmp_path: Path
) -> None:
    run = train(_recipe(pictures), tmp_path / "run", device="cpu")
    assert narrow_steps == [*[True] * 6, *[False] * 3, *[True] * 6, *[False] * 3, *[True] * 9]
    assert {fact.name: fact.by for fact in run.info.products} == {
        "fc1.weight": "csr",
        "fc2.weight": "dense",
        "fc3.weight": "dense",
    }
    assert se.open_run(run.path).info.products == run.info.products
    masks, weights = (load_file(run.path / f"{name}.safetensors") for name in ("masks", "model"))
    for name, mask in masks.items():
        assert not weights[name][~mask].any()
        assert weights[name][mask].any()
    assert isinstance(run.module, nn.Module)
    assert {type(module) for module in run.module.modules()} >= {nn.Linear}
    assert run.info.test is not None
    assert run.info.test.figure > 60  # chance is 10


@pytest.mark.usefixtures("fc1_by_csr")
def test_a_run_in_steps_of_whole_windows_is_the_dense_one_but_for_rounding(
    pictures: Path, tmp_path: Path
) -> None:
    for products in ("dense", "csr"):
        window = 9 if products == "csr" else None
        train(_recipe(pictures, products=products, window=window), tmp_path / products, device="cpu")
    wanted, found = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "csr"))
    assert (tmp_path / "csr" / "masks.safetensors").read_bytes() == (
        tmp_path / "dense" / "masks.safetensors"
    ).read_bytes()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("stops", [(4, 13), (7, 9), (9, 18)])
def test_a_run_that_is_resumed_has_the_bits_of_an_unbroken_one_and_chooses_nothing_anew(
    stops: tuple[int, int], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = _forced({"fc1.weight": "csr", "fc2.weight": "csr"})
    monkeypatch.setattr(products_module, "choose_products", choose)
    recipe = _recipe(pictures)
    train(recipe, tmp_path / "whole", device="cpu")
    out = tmp_path / "broken"
    with pytest.raises(Interrupted):
        train(recipe, out, device="cpu", observer=InterruptAtStep(stops[0], signal.SIGINT))
    monkeypatch.setattr(products_module, "choose_products", lambda *_: pytest.fail("chosen anew"))
    with pytest.raises(Interrupted):
        train(None, out, device="cpu", resume=True, observer=InterruptAtStep(stops[1], signal.SIGINT))
    train(None, out, device="cpu", resume=True)
    assert outcome(out) == outcome(tmp_path / "whole")


def test_where_nothing_wins_training_is_dense_to_the_bit_and_says_so(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products_module, "choose_products", _forced({}))
    run = train(_recipe(pictures), tmp_path / "csr", device="cpu")
    train(_recipe(pictures, products="dense", window=None), tmp_path / "dense", device="cpu")
    assert outcome(tmp_path / "csr") == outcome(tmp_path / "dense")
    document = json.loads((run.path / "run.json").read_text())
    assert {fact["by"] for fact in document["products"]} == {"dense"}
    assert all(fact["reason"] for fact in document["products"])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sparsity": {"products": "csr", "pattern": "2:4"}}, "with the pattern 2:4"),
        ({"sparsity": {"products": "csr", "method": "magnitude"}}, "magnitude"),
        ({"sparsity": {"window": 5}}, "window belongs to"),
        ({"sparsity": {"products": "csr"}, "ema": 0.9}, "ema exclude"),
        ({"sparsity": {"products": "csr"}, "precision": "bf16"}, "bf16"),
        ({"sparsity": {"products": "csr"}, "compile": True}, "compile exclude"),
        ({"sparsity": {"products": "2:4"}, "precision": "bf16"}, "need the pattern"),
        ({"sparsity": {"products": "2:4", "pattern": "1:4"}, "precision": "bf16"}, "need the pattern"),
        ({"sparsity": {"products": "2:4", "pattern": "2:4", "method": "sr-ste"}}, "sr-ste"),
        ({"sparsity": {"products": "2:4", "pattern": "2:4"}}, "bf16"),
        ({"sparsity": {"products": "2:4", "pattern": "2:4"}, "precision": "bf16", "ema": 0.9}, "ema"),
    ],
)
def test_recipes_that_contradict_such_products_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        load_recipe("digits", changes=changes)


def test_on_another_device_csr_products_are_refused(pictures: Path) -> None:
    with pytest.raises(UsageError, match="on meta"):
        require_possible(_recipe(pictures), torch.device("meta"), ALONE)


def _recipe_24(pictures: Path, products: str, **changes: Any) -> Recipe:
    given = {
        "data": f"npz:{pictures}",
        "epochs": 3,
        "batch_size": 20,
        "precision": "bf16",
        "sparsity": {"pattern": "2:4", "density": None, "products": products, "approach": [0.0, 0.0]},
    }
    return load_recipe("mnist-lenet300-100", changes=given | changes)


def test_a_run_by_24_products_is_the_dense_one_but_for_rounding_and_hands_on_ordinary_layers(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step24, "BACKEND_24", "reference")
    runs = {
        products: train(_recipe_24(pictures, products), tmp_path / products, device="cpu")
        for products in ("dense", "2:4")
    }
    assert {fact.name: fact.by for fact in runs["2:4"].info.products} == {
        "fc1.weight": "2:4",
        "fc2.weight": "2:4",
    }
    module = runs["2:4"].module
    assert isinstance(module, nn.Module)
    assert {type(layer) for layer in module.modules() if list(layer.parameters(recurse=False))} == {nn.Linear}
    wanted, found = (load_file(run.path / "model.safetensors") for run in runs.values())
    masks = load_file(runs["2:4"].path / "masks.safetensors")
    for name, mask in masks.items():
        assert not found[name][~mask].any()
        # Rounding to bfloat16 moves a few masks and with them the weights; the networks stay close.
        difference = float((found[name] - wanted[name]).norm() / wanted[name].norm())
        assert difference < 0.2, name
    dense, sparse = (run.info.test for run in runs.values())
    assert dense is not None
    assert sparse is not None
    assert sparse.figure > 60
    assert abs(sparse.figure - dense.figure) <= 10


def test_a_run_by_24_products_that_is_resumed_has_the_bits_of_an_unbroken_one(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step24, "BACKEND_24", "reference")
    recipe = _recipe_24(pictures, "2:4")
    train(recipe, tmp_path / "whole", device="cpu")
    out = tmp_path / "broken"
    with pytest.raises(Interrupted):
        train(recipe, out, device="cpu", observer=InterruptAtStep(13, signal.SIGINT))
    train(None, out, device="cpu", resume=True)
    assert outcome(out) == outcome(tmp_path / "whole")


@pytest.mark.gpu
def test_on_a_card_a_run_by_24_products_learns(pictures: Path, tmp_path: Path) -> None:
    run = train(_recipe_24(pictures, "2:4", epochs=5, batch_size=64), tmp_path / "run", device="cuda")
    assert {fact.by for fact in run.info.products} == {"2:4", "dense"}  # 784 inputs fit, 100 outputs do not
    assert run.info.test is not None
    assert run.info.test.figure > 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a card")
def test_without_a_card_24_products_end_with_5(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingCapability, match="on cpu") as caught:
        train(_recipe_24(pictures, "2:4"), tmp_path / "run", device="cpu")
    assert caught.value.exit_code == 5
