"""Sparse momentum around a user's own loop."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import sparse_export as se
from sparse_export.errors import UsageError
from sparse_export.runtimes.choice import open_runtime
from sparse_export.sparsity import update_masks

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.05, momentum=0.9),
    "nesterov": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "adam": lambda p: Adam(p, lr=1e-3),
    "adamw": lambda p: AdamW(p, lr=1e-3),
}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 12), nn.ReLU(), nn.Linear(12, 4))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 20, generator=generator)
    return x, x[:, :4].argmax(1)


def take_steps(trainer: se.SparseTraining, n_steps: int) -> None:
    for step in range(n_steps):
        x, y = batch(step)
        trainer.optimizer.zero_grad()
        nn.functional.cross_entropy(trainer.model(x), y).backward()
        trainer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_count_is_exact_and_weights_follow_masks_through_all_updates(name: str) -> None:
    model = network()
    trainer = se.SparseTraining(
        model, OPTIMIZERS[name](model.parameters()), density=0.1, total_steps=60, update_every=5
    )
    target = round(0.1 * (20 * 30 + 30 * 12 + 12 * 4))
    for _ in range(12):
        take_steps(trainer, 5)
        assert sum(int(mask.sum()) for mask in trainer.masks.values()) == target == trainer.n_active
        for key, mask in trainer.masks.items():
            assert not model.state_dict()[key][~mask].any()
    assert trainer.n_updates == 11  # none in the last stretch


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_growth_follows_the_optimisers_own_statistic(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    trainer = se.SparseTraining(model, optimizer, density=0.2, total_steps=100, update_every=None)
    take_steps(trainer, 7)
    parameters = {key: value for key, value in model.named_parameters() if key in trainer.masks}
    states = {key: optimizer.state[value] for key, value in parameters.items()}
    scores = {
        key: state["momentum_buffer"]
        if "sgd" in name or name == "nesterov"
        else state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)
        for key, state in states.items()
    }
    before = {key: mask.clone() for key, mask in trainer.masks.items()}
    weights = {key: value.detach().clone() for key, value in parameters.items()}
    rate = 0.005 + 0.495 * (1 + math.cos(math.pi * 0.07)) / 2
    expected = update_masks(weights, scores, before, prune_rate=rate)
    trainer.update()
    for key, mask in before.items():
        assert torch.equal(trainer.masks[key], expected.masks[key])
        grown = expected.masks[key] & ~mask
        assert not parameters[key][grown].any()
        kept = expected.masks[key] & mask
        assert torch.equal(parameters[key][kept], weights[key][kept])


def test_rescaling_keeps_the_variance_of_a_layer() -> None:
    model = network()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = se.SparseTraining(model, OPTIMIZERS["sgd"](model.parameters()), density=0.25, start="uniform")
    for key, mask in trainer.masks.items():
        density = float(mask.float().mean())
        expected = start[key] * mask / math.sqrt(density)
        torch.testing.assert_close(model.state_dict()[key], expected)


def test_the_reference_start_changes_no_active_weight() -> None:
    model = network()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = se.SparseTraining(
        model, OPTIMIZERS["sgd"](model.parameters()), density=0.25, start="uniform", rescale=False
    )
    for key, mask in trainer.masks.items():
        assert torch.equal(model.state_dict()[key], start[key] * mask)


def test_density_one_stays_full_and_trains_like_the_optimiser_alone() -> None:
    model, twin = network(), network()
    trainer = se.SparseTraining(model, OPTIMIZERS["sgd"](model.parameters()), density=1.0, update_every=3)
    optimizer = OPTIMIZERS["sgd"](twin.parameters())
    take_steps(trainer, 10)
    for step in range(10):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin(x), y).backward()
        optimizer.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key])


def test_layers_that_stay_dense_are_not_counted() -> None:
    model = network()
    trainer = se.SparseTraining(model, OPTIMIZERS["sgd"](model.parameters()), density=0.1, keep_dense=("4",))
    assert trainer.n_masked == 20 * 30 + 30 * 12
    assert trainer.n_active == round(0.1 * trainer.n_masked)
    facts = {fact.name: fact for fact in trainer.layer_facts()}
    assert not facts["4.weight"].masked
    assert facts["4.weight"].n_active == 48


def test_the_same_seed_gives_the_same_masks_and_another_seed_others() -> None:
    def masks(seed: int) -> list[torch.Tensor]:
        model = network()
        trainer = se.SparseTraining(
            model,
            OPTIMIZERS["sgd"](model.parameters()),
            density=0.1,
            seed=seed,
            total_steps=40,
            update_every=5,
        )
        take_steps(trainer, 40)
        return list(trainer.masks.values())

    first, again, other = masks(1), masks(1), masks(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_state_taken_over_goes_on_as_if_nothing_had_happened() -> None:
    def build() -> se.SparseTraining:
        model = network()
        return se.SparseTraining(
            model, OPTIMIZERS["nesterov"](model.parameters()), density=0.2, total_steps=40, update_every=4
        )

    unbroken = build()
    take_steps(unbroken, 20)
    first = build()
    take_steps(first, 10)
    second = build()
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    for step in range(10, 20):
        x, y = batch(step)
        second.optimizer.zero_grad()
        nn.functional.cross_entropy(second.model(x), y).backward()
        second.step()
    for key, mask in unbroken.masks.items():
        assert torch.equal(mask, second.masks[key])
        assert torch.equal(unbroken.model.state_dict()[key], second.model.state_dict()[key])


def test_another_networks_state_is_refused() -> None:
    model, other = network(), nn.Sequential(nn.Linear(3, 3))
    trainer = se.SparseTraining(model, OPTIMIZERS["sgd"](model.parameters()), density=0.5)
    stranger = se.SparseTraining(other, OPTIMIZERS["sgd"](other.parameters()), density=0.5)
    with pytest.raises(UsageError, match="saved masks"):
        trainer.load_state_dict(stranger.state_dict())


def test_an_optimiser_without_momentum_is_refused_with_the_way_out() -> None:
    model = network()
    with pytest.raises(UsageError, match=r"momentum=0\.9"):
        se.SparseTraining(model, SGD(model.parameters(), lr=0.1), density=0.1)
    with pytest.raises(UsageError, match="RMSprop"):
        se.SparseTraining(model, RMSprop(model.parameters()), density=0.1)


def test_a_weight_that_is_not_trained_is_refused() -> None:
    model = network()
    with pytest.raises(UsageError, match=r"2\.weight is not among"):
        se.SparseTraining(model, SGD(model[0].parameters(), lr=0.1, momentum=0.9), density=0.1)


def test_an_update_before_the_first_step_is_refused() -> None:
    model = network()
    trainer = se.SparseTraining(model, OPTIMIZERS["sgd"](model.parameters()), density=0.1)
    with pytest.raises(UsageError, match="after at least one optimizer step"):
        trainer.update()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.0}, "density is 0.0"),
        ({"density": 1.2}, "density is 1.2"),
        ({"density": float("nan")}, "density is nan"),
        ({"density": 1e-6}, "none at all"),
        ({"density": 0.1, "prune_rate": -0.1}, "prune_rate is -0.1"),
        ({"density": 0.1, "final_prune_rate": float("nan")}, "final_prune_rate is nan"),
        (
            {"density": 0.1, "final_prune_rate": 0.1, "prune_schedule": "constant", "total_steps": 9},
            "final_prune_rate is 0.1, and the prune schedule is 'constant'",
        ),
        ({"density": 0.1, "final_prune_rate": 0.1}, "the prune schedule is 'constant'"),
        ({"density": 0.1, "update_every": 0}, "update_every is 0"),
        ({"density": 0.1, "prune_schedule": "cosine"}, "total_steps"),
        ({"density": 0.1, "prune_schedule": "cosin"}, "prune_schedule is 'cosin'"),
        ({"density": 0.1, "start": "er"}, "start is 'er'"),
        ({"density": 0.1, "redistribution": "size"}, "redistribution is 'size'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], message: str) -> None:
    model = network()
    with pytest.raises(UsageError, match=message):
        se.SparseTraining(model, OPTIMIZERS["sgd"](model.parameters()), **settings)


def test_a_run_of_a_users_loop_can_be_saved_and_keeps_plus_zero(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = network()
    trainer = se.SparseTraining(
        model, OPTIMIZERS["sgd"](model.parameters()), density=0.1, total_steps=20, seed=7
    )
    take_steps(trainer, 10)
    run = trainer.run(tmp_path / "mine")
    assert run.info.seed == 7
    assert run.info.signature.input_shape == (20,)
    assert run.info.signature.n_classes == 4
    weights = load_file(run.path / "model.safetensors")
    for key, mask in trainer.masks.items():
        assert not weights[key][~mask].view(torch.int32).any()  # the bits of +0.0
        assert torch.equal(weights[key][mask], model.state_dict()[key][mask])
    assert se.open_run(tmp_path / "mine").info == run.info
    with pytest.raises(UsageError, match="already holds a run"):
        trainer.run(tmp_path / "mine")


@pytest.mark.parametrize("value", [torch.tensor(255, dtype=torch.uint8), torch.tensor(0.5)])
def test_given_masks_of_another_type_keep_what_is_not_zero(value: torch.Tensor) -> None:
    model = network()
    kept = {
        name: torch.rand_like(weight) < 0.3 for name, weight in model.named_parameters() if weight.dim() > 1
    }
    masks = {name: mask * value for name, mask in kept.items()}
    trainer = se.SparseTraining(
        model, OPTIMIZERS["sgd"](model.parameters()), masks=masks, total_steps=20, update_every=5
    )
    assert all(torch.equal(mask, kept[name]) for name, mask in trainer.masks.items())
    assert trainer.n_active == sum(int(mask.sum()) for mask in kept.values())
    take_steps(trainer, 20)
    assert sum(int(mask.sum()) for mask in trainer.masks.values()) == trainer.n_active


def test_a_run_saved_in_the_midst_of_training_leaves_frozen_parts_frozen(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(20, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 4))
    trainer = se.SparseTraining(model, OPTIMIZERS["sgd"](model.parameters()), density=0.5)
    model[1].eval()
    run = trainer.run(tmp_path / "run", input_shape=(20,))
    assert run.info.signature.n_classes == 4
    assert [part.training for part in model] == [True, False, True, True, True]
    assert model.training


@pytest.mark.parametrize("seen", [True, False])
def test_a_network_that_gives_one_number_a_sample_has_one_output_whatever_the_batch(
    seen: bool, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 1), nn.Flatten(0))
    trainer = se.SparseTraining(model, OPTIMIZERS["sgd"](model.parameters()), density=0.5)
    if seen:
        model(torch.zeros(32, 20))
    run = trainer.run(tmp_path / "run", input_shape=(20,))
    assert [one.shape for one in run.info.signature.outputs] == [("batch",)]
    assert (run.info.signature.n_classes, run.info.task.name) == (None, "agreement")


class _Reads(nn.Module):
    """Two inputs of integers and a mapping of two outputs, as encoders of text have."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.inner, self.head = nn.Linear(16, 32), nn.Linear(32, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        states = self.inner(self.table(ids)) * mask[..., None]
        return {"states": states, "scores": self.head(states.mean(1))}


def test_a_run_of_any_network_tells_its_inputs_and_outputs_and_can_be_built(tmp_path: Path) -> None:
    model = _Reads()
    trainer = se.SparseTraining(model, OPTIMIZERS["sgd"](model.parameters()), density=0.5)
    ids = torch.randint(0, 50, (6, 7))
    for _ in range(3):
        trainer.optimizer.zero_grad()
        model(ids=ids, mask=torch.ones_like(ids))["scores"].square().mean().backward()
        trainer.step()
    free = {"ids": ("batch", "sequence"), "mask": ("batch", "sequence")}
    run = trainer.run(tmp_path / "run", free_sizes=free)
    told = run.info.signature
    assert [(one.name, one.dtype, one.shape) for one in told.inputs] == [
        (name, "int64", ("batch", "sequence")) for name in ("ids", "mask")
    ]
    assert [(one.name, one.shape) for one in told.outputs] == [
        ("states", ("batch", "sequence", 32)),
        ("scores", ("batch", 3)),
    ]
    assert told.sizes == {"sequence": 7}
    bundle = se.build(run, tmp_path / "bundle")
    assert [(one.low, one.high) for one in bundle.info.signature.inputs] == [(0, 49), (1, 1)]
    with open_runtime(bundle, "onnxruntime-cpu") as session:
        longer = torch.randint(0, 50, (3, 11))
        found = session.run({"ids": longer.numpy(), "mask": np.ones((3, 11), np.int64)})
    with torch.no_grad():
        wanted = model.eval()(longer, torch.ones_like(longer))
    for name, one in wanted.items():
        np.testing.assert_allclose(found[name], one.numpy(), atol=1e-5)


@pytest.mark.filterwarnings("ignore:The tensor attribute")  # of torch.export, about what the hook assigns
def test_a_network_whose_forward_computes_a_weight_is_built_in_the_process_that_trained_it(
    tmp_path: Path,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        normed = nn.utils.weight_norm(nn.Linear(20, 16))
    model = nn.Sequential(normed, nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    trainer = se.SparseTraining(model, OPTIMIZERS["sgd"](model.parameters()), density=0.5)
    x, y = batch(0)
    nn.functional.cross_entropy(model(x), y).backward()  # leaves the weight in the layer, with its gradient
    trainer.step()
    nn.functional.cross_entropy(model(x), y).backward()
    bundle = se.build(trainer.run(tmp_path / "run"), tmp_path / "bundle")
    with open_runtime(bundle, "onnxruntime-cpu") as session, torch.no_grad():
        np.testing.assert_allclose(session.run(x.numpy()), model.eval()(x).numpy(), atol=1e-5)


def test_a_closure_is_passed_on() -> None:
    model = network()
    trainer = se.SparseTraining(model, OPTIMIZERS["sgd"](model.parameters()), density=0.1)
    x, y = batch(0)

    def closure() -> float:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return float(loss.detach())

    with torch.no_grad():
        expected = float(nn.functional.cross_entropy(model(x), y))
    assert trainer.step(closure) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "end"),
    [
        ({}, 0.005),
        ({"method": "rigl"}, 0.0),
        ({"final_prune_rate": 0.1}, 0.1),
        ({"prune_schedule": "linear"}, 0.0),
        ({"prune_schedule": "linear", "final_prune_rate": 0.1}, 0.1),
        ({"prune_schedule": "constant"}, 0.4),
        ({"final_prune_rate": 0.9}, 0.4),
    ],
)
def test_the_prune_rate_ends_where_schedule_and_method_say(settings: dict[str, Any], end: float) -> None:
    model = network()
    trainer = se.SparseTraining(
        model,
        OPTIMIZERS["sgd"](model.parameters()),
        density=0.1,
        total_steps=4,
        prune_rate=0.4,
        freeze=1.0,
        **settings,
    )
    assert trainer.prune_rate == pytest.approx(0.4)
    take_steps(trainer, 4)
    assert trainer.prune_rate == pytest.approx(end)


def test_a_run_whose_inactive_weights_were_trained_is_not_recorded(tmp_path: Path) -> None:
    """As when the optimizer is stepped in place of the trainer: the score would be of another network."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = se.SparseTraining(model, optimizer, density=0.3, total_steps=4)
    x, y = batch(0)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    with pytest.raises(UsageError, match=r"inactive weights of .* are not 0.*trainer\.step\(\)"):
        trainer.run(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    trainer.apply_masks()
    assert trainer.run(tmp_path / "run").info.status == "complete"


def test_a_score_is_recorded_as_such_alone(tmp_path: Path) -> None:
    model = network()
    trainer = se.SparseTraining(
        model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), density=0.3, total_steps=4
    )
    take_steps(trainer, 1)
    with pytest.raises(UsageError, match=r"test is 0\.93.*Score\(n_correct"):
        trainer.run(tmp_path / "run", test=0.93)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "settings", [{"update_every": 1.5}, {"update_every": True}, {"total_steps": float("nan")}]
)
def test_steps_are_whole_numbers(settings: dict[str, Any]) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(UsageError, match="A whole number of steps"):
        se.SparseTraining(model, optimizer, density=0.3, **{"total_steps": 12, **settings})
