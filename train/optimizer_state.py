"""What an optimizer remembers of each weight: its momentum, read and forgotten."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from sparse_export.errors import UsageError

__all__ = ["forget_momentum", "momentum_scores", "require_optimizer"]

_STATISTICS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_ADAM_EPSILON = 1e-8  # the reference's, whatever the optimizer's own eps is


def require_optimizer(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], *, momentum: bool
) -> None:
    """Hold an optimizer to training these parameters.

    Args:
        optimizer: of the training.
        parameters: the masked weights, by name.
        momentum: must it keep a momentum for each of them?

    Raises:
        UsageError: it does not train one of them, or keeps no momentum.
    """
    if momentum and not isinstance(optimizer, SGD | Adam | AdamW):
        raise UsageError(
            f"Sparse momentum cannot read the state of {type(optimizer).__name__}.",
            expected="SGD with momentum, Adam or AdamW of torch.optim was expected.",
        )
    group_of = {id(value): group for group in optimizer.param_groups for value in group["params"]}
    for name, value in parameters.items():
        group = group_of.get(id(value))
        if group is None:
            raise UsageError(
                f"{name} is not among the optimizer's parameters.",
                expected="Every masked weight was expected to be trained.",
                do="Give it to the optimizer, or name it in keep_dense.",
            )
        if momentum and isinstance(optimizer, SGD) and not group["momentum"] > 0:
            raise UsageError(
                "SGD without momentum has nothing to grow weights by.",
                expected="A momentum above 0 was expected.",
                do="Use torch.optim.SGD(..., momentum=0.9), Adam or AdamW.",
            )


def momentum_scores(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The momentum of every weight.

    SGD: the momentum buffer. Adam and AdamW: exp_avg / (sqrt(exp_avg_sq) + 1e-8), without bias correction, as
    the reference has it.

    Args:
        optimizer: SGD with momentum, Adam or AdamW.
        parameters: by name.

    Returns:
        Tensors of the parameters' shapes, by name.

    Raises:
        UsageError: the optimizer has not made a step yet.
    """
    scores = {}
    for name, value in parameters.items():
        state = optimizer.state.get(value, {})
        if state.get("momentum_buffer") is not None:
            scores[name] = state["momentum_buffer"]
        elif "exp_avg" in state:
            scores[name] = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + _ADAM_EPSILON)
        else:
            raise UsageError(
                f"The optimizer holds no momentum for {name} yet.",
                expected="A mask update comes after at least one optimizer step in which the weight had a "
                "gradient.",
            )
    return scores


@torch.no_grad()
def forget_momentum(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], born: Mapping[str, Tensor]
) -> None:
    """Zero the optimizer's statistics of weights that are grown, in place.

    A weight that is inactive, and whose momentum is zeroed when it is grown, trains as if its gradient had
    been masked all along, which is how these methods save the dense gradient.

    Args:
        optimizer: of the training.
        parameters: by name.
        born: bool, by name; True where a weight is grown.
    """
    for name, value in parameters.items():
        state = optimizer.state.get(value, {})
        for key in _STATISTICS:
            if isinstance(state.get(key), Tensor):
                state[key].masked_fill_(born[name], 0)
