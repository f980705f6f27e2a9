"""What each process does in the tests of distributed training: torchrun torchrun_worker.py SCENARIO
ARGUMENT...
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparse_export.train.distributed import World, masks_sha256
from sparse_export.train.divergence import FiniteNumbers
from sparse_export.train.loop import train
from sparse_export.train.network import wrapped_for_training
from sparse_export.train.observer import SilentObserver
from sparse_export.train.recipe import Recipe, load_recipe
from sparse_export.train.sparse_training import SparseTraining
from sparse_export.train.stepper import Stepper

RANK = int(os.environ["RANK"])


def recipe(**changes: object) -> Recipe:
    return load_recipe("digits", changes={"epochs": 3, **changes})


class AtStep(SilentObserver):
    """Does something once, at a step, in the first process: the only one that is observed."""

    def __init__(self, step: int, marker: str) -> None:
        self.step, self.marker = step, marker

    def stepped(self, step: int, loss: torch.Tensor) -> None:
        if step == self.step:
            Path(self.marker).touch()


def killed(out: str, victim: str, step: str) -> None:
    """One process is killed, for good, when it has done so many steps."""
    step_weights = Stepper.step_weights

    def then_die(self: Stepper, done: int) -> None:
        step_weights(self, done)
        if int(victim) == RANK and done + 1 == int(step):
            os.kill(os.getpid(), signal.SIGKILL)

    Stepper.step_weights = then_die  # type: ignore[method-assign, assignment]
    train(recipe(), out, device="cpu")


def diverged(out: str) -> None:
    """The last process turns a bit of its mask over after an update, before the masks are compared."""
    compare = SparseTraining._require_same_masks

    def spoilt(self: SparseTraining) -> None:
        if RANK == 1 and self.n_updates:
            mask = next(iter(self.masks.values()))
            mask.view(-1)[0] ^= True
        compare(self)

    SparseTraining._require_same_masks = spoilt  # type: ignore[method-assign]
    train(recipe(), out, device="cpu")


def long(out: str, marker: str) -> None:
    """Goes on for long, slowly, until it is told to stop."""
    step_weights = Stepper.step_weights

    def slowly(self: Stepper, done: int) -> None:
        step_weights(self, done)
        time.sleep(0.02)

    Stepper.step_weights = slowly  # type: ignore[method-assign, assignment]
    train(recipe(epochs=30), out, device="cpu", observer=AtStep(25, marker))


def user_loop(out: str, pattern: str = "") -> None:
    """A loop of somebody's own around DistributedDataParallel; the result is what one process would get."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 3))
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = SparseTraining(
        wrapped, optimizer, density=0.3, pattern=pattern or None, total_steps=40, update_every=10
    )
    if pattern:
        trainer.attach()
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):
        x = torch.randn(16, 12, generator=generator)
        y = x[:, :3].argmax(1)
        loss = nn.functional.cross_entropy(wrapped(x.tensor_split(2)[RANK]), y.tensor_split(2)[RANK])
        optimizer.zero_grad()
        loss.backward()
        (optimizer if pattern else trainer).step()
    names = list(trainer.masks)
    if RANK == 0:
        text = f"{trainer.n_updates} {masks_sha256(trainer.masks)} {trainer.masks_sha256} {' '.join(names)}"
        Path(out).write_text(text)
    dist.barrier()
    os._exit(0)  # how torch takes a process group down is not what is tested


def parts() -> None:
    """Shares of a batch in parts have the gradients of the whole batch, which only the last part exchanges."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    plain, model = (nn.Linear(12, 3) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    world, settings = World(rank=RANK, size=2), recipe(dense=True, accumulate=3, batch_size=10)
    stepper = Stepper(
        settings,
        model,
        wrapped_for_training(model, settings, torch.device("cpu"), world),
        torch.optim.SGD(model.parameters(), lr=0.1),
        None,
        None,
        None,
        device=torch.device("cpu"),
        world=world,
        batch_size=10,
        numbers=FiniteNumbers(run=Path("none"), n_steps=1),
    )
    x, y = torch.randn(10, 12, generator=torch.Generator().manual_seed(1)), torch.arange(10) % 3
    whole = nn.functional.cross_entropy(plain(x), y)
    whole.backward()
    loss = stepper.step_gradients(world.share(x), world.share(y), 0).clone()
    dist.all_reduce(loss)
    torch.testing.assert_close(loss, whole.detach())
    for wanted, found in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    from sparse_export.errors import SparseExportError

    scenario, *arguments = sys.argv[1:]
    try:
        scenarios: dict[str, Callable[..., None]] = {
            "killed": killed,
            "diverged": diverged,
            "long": long,
            "user_loop": user_loop,
            "parts": parts,
        }
        scenarios[scenario](*arguments)
    except SparseExportError as error:
        print(f"rank {RANK}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
