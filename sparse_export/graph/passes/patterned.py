"""Networks as `fit_pattern` works on them: a torch module and an ONNX graph, each with its weights by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, Protocol

import onnx
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from sparse_export.graph.channels.graph_groups import find_graph_channels
from sparse_export.graph.channels.groups import find_channels
from sparse_export.graph.channels.orders import tensors_of
from sparse_export.graph.channels.spaces import Channels
from sparse_export.graph.layer_uses import LayerUse, layer_uses
from sparse_export.graph.passes.permute import (
    PermutationReport,
    Search,
    permute_network,
    reduction_axis,
    summed_parts,
)
from sparse_export.graph.passes.permute_graph import permute_graph, stored_weights
from sparse_export.signature import Feeds
from sparse_export.sparsity.pattern import NMPattern, fits

__all__ = ["Gather", "GraphNetwork", "Patterned", "TorchNetwork"]

Gather = Literal["none", "input", "any"]

# Operators after which an input's values stand in the same order, in whatever shape.
_SAME_ORDER = frozenset(("Identity", "Cast", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Dropout"))


class Patterned(Protocol):
    """A network whose channels can be put in another order."""

    @property
    def channels(self) -> Channels:
        """Its spaces, found when they are first asked for."""

    def weight(self, name: str) -> Tensor:
        """As it is now."""

    def axis(self, name: str) -> int:
        """The axis that its layer sums over."""

    def excluded(self, name: str, pattern: NMPattern) -> str:
        """Why a weight has no groups, or empty."""

    def tensors(self) -> Mapping[str, Tensor]:
        """All that can be put in another order, by name."""

    def permute(self, names: Collection[str], pattern: NMPattern, search: Search) -> PermutationReport:
        """Permute channels so that these weights fit better, and prove that nothing else changes."""

    def gatherable(self, names: Sequence[str], gather: Gather) -> list[str]:
        """Those whose layers may be given their input in an order of their own."""


class TorchNetwork:
    """A torch network, changed in place.

    Attributes:
        module: the network.
        masks: moved with their weights, in place.
    """

    def __init__(self, module: nn.Module, sample: Tensor, masks: Mapping[str, Tensor]) -> None:
        self.module, self.masks, self._sample = module, masks, sample

    @cached_property
    def channels(self) -> Channels:
        """Its spaces, found when they are first asked for."""
        return find_channels(self.module, self._sample)

    def weight(self, name: str) -> Tensor:
        """As it is now."""
        return self.module.get_parameter(name).detach()

    def axis(self, name: str) -> int:
        """The axis that its layer sums over."""
        return reduction_axis(self.module, name) or 0

    def tensors(self) -> Mapping[str, Tensor]:
        """Parameters and buffers."""
        return tensors_of(self.module)

    def excluded(self, name: str, pattern: NMPattern) -> str:
        """Why a weight has no groups, or empty."""
        owner, weight = self.module.get_submodule(name.rpartition(".")[0]), self.weight(name)
        if isinstance(owner, nn.MultiheadAttention):
            # Export finds these by name only as weights of one layer, which a mask requires of them in any
            # case.
            if name not in self.masks:
                return "it belongs to a MultiheadAttention, and has no mask"
        elif not isinstance(owner, nn.Linear | _ConvNd) or not name.endswith("weight"):
            return f"it belongs to a {type(owner).__name__}, whose reduction axis is not known"
        n_reduced = weight.shape[self.axis(name)] // summed_parts(self.module, name)
        if isinstance(owner, _ConvNd) and owner.groups > 1 and n_reduced == 1:
            return "each of its channels is summed by itself (depthwise)"
        return _indivisible(weight, self.axis(name), n_reduced, pattern)

    def permute(self, names: Collection[str], pattern: NMPattern, search: Search) -> PermutationReport:
        """Permute the module in place."""
        return permute_network(
            self.module,
            self._sample,
            dict.fromkeys(names, pattern),
            search,
            extra=[self.masks],
            channels=self.channels,
        )

    def gatherable(self, names: Sequence[str], gather: Gather) -> list[str]:
        """Linear layers and ungrouped convolutions."""
        if gather == "none":
            return []
        candidates = [
            name
            for name in names
            if isinstance(owner := self.module.get_submodule(name.rpartition(".")[0]), nn.Linear)
            or (isinstance(owner, _ConvNd) and not isinstance(owner, _ConvTransposeNd) and owner.groups == 1)
        ]
        if gather == "any" or not candidates:
            return candidates
        reading = _input_readers(self.module, self._sample, candidates)
        return [name for name in candidates if name in reading]


class GraphNetwork:
    """An ONNX graph; the one that was given stays as it is.

    Attributes:
        model: as it is now.
    """

    def __init__(self, model: onnx.ModelProto, feeds: Sequence[Feeds], sizes: Mapping[str, int]) -> None:
        self.model, self._feeds, self._sizes = model, feeds, sizes
        self._tensors = stored_weights(model)
        self._uses: dict[str, list[_Use]] = {}
        for use in layer_uses(model):
            if isinstance(use, LayerUse):
                self._uses.setdefault(use.stored, []).append(_Use(use))

    @cached_property
    def channels(self) -> Channels:
        """Its spaces, found when they are first asked for; an order keeps them."""
        return find_graph_channels(self.model, self._sizes)

    def weight(self, name: str) -> Tensor:
        """As it is now."""
        return self._tensors[name]

    def axis(self, name: str) -> int:
        """The axis that its layers sum over, 0 where there is no one."""
        axes = {use.axis for use in self._uses.get(name, ())}
        return (axes.pop() or 0) if len(axes) == 1 else 0

    def tensors(self) -> Mapping[str, Tensor]:
        """Stored floats."""
        return self._tensors

    def excluded(self, name: str, pattern: NMPattern) -> str:
        """Why a weight has no groups, or empty."""
        uses = self._uses.get(name, [])
        if not uses or name not in self._tensors:
            return "no layer multiplies by it as it is stored"
        if None in {use.axis for use in uses} or len({(use.axis, use.n_reduced) for use in uses}) > 1:
            return "its reduction axis is not known"
        weight = self._tensors[name]
        if weight.dim() < 2:
            return "it is a vector"
        if uses[0].n_groups > 1 and uses[0].n_reduced == 1:
            return "each of its channels is summed by itself (depthwise)"
        return _indivisible(weight, self.axis(name), uses[0].n_reduced, pattern)

    def permute(self, names: Collection[str], pattern: NMPattern, search: Search) -> PermutationReport:
        """Permute the graph, and take the new one."""
        done = permute_graph(
            self.model, self._feeds, dict.fromkeys(names, pattern), search, channels=self.channels
        )
        self.model = done.model
        self._tensors = stored_weights(done.model)
        return done.report

    def gatherable(self, names: Sequence[str], gather: Gather) -> list[str]:
        """Weights as they are stored of Gemm, MatMul and ungrouped Conv nodes alone."""
        if gather == "none":
            return []
        from_input = {value.name for value in self.model.graph.input} - {
            tensor.name for tensor in self.model.graph.initializer
        }
        for node in self.model.graph.node:
            if node.op_type in _SAME_ORDER and node.input[0] in from_input:
                from_input.update(node.output[:1])
        found = []
        for name in names:
            readers = [node for node in self.model.graph.node if name in node.input]
            uses = self._uses.get(name, [])
            plain = len(uses) == len(readers) and all(use.takes_a_gather for use in uses)
            if plain and (gather == "any" or all(node.input[0] in from_input for node in readers)):
                found.append(name)
        return found


class _Use:
    """What is asked of a layer that multiplies by a stored tensor, without its values."""

    def __init__(self, use: LayerUse) -> None:
        self.axis = None if use.packed else use.weight.stored_axis(use.axis)
        self.n_reduced, self.n_groups = use.n_reduced, use.channel_groups
        turned = any(a.name == "transA" and a.i for a in use.node.attribute)
        plain = use.node.op_type in ("Gemm", "MatMul", "Conv") and not turned and self.n_groups == 1
        self.takes_a_gather = plain and not use.through and use.position == 1 and use.weight.values.ndim > 1


def _indivisible(weight: Tensor, axis: int, n_reduced: int, pattern: NMPattern) -> str:
    if n_reduced % pattern.m or not fits(tuple(weight.shape), axis, pattern):
        return f"it sums over {n_reduced} channels, of which {pattern} needs a multiple of {pattern.m}"
    return ""


def _input_readers(module: nn.Module, sample: Tensor, names: Sequence[str]) -> set[str]:
    """Weights of layers that are only ever given the network's input, in whatever shape."""
    found: dict[str, list[bool]] = {}
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((2, *sample.shape[1:]), generator=generator).to(sample)
    with _noting_inputs(module, names, x, found), torch.no_grad():
        module(x)
    return {name for name, alike in found.items() if all(alike)}


@contextmanager
def _noting_inputs(
    module: nn.Module, names: Sequence[str], x: Tensor, found: dict[str, list[bool]]
) -> Iterator[None]:
    def noting(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            got = arguments[0] if arguments and isinstance(arguments[0], Tensor) else None
            alike = got is not None and got.numel() == x.numel() and torch.equal(got.flatten(), x.flatten())
            found.setdefault(name, []).append(alike)

        return note

    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    hooks = [
        module.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(noting(name))
        for name in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for part, mode in modes:
            part.training = mode
