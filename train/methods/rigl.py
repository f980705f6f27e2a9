"""RigL: as many weights as a layer lost are grown in it again where the gradient is largest.

Prune: the smallest |weight| of each layer, by the prune rate. Redistribution: each layer gets back what it
lost. Growth: the inactive weights of largest |gradient| in the step before the update; a grown weight starts
without momentum. Schedule: masks move for three quarters of the training, the prune rate falls along a cosine
to 0.

Source: Evci et al. 2020, "Rigging the lottery: making all tickets winners", algorithm 1. On purpose
different: masks are updated after an optimizer step, not in place of one.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sparse_export.errors import UsageError
from sparse_export.train.methods.method import Growth, Method, Moment
from sparse_export.train.methods.swap_weights import swap_weights

__all__ = ["GRADIENT", "RIGL", "gradient_scores"]


def gradient_scores(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradient of the last step, of inactive weights too.

    Args:
        parameters: by name.

    Returns:
        Their gradients, by name.

    Raises:
        UsageError: a parameter has none.
    """
    scores = {}
    for name, value in parameters.items():
        if value.grad is None:
            raise UsageError(
                f"{name} has no gradient.",
                expected="growth='gradient' expected that of the step before the mask update.",
                do="Do not clear gradients between the step and the update, or choose another growth.",
            )
        scores[name] = value.grad
    return scores


def _scores(at: Moment) -> dict[str, Tensor]:
    return gradient_scores(at.parameters)


GRADIENT = Growth(name="gradient", scores=_scores, reads_gradient=True)

RIGL = Method(
    name="rigl",
    update=swap_weights,
    prune="magnitude",
    redistribution="own",
    growth=GRADIENT,
    forgets=True,
    freeze=0.75,
    final_prune_rate=0.0,
)
