"""Is a network the same function each time it runs?

No graph can be held against one that draws random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_export.errors import UsageError
from sparse_export.graph.example import Example
from sparse_export.graph.named_network import tensors_in
from sparse_export.graph.weight_uses import open_modules

__all__ = ["require_deterministic"]

_TOLERANCE = 1e-5  # of the largest output; sums in another order differ by about 1e-7
_MOST_NAMED = 3


def require_deterministic(network: nn.Module, example: Example) -> None:
    """Run a network twice on the same inputs.

    Args:
        network: float32, in evaluation mode, on the CPU.
        example: of its inputs; zeros would hide dropout of them.

    Raises:
        UsageError: the outputs differ; it names the operators that drew random numbers, and their modules.
    """
    inputs = list(example.tensors.values())
    try:
        with torch.no_grad():
            with open_modules(network) as modules, _Draws(lambda: modules[-1]) as draws:
                first = tensors_in(example.call(network, [one.clone() for one in inputs]))
            second = tensors_in(example.call(network, [one.clone() for one in inputs]))
    except Exception:  # noqa: BLE001 - whatever forward raises of two samples; told where its answers are wanted
        return
    difference = max((_difference(*pair) for pair in zip(first, second, strict=False)), default=0.0)
    if difference == 0:
        return
    drawn = list(draws.found)
    more = f" and {len(drawn) - _MOST_NAMED} more" if len(drawn) > _MOST_NAMED else ""
    by = f", drawing random numbers by {', '.join(drawn[:_MOST_NAMED])}{more}" if drawn else ""
    raise UsageError(
        f"The network {type(network).__name__} is random in evaluation mode{by}: two runs on one input "
        "differ by "
        f"{difference:.3g}.",
        expected="A network was expected that answers the same each time.",
        do="Make random operations follow the mode, as in dropout(x, p, self.training), and call eval().",
    )


def _difference(first: Tensor, second: Tensor) -> float:
    """How far two outputs are apart, 0 where that is rounding; sizes that differ are told elsewhere."""
    if first.shape != second.shape or first.numel() == 0:
        return 0.0
    one, other = first.double(), second.double()
    largest = float(one.nan_to_num().abs().max())
    if torch.allclose(one, other, rtol=0.0, atol=_TOLERANCE * largest, equal_nan=True):
        return 0.0
    return float((one - other).nan_to_num().abs().max())


class _Draws(TorchDispatchMode):
    """Notes the operators that take numbers from a generator, in words."""

    def __init__(self, where: Callable[[], str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.where = where
        self.found: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            name = func.overloadpacket.__name__.rstrip("_")
            self.found[f"{name} in {self.where() or 'its own forward'}"] = None
        return func(*args, **(kwargs or {}))
