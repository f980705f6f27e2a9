"""What the layers of a network meet on calibration data: sums of squares, or Gram matrices, of their inputs.

Both are sums over the data, so batches stream through and none is kept. The products of a Gram matrix are
made in float32, over at most 128 MB of inputs at once, and summed up in float64. Memory: for each layer asked
for K float64 numbers, with Gram matrices K² (a convolution's K is input channels of a group times kernel
positions, and each of its groups has a matrix of its own: 4608, the widest of a ResNet-18, comes to 170 MB),
in work 1.5 times that besides, and 128 MB for the inputs. Ask for one layer at a time where that is much, and
`why_no_gram` where even one is too much.

Legend: N samples, C channels, P kernel positions, G groups of channels, K columns as `columns_from_weight`
has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from sparse_export.errors import UsageError

LARGEST_GRAM = 10_000**2
"""Most numbers in the Gram matrices of one layer: 0.8 GB in float64, and 2 GB while a batch is added. A
square of 10,000 takes in the first Linear of AlexNet and the widest convolutions of Wide ResNet-50-2 (9216
columns), and leaves out the first Linear of VGG-16 (25,088), whose matrix and its copies would come to 12.6
GB."""

_CHUNK = 1 << 25  # numbers of unfolded inputs at once

_ATTENTION_INPUTS = {"q_proj_weight": 0, "k_proj_weight": 1, "v_proj_weight": 2}


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """Sums over all inputs that a layer met, on the CPU, in float64; a Gram matrix's of float32 products.

    n_inputs: how many there were: samples, times places of a convolution or tokens.
    squares: (G, K).  gram: (G, K, K), or None where it was not asked for. G is 1 but for grouped
    convolutions, of whose rows each block belongs to one group.
    """

    n_inputs: int
    squares: Tensor
    gram: Tensor | None


@torch.no_grad()
def input_statistics(
    module: nn.Module, batches: Iterable[Tensor], names: Sequence[str], *, gram: bool
) -> dict[str, InputStatistics]:
    """Run the batches through the network, in eval mode, and sum up what the named weights are multiplied by.

    names: parameters, as `maskable_parameters` has them. Returned in the order in which the forward pass
    comes to them; a layer that it never calls, or whose inputs cannot be told (`why_not_calibrated`), is not
    among them. The network is left in the mode that it was in. Raises UsageError for inputs that are NaN or
    infinite.
    """
    sums: dict[str, _Sums] = {}
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
    for name, found in sums.items():
        if not bool(torch.isfinite(found.squares).all()):
            raise UsageError(
                f"On the calibration data the inputs of {name} are NaN or infinite.",
                expected="Finite ones were expected.",
                do="Look at the weights of the layers before it, and at the data.",
            )
    return {
        name: InputStatistics(n_inputs=found.n_inputs, squares=found.squares, gram=found.gram)
        for name, found in sums.items()
    }


def why_not_calibrated(module: nn.Module, name: str) -> str:
    """Why no inputs of a weight can be told, for one that `input_statistics` left out."""
    owner = module.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, _ConvTransposeNd):
        return "calibration does not know transposed convolutions"
    if isinstance(owner, nn.MultiheadAttention):
        return "its queries, keys and values are not one tensor"
    return "the forward pass does not call this layer by itself, so its inputs are not seen"


def why_no_gram(module: nn.Module, name: str) -> str:
    """Why the Gram matrices of a weight's inputs are too large to ask for; empty where they are not."""
    groups = getattr(module.get_submodule(name.rpartition(".")[0]), "groups", 1)
    n_columns = module.get_parameter(name)[0].numel()
    if groups * n_columns**2 <= LARGEST_GRAM:
        return ""
    many = f"{groups} times " if groups > 1 else ""
    return (
        f"the Gram matrix of its inputs would have {many}{n_columns:,} x {n_columns:,} numbers, "
        f"more than the {LARGEST_GRAM:,} that are held in memory"
    )


@dataclass(kw_only=True)
class _Sums:
    n_inputs: int
    squares: Tensor
    gram: Tensor | None


def _owners(module: nn.Module, parameter: nn.Parameter) -> Iterator[tuple[nn.Module, str]]:
    """Every module that holds the parameter itself, with its name there."""
    for part in module.modules():
        for attribute, value in part._parameters.items():
            if value is parameter:
                yield part, attribute


def _hook(name: str, attribute: str, gram: bool, sums: dict[str, _Sums]) -> Callable[..., None]:
    def hook(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for inputs_GNK in _inputs(owner, attribute, args, kwargs):
            inputs = inputs_GNK.detach().float()
            squares = inputs.double().square().sum(1).cpu()
            products = (inputs.mT @ inputs).double().cpu() if gram else None
            if name not in sums:
                sums[name] = _Sums(n_inputs=inputs.shape[1], squares=squares, gram=products)
                continue
            found = sums[name]
            found.n_inputs += inputs.shape[1]
            found.squares += squares
            if found.gram is not None and products is not None:
                found.gram += products

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
        rows = x.reshape(1, -1, x.shape[-1])
        yield from rows.split(max(1, _CHUNK // x.shape[-1]), dim=1)


def _attention_input(attribute: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The input of a projection of attention; None for a joint one whose three inputs are not one tensor."""
    given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    three: list[Tensor | None] = [given.get(key) for key in ("query", "key", "value")]
    if attribute in _ATTENTION_INPUTS:
        return three[_ATTENTION_INPUTS[attribute]]
    return three[0] if three[0] is three[1] is three[2] else None


def _unfolded(layer: _ConvNd, x: Tensor) -> Iterator[Tensor]:
    """The patches that a convolution's kernel meets, (G, patches, P * C), channels last, a few samples at a
    time.
    """
    n_axes = len(layer.kernel_size)
    if x.dim() == n_axes + 1:  # one sample without a batch axis
        x = x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = nn.functional.pad(x, list(layer._reversed_padding_repeated_twice), mode=mode)
    spans = []
    for size, kernel, stride, dilation in zip(
        x.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True
    ):
        length = (size - dilation * (kernel - 1) - 1) // stride + 1
        spans.append(
            [
                slice(start, start + stride * (length - 1) + 1, stride)
                for start in range(0, dilation * kernel, dilation)
            ]
        )
    n_places = math.prod(
        len(range(*span[0].indices(size))) for span, size in zip(spans, x.shape[2:], strict=True)
    )
    n_positions = math.prod(layer.kernel_size)
    for part in x.split(max(1, _CHUNK // max(1, n_places * n_positions * x.shape[1]))):
        patches = torch.stack([part[(slice(None), slice(None), *where)] for where in product(*spans)])
        patches = patches.reshape(n_positions, len(part), layer.groups, x.shape[1] // layer.groups, n_places)
        # (P, N, G, C, places) -> (G, N, places, P, C)
        yield patches.permute(2, 1, 4, 0, 3).reshape(layer.groups, len(part) * n_places, -1)
