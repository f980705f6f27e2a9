"""Training to an N:M pattern: by capped sparse momentum, and by the methods it is compared with."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD

import sparse_export as se
from sparse_export.errors import Interrupted, RecipeError, UsageError
from sparse_export.formats.run import LayerInfo
from sparse_export.sparsity import NMPattern, prune_rate
from sparse_export.sparsity.pattern import largest_per_group, obeys
from sparse_export.train.layers import output_layers
from sparse_export.train.loop import train
from sparse_export.train.methods.sr_ste import SrSte
from sparse_export.train.observer import SilentObserver
from sparse_export.train.recipe import Recipe, load_recipe

TWO_FOUR = NMPattern(n=2, m=4)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 4))


def sgd(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.05, momentum=0.9)


def capped(model: nn.Module | None = None, /, **settings: Any) -> se.SparseTraining:
    model = network() if model is None else model
    every: dict[str, Any] = {"pattern": "2:4", "total_steps": 60, "update_every": 5}
    return se.SparseTraining(model, sgd(model), **(every | settings))


def backward(model: nn.Module, step: int) -> None:
    x = torch.randn(16, 20, generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()


def take_steps(trainer: se.SparseTraining | SrSte, n_steps: int, first: int = 0) -> None:
    for step in range(first, first + n_steps):
        backward(trainer.model, step)
        trainer.step()


def within(masks: Mapping[str, Tensor], n: int = 2) -> bool:
    return all(obeys(mask, 1, NMPattern(n=n, m=4)) for mask in masks.values())


# Capped sparse momentum


def test_alone_a_pattern_is_kept_exactly_from_the_first_step_to_the_last() -> None:
    trainer = capped()
    start = {name: mask.clone() for name, mask in trainer.masks.items()}
    for _ in range(12):
        take_steps(trainer, 5)
        assert within(trainer.masks)
        for name, mask in trainer.masks.items():
            assert int(mask.sum()) == mask.numel() // 2
            assert not trainer.model.get_parameter(name)[~mask].any()
    assert any((mask ^ start[name]).any() for name, mask in trainer.masks.items())
    assert trainer.density == trainer.density_now == 0.5


def test_the_output_layer_and_small_layers_stay_dense_and_are_told() -> None:
    trainer = capped()
    assert list(trainer.masks) == ["0.weight", "2.weight"]
    assert trainer.why_dense == {"4.weight": "it gives the outputs"}
    facts = {fact.name: fact for fact in trainer.layer_facts()}
    assert (facts["0.weight"].pattern, facts["0.weight"].masked) == ("2:4", True)
    assert (facts["4.weight"].pattern, facts["4.weight"].masked, facts["4.weight"].n_active) == (
        None,
        False,
        48,
    )
    assert facts["4.weight"].why_dense == "it gives the outputs"
    assert list(capped(small_share=0.5).masks) == ["0.weight"]
    assert list(capped(output_layers=["0.weight"]).masks) == ["2.weight", "4.weight"]


def test_a_density_below_the_pattern_moves_between_the_layers_within_it() -> None:
    trainer = capped(density=0.2)
    total = round(0.2 * (20 * 32 + 32 * 12))
    first = {name: int(mask.sum()) for name, mask in trainer.masks.items()}
    for _ in range(12):
        take_steps(trainer, 5)
        assert within(trainer.masks)
        assert sum(int(mask.sum()) for mask in trainer.masks.values()) == total == trainer.n_active
    assert {name: int(mask.sum()) for name, mask in trainer.masks.items()} != first


def test_the_cap_comes_down_in_steps_and_masks_follow_at_once() -> None:
    trainer = capped(approach=(1 / 3, 1 / 2), update_every=None)
    for step in range(60):
        take_steps(trainer, 1, step)
        n = 4 if step + 1 < 20 else 3 if step + 1 < 30 else 2
        assert trainer.density_now == n / 4
        assert all(int(mask.sum()) == mask.numel() * n // 4 for mask in trainer.masks.values())
        assert n == 4 or within(trainer.masks, n)
        promised = {fact.pattern for fact in trainer.layer_facts() if fact.masked}
        assert promised == ({"2:4"} if n == 2 else {None})
    assert trainer.n_updates == 2


def test_a_cut_by_the_cap_keeps_the_largest_weights_of_each_group() -> None:
    trainer = capped(approach=(0.5, 0.5), prune_rate=0.0, update_every=None)
    take_steps(trainer, 29)
    backward(trainer.model, 29)
    trainer.optimizer.step()
    wanted = {
        name: largest_per_group(trainer.model.get_parameter(name).detach(), 1, TWO_FOUR)
        for name in trainer.masks
    }
    trainer.after_step()
    assert all(torch.equal(mask, wanted[name]) for name, mask in trainer.masks.items())


def test_masks_stand_still_after_the_freeze_and_the_prune_rate_has_run_its_course() -> None:
    trainer = capped(freeze=0.5)
    take_steps(trainer, 30)
    assert trainer.prune_rate <= 0.005
    frozen = {name: mask.clone() for name, mask in trainer.masks.items()}
    n_updates = trainer.n_updates
    take_steps(trainer, 30, 30)
    assert trainer.is_frozen
    assert trainer.n_updates == n_updates == 5
    assert all(torch.equal(mask, frozen[name]) for name, mask in trainer.masks.items())


def test_the_prune_rate_falls_when_swaps_do_not() -> None:
    trainer = capped(prune_schedule="constant", prune_rate=0.3)
    rates, flips = [], []
    for _ in range(11):
        take_steps(trainer, 5)
        rates.append(trainer.prune_rate)
        flips.append(trainer.flip_rate)
    assert flips[0] is not None
    for before, now, rate_before, rate in zip(flips, flips[1:], rates, rates[1:], strict=False):
        assert before is not None
        assert now is not None
        assert rate == pytest.approx(rate_before * (0.7 if now >= before else 1.0))
    assert rates[-1] < 0.3


def test_without_a_pattern_the_prune_rate_is_the_schedules_alone() -> None:
    model = network()
    trainer = se.SparseTraining(
        model,
        sgd(model),
        density=0.2,
        total_steps=60,
        update_every=5,
        prune_schedule="constant",
        prune_rate=0.3,
    )
    take_steps(trainer, 60)
    assert trainer.prune_rate == 0.3


def test_training_may_begin_with_masks_of_ones_own() -> None:
    model = network()
    masks = {
        name: largest_per_group(model.get_parameter(name).detach(), 1, TWO_FOUR)
        for name in ("0.weight", "2.weight")
    }
    kept = {name: model.get_parameter(name).detach() * mask for name, mask in masks.items()}
    trainer = capped(model, masks=masks)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in kept.items())
    assert trainer.n_active == sum(int(mask.sum()) for mask in masks.values())
    take_steps(trainer, 60)
    assert within(trainer.masks)
    with pytest.raises(UsageError, match="do not satisfy"):
        over = {name: torch.zeros_like(mask) for name, mask in masks.items()}
        over["0.weight"][0, :3] = True
        capped(masks=over)
    with pytest.raises(UsageError, match="has room for"):
        capped(masks={name: torch.ones_like(mask) for name, mask in masks.items()}, approach=(0.2, 0.4))
    with pytest.raises(UsageError, match="The masks are for"):
        capped(masks={"0.weight": masks["0.weight"]})
    with pytest.raises(UsageError, match="Masks and a density"):
        capped(masks=masks, density=0.5)


@pytest.mark.parametrize("settings", [{}, {"density": 0.2}, {"approach": (0.3, 0.7)}], ids=str)
def test_a_saved_state_goes_on_as_the_unbroken_training(settings: dict[str, Any]) -> None:
    unbroken = capped(**settings)
    take_steps(unbroken, 60)
    first = capped(**settings)
    take_steps(first, 32)
    second = capped(network(1), **settings)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    assert second.flip_rate == first.flip_rate
    take_steps(second, 28, 32)
    for name, mask in unbroken.masks.items():
        assert torch.equal(mask, second.masks[name])
        assert torch.equal(unbroken.model.get_parameter(name), second.model.get_parameter(name))


def test_a_grouped_transposed_convolution_has_the_groups_that_it_sums_over() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(8, 16, 2, groups=4), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 1))
    trainer = capped(model)
    assert list(trainer.masks) == ["1.weight"]
    assert "2 channels, and 2:4 needs a multiple of 4" in trainer.why_dense["0.weight"]
    assert list(capped(nn.Sequential(nn.ConvTranspose2d(8, 16, 2, groups=2), nn.Conv2d(16, 4, 1))).masks) == [
        "0.weight"
    ]


def test_a_run_saved_on_the_way_to_the_pattern_tells_the_density_it_has(tmp_path: Path) -> None:
    trainer = capped(approach=(0.3, 0.7))
    take_steps(trainer, 24)
    with pytest.warns(UserWarning, match="not yet those of the end: density 0.75 in place of 0.5"):
        info = trainer.run(tmp_path / "run", input_shape=(20,)).info
    assert info.density == 0.75 == info.n_active / info.n_masked
    assert {layer.pattern for layer in info.layers} == {None}


def test_wide_groups_have_room_too() -> None:
    model = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 4))
    trainer = capped(model, pattern="256:512", density=0.3)
    assert int(trainer.masks["0.weight"].sum()) == round(0.3 * 512 * 64)
    fresh = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 4))
    assert capped(fresh, pattern="128:256").density_now == 0.5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pattern": "4:2"}, "4:2"),
        ({"pattern": "two"}, "not a pattern"),
        ({"density": 0.6}, "density is 0.6, and the pattern 2:4"),
        ({"pattern": None}, "Neither a density nor a pattern"),
        ({"pattern": None, "density": 0.1, "approach": (0.1, 0.2)}, "there is no pattern"),
        ({"approach": (0.5, 0.2)}, "approach is"),
        ({"approach": (0.1, 0.9), "freeze": 0.5}, "freeze is 0.5"),
        ({"approach": (0.1, 0.2), "total_steps": None}, "length of the training"),
        ({"pattern": "7:13"}, "7:13 needs a multiple of 13"),
        ({"keep_dense": ["9"]}, "names '9'"),
        ({"small_share": 2.0}, "small_share is 2.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_meant_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        capped(**settings)


def test_the_output_layer_is_the_one_called_last_whatever_was_registered_last() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 2)
            self.body = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.body(x))
            return result

    model = Odd()
    assert output_layers(model) == ("body.weight",)
    assert output_layers(model, lambda: model(torch.zeros(1, 8))) == ("head.weight",)


# SR-STE


def test_sr_ste_equals_its_equations_step_by_step() -> None:
    model, oracle = network(), network()
    trainer = SrSte(model, sgd(model), pattern=TWO_FOUR, decay=0.01)
    optimizer = sgd(oracle)
    names = ("0.weight", "2.weight")
    dense = {name: oracle.get_parameter(name).detach().clone() for name in names}
    masks = {name: largest_per_group(value, 1, TWO_FOUR) for name, value in dense.items()}
    for step in range(8):
        with torch.no_grad():
            for name in names:
                oracle.get_parameter(name).copy_(dense[name] * masks[name])
        backward(oracle, step)
        with torch.no_grad():
            for name in names:
                parameter = oracle.get_parameter(name)
                assert parameter.grad is not None
                parameter.grad += 0.01 * torch.where(masks[name], 0.0, dense[name])
                parameter.copy_(dense[name])
        optimizer.step()
        dense = {name: oracle.get_parameter(name).detach().clone() for name in names}
        masks = {name: largest_per_group(value, 1, TWO_FOUR) for name, value in dense.items()}
        take_steps(trainer, 1, step)
        for name in names:
            assert torch.equal(trainer.masks[name], masks[name])
            torch.testing.assert_close(model.get_parameter(name).detach(), dense[name] * masks[name])
    assert torch.equal(model.get_parameter("4.weight"), oracle.get_parameter("4.weight"))


def test_sr_ste_takes_up_its_dense_weights_from_a_saved_state() -> None:
    unbroken = network()
    trainer = SrSte(unbroken, sgd(unbroken), pattern=TWO_FOUR)
    take_steps(trainer, 20)
    first = network()
    half = SrSte(first, sgd(first), pattern=TWO_FOUR)
    take_steps(half, 10)
    second = network(1)
    rest = SrSte(second, sgd(second), pattern=TWO_FOUR)
    second.load_state_dict(first.state_dict())
    rest.optimizer.load_state_dict(half.optimizer.state_dict())
    rest.load_state_dict(half.state_dict())
    take_steps(rest, 10, 10)
    for name, value in unbroken.named_parameters():
        assert torch.equal(value, second.get_parameter(name)), name
    with pytest.raises(UsageError, match="closure"):
        rest.step(lambda: 0.0)


# Whole runs


def small(method: str, **changes: Any) -> Recipe:
    sparsity = {"method": method, "pattern": "2:4", "density": None} | changes.pop("sparsity", {})
    return load_recipe("digits", changes={"epochs": 4, "sparsity": sparsity, **changes})


METHODS = {
    "sparse-momentum": small("sparse-momentum"),
    "approached": small("sparse-momentum", sparsity={"approach": (0.25, 0.5)}),
    "averaged": small("sparse-momentum", ema=0.9),
    "sr-ste": small("sr-ste"),
    "asp": small("asp"),
}


def facts_of(run: se.Run) -> dict[str, LayerInfo]:
    return {fact.name: fact for fact in run.info.layers}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_promises_its_pattern_and_the_bundle_keeps_it(name: str, tmp_path: Path) -> None:
    run = train(METHODS[name], tmp_path / "run", device="cpu")
    promised = {layer: fact for layer, fact in facts_of(run).items() if fact.pattern == "2:4"}
    assert promised
    assert run.info.method == METHODS[name].sparsity.method
    weights = load_file(tmp_path / "run" / "model.safetensors")
    for layer, fact in promised.items():
        assert obeys(weights[layer], 1, TWO_FOUR)
        assert fact.n_active == fact.n_weights // 2
    assert all(fact.why_dense for fact in run.info.layers if not fact.masked)
    assert run.info.density == 0.5
    if name in ("approached", "sr-ste"):  # an export takes seconds, and the others leave the same kind of run
        bundle = se.build(run, tmp_path / "bundle", onnx="packed")
        layers = json.loads((bundle.path / "layers.json").read_text())["layers"]
        assert len([layer for layer in layers if layer["pattern_holds"]]) == len(promised)
    assert run.info.test is not None
    assert run.info.test.figure > 50  # four epochs; chance is 10


class SignalAtStep(SilentObserver):
    """Asks the run to stop, as Ctrl-C does: it saves after this step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def stepped(self, step: int, loss: Tensor) -> None:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("name", ["approached", "averaged", "sr-ste"])
def test_an_interrupted_run_ends_with_the_bytes_of_an_unbroken_one(name: str, tmp_path: Path) -> None:
    train(METHODS[name], tmp_path / "unbroken", device="cpu")
    out = tmp_path / "broken"
    with pytest.raises(Interrupted):
        train(METHODS[name], out, device="cpu", observer=SignalAtStep(50))
    train(None, out, device="cpu", resume=True)
    for file in ("model.safetensors", "masks.safetensors"):
        assert (out / file).read_bytes() == (tmp_path / "unbroken" / file).read_bytes()


def test_what_is_logged_of_an_epoch_is_its_last_update_also_when_the_run_was_interrupted(
    tmp_path: Path,
) -> None:
    recipe = small("sparse-momentum", sparsity={"update_every": 7})
    train(recipe, tmp_path / "unbroken", device="cpu")
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "broken", device="cpu", observer=SignalAtStep(18))
    train(None, tmp_path / "broken", device="cpu", resume=True)
    logs = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("unbroken", "broken")
    ]
    rates = [[(line["prune_rate"], line["flip_rate"]) for line in log] for log in logs]
    assert rates[0] == rates[1]
    first = prune_rate(14, round(0.75 * 4 * 19), initial=0.5, final=0.005, schedule="cosine")
    assert rates[0][0][0] == pytest.approx(first)  # of step 14, the last of 7 and 14 in an epoch of 19 steps


def test_a_network_with_lazy_layers_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lazy_factory.py").write_text(
        "from torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Flatten(), nn.LazyLinear(32), nn.ReLU(), nn.Linear(32, "
        "10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipe = load_recipe(
        "digits",
        changes={"model": "lazy_factory:make", "epochs": 1, "sparsity": {"pattern": "2:4", "density": None}},
    )
    run = train(recipe, tmp_path / "run", device="cpu")
    assert facts_of(run)["1.weight"].pattern == "2:4"


@pytest.mark.parametrize("method", ["sparse-momentum", "sr-ste"])
def test_a_weight_that_is_multiplied_along_two_axes_stays_dense_and_is_told(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tied_training.py").write_text(
        "from torch import nn\n"
        "class Tied(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.encoder, self.middle, self.out = nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(32, "
        "10)\n"
        "    def forward(self, x):\n"
        "        x = self.encoder(x.flatten(1)).relu() @ self.encoder.weight\n"
        "        return self.out(self.middle(x).relu())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    sparsity = {"pattern": "2:4", "density": None, "method": method}
    recipe = load_recipe("digits", changes={"model": "tied_training:Tied", "epochs": 1, "sparsity": sparsity})
    facts = facts_of(train(recipe, tmp_path / "run", device="cpu"))
    assert (facts["encoder.weight"].pattern, facts["middle.weight"].pattern) == (None, "2:4")
    assert "along axis 0 in the network's own forward" in str(facts["encoder.weight"].why_dense)


def test_asp_trains_dense_then_cuts_once_and_runs_the_learning_rate_again(tmp_path: Path) -> None:
    train(METHODS["asp"], tmp_path / "run", device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["density"] for line in lines] == [1.0, 0.5, 0.5, 0.5]
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.005, 0.0005, 0.005, 0.0005])
    assert lines[1]["flip_rate"] == 0.5
    assert [line["flip_rate"] for line in lines[2:]] == [None, None]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sparsity": {"method": "asp"}}, "'asp' needs a pattern"),
        ({"sparsity": {"method": "sr-ste", "pattern": "2:4"}}, "takes no density"),
        ({"sparsity": {"pattern": "2:4", "density": 0.7}}, "a density of 0.5 at most"),
        ({"sparsity": {"pattern": "2of4"}}, "pattern is '2of4'"),
        ({"sparsity": {"approach": [0.1, 0.2]}}, "and there is no pattern"),
        ({"sparsity": {"pattern": "2:4", "approach": [0.3, 0.2]}}, "no later than its last"),
        ({"sparsity": {"pattern": "2:4", "approach": [0.5, 0.9]}}, "freeze is 0.75"),
        ({"sparsity": {"method": "asp", "pattern": "2:4", "density": None, "freeze": 0.5}}, "sets freeze"),
        ({"sparsity": {"method": "sr-ste", "pattern": "2:4", "density": None}, "ema": 0.9}, "ema and method"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_recipe_that_contradicts_itself_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe("digits", changes=changes)
