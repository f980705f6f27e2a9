"""Start masks by connection sensitivity: the weights whose loss the first batch would miss most."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sparse_export.errors import UsageError
from sparse_export.models.modes import modes_kept
from sparse_export.sparsity import largest_of_all
from sparse_export.train.layers import masked_parameters


def snip_masks(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    density: float,
    keep_dense: Sequence[str] = (),
    combine: Callable[[Tensor], object] | None = None,
) -> dict[str, Tensor]:
    """Keep the largest |weight * gradient| of all layers together, round(density * weights) of them.

    loss: that of one batch through the model, which is in training mode then; its buffers are put back after it.
    combine: sums a gradient over several processes, in place.
    Returns bool by parameter name. Gradients of the parameters are left as they were.
    Raises UsageError when a sensitivity is not finite, or when nothing would be kept.
    Source: Lee, Ajanthan & Torr 2019, "SNIP", algorithm 1.
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
