"""The growth statistic, read from an optimiser's state."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from sparse_export.errors import UsageError

_ADAM_EPSILON = 1e-8  # the reference's, whatever the optimiser's own eps is


def require_optimizer(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], *, momentum: bool
) -> None:
    """Raise UsageError unless the optimiser trains these parameters, and where wanted keeps a momentum for each."""
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
                f"{name} is not among the optimiser's parameters.",
                expected="Every masked weight was expected to be trained.",
                do="Give it to the optimiser, or name it in keep_dense.",
            )
        if momentum and isinstance(optimizer, SGD) and not group["momentum"] > 0:
            raise UsageError(
                "SGD without momentum has nothing to grow weights by.",
                expected="A momentum above 0 was expected.",
                do="Use torch.optim.SGD(..., momentum=0.9), Adam or AdamW.",
            )


def growth_scores(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The momentum of every weight, by parameter name; tensors of the parameters' shapes.

    SGD: the momentum buffer. Adam and AdamW: exp_avg / (sqrt(exp_avg_sq) + 1e-8), without bias correction, as
    the reference has it. Raises UsageError before the first optimiser step.
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
                f"The optimiser holds no momentum for {name} yet.",
                expected="A mask update comes after at least one optimiser step in which the weight had a gradient.",
            )
    return scores
