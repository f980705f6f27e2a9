"""The momentum that growth goes by, read from many optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm.optim
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Muon, NAdam, Optimizer, RAdam, RMSprop

from sparse_export.errors import UsageError
from sparse_export.sparsity import update_masks
from sparse_export.train import SparseTraining
from sparse_export.train.optimizer_state import OptimizerState

Make = Callable[[Any], Optimizer]
Scores = Callable[[dict[str, Tensor]], Tensor]
timm_optim: Any = timm.optim  # its names are exported without saying so


def normalised(state: dict[str, Tensor]) -> Tensor:
    return state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)


READ: dict[str, tuple[Make, Scores]] = {
    "nadam": (lambda p: NAdam(p, lr=1e-3), normalised),
    "radam": (lambda p: RAdam(p, lr=1e-3), normalised),
    "muon": (lambda p: Muon(p, lr=1e-2), lambda state: state["momentum_buffer"]),
    "timm-lion": (lambda p: timm_optim.Lion(p, lr=1e-4), lambda state: state["exp_avg"]),
    "timm-lamb": (lambda p: timm_optim.Lamb(p, lr=1e-3), normalised),
    "timm-muon": (lambda p: timm_optim.Muon(p, lr=1e-2), lambda state: state["momentum_buffer"]),
    "timm-sgdw": (
        lambda p: timm_optim.SGDW(p, lr=0.05, momentum=0.9),
        lambda state: state["momentum_buffer"],
    ),
    "timm-nadamw": (lambda p: timm_optim.NAdamW(p, lr=1e-3), normalised),
    "timm-adafactor": (
        lambda p: timm_optim.Adafactor(p, lr=1e-3, betas=(0.9, 0.999)),
        lambda state: state["exp_avg"],
    ),
    "timm-adafactor-bv": (
        lambda p: timm_optim.AdafactorBigVision(p, momentum=0.9, momentum_dtype=torch.float32),
        lambda state: state["exp_avg"],
    ),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 30, bias=False), nn.ReLU(), nn.Linear(30, 12, bias=False), nn.ReLU(), nn.Linear(12, 4)
    )


def take_steps(trainer: SparseTraining, n_steps: int) -> None:
    for step in range(n_steps):
        x = torch.randn(16, 20, generator=torch.Generator().manual_seed(step))
        trainer.model.zero_grad()
        nn.functional.cross_entropy(trainer.model(x), x[:, :4].argmax(1)).backward()
        trainer.step()


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [value for value in model.parameters() if value.ndim == 2]


def momenta_hold(trainer: SparseTraining, scores: dict[str, Tensor]) -> None:
    """The next update is the one by these momenta."""
    masks = {name: mask.clone() for name, mask in trainer.masks.items()}
    weights = {name: trainer.model.get_parameter(name).detach().clone() for name in masks}
    expected = update_masks(weights, scores, masks, prune_rate=trainer.prune_rate)
    trainer.update()
    for name, mask in expected.masks.items():
        assert torch.equal(trainer.masks[name], mask), name
    assert sum(int(mask.sum()) for mask in trainer.masks.values()) == trainer.n_active


@pytest.mark.parametrize("name", READ)
def test_growth_follows_the_first_moment_of_each_optimizer(name: str) -> None:
    make, score = READ[name]
    model = network()
    trainer = SparseTraining(model, make(matrices(model)), density=0.2, total_steps=50, update_every=None)
    take_steps(trainer, 6)
    states = {key: trainer.optimizer.state[model.get_parameter(key)] for key in trainer.masks}
    momenta_hold(trainer, {key: score(state) for key, state in states.items()})


def test_any_other_optimizer_by_a_function_that_reads_it() -> None:
    model = network()
    optimizer = RMSprop(model.parameters(), lr=1e-3, momentum=0.9)

    def read(given: Optimizer, value: Tensor) -> Tensor | None:
        assert given is optimizer
        found: Tensor | None = given.state[value].get("momentum_buffer")
        return found

    trainer = SparseTraining(
        model, optimizer, density=0.2, total_steps=50, update_every=None, momentum_of=read
    )
    with pytest.raises(UsageError, match="holds no momentum for"):
        trainer.update()
    take_steps(trainer, 5)
    momenta_hold(
        trainer, {key: optimizer.state[model.get_parameter(key)]["momentum_buffer"] for key in trainer.masks}
    )


@pytest.mark.parametrize("given", [torch.zeros(3), torch.zeros(30, 20, dtype=torch.int64), 0.5])
def test_what_is_no_momentum_of_the_weight_is_refused(given: Any) -> None:
    model = network()
    trainer = SparseTraining(
        model, SGD(model.parameters(), lr=0.1), density=0.2, momentum_of=lambda *_: given
    )
    with pytest.raises(UsageError, match=r"momentum_of gives .* for 0\.weight\. A tensor of floats of shape"):
        trainer.update()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: RMSprop(p), "The momentum of RMSprop cannot be read"),
        (lambda p: SGD(p, lr=0.1), "SGD without momentum"),
        (lambda p: Adafactor(p), "This Adafactor keeps no first moment"),
        (lambda p: timm_optim.Adafactor(p), "This Adafactor keeps no first moment"),
        (lambda p: timm_optim.AdafactorBigVision(p, momentum=None), "keeps no first moment"),
    ],
)
def test_an_optimizer_without_momentum_is_refused_and_methods_named_that_need_none(
    make: Make, message: str
) -> None:
    model = network()
    with pytest.raises(
        UsageError, match=f"{message}.*set, rigl, rigl-itop, granet, dsr, static, snip, magnitude"
    ):
        SparseTraining(model, make(model.parameters()), density=0.2)
    trainer = SparseTraining(model, make(model.parameters()), density=0.2, method="rigl", update_every=2)
    take_steps(trainer, 4)
    assert trainer.n_updates == 2


def test_momenta_of_different_rules_are_compared_by_their_means() -> None:
    first, second = nn.Parameter(torch.zeros(4, 5)), nn.Parameter(torch.zeros(6, 3))
    muon, adamw = Muon([first]), AdamW([second])
    torch.manual_seed(0)
    first.grad, second.grad = torch.randn(4, 5) * 1e-6, torch.randn(6, 3)
    muon.step()
    adamw.step()
    found = OptimizerState((muon, adamw), {"first": first, "second": second}).momentum()
    for name, value in found.items():
        assert float(value.abs().mean()) == pytest.approx(1), name
    buffer = muon.state[first]["momentum_buffer"]
    torch.testing.assert_close(found["first"], buffer / buffer.abs().mean())


def test_what_is_no_optimizer_is_refused() -> None:
    model = network()
    for given in ([], [model], model):
        with pytest.raises(UsageError, match="optimizer"):
            SparseTraining(model, given, density=0.2)  # type: ignore[arg-type]
