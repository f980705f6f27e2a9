"""The oracle of calibration: what the layers of a torch network meet, by hooks on its modules.

Legend: G groups of channels, K columns as `columns_from_weight` has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from sparse_export.oneshot.unfolding import InputStatistics, InputSums, patches, rows

__all__ = ["InputStatistics", "input_statistics"]

_ATTENTION_INPUTS = {"q_proj_weight": 0, "k_proj_weight": 1, "v_proj_weight": 2}


@torch.no_grad()
def input_statistics(
    module: nn.Module, batches: Iterable[Tensor], names: Sequence[str], *, gram: bool
) -> dict[str, InputStatistics]:
    """Run the batches through the network, in eval mode, and sum up what the named weights are multiplied by.

    names: parameters, as `maskable_parameters` has them. Returned in the order in which the forward pass
    comes to them; a layer that it never calls, or whose inputs cannot be told, is not among them.
    """
    sums: dict[str, InputSums] = {}
    was_training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with ExitStack() as stack:
            for name in names:
                parameter = module.get_parameter(name)
                for owner, attribute in _owners(module, parameter):
                    hook = _hook(name, attribute, gram, sums)
                    handle = owner.register_forward_pre_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)
            for batch in batches:
                module(batch)
    finally:
        for part, training in was_training.items():
            part.training = training
    found = {}
    for name, one in sums.items():
        statistics = one.statistics()
        assert statistics is not None, "a layer without inputs has no sums"
        found[name] = statistics
    return found


def _owners(module: nn.Module, parameter: nn.Parameter) -> Iterator[tuple[nn.Module, str]]:
    """Every module that holds the parameter itself, with its name there."""
    for part in module.modules():
        for attribute, value in part._parameters.items():
            if value is parameter:
                yield part, attribute


def _hook(name: str, attribute: str, gram: bool, sums: dict[str, InputSums]) -> Callable[..., None]:
    def hook(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for inputs_GNK in _inputs(owner, attribute, args, kwargs):
            sums.setdefault(name, InputSums(gram=gram)).add(inputs_GNK)

    return hook


def _inputs(
    owner: nn.Module, attribute: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[Tensor]:
    """What a weight of a module is about to be multiplied by, as (G, inputs, K), in parts."""
    if isinstance(owner, nn.MultiheadAttention):
        x = _attention_input(attribute, args, kwargs)
    else:
        x = args[0] if args else kwargs.get("input")
    if not isinstance(x, Tensor) or isinstance(owner, _ConvTransposeNd):
        return
    if isinstance(owner, _ConvNd):
        yield from _unfolded(owner, x)
    elif isinstance(owner, nn.Linear | nn.MultiheadAttention):
        yield from rows(x)


def _attention_input(attribute: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The input of a projection of attention; None for a joint one whose three inputs are not one tensor."""
    given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    three: list[Tensor | None] = [given.get(key) for key in ("query", "key", "value")]
    if attribute in _ATTENTION_INPUTS:
        return three[_ATTENTION_INPUTS[attribute]]
    return three[0] if three[0] is three[1] is three[2] else None


def _unfolded(layer: _ConvNd, x: Tensor) -> Iterator[Tensor]:
    if x.dim() == len(layer.kernel_size) + 1:  # one sample without a batch axis
        x = x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = nn.functional.pad(x, list(layer._reversed_padding_repeated_twice), mode=mode)
    yield from patches(x, layer.kernel_size, layer.stride, layer.dilation, layer.groups)
