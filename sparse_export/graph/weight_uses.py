"""Where a torch network multiplies by its weights, and along which of their axes: its layers do, and forward
may too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_export.graph.attention import attention_in_parts
from sparse_export.graph.example import Example, as_example
from sparse_export.graph.passes.permute import reduction_axis

__all__ = ["WeightUse", "open_modules", "uses_of_weights", "why_no_axis"]


@dataclass(frozen=True)
class WeightUse:
    """One product. axis: of the weight, that is summed over; None where it is none of its own.

    module: whose forward multiplies, "" for the network's own.
    """

    module: str
    axis: int | None


def why_no_axis(network: nn.Module, sample: Tensor | Example, names: Sequence[str]) -> dict[str, str]:
    """Weights that no pattern along their layer's reduction axis can help, since they are multiplied along
    another too.

    Args:
        network: in any mode; it is not changed.
        sample: one input batch, or an example of the inputs, on its device.
        names: of the weights in question.

    Returns:
        The reason for each such weight: a clause that names the uses.
    """
    reasons = {}
    for name, uses in uses_of_weights(network, sample, names).items():
        wanted = reduction_axis(network, name)
        if all(use.axis == wanted for use in uses):
            continue
        clauses = [f"{_along(use.axis)} {_by(use.module)}" for use in uses]
        reasons[name] = (
            f"it is multiplied {', and '.join(clauses)}, while a pattern holds along axis {wanted}, "
            "which its layer sums over"
        )
    return reasons


def _along(axis: int | None) -> str:
    return "along several axes at once" if axis is None else f"along axis {axis}"


def _by(module: str) -> str:
    return f"in {module}" if module else "in the network's own forward"


def uses_of_weights(
    network: nn.Module, sample: Tensor | Example, names: Sequence[str]
) -> dict[str, tuple[WeightUse, ...]]:
    """The products of a forward pass in evaluation that weights take part in, each of a kind once, in order.

    Args:
        network: in any mode; it is not changed.
        sample: one input batch, or an example of the inputs, on its device.
        names: of the weights in question.

    Returns:
        The uses by name. Products with a copy of a weight, or with something computed of it, are not seen.
    """
    weights = {name: network.get_parameter(name).detach() for name in names}
    found: dict[str, dict[WeightUse, None]] = {name: {} for name in names}
    modes = [(part, part.training) for part in network.modules()]
    network.eval()
    try:
        with (
            attention_in_parts(),
            open_modules(network) as modules,
            torch.no_grad(),
            _Products(weights, found, lambda: modules[-1]),
        ):
            as_example(sample).call(network)
    finally:
        for part, training in modes:
            part.training = training
    return {name: tuple(uses) for name, uses in found.items()}


@contextmanager
def open_modules(network: nn.Module) -> Iterator[list[str]]:
    """The names of the modules whose forward is running, the innermost last."""
    running = [""]

    def entered(name: str) -> Callable[..., None]:
        return lambda *_: running.append(name)

    def left(*_: Any) -> None:
        running.pop()

    handles = []
    for name, part in network.named_modules():
        if name:
            handles += [
                part.register_forward_pre_hook(entered(name)),
                part.register_forward_hook(left, always_call=True),
            ]
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


class _Products(TorchDispatchMode):
    """Notes the products that views of weights take part in."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        found: Mapping[str, dict[WeightUse, None]],
        where: Callable[[], str],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights, self.found, self.where = weights, found, where

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for operand, axis in _operands(func, args):
            for name, weight in self.weights.items():
                if _is_part(operand, weight):
                    self.found[name][WeightUse(self.where(), _axis_of(operand, axis, weight))] = None
        return func(*args, **(kwargs or {}))


def _operands(func: Any, args: Sequence[Any]) -> list[tuple[Tensor, int]]:
    """The operands of a product, each with the axis that is summed over; none for another operator."""
    name = func.overloadpacket.__name__
    if name == "convolution":
        return [(args[1], 0 if args[6] else 1)]
    first = {"mm": 0, "bmm": 0, "mv": 0, "addmm": 1, "baddbmm": 1, "addbmm": 1, "addmv": 1}.get(name)
    if first is None:
        return []
    left, right = args[first], args[first + 1]
    return [(left, left.dim() - 1), (right, max(right.dim() - 2, 0))]


def _is_part(view: Tensor, weight: Tensor) -> bool:
    """Does a tensor lie in the memory of a weight?"""
    if view.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr() or not weight.numel():
        return False
    first, start = int(view.storage_offset()), int(weight.storage_offset())
    end = start + _reach(weight)
    return view.numel() > 0 and start <= first < end and first + _reach(view) <= end


def _reach(tensor: Tensor) -> int:
    """Entries of memory from the first to the last of a tensor."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _axis_of(view: Tensor, axis: int, weight: Tensor) -> int | None:
    """Which axis of a weight an axis of a view of it is."""
    if view.shape == weight.shape and view.stride() == weight.stride():
        return axis
    same = (view.shape[axis], view.stride(axis))
    axes = [i for i in range(weight.dim()) if (weight.shape[i], weight.stride(i)) == same]
    return axes[0] if axes else None
