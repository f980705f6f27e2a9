"""The proof that a permutation leaves a network's function as it was."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from sparse_export.errors import GateFailed
from sparse_export.graph.channels.groups import first_samples
from sparse_export.graph.channels.orders import Orders, apply_orders, tensors_of
from sparse_export.graph.copies import copy_of

_N_RANDOM = 2
_N_SAMPLES = 8  # of the sample; more would only take longer


def difference_by(module: nn.Module, sample: Tensor | tuple[Tensor, ...], orders: Orders) -> float:
    """The largest difference of outputs by a permutation, over the largest output, in a float64 copy.

    Once as the network is, and once with every parameter and statistic drawn anew: a network that is fresh,
    or has a last layer of zeros, would not tell a wrong order. NaN, or outputs of another structure, give
    infinity.
    """
    inputs = first_samples(sample, _N_SAMPLES)
    generator = torch.Generator().manual_seed(0)
    batches = [inputs] + [tuple(_random_like(x, generator) for x in inputs) for _ in range(_N_RANDOM)]
    with _of_the_network():
        double = copy_of(module).double().eval()
    worst = 0.0
    for drawn in (False, True):
        if drawn:
            _draw(double, generator)
        with _of_the_network():
            before = [_outputs(double, batch) for batch in batches]
        apply_orders(double, orders, ())  # its faults are ours
        with _of_the_network():
            after = [_outputs(double, batch) for batch in batches]
        for a, b in zip(before, after, strict=True):
            worst = max(worst, _apart(a, b))
    return worst


@contextmanager
def _of_the_network() -> Iterator[None]:
    """Turn whatever a network raises into a GateFailed."""
    try:
        yield
    except Exception as cause:
        raise GateFailed(
            f"Whether a permutation keeps the function cannot be checked: {type(cause).__name__}: {cause}.",
            expected="A network that can be copied and runs in float64 was expected. It was left as it was.",
            do="Train or export it without a permutation.",
        ) from cause


def _random_like(x: Tensor, generator: torch.Generator) -> Tensor:
    if not x.is_floating_point():
        return x
    return torch.randn(x.shape, generator=generator).to(x)


def _draw(module: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for tensor in tensors_of(module).values():
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            noise = torch.rand(tensor.shape, generator=generator).to(tensor)
            scale = tensor.abs().mean()
            scale = torch.where(scale > 0, scale, torch.ones_like(scale) * 0.1)
            signed = bool((tensor < 0).any()) or not bool((tensor > 0).any())  # variances stay above 0
            tensor.copy_((noise * 2 - 1 if signed else noise + 0.5) * scale)


def _outputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        out = module(*(x.double() if x.is_floating_point() else x.clone() for x in inputs))
    return [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor)]


def _apart(before: list[Tensor], after: list[Tensor]) -> float:
    if len(before) != len(after) or any(a.shape != b.shape for a, b in zip(before, after, strict=True)):
        return float("inf")
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        if not a.numel():
            continue
        largest = float(a.abs().max())
        apart = float((a.double() - b.double()).abs().max())
        if math.isnan(largest) or math.isnan(apart):
            return float("inf")
        worst = max(worst, apart / largest if largest else apart)
    return worst
