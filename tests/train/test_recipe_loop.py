"""What a recipe says of the loop itself: its loss, clipped gradients, batches in parts."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_export as se
from sparse_export import trust
from sparse_export.errors import Interrupted, NotTrustedError, RecipeError, UsageError
from sparse_export.files import sha256_file
from sparse_export.train.distributed import ALONE
from sparse_export.train.divergence import FiniteNumbers
from sparse_export.train.loop import train
from sparse_export.train.optimizer import make_optimizer
from sparse_export.train.recipe import Recipe
from sparse_export.train.stepper import Stepper
from tests.train.test_loop import InterruptAtStep, outcome, small

HERE = "tests.train.test_recipe_loop"


def doubled(outputs: Tensor, targets: Tensor) -> Tensor:
    return 2 * nn.functional.cross_entropy(outputs, targets)


def unreduced(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


def gradients(recipe: Recipe, n_samples: int = 10) -> tuple[float, list[Tensor]]:
    """The loss and the gradients of one step by a recipe, of one network and one batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    stepper = Stepper(
        recipe,
        model,
        model,
        make_optimizer(recipe.optimizer, model),
        None,
        None,
        None,
        device=torch.device("cpu"),
        world=ALONE,
        batch_size=n_samples,
        numbers=FiniteNumbers(run=Path("none"), n_steps=10),
    )
    loss = stepper.step_gradients(torch.randn(n_samples, 1, 8, 8), torch.arange(n_samples) % 10, 0)
    return float(loss.detach()), [value.grad for value in model.parameters() if value.grad is not None]


@pytest.mark.parametrize("parts", [2, 3, 10, 50])
def test_a_batch_in_parts_has_the_loss_and_the_gradients_of_the_whole(parts: int) -> None:
    wanted, whole = gradients(small(dense=True))
    found, summed = gradients(small(dense=True, accumulate=parts))
    assert found == pytest.approx(wanted, rel=1e-5)
    for one, other in zip(whole, summed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_to_the_norm_that_the_recipe_says() -> None:
    _, whole = gradients(small(dense=True))
    _, clipped = gradients(small(dense=True, grad_clip=0.01, accumulate=2))
    norm = torch.cat([value.flatten() for value in whole]).norm()
    for one, other in zip(whole, clipped, strict=True):
        torch.testing.assert_close(other, one * (0.01 / norm), rtol=1e-3, atol=1e-7)


def test_a_loss_of_ones_own_is_what_is_trained_by() -> None:
    wanted, whole = gradients(small(dense=True))
    found, own = gradients(small(dense=True, loss=f"{HERE}:doubled"))
    assert found == pytest.approx(2 * wanted)
    for one, other in zip(whole, own, strict=True):
        torch.testing.assert_close(other, 2 * one)


@pytest.mark.parametrize("method", ["sparse-momentum", "rigl", "snip"])
def test_the_count_is_exact_in_every_step_and_a_resumed_run_has_the_bits_of_an_unbroken_one(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, n_seen = Stepper.step_weights, 0

    def watched(self: Stepper, done: int) -> None:
        nonlocal n_seen
        step(self, done)
        assert self.sparse is not None
        assert sum(int(mask.sum()) for mask in self.sparse.masks.values()) == self.sparse.n_active
        for name, mask in self.sparse.masks.items():
            assert not self.model.get_parameter(name)[~mask].any()
        n_seen += 1

    monkeypatch.setattr(Stepper, "step_weights", watched)
    recipe = small(
        loss=f"{HERE}:doubled",
        accumulate=3,
        grad_clip=1.0,
        precision="bf16",
        sparsity={"density": 0.1, "update_every": 5, "method": method},
    )
    whole = train(recipe, tmp_path / "whole", device="cpu")
    assert n_seen == whole.info.n_steps
    out = tmp_path / "broken"
    with pytest.raises(Interrupted):
        train(recipe, out, device="cpu", observer=InterruptAtStep(13, signal.SIGINT))
    train(None, out, device="cpu", resume=True)
    assert outcome(out) == outcome(whole.path)


def test_a_resumed_run_imports_no_loss_that_nobody_vouches_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(
            small(loss=f"{HERE}:doubled"),
            out,
            device="cpu",
            observer=InterruptAtStep(5, signal.SIGINT),
        )
    monkeypatch.setattr(trust, "store_path", lambda: tmp_path / "another user" / "trust.json")
    with pytest.raises(NotTrustedError, match=f"the loss {HERE}:doubled"):
        train(None, out, resume=True)
    assert json.loads((out / "run.json").read_text())["recipe"]["loss"] == f"{HERE}:doubled"
    run = train(None, out, resume=True, device="cpu", trust=sha256_file(out / "run.json"))
    assert se.open_run(out).info.n_steps == run.info.n_steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "mse"}, "loss is 'mse'; 'cross-entropy' was expected, or a function"),
        ({"loss": "a:b", "label_smoothing": 0.1}, "label_smoothing belongs to the cross-entropy"),
        ({"accumulate": 200}, "accumulate is 200, more than the batch_size 64"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"grad_clip": -1.0}, "grad_clip is -1"),
        ({"grad_clip": 1.0, "sparsity": {"products": "csr"}}, "products 'csr' and grad_clip exclude"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        small(**changes)


def test_a_loss_that_is_none_is_refused_before_a_step(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gives shape"):
        gradients(small(dense=True, loss=f"{HERE}:unreduced"))
    for name, message in (
        ("nowhere_at_all:loss", "nowhere_at_all"),
        (f"{HERE}:nobody", "has no 'nobody'"),
        (f"{HERE}:HERE", "not a function"),
    ):
        with pytest.raises(UsageError, match=message):
            train(small(loss=name), tmp_path / "run", device="cpu")
        assert not (tmp_path / "run" / "run.json").exists()
