"""What is reported of layers and settings before training goes on with them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim import SGD

from sparse_export.errors import UsageError
from sparse_export.train import SparseTraining, SparsityConfig


class _Forked(nn.Module):
    """`spare` is used by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.spare, self.last = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())  # type: ignore[no-any-return]


def trained(model: nn.Module, **settings: Any) -> SparseTraining:
    optimizer = SGD([value for value in model.parameters() if value.requires_grad], lr=0.1, momentum=0.9)
    return SparseTraining(model, optimizer, **{"density": 0.5, **settings})


def step(trainer: SparseTraining) -> None:
    trainer.optimizer.zero_grad()
    trainer.model(torch.ones(4, 8)).square().mean().backward()
    trainer.step()


@pytest.mark.parametrize("method", ["sparse-momentum", "set", "static"])
def test_a_frozen_layer_is_refused_when_the_trainer_is_made_and_keep_dense_named(method: str) -> None:
    model = _Forked()
    model.first.requires_grad_(False)
    with pytest.raises(UsageError, match=r"first\.weight is frozen .*keep_dense=\['first\.weight'\]"):
        trained(model, method=method)
    trainer = trained(model, method=method, keep_dense=["first.weight", "spare"])
    assert list(trainer.masks) == ["last.weight"]


@pytest.mark.parametrize("attached", [False, True])
def test_an_unused_layer_is_reported_at_the_first_step_once(attached: bool) -> None:
    trainer = trained(_Forked(), update_every=None)
    if attached:
        trainer.attach()
    with pytest.warns(UserWarning, match=r"spare\.weight got no gradient .*keep_dense=\['spare\.weight'\]"):
        step(trainer)
    step(trainer)
    with pytest.raises(UsageError, match=r"no momentum for spare\.weight.*keep_dense"):
        trainer.update()


def test_a_used_network_is_reported_nothing_of() -> None:
    trainer = trained(_Forked(), keep_dense=["spare"], update_every=1)
    for _ in range(3):
        step(trainer)
    assert trainer.empty_layers == ()


def test_a_momentum_that_is_not_where_it_should_be_is_refused_at_the_first_step() -> None:
    class Adam(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for value in group["params"]:
                    self.state[value]["state1"] = torch.zeros_like(value)

    model = nn.Linear(8, 4)
    trainer = SparseTraining(model, Adam(model.parameters()), density=0.5)
    with pytest.raises(UsageError, match=r"Adam keeps state1 of weight, none of which.*momentum_of"):
        step(trainer)


def test_a_layer_that_runs_empty_is_reported_once() -> None:
    torch.manual_seed(0)
    last = nn.Linear(64, 4)
    model = nn.Sequential(nn.Linear(8, 64, bias=False), nn.ReLU(), last)
    trainer = trained(
        model, density=0.2, prune_rate=1.0, redistribution="momentum", update_every=None, start="uniform"
    )
    step(trainer)
    trainer.optimizer.state[last.weight][
        "momentum_buffer"
    ].zero_()  # so that everything goes to the other layer
    with pytest.warns(UserWarning, match=r"2\.weight has no active weight left.*keep_dense=\['2\.weight'\]"):
        trainer.update()
    assert trainer.empty_layers == ("2.weight",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trainer.state_dict()["n_updates"] == 1


def test_layers_under_hooks_are_in_the_table_with_a_reason_and_how_to_undo_them() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    parametrizations.weight_norm(model[1])
    trainer = trained(model, keep_dense=["0"])
    facts = {fact.name: fact for fact in trainer.layer_facts()}
    assert list(trainer.masks) == ["2.weight"]
    for name, way in (("0.weight", "prune.remove"), ("1.weight", "parametrize.remove_parametrizations")):
        assert not facts[name].masked
        assert f"torch.nn.utils.{way}" in (facts[name].why_dense or "")
        assert trainer.why_dense[name] == facts[name].why_dense
    with pytest.raises(UsageError, match=r"no layer to make sparse: weight: it is computed at each call"):
        trained(parametrizations.weight_norm(nn.Linear(8, 4)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": "0.1"}, r"density is '0\.1'\. A number was expected"),
        ({"density": True}, "density is True"),
        ({"pattern": (2, 4)}, r"pattern is \(2, 4\)\. A text like '2:4', or an NMPattern"),
        ({"keep_dense": [1]}, r"keep_dense is \[1\]"),
        ({"keep_dense": "last"}, r"keep_dense=\['last'\]"),
        ({"method": 5}, "method is 5"),
        ({"start": ["uniform"]}, r"start is \['uniform'\]"),
        ({"rescale": 1}, "rescale is 1"),
        ({"prune_rate": None}, "prune_rate is None"),
        ({"small_share": "x"}, "small_share is 'x'"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"total_steps": "9"}, "total_steps is '9'"),
        ({"approach": 3}, "approach is 3"),
        ({"freeze": 0.5}, r"freeze is 0\.5, a fraction of a training whose length is not known.*total_steps"),
        ({"density": None, "masks": [1]}, "masks is of type list"),
        ({"density": None, "masks": {"last.weight": 1}}, "masks is of type dict"),
        ({"output_layers": "last.weight"}, r"output_layers=\['last\.weight'\]"),
        ({"output_layers": ["nobody"]}, "output_layers names 'nobody'"),
        ({"momentum_of": 3}, "momentum_of is 3"),
    ],
    ids=str,
)
def test_settings_of_another_type_end_in_plain_words(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        trained(_Forked(), **settings)


def test_a_configuration_is_checked_in_the_same_way() -> None:
    settings: dict[str, Any] = {"density": 0.1, "keep_dense": ["fc"], "approach": (0.1,), "window": "3"}
    for name, value in settings.items():
        if name not in ("density", "keep_dense"):
            with pytest.raises(UsageError, match=f"{name} is"):
                SparsityConfig(**{name: value})
    model = _Forked()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(UsageError, match="length is not known"):
        SparseTraining.from_config(
            model, optimizer, SparsityConfig(freeze=0.5, prune_schedule="constant"), total_steps=None
        )
    with pytest.raises(UsageError, match="int is no network"):
        SparseTraining(3, optimizer, density=0.5)  # type: ignore[arg-type]
