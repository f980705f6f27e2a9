"""What sparse training would do no good to: layers frozen, unused or emptied, weights trained before."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from sparse_export.errors import UsageError

__all__ = [
    "EmptyLayers",
    "require_trained",
    "warn_of_left_dense",
    "warn_of_lost",
    "warn_of_trained",
    "warn_of_unfinished",
    "warn_of_unmasked",
    "warn_of_unused",
]

_MOST_BATCHES = 10  # that batch norms may have seen of a network that is not trained yet
_FEWEST_ZEROS = 0.1  # of a layer that was pruned before


def require_trained(parameters: Mapping[str, Tensor]) -> None:
    """Raise UsageError for weights that are frozen. parameters: the masked weights, by name."""
    frozen = [name for name, value in parameters.items() if not value.requires_grad]
    if frozen:
        raise UsageError(
            f"{_listed(frozen)} {'is' if len(frozen) == 1 else 'are'} frozen (requires_grad is False): masks "
            "would be trained there, and weights would not.",
            do=f"Leave them dense by keep_dense={frozen}, or set requires_grad before the trainer is made.",
        )


def warn_of_unused(parameters: Mapping[str, Tensor], optimizers: Iterable[Optimizer]) -> bool:
    """Warn of masked weights that got no gradient in the first step.

    Args:
        parameters: by name, after the backward pass.
        optimizers: what trains them; a weight that is in none is trained in another form at the moment.

    Returns:
        Whether that could be seen; not where no weight has a gradient any more.
    """
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    held = {id(value) for group in groups for value in group["params"]}
    trained = {name: value for name, value in parameters.items() if id(value) in held}
    without = [name for name, value in trained.items() if value.grad is None]
    if len(without) == len(trained):
        return False
    if without:
        warnings.warn(
            f"{_listed(without)} got no gradient in the first step. Where the network does not use "
            f"{'it' if len(without) == 1 else 'them'}, leave dense what masks cannot help: "
            f"keep_dense={without}.",
            stacklevel=2,
        )
    return True


def warn_of_left_dense(model: nn.Module, n_masked: int, computed: Mapping[str, tuple[Tensor, str]]) -> None:
    """Warn where layers that get no mask have more weights than those that get one.

    Args:
        model: the network.
        n_masked: masked weights.
        computed: weights that are no parameters, by name, each with the reason why it has no mask.
    """
    without = {name: (value.numel(), reason) for name, (value, reason) in computed.items()}
    for owner, module in model.named_modules():
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            for name, value in module.named_parameters(prefix=owner, recurse=False):
                if value.dim() > 1:
                    without[name] = value.numel(), f"{type(module).__name__} is masked by no method"
    n_rest = sum(n for n, _ in without.values())
    if n_rest > n_masked:
        name, (_, reason) = next(iter(without.items()))
        others = f" Likewise {_listed(list(without)[1:])}." if len(without) > 1 else ""
        warnings.warn(
            f"Only {n_masked:,} weights are masked, and {n_rest:,} stay dense. {name}: {reason}.{others}",
            stacklevel=2,
        )


def warn_of_trained(
    model: nn.Module, parameters: Mapping[str, Tensor], optimizers: Iterable[Optimizer]
) -> None:
    """Warn where random masks are about to be put on a network that was trained before, as far as that shows.

    Args:
        model: the network.
        parameters: the masked weights, by name, as they were given.
        optimizers: what trains them.
    """
    if any(optimizer.state.get(value) for optimizer in optimizers for value in parameters.values()):
        sign = "the optimizer has made steps"
    elif any(
        module.num_batches_tracked is not None and int(module.num_batches_tracked) > _MOST_BATCHES
        for module in model.modules()
        if isinstance(module, _BatchNorm)
    ):
        sign = "its batch norms have seen batches"
    elif pruned := [name for name, value in parameters.items() if _looks_pruned(value)]:
        sign = f"{pruned[0]} has zeros, as of an earlier pruning"
    else:
        return
    warnings.warn(
        f"The network was trained before ({sign}), and random masks zero most of what it learned. To go on "
        "from its weights, give masks='magnitude'. To go on from a checkpoint of sparse training, make the "
        "trainer first, then load all states, the trainer's last.",
        stacklevel=2,
    )


def _looks_pruned(value: Tensor) -> bool:
    zeros = 1 - int(torch.count_nonzero(value)) / value.numel()
    return _FEWEST_ZEROS <= zeros < 1  # a layer may well start with nothing but zeros


def warn_of_lost(parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Warn of weights that are not 0 where the masks are off, before the step that will zero them.

    Args:
        parameters: the masked weights, by name.
        masks: theirs.
    """
    n_lost, names = _unmasked(parameters, masks)
    if names:
        warnings.warn(
            f"{n_lost} inactive values in {_listed(names)} are not 0, and this step zeroes them; "
            "they were set or loaded after the masks were made. If they come from a checkpoint of this "
            "training, load the trainer's state too. If they come from a trained network, load them first, "
            "then make the trainer with masks='magnitude'.",
            stacklevel=2,
        )


def warn_of_unmasked(parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Warn, where a state is saved, of weights that are not 0 where the masks are off.

    Args:
        parameters: the masked weights, by name.
        masks: theirs.
    """
    n, names = _unmasked(parameters, masks)
    if names:
        warnings.warn(
            f"{n} inactive values in {_listed(names)} are not 0: another optimizer than that of the trainer "
            "steps, or trainer.step() is not called. The network is not sparse, and no run of it can be "
            "written. For another optimizer make a new trainer with masks=trainer.masks and no density, and "
            "load this state into it.",
            stacklevel=3,
        )


def _unmasked(parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> tuple[int, list[str]]:
    """How many weights are not 0 where the masks are off, and the names of those that hold them."""
    found = {
        name: int(torch.count_nonzero(value.detach()[~masks[name]])) for name, value in parameters.items()
    }
    return sum(found.values()), [name for name, n in found.items() if n]


def warn_of_unfinished(
    n_steps: int, total_steps: int | None, *, density: float, wanted: float, cap: int | None
) -> None:
    """Warn of a network that is written before its masks are those of the end of the training.

    Args:
        n_steps, total_steps: made, and given.
        density, wanted: as they stand, and those of the end.
        cap: weights that a pattern still allows in a group; None where that is as the pattern has it.
    """
    if math.isclose(density, wanted, rel_tol=1e-9) and cap is None:
        return
    group = "" if cap is None else f", {cap} weights of a group in place of those of the pattern"
    warnings.warn(
        f"The masks are not yet those of the end: density {density:.4g} in place of {wanted:.4g}{group}, "
        f"after {n_steps} of {total_steps} steps. Train to the end. total_steps counts the steps of the "
        "optimizer: with accumulation they are fewer than the batches.",
        stacklevel=3,
    )


class EmptyLayers:
    """Warns, once a layer, of layers that have no active weight.

    On an accelerator the counts of one update are read at the next look, so that no update waits for them.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._seen: tuple[Sequence[str], Tensor] | None = None

    def note(self, masks: Mapping[str, Tensor]) -> None:
        """Take in masks as they are now."""
        alive = torch.stack([mask.any() for mask in masks.values()])
        self._seen = (list(masks), alive)
        if alive.device.type == "cpu":
            self.look()

    def look(self) -> None:
        """Warn of what was noted last. Reads from the device."""
        if self._seen is None:
            return
        (names, alive), self._seen = self._seen, None
        empty = [name for name, is_alive in zip(names, alive.tolist(), strict=True) if not is_alive]
        new = [name for name in empty if name not in self.names]
        self.names = empty
        if new:
            warnings.warn(
                f"{_listed(new)} {'has' if len(new) == 1 else 'have'} no active weight left: nothing passes "
                f"through. Leave dense by keep_dense={new}, choose redistribution 'own', which keeps each "
                "layer's count, or a higher density.",
                stacklevel=2,
            )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
