from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from sparse_export.errors import UsageError
from sparse_export.models.layers_csr import LinearCsr
from sparse_export.train import SparseTraining
from sparse_export.train.csr_choice import choose_products
from sparse_export.train.step_csr import StepCsr, default_window

LAYERS = ("0.weight", "2.weight")
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda values: SGD(values, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3, fused=True),
    "adam": lambda values: Adam(values, lr=1e-2, amsgrad=True),
    "adamw": lambda values: AdamW(values, lr=1e-2, weight_decay=1e-2, fused=True),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks of this size only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(inplace=True), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def _trained(kind: str = "sgd", **options: Any) -> SparseTraining:
    model = _network()
    settings: dict[str, Any] = {"density": 0.2, "total_steps": 120, "update_every": 20} | options
    return SparseTraining(model, OPTIMIZERS[kind](model.parameters()), **settings)


def _csr(trainer: SparseTraining, **options: Any) -> StepCsr:
    return StepCsr(trainer.model, trainer, layers=LAYERS, **({"most_density": 1.0} | options))


def _batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn((8, 16), generator=generator), torch.randint(10, (8,), generator=generator)


def _run(
    trainer: SparseTraining,
    steps: range,
    products: StepCsr | None = None,
    after_backward: Callable[[int], None] | None = None,
) -> None:
    for step in steps:
        x, y = _batch(step)
        trainer.optimizer.zero_grad()
        nn.functional.cross_entropy(trainer.model(x), y).backward()
        if after_backward:
            after_backward(step)
        trainer.step()
        if products is not None:
            products.after_step()


def _state(trainer: SparseTraining) -> dict[str, Tensor]:
    """Weights and the optimiser's statistics, by name."""
    found = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    names = [name for name, _ in trainer.model.named_parameters()]
    for index, entries in trainer.optimizer.state_dict()["state"].items():
        found |= {
            f"{names[index]} {key}": value.clone()
            for key, value in entries.items()
            if isinstance(value, Tensor)
        }
    return found


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_between_updates_a_step_is_the_dense_masked_one_on_active_weights(kind: str) -> None:
    plain, sparse = _trained(kind), _trained(kind)
    products = _csr(sparse, window=2)
    _run(plain, range(17))
    _run(sparse, range(17), products)
    assert products.is_narrow
    wanted, found = _state(plain), _state(sparse)
    assert set(wanted) == set(found)
    for name, value in wanted.items():
        mask = plain.masks.get(name.split()[0], torch.ones(()).bool())
        torch.testing.assert_close(found[name] * mask, value * mask, rtol=1e-4, atol=1e-6)
    for name, mask in sparse.masks.items():
        assert torch.equal(sparse.masks[name], plain.masks[name])
        assert not found[name][~mask].any()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_window_of_a_whole_interval_is_dense_masked_training_through_updates(kind: str) -> None:
    plain, sparse = _trained(kind), _trained(kind)
    products = _csr(sparse, window=20)
    _run(plain, range(70))
    _run(sparse, range(70), products)
    assert plain.n_updates == sparse.n_updates == 3
    for name, mask in plain.masks.items():
        assert torch.equal(mask, sparse.masks[name])
    wanted, found = _state(plain), _state(sparse)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("window", [1, 6])
def test_masks_follow_a_momentum_whose_gradients_of_inactive_weights_are_zero_outside_the_window(
    window: int,
) -> None:
    plain, sparse = _trained(), _trained()

    def zero_inactive(step: int) -> None:
        if step % 20 < 20 - window:
            for name in LAYERS:
                weight = plain.model.get_parameter(name)
                assert weight.grad is not None
                weight.grad.mul_(plain.masks[name])

    products = _csr(sparse, window=window)
    _run(plain, range(90), after_backward=zero_inactive)
    _run(sparse, range(90), products)
    products.widen()
    assert sparse.n_updates == 4
    for name, mask in plain.masks.items():
        assert torch.equal(mask, sparse.masks[name])
    wanted, found = _state(plain), _state(sparse)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_a_loop_that_clears_gradients_through_the_network_trains_the_same() -> None:
    wanted, found = _trained(), _trained()
    for trainer, clear in ((wanted, wanted.optimizer.zero_grad), (found, found.model.zero_grad)):
        products = _csr(trainer, window=3)
        for step in range(25):
            x, y = _batch(step)
            clear()
            nn.functional.cross_entropy(trainer.model(x), y).backward()
            trainer.step()
            products.after_step()
    for name, value in _state(wanted).items():
        assert torch.equal(_state(found)[name], value)


def test_gradients_are_dense_in_the_window_alone() -> None:
    sparse = _trained()
    products = _csr(sparse, window=3)
    weight = sparse.model.get_parameter("2.weight")
    seen: list[int] = []
    _run(
        sparse,
        range(40),
        products,
        lambda step: seen.append(step) if weight.grad is not None else None,
    )
    assert seen == [17, 18, 19, 37, 38, 39]


@pytest.mark.parametrize(("freeze", "steps"), [(0.5, range(40, 120)), (1.0, range(100, 120))])
def test_after_the_last_update_there_is_no_window(freeze: float, steps: range) -> None:
    sparse = _trained(freeze=freeze)
    products = _csr(sparse, window=3)
    narrow: dict[int, bool] = {}
    _run(sparse, range(120), products, lambda step: narrow.__setitem__(step, products.is_narrow))
    assert all(narrow[step] for step in steps)
    assert not narrow[steps[0] - 1]


def test_masks_that_never_move_need_no_window() -> None:
    sparse = _trained(method="static")
    products = _csr(sparse)
    _run(sparse, range(50), products, lambda step: pytest.fail("wide") if not products.is_narrow else None)


@pytest.mark.parametrize("method", ["set", "rigl", "dsr"])
def test_growth_that_does_not_go_by_momentum_needs_one_dense_step(method: str) -> None:
    plain, sparse = _trained(method=method), _trained(method=method)
    products = _csr(sparse)
    assert products.window == 1
    _run(plain, range(30))
    _run(sparse, range(30), products)
    for name, mask in plain.masks.items():
        assert torch.equal(mask, sparse.masks[name])


def test_the_default_window_leaves_a_hundredth_of_the_momentum_before_it() -> None:
    sgd, adam = _trained(), _trained("adam")
    assert default_window(sgd, LAYERS) == math.ceil(math.log(100) / (1 - 0.9)) == 47
    assert default_window(adam, LAYERS) == 47
    assert 0.9**47 < 0.01
    model = _network()
    slow = SparseTraining(model, SGD(model.parameters(), lr=0.1, momentum=0.95), density=0.2)
    assert default_window(slow, LAYERS) == 93


@pytest.mark.parametrize("stop", [9, 13, 17, 20, 31])
def test_a_training_that_goes_on_from_saved_states_has_the_bits_of_an_unbroken_one(stop: int) -> None:
    unbroken = _trained()
    products = _csr(unbroken, window=6)
    _run(unbroken, range(stop), products)
    states = copy.deepcopy(
        (unbroken.model.state_dict(), unbroken.optimizer.state_dict(), unbroken.state_dict())
    )
    resumed = _trained()
    resumed.model.load_state_dict(states[0])
    resumed.optimizer.load_state_dict(states[1])
    resumed.load_state_dict(states[2])
    again = _csr(resumed, window=6)
    assert again.is_narrow == products.is_narrow
    _run(unbroken, range(stop, 50), products)
    _run(resumed, range(stop, 50), again)
    wanted, found = _state(unbroken), _state(resumed)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_an_update_from_outside_finds_whole_weights() -> None:
    plain, sparse = (_trained(update_every=None, prune_schedule="constant") for _ in range(2))
    products = _csr(sparse, window=20, update_every=10)
    assert not products.is_narrow
    for trainer, one in ((plain, None), (sparse, products)):
        _run(trainer, range(10), one)
        trainer.update()
        if one is not None:
            one.after_step()
        _run(trainer, range(10, 15), one)
    wanted, found = _state(plain), _state(sparse)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_an_update_between_windows_finds_whole_weights_too() -> None:
    sparse = _trained(update_every=None, prune_schedule="constant")
    products = _csr(sparse, window=3, update_every=10)
    _run(sparse, range(4), products)
    assert products.is_narrow
    values = {name: layer.values for name, layer in products.layers.items()}
    kept = {name: value.detach().abs().sum() for name, value in values.items() if value is not None}
    update = sparse.update()
    assert not products.is_narrow
    for name in LAYERS:
        weight = sparse.model.get_parameter(name).detach()
        assert weight.abs().sum() > 0.5 * kept[name]
        assert not weight[~update.masks[name]].any()


def test_a_layer_that_has_grown_denser_is_multiplied_densely() -> None:
    sparse = _trained()
    limit = int(sparse.masks["0.weight"].sum()) / 512
    products = _csr(sparse, window=2, most_density=limit)
    assert "0.weight" in products.sparse_layers
    wide = sparse.masks["0.weight"].clone()
    wide.view(-1)[(~wide).flatten().nonzero()[0]] = True
    sparse._pass.set(sparse.masks | {"0.weight": wide})
    sparse.n_updates += 1
    products.after_step()
    assert "0.weight" not in products.sparse_layers
    _run(sparse, range(5), products)


def test_restored_layers_are_plain_and_trained_as_any_other() -> None:
    sparse = _trained()
    products = _csr(sparse, window=2)
    _run(sparse, range(5), products)
    x, _ = _batch(0)
    before = sparse.model(x)
    products.restore()
    torch.testing.assert_close(sparse.model(x), before, rtol=1e-4, atol=1e-6)
    assert not any(isinstance(module, LinearCsr) for module in sparse.model.modules())
    held = [value for group in sparse.optimizer.param_groups for value in group["params"]]
    assert [id(value) for value in held] == [id(value) for value in sparse.model.parameters()]
    _run(sparse, range(5, 25))
    assert sparse.n_updates == 1


def test_a_state_that_is_loaded_while_active_weights_are_apart_is_refused() -> None:
    sparse = _trained()
    _csr(sparse, window=2)
    with pytest.raises(UsageError, match="active weights alone"):
        sparse.optimizer.load_state_dict(sparse.optimizer.state_dict())


def test_copies_of_a_changed_network_are_apart_from_it() -> None:
    sparse = _trained()
    products = _csr(sparse, window=2)
    twin = copy.deepcopy(sparse.model)
    x, _ = _batch(0)
    wanted = twin(x).detach().clone()
    _run(sparse, range(3), products)
    assert torch.equal(twin(x), wanted)


@pytest.mark.parametrize(
    ("trainer", "options", "named"),
    [
        ({}, {"window": 0}, "window is 0"),
        ({}, {"layers": ()}, "No layer"),
        ({}, {"layers": ("4.bias",)}, "no masked weight"),
        ({"update_every": None}, {}, "update_every is not given"),
        ({"density": None, "pattern": "2:4"}, {}, "under a pattern"),
        ({"method": "magnitude"}, {}, "magnitude"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    trainer: dict[str, Any], options: dict[str, Any], named: str
) -> None:
    training = _trained(**trainer)
    with pytest.raises(UsageError, match=named):
        StepCsr(training.model, training, **({"layers": LAYERS} | options))


def test_optimisers_that_may_mix_weights_are_refused() -> None:
    model = _network()
    trainer = SparseTraining(model, RMSprop(model.parameters()), density=0.2, method="set")
    with pytest.raises(UsageError, match="RMSprop"):
        StepCsr(model, trainer, layers=LAYERS)


class _Clock:
    """Gives dense and CSR products set times; the order in which they are timed changes from round to
    round.
    """

    def __init__(self, dense_s: float, csr_s: float) -> None:
        order = [(dense_s, csr_s) if n % 2 == 0 else (csr_s, dense_s) for n in range(5)]
        self._steps = [step for pair in order for step in pair]
        self._now, self._n = 0.0, 0

    def __call__(self) -> float:
        if self._n % 2:
            self._now += self._steps[self._n // 2 % len(self._steps)]
        self._n += 1
        return self._now


@pytest.mark.parametrize(("csr_s", "by"), [(1.0, "csr"), (1.85, "dense"), (3.0, "dense")])
def test_csr_products_are_chosen_where_they_win_clearly(csr_s: float, by: str) -> None:
    trainer = _trained()
    facts = choose_products(
        trainer.model, trainer.masks, torch.zeros(8, 16), most_density=1.0, clock=_Clock(2.0, csr_s)
    )
    assert {fact.name: fact.by for fact in facts} == dict.fromkeys(trainer.masks, by)
    for fact in facts:
        assert fact.dense_ms == pytest.approx(2000)
        assert fact.csr_ms == pytest.approx(1000 * csr_s)
        assert fact.n_rows == 8
        assert "timed" in fact.reason


def test_layers_that_are_not_timed_have_a_reason() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 6), nn.Linear(6, 6))
    model.append(nn.Linear(6, 6))
    model[4].weight = model[3].weight
    masks = {
        name: torch.rand(value.shape) < (0.9 if name == "2.weight" else 0.05)
        for name, value in model.named_parameters()
        if value.ndim > 1
    }
    facts = {fact.name: fact for fact in choose_products(model, masks, torch.zeros(4, 1, 4, 4))}
    assert "Conv2d" in facts["0.weight"].reason
    assert "above 0.1" in facts["2.weight"].reason
    assert facts["3.weight"].reason == "two layers share it"
    assert {fact.by for fact in facts.values()} == {"dense"}
    assert all(fact.dense_ms is None for fact in facts.values())


def test_a_network_is_timed_in_the_mode_it_was_in() -> None:
    trainer = _trained()
    trainer.model.train()
    choose_products(trainer.model, trainer.masks, torch.zeros(8, 16))
    assert trainer.model.training


def test_the_next_update_is_where_training_makes_it() -> None:
    for options in (
        {},
        {"freeze": 0.6},
        {"total_steps": None, "prune_schedule": "constant"},
        {"method": "rigl"},
        {"total_steps": 130},
        {"method": "static"},
    ):
        trainer = _trained(**options)
        model_steps = range(0, trainer.total_steps or 150, 1)
        told: list[int | None] = []
        happened: list[int] = []
        n_updates = 0
        for _ in model_steps:
            told.append(trainer.next_update())
            for value in trainer.model.parameters():
                value.grad = torch.zeros_like(value)
            trainer.step()
            if trainer.n_updates > n_updates:
                n_updates = trainer.n_updates
                happened.append(trainer.n_steps)
        wanted = [next((at for at in happened if at > step), None) for step in model_steps]
        if trainer.total_steps is None:
            wanted, told = wanted[:140], told[:140]
        assert told == wanted, options
