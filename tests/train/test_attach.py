"""Loops that know nothing of masks: hooks on the optimizer's step do all that `trainer.step()` does."""

from __future__ import annotations

import copy
import gc
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparse_export.errors import UsageError
from sparse_export.train import SparseTraining

Make = Callable[[Any], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: AdamW(p, lr=1e-3),
    "fused-adam": lambda p: Adam(p, lr=1e-3, fused=True),
    "fused-sgd": lambda p: SGD(p, lr=0.05, momentum=0.9, fused=True),
}
TRAINING: dict[str, Any] = {"density": 0.2, "total_steps": 40, "update_every": 4}
OVERFLOWS = (2, 7, 8, 13)  # batches whose gradients are not finite


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 12), nn.ReLU(), nn.Linear(12, 4))


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(16, 20, generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(x), x[:, :4].argmax(1))


def take_steps(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    """A loop as people have it."""
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def require_sparse(trainer: SparseTraining) -> None:
    """The count is exact, and every inactive weight zero."""
    assert sum(int(mask.sum()) for mask in trainer.masks.values()) == trainer.n_active
    for name, mask in trainer.masks.items():
        assert not trainer.model.get_parameter(name)[~mask].any(), name


def require_equal(first: SparseTraining, second: SparseTraining) -> None:
    """Two trainings are at the same bits, and as far."""
    assert (first.n_steps, first.n_updates) == (second.n_steps, second.n_updates)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    for name, mask in first.masks.items():
        assert torch.equal(mask, second.masks[name]), name


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("method", ["sparse-momentum", "rigl"])
def test_a_loop_unchanged_trains_to_the_bits_of_trainer_step(name: str, method: str) -> None:
    by_hooks, by_steps = (
        SparseTraining(model, OPTIMIZERS[name](model.parameters()), method=method, **TRAINING)
        for model in (network(), network())
    )
    by_hooks.attach()
    for step in range(24):
        take_steps(by_hooks.model, by_hooks.optimizer, range(step, step + 1))
        require_sparse(by_hooks)
        by_steps.optimizer.zero_grad()
        loss_of(by_steps.model, step).backward()
        by_steps.step()
    assert by_hooks.n_updates > 4
    require_equal(by_hooks, by_steps)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("unscaled_first", [False, True])
def test_under_a_grad_scaler_the_count_is_exact_in_each_step_and_skipped_ones_do_not_count(
    name: str, unscaled_first: bool
) -> None:
    scaled, plain = (
        SparseTraining(model, OPTIMIZERS[name](model.parameters()), **TRAINING)
        for model in (network(), network())
    )
    scaled.attach()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    n_real = 0
    for step in range(28):
        before = {key: mask.clone() for key, mask in scaled.masks.items()}
        weights = copy.deepcopy(scaled.model.state_dict())
        scaled.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(scaled.model, step) * (torch.inf if step in OVERFLOWS else 1)
        scaler.scale(loss).backward()
        if unscaled_first:
            scaler.unscale_(scaled.optimizer)
        scaler.step(scaled.optimizer)
        scaler.update()
        if step in OVERFLOWS:
            assert all(torch.equal(mask, before[key]) for key, mask in scaled.masks.items())
            assert all(torch.equal(value, weights[key]) for key, value in scaled.model.state_dict().items())
        else:
            n_real += 1
            plain.optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(plain.model, step)
            loss.backward()
            plain.step()
            assert scaled.n_updates == plain.n_updates == n_real // 4
        require_sparse(scaled)
    assert scaled.n_steps == n_real == 24
    require_equal(scaled, plain)  # scales are powers of 2


def test_steps_that_a_fused_optimizer_skips_are_read_from_the_device_when_an_update_may_be_due() -> None:
    model = network()
    optimizer = OPTIMIZERS["fused-adam"](model.parameters())
    trainer = SparseTraining(model, optimizer, density=0.2, total_steps=40, update_every=4)
    trainer.attach()
    for skipped in (0.0, 1.0, 0.0, 1.0, 1.0, 0.0):
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        optimizer.found_inf = torch.tensor(skipped)  # type: ignore[attr-defined]
        optimizer.grad_scale = torch.tensor(1.0)  # type: ignore[attr-defined]
        optimizer.step()
        assert trainer.n_updates == 0
    del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]
    take_steps(model, optimizer, range(1))
    assert (trainer.n_steps, trainer.n_updates) == (4, 1)
    assert trainer.state_dict()["n_steps"] == 4


def test_accumulation_and_clipping_count_real_steps() -> None:
    model = network()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    trainer = SparseTraining(model, optimizer, **TRAINING)
    trainer.attach()
    for step in range(48):
        (loss_of(model, step) / 3).backward()
        if step % 3 == 2:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            require_sparse(trainer)
    assert (trainer.n_steps, trainer.n_updates) == (16, 4)


def test_an_average_is_as_sparse_as_the_network_at_every_step() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    trainer = SparseTraining(model, optimizer, **TRAINING)
    trainer.attach()
    trainer.mask_also(average)
    for step in range(20):
        take_steps(model, optimizer, range(step, step + 1))
        average.update_parameters(model)
        for name, mask in trainer.masks.items():
            value = average.module.get_parameter(name)
            assert not value[~mask].any()
            assert value[mask].any()
    assert trainer.n_updates == 5
    with pytest.raises(UsageError, match=r"Linear has no weight 0\.weight"):
        trainer.mask_also(nn.Linear(3, 3))


@pytest.mark.parametrize("method", ["sparse-momentum", "rigl"])
def test_an_attached_loop_goes_on_from_a_checkpoint_as_if_nothing_had_happened(method: str) -> None:
    def fresh() -> SparseTraining:
        model = network()
        trainer = SparseTraining(model, OPTIMIZERS["sgd"](model.parameters()), method=method, **TRAINING)
        trainer.attach()
        return trainer

    unbroken, first, second = fresh(), fresh(), fresh()
    take_steps(unbroken.model, unbroken.optimizer, range(22))
    take_steps(first.model, first.optimizer, range(11))
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    take_steps(second.model, second.optimizer, range(11, 22))
    require_equal(unbroken, second)


def test_a_scheduler_a_closure_and_several_groups_change_nothing() -> None:
    model = network()
    groups: list[dict[str, Any]] = [
        {"params": model[:2].parameters()},
        {"params": model[2:].parameters(), "lr": 0.01},
    ]
    optimizer = SGD(groups, lr=0.05, momentum=0.9)
    trainer = SparseTraining(model, optimizer, **TRAINING)
    trainer.attach()
    scheduler = StepLR(optimizer, 5)
    for step in range(8):

        def closure(step: int = step) -> float:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return float(loss.detach())

        assert optimizer.step(closure) > 0
        scheduler.step()
        require_sparse(trainer)
    assert (trainer.n_steps, trainer.n_updates) == (8, 2)


def test_step_and_after_step_of_an_attached_trainer_count_nothing_twice() -> None:
    model = network()
    trainer = SparseTraining(model, OPTIMIZERS["sgd"](model.parameters()), **TRAINING)
    trainer.attach()
    for n in range(1, 9):
        loss_of(model, n).backward()
        if n % 2:
            trainer.step()
        else:
            trainer.optimizer.step()
            trainer.after_step()
        assert trainer.n_steps == n
    assert trainer.n_updates == 2


def _scaled_steps(model: nn.Module, trainer: SparseTraining) -> None:
    scaler = torch.amp.GradScaler("cpu")
    for step in range(3):
        scaler.scale(loss_of(model, step)).backward()
        scaler.step(trainer.optimizer)
        scaler.update()
        trainer.step()


def test_a_gradient_that_is_applied_twice_is_warned_of() -> None:
    model = network()
    trainer = SparseTraining(model, OPTIMIZERS["sgd"](model.parameters()), **TRAINING)
    with pytest.warns(UserWarning, match=r"each gradient is applied twice.*after_step"):
        _scaled_steps(model, trainer)
    take_steps(model, trainer.optimizer, range(2))  # a part of the loop without the trainer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            loss_of(model, step).backward()
            trainer.step()
        with trainer.attach():
            take_steps(model, trainer.optimizer, range(3))
        trainer.step()


def test_a_step_that_the_scaler_leaves_out_does_not_count_in_a_loop_of_after_step() -> None:
    model = network()
    trainer = SparseTraining(model, OPTIMIZERS["sgd"](model.parameters()), **TRAINING)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    counted = []
    for step in range(6):
        loss = loss_of(model, step) * (math.inf if step in (2, 3) else 1)
        trainer.optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(trainer.optimizer)
        scaler.update()
        trainer.after_step()
        counted.append(trainer.n_steps)
    assert counted == [1, 2, 2, 2, 3, 4]
    require_sparse(trainer)


def test_after_step_counts_where_an_optimizer_calls_no_hooks() -> None:
    model = network()
    trainer = SparseTraining(model, OPTIMIZERS["sgd"](model.parameters()), **TRAINING)
    for _ in range(3):
        trainer.after_step()
    assert trainer.n_steps == 3


def test_a_trainer_is_not_kept_by_its_optimizer() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    gone = weakref.ref(SparseTraining(model, optimizer, **TRAINING))
    gc.collect()
    assert gone() is None
    take_steps(model, optimizer, range(1))
    assert copy.deepcopy(optimizer).state_dict().keys() == optimizer.state_dict().keys()


def test_a_detached_trainer_is_called_by_nobody() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    trainer = SparseTraining(model, optimizer, **TRAINING)
    with trainer.attach():
        assert trainer.is_attached
        take_steps(model, optimizer, range(2))
    assert not trainer.is_attached
    take_steps(model, optimizer, range(2))
    assert trainer.n_steps == 2
    trainer.attach()
    trainer.detach()
    trainer.detach()
    take_steps(model, optimizer, range(2))
    assert trainer.n_steps == 2


def test_masks_of_two_trainers_on_one_optimizer_are_refused() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    first, second = (SparseTraining(model, optimizer, density=1.0, update_every=None) for _ in range(2))
    first.attach()
    for trainer in (first, second):
        with pytest.raises(UsageError, match="attached already"):
            trainer.attach()
    first.detach()
    second.attach()


def test_matrices_by_muon_and_the_rest_by_adamw() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))
    matrices = [value for value in model.parameters() if value.ndim == 2]
    others = [value for value in model.parameters() if value.ndim != 2]
    muon, adamw = Muon(matrices, lr=0.02), AdamW(others, lr=1e-3)
    trainer = SparseTraining(model, [muon, adamw], density=0.3, total_steps=40, update_every=4)
    trainer.attach()
    start = {name: mask.clone() for name, mask in trainer.masks.items()}
    for step in range(20):
        x = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        nn.functional.cross_entropy(model(x), x.flatten(1)[:, :4].argmax(1)).backward()
        muon.step()
        adamw.step()
        require_sparse(trainer)
    assert (trainer.n_steps, trainer.n_updates) == (20, 5)
    assert all(not torch.equal(mask, start[name]) for name, mask in trainer.masks.items())
    trainer.detach()
    trainer.step()
    assert trainer.n_steps == 21
    with pytest.raises(UsageError, match="A closure was given, and there are 2 optimizers"):
        trainer.step(lambda: 0.0)


@pytest.mark.parametrize("prepared_first", [False, True])
def test_an_optimizer_of_accelerate_is_the_one_inside(prepared_first: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, plain = network(), network()
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=2, cpu=True)
    optimizer: Any = OPTIMIZERS["sgd"](model.parameters())
    if prepared_first:
        outer, optimizer = accelerator.prepare(model, optimizer)
    trainer = SparseTraining(model, optimizer, **TRAINING)
    trainer.attach()
    if not prepared_first:
        outer, optimizer = accelerator.prepare(model, optimizer)
    other = SparseTraining(plain, OPTIMIZERS["sgd"](plain.parameters()), **TRAINING)
    for step in range(24):
        with accelerator.accumulate(outer):
            accelerator.backward(loss_of(outer, step))
            optimizer.step()
            optimizer.zero_grad()
        require_sparse(trainer)
        (loss_of(plain, step) / 2).backward()
        if step % 2:
            other.step()
            other.optimizer.zero_grad()
    assert trainer.n_steps == 12
    require_equal(trainer, other)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_network_in_distributed_data_parallel_trains_to_the_bits_of_the_plain_one() -> None:
    wrapped, plain = network(), network()
    outer = nn.parallel.DistributedDataParallel(wrapped)
    first = SparseTraining(outer, OPTIMIZERS["sgd"](outer.parameters()), **TRAINING)
    second = SparseTraining(plain, OPTIMIZERS["sgd"](plain.parameters()), **TRAINING)
    for trainer, model in ((first, outer), (second, plain)):
        trainer.attach()
        take_steps(model, trainer.optimizer, range(10))
    require_equal(first, second)
