"""Batch norm folded into the convolution or linear layer before it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batch_norm(module: nn.Module, sample: Tensor) -> tuple[str, ...]:
    """Fold every batch norm that follows one layer and nothing else, in place; gives the names of those
    layers.

    module: in eval mode; parameter names stay, a folded batch norm becomes an Identity.  sample: one input
    batch.  A network that torch.fx cannot trace is left as it is, and so is a layer whose weight or whose
    output has a second user: folding would change what that one sees.
    """
    try:
        trace = fx.symbolic_trace(module)
        ranks = _input_ranks(module, sample)
    except Exception:  # noqa: BLE001 - whatever a user's forward raises; the exporter folds then, or tells of it
        return ()
    pairs = list(_pairs(trace.graph, module, ranks))
    for layer_name, norm_name in pairs:
        layer, norm = module.get_submodule(layer_name), module.get_submodule(norm_name)
        _replace(module, layer_name, _fused(layer, norm))
        _replace(module, norm_name, nn.Identity())
    return tuple(layer_name for layer_name, _ in pairs)


def _pairs(graph: fx.Graph, module: nn.Module, ranks: dict[str, int]) -> Iterator[tuple[str, str]]:
    called = Counter(id(module.get_submodule(str(n.target))) for n in graph.nodes if n.op == "call_module")
    read = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    owners = Counter(id(p) for part in module.modules() for p in part.parameters(recurse=False))

    def alone(name: str) -> bool:
        part = module.get_submodule(name)
        own = dict(part.named_parameters(recurse=False)) | dict(part.named_buffers(recurse=False))
        hooked = part._forward_hooks or part._forward_pre_hooks
        return (
            called[id(part)] == 1
            and not hooked
            and not any(f"{name}.{key}" in read for key in own)
            and all(owners[id(p)] == 1 for p in part.parameters(recurse=False))
        )

    for node in graph.nodes:
        source = node.args[0] if node.op == "call_module" and len(node.args) == 1 else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        layer_name, norm_name = str(source.target), str(node.target)
        layer, norm = module.get_submodule(layer_name), module.get_submodule(norm_name)
        if type(norm) not in _NORMS or norm.running_mean is None or norm.running_var is None:
            continue
        if not (alone(layer_name) and alone(norm_name)):
            continue
        plain = type(layer) in _CONVS or (type(layer) in _TRANSPOSED and layer.groups == 1)
        linear = (
            type(layer) is nn.Linear and ranks.get(norm_name) == 2
        )  # of rank 3 it normalises another axis
        if plain or linear:
            yield layer_name, norm_name


def _input_ranks(module: nn.Module, sample: Tensor) -> dict[str, int]:
    ranks: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            ranks[name] = (inputs[0] if inputs else named["input"]).dim()

        return hook

    norms = [(name, part) for name, part in module.named_modules() if type(part) in _NORMS]
    handles = [part.register_forward_pre_hook(note(name), with_kwargs=True) for name, part in norms]
    try:
        with torch.no_grad():
            module(sample)
    finally:
        for handle in handles:
            handle.remove()
    return ranks


def _fused(layer: Any, norm: Any) -> nn.Module:
    norm = _with_scale(norm)
    if isinstance(layer, nn.Linear):
        return fuse_linear_bn_eval(layer, norm)
    fused: nn.Module = fuse_conv_bn_eval(layer, norm, transpose=isinstance(layer, _TRANSPOSED))
    return fused


def _with_scale(norm: Any) -> Any:
    """A norm that scales and shifts: by 1 and 0 where the one that is given does not, since torch folds no
    other.
    """
    whole = copy.deepcopy(norm)
    if whole.weight is None:
        whole.weight = nn.Parameter(torch.ones_like(whole.running_var), requires_grad=False)
    if whole.bias is None:
        whole.bias = nn.Parameter(torch.zeros_like(whole.running_mean), requires_grad=False)
    return whole


def _replace(module: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, part)
