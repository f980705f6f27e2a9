"""Weights of a torch network that its outputs do not hang on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_export.train.layers import maskable_parameters
from sparse_export.train.user_run import tensors_in

__all__ = ["unused_weights"]

_RUN_AGAIN = "CheckpointFunctionBackward"  # of torch.utils.checkpoint with use_reentrant


def unused_weights(network: nn.Module, sample: Tensor) -> list[str]:
    """Weights that the outputs do not hang on in evaluation, like those of heads that only training has.

    Weights that are frozen count as used, and all do where a part of the network is run again for its gradients,
    which hides its weights. No gradient is computed, and nothing is kept for one.

    Args:
        network: in evaluation mode.
        sample: an input.

    Returns:
        Their names.
    """
    weights = {name: weight for name, weight in maskable_parameters(network).items() if weight.requires_grad}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda _: None, _no_gradient):
        stack = [one.grad_fn for one in tensors_in(network(sample)) if one.grad_fn is not None]
    if not stack:
        return []
    seen = set(stack)
    used: set[int] = set()
    while stack:
        node = stack.pop()
        if node.name() == _RUN_AGAIN:
            return []
        if hasattr(node, "variable"):
            used.add(id(node.variable))
        after = {one for one, _ in node.next_functions if one is not None} - seen
        seen |= after
        stack += after
    return [name for name, weight in weights.items() if id(weight) not in used]


def _no_gradient(_: None) -> Tensor:
    raise AssertionError("a gradient was asked for")
