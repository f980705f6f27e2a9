"""Is a network the same function each time it runs?

No graph can be held against one that draws random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_export.errors import UsageError
from sparse_export.graph.weight_uses import open_modules

__all__ = ["require_deterministic"]

_TOLERANCE = 1e-5  # of the largest output; sums in another order differ by about 1e-7
_SEED = 21
_MOST_NAMED = 3


def require_deterministic(network: nn.Module, input_shape: Sequence[int]) -> None:
    """Run a network twice on the same random inputs.

    Args:
        network: float32, in evaluation mode, on the CPU.
        input_shape: of one sample.

    Raises:
        UsageError: the outputs differ; it names the operators that drew random numbers, and their modules.
    """
    inputs = torch.randn((2, *input_shape), generator=torch.Generator().manual_seed(_SEED))
    try:
        with torch.no_grad():
            with open_modules(network) as modules, _Draws(lambda: modules[-1]) as draws:
                first = network(inputs.clone())
            second = network(inputs.clone())
    except Exception:  # noqa: BLE001 - whatever forward raises of two samples; told where its answers are wanted
        return
    if not isinstance(first, Tensor) or first.shape != second.shape or first.numel() == 0:
        return  # told elsewhere, where it matters
    largest = float(first.nan_to_num().abs().max())
    if torch.allclose(first, second, rtol=0.0, atol=_TOLERANCE * largest, equal_nan=True):
        return
    difference = float((first - second).nan_to_num().abs().max())
    drawn = list(draws.found)
    more = f" and {len(drawn) - _MOST_NAMED} more" if len(drawn) > _MOST_NAMED else ""
    by = f", drawing random numbers by {', '.join(drawn[:_MOST_NAMED])}{more}" if drawn else ""
    raise UsageError(
        f"The network {type(network).__name__} is random in evaluation mode{by}: two runs on one input "
        "differ by "
        f"{difference:.3g}.",
        expected="A network was expected that answers the same each time.",
        do="Let random operations ask for the mode, as in dropout(x, p, self.training), and run eval().",
    )


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
