"""SNIP: masks by connection sensitivity, drawn from one batch before the first step and never moved.

Prune: before training, all but the weights of largest |weight * gradient| of one batch, of all layers
together. Growth: none. Nothing is rescaled.

Source: Lee, Ajanthan & Torr 2019, "SNIP: single-shot network pruning based on connection sensitivity",
algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sparse_export.errors import UsageError
from sparse_export.models.modes import modes_kept
from sparse_export.sparsity import largest_of_all
from sparse_export.train.layers import masked_parameters
from sparse_export.train.methods.method import NO_CHOICE, RATE_KEYS, START_KEYS, Accepts, Method

__all__ = ["SNIP", "snip_masks"]


def snip_masks(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    density: float,
    keep_dense: Sequence[str] = (),
    combine: Callable[[Tensor], object] | None = None,
) -> dict[str, Tensor]:
    """Keep the largest |weight * gradient| of all layers together.

    Gradients and buffers of the network are left as they were.

    Args:
        model: on the device that it is trained on.
        loss: of one batch through the model, which is in training mode then.
        density: kept / total over the masked weights, above 0 and up to 1.
        keep_dense: shell patterns of parameters or layers that stay dense and are not counted.
        combine: sums a gradient over several processes, in place; None for one process.

    Returns:
        bool by parameter name, round(density * weights) of them True.

    Raises:
        UsageError: a sensitivity is not finite, or nothing would be kept.
    """
    parameters = masked_parameters(model, keep_dense)
    n_kept = round(density * sum(value.numel() for value in parameters.values()))
    if not 0 < density <= 1 or n_kept == 0:
        raise UsageError(
            f"density is {density}.", expected="A number up to 1 that keeps at least one weight was expected."
        )
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    try:
        with modes_kept(model):
            model.train()
            gradients = torch.autograd.grad(loss(), list(parameters.values()))
    finally:
        with torch.no_grad():
            for name, value in model.named_buffers():
                value.copy_(buffers[name])
    scores = {}
    for (name, value), gradient in zip(parameters.items(), gradients, strict=True):
        if combine is not None:
            combine(gradient)
        scores[name] = value.detach() * gradient
    if not all(bool(score.isfinite().all()) for score in scores.values()):
        raise UsageError(
            "The gradient of the first batch is not finite.",
            expected="Finite sensitivities were expected.",
            do="Look at the data, or choose another method.",
        )
    everywhere = {name: torch.ones_like(value, dtype=torch.bool) for name, value in scores.items()}
    count = torch.tensor(n_kept, device=next(iter(scores.values())).device)
    return largest_of_all(scores, everywhere, count)


SNIP = Method(
    name="snip",
    start="sensitivity",
    first_masks=snip_masks,
    freeze=0.0,
    accepts=Accepts(
        **NO_CHOICE,
        freeze=False,
        pattern="no",
        unread=("decay", *RATE_KEYS, "history", "update_every", *START_KEYS),
    ),
)
