"""Fits the kept weights of all layers of a torch network together, so that it gives what the dense one gives.

The walk corrects layer after layer by linear algebra, each towards its own output. Here gradients go through the
non-linearities to what lies ahead, as in SNOWS (Lucas and Mazumder 2024, arXiv 2411.18376), with Adam in place
of its Newton steps, and ahead of a layer lies the whole network: reconstruction of three layers ahead, one after
the other, came less close to the dense outputs. No labels are read.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_export.errors import UsageError
from sparse_export.oneshot.recovering import n_held_of
from sparse_export.oneshot.recovery import JointResult
from sparse_export.tasks.task import Task
from sparse_export.train.augment import crop_flip, draw_crops
from sparse_export.train.teacher import FEATURES, Teacher, layers_learnt, relative_distance
from sparse_export.train.user_run import tensors_in

__all__ = ["JointFit", "fit_jointly"]

_STEPS = 600
_LAYERS_WEIGHT = 100.0  # beside the loss of the outputs
_BATCH = 64  # samples of a step, at most
_RATE = 1e-3  # of Adam, at first; it falls along a cosine to 0


@dataclass(frozen=True, kw_only=True)
class JointFit:
    """How weights are fitted.

    Attributes:
        task: what the network is for.
        device: to compute on.
        batch_size: samples that go through the network at once, at most.
        augments: crop and mirror the samples, as in training.
        seed: of the order of the samples, and of the crops.
        n_steps: of Adam.
    """

    task: Task
    device: torch.device
    batch_size: int
    augments: bool = False
    seed: int = 0
    n_steps: int = _STEPS


def fit_jointly(
    network: nn.Module, dense: nn.Module, masks: Mapping[str, Tensor], samples: Tensor, how: JointFit
) -> JointResult:
    """Fit a pruned network to the dense one, and keep that where it helps on samples that it is not fitted to.

    Kept weights, biases, and scales and shifts of norms are fitted; statistics of batch norms stay, and so do
    masks. One sample in five decides, 64 at most, as of `sparsify_recovering`, and they are the same ones.

    Args:
        network: changed in place; afterwards on the CPU, in eval mode.
        dense: of the same kind, with the same order of channels.
        masks: of its sparse weights, by name.
        samples: calibration inputs, (N, …).
        how: steps and the like.

    Returns:
        Whether it helped.

    Raises:
        UsageError: there are fewer than five samples, or the network gives no floats.
    """
    n_held = n_held_of(len(samples), "--recover")
    samples = samples.to(how.device)
    fitted, held = samples[:-n_held], samples[-n_held:]
    network.to(how.device).eval()
    dense.to(how.device).eval()
    before = copy.deepcopy(network.state_dict())
    without = _change(network, dense, held, how.batch_size)
    teacher = Teacher(dense, how.task, layers_learnt(FEATURES, masks), layers_weight=_LAYERS_WEIGHT)
    _fit(network, teacher, {name: mask.to(how.device) for name, mask in masks.items()}, fitted, how)
    changed = _change(network, dense, held, how.batch_size)
    kept = changed < without  # False for NaN
    if not kept:
        network.load_state_dict(before)
    network.cpu()
    return JointResult(
        n_steps=how.n_steps, kept=kept, change_without=without, change_with=changed, n_samples=n_held
    )


def _fit(
    network: nn.Module, teacher: Teacher, masks: Mapping[str, Tensor], samples: Tensor, how: JointFit
) -> None:
    parameters = [one for one in network.parameters() if one.is_floating_point()]
    had_gradients = [one.requires_grad for one in parameters]
    for one in parameters:
        one.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=_RATE)
    generator = torch.Generator().manual_seed(how.seed)
    size = min(_BATCH, how.batch_size, len(samples))
    next_batch = _batches(len(samples), size, generator)
    for step in range(how.n_steps):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * (1 + math.cos(math.pi * step / how.n_steps)) / 2
        x = samples[next_batch().to(samples.device)]
        if how.augments:
            x = crop_flip(x, draw_crops(size, generator))
        optimizer.zero_grad()
        teacher.loss(x, network, network).backward()
        optimizer.step()
        with torch.no_grad():
            for name, mask in masks.items():
                network.get_parameter(name).mul_(mask)
    for one, had in zip(parameters, had_gradients, strict=True):
        one.grad = None
        one.requires_grad_(had)


def _batches(n: int, size: int, generator: torch.Generator) -> Callable[[], Tensor]:
    """Gives the numbers of the next samples, of which no order is begun before too few of the last are left."""
    left = torch.empty(0, dtype=torch.int64)

    def next_batch() -> Tensor:
        nonlocal left
        if len(left) < size:
            left = torch.randperm(n, generator=generator)
        found, left = left[:size], left[size:]
        return found

    return next_batch


@torch.no_grad()
def _change(network: nn.Module, dense: nn.Module, held: Tensor, batch_size: int) -> float:
    """The squared change of the outputs by their variance, as the mean over the outputs."""
    found, wanted = (
        [[one for one in tensors_in(side(x)) if one.is_floating_point()] for x in held.split(batch_size)]
        for side in (network, dense)
    )
    pairs = [
        (torch.cat([one[at] for one in found]), torch.cat([one[at] for one in wanted]))
        for at in range(len(wanted[0]))
    ]
    if not pairs:
        raise UsageError(
            "The network gives no output of floats, and the dense network's outputs were to be fitted.",
            do="Leave the step joint of --recover out.",
        )
    return float(relative_distance(pairs))
