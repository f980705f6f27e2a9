"""A network between flat lists of named tensors, whatever its forward takes and returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparse_export.errors import UsageError
from sparse_export.graph.attention import attention_in_parts
from sparse_export.graph.example import Example
from sparse_export.graph.names import free_name
from sparse_export.graph.tensor_arrays import array_from_tensor
from sparse_export.signature import BATCH, Array, Feeds, Signature, TensorInfo

__all__ = ["NamedNetwork", "named_tensors", "run_module", "signature_of_call", "tensors_in"]

_Step = tuple[Literal["item", "attribute"], Any]
_ONLY = ""


class NamedNetwork(nn.Module):
    """Calls a network with tensors in the order of its example's, and returns its tensors in one tuple.

    Outputs are named as forward returns them. A tensor alone is `logits` where it is floats
    (batch, classes), else `output`; of several in a tuple or list they are `output_0`, `output_1` and so on;
    in mappings and dataclasses each has its key. Names of nested ones are joined by dots, and None is left
    out.

    Attributes:
        network: the network.
        example: of its inputs.
        outputs: the names, in order.
    """

    def __init__(self, network: nn.Module, example: Example) -> None:
        """Run the network on the example once, in the mode that it is in.

        Args:
            network: on the device of the example.
            example: of its inputs.

        Raises:
            UsageError: it returns something that is no tensor, or no tensor.
            Exception: whatever forward raises.
        """
        super().__init__()
        self.network = network
        self.example = example
        with torch.no_grad(), attention_in_parts():
            returned = example.call(network)
        found = list(_tensors(returned, (), _ONLY))
        if not found:
            raise UsageError(
                f"The network {type(network).__name__} returns no tensor.", do="Return the outputs."
            )
        self.outputs: list[str] = []
        self.paths: list[tuple[_Step, ...]] = []
        for path, name, tensor in found:
            alone = len(found) == 1 and all(isinstance(key, int) for _, key in path)
            wanted = _name_alone(tensor, example) if alone else name
            self.outputs.append(free_name(wanted, {*example.tensors, *self.outputs}))
            self.paths.append(path)

    def of(self, network: nn.Module, example: Example) -> NamedNetwork:
        """The same of a copy of the network, which is not run.

        Args:
            network: the copy.
            example: as that of this one, on the copy's device.
        """
        made = NamedNetwork.__new__(NamedNetwork)
        nn.Module.__init__(made)
        made.network, made.example = network, example
        made.outputs, made.paths = self.outputs, self.paths
        return made

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the network.

        Args:
            tensors: in the order of the example's.

        Returns:
            The outputs, in the order of their names.
        """
        returned = self.example.call(self.network, tensors)
        return tuple([_at(returned, path) for path in self.paths])


def run_module(network: NamedNetwork, feeds: Feeds) -> dict[str, Array]:
    """Run a torch network on arrays.

    Args:
        network: in the mode to run it in.
        feeds: by the names of its inputs.

    Returns:
        The outputs by name, as the exported graph has them.

    Raises:
        UsageError: an input is missing or of another type.
        Exception: whatever forward raises.
    """
    with torch.inference_mode(), attention_in_parts():
        outputs = network(*network.example.from_feeds(feeds))
    return {name: array_from_tensor(one) for name, one in zip(network.outputs, outputs, strict=True)}


def signature_of_call(network: nn.Module, example: Example) -> Signature:
    """What a network takes and gives, found by running it with other lengths of the free sizes.

    Args:
        network: in evaluation mode, on the device of the example.
        example: of its inputs.

    Returns:
        The signature. The range of an integer input is that of the example.

    Raises:
        UsageError: it does not take another length of a free size, or returns something that is no tensor.
    """
    named = NamedNetwork(network, example)
    sizes = example.all_sizes
    first = _shapes(named, example)
    axes: list[list[int | str]] = [list(shape) for shape in first]
    for name, size in sizes.items():
        other = _shapes(named, example.with_sizes({name: size + 1}))
        for sized, before, after in zip(axes, first, other, strict=True):
            for axis, (a, b) in enumerate(zip(before, after, strict=True)):
                if a != b:
                    sized[axis] = name if (a, b) == (size, size + 1) else f"{name}_{axis}"
    with torch.no_grad(), attention_in_parts():
        outputs = named(*example.tensors.values())
    return Signature(
        inputs=tuple(
            TensorInfo(
                name=name,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(
                    size if axis is None else axis
                    for size, axis in zip(tensor.shape, example.axes[name], strict=True)
                ),
                **_range(tensor),
            )
            for name, tensor in example.tensors.items()
        ),
        outputs=tuple(
            TensorInfo(name=name, dtype=str(one.dtype).removeprefix("torch."), shape=tuple(shape))
            for name, one, shape in zip(named.outputs, outputs, axes, strict=True)
        ),
        batch=BATCH if BATCH in sizes else None,
        sizes=example.sizes,
    )


def _range(tensor: Tensor) -> dict[str, int]:
    """The smallest and the largest of integers."""
    if tensor.is_floating_point() or tensor.dtype is torch.bool or not tensor.numel():
        return {}
    return {"low": int(tensor.min()), "high": int(tensor.max())}


def _shapes(named: NamedNetwork, example: Example) -> list[tuple[int, ...]]:
    """Of the outputs for an example. Raises UsageError where the network does not take it."""
    try:
        with torch.no_grad(), attention_in_parts():
            return [tuple(one.shape) for one in named(*example.tensors.values())]
    except Exception as cause:  # whatever forward raises
        given = ", ".join(f"{name} {tuple(one.shape)}" for name, one in example.tensors.items())
        raise UsageError(
            f"The network {type(named.network).__name__} does not take inputs {given}: "
            f"{str(cause) or type(cause).__name__}.",
            expected="Every length of its free sizes was expected to be taken.",
            do="Name only those sizes as free that are.",
        ) from cause


def tensors_in(returned: Any) -> list[Tensor]:
    """The tensors that a forward returned, in order.

    Raises:
        UsageError: there is something else.
    """
    return [tensor for _, _, tensor in _tensors(returned, (), _ONLY)]


def named_tensors(returned: Any) -> dict[str, Tensor]:
    """The tensors that a forward returned, by the names that the outputs of its graph have.

    Args:
        returned: several tensors in tuples, lists, mappings and dataclasses.

    Raises:
        UsageError: there is something else.
    """
    found: dict[str, Tensor] = {}
    for _, name, tensor in _tensors(returned, (), _ONLY):
        found[free_name(name, found)] = tensor
    return found


def _name_alone(tensor: Tensor, example: Example) -> str:
    if example.lone_output is not None:
        return example.lone_output
    is_logits = tensor.is_floating_point() and tensor.dim() == 2
    return "logits" if is_logits and tensor.shape[0] == example.all_sizes.get(BATCH) else "output"


def _tensors(
    value: Any, path: tuple[_Step, ...], name: str
) -> Iterator[tuple[tuple[_Step, ...], str, Tensor]]:
    """Where each tensor lies, and its name. Raises UsageError for what is no tensor."""
    if value is None:
        return
    if isinstance(value, Tensor):
        yield path, name or "output", value
        return
    inside: list[tuple[_Step, Any]]
    if isinstance(value, Mapping):  # HF's outputs are dataclasses as well, and mappings without None
        inside = [(("item", key), one) for key, one in value.items()]
    elif dataclasses.is_dataclass(value):
        keys = [one.name for one in dataclasses.fields(value)]
        inside = [(("attribute", key), getattr(value, key)) for key in keys]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        inside = [(("attribute", key), getattr(value, key)) for key in value._fields]
    elif isinstance(value, tuple | list):
        inside = [(("item", number), one) for number, one in enumerate(value)]
    else:
        raise UsageError(
            f"forward returns {_article(type(value).__name__)}{f' as {name}' if name else ''}.",
            expected="Tensors were expected, lists, tuples, mappings and dataclasses of them, and None.",
            do="Wrap the network in one that returns tensors alone"
            + (", or call it with use_cache=False." if type(value).__name__.endswith("Cache") else "."),
        )
    is_list = isinstance(value, tuple | list) and not hasattr(value, "_fields")
    for step, one in inside:
        first = f"output_{step[1]}" if is_list else str(step[1])
        yield from _tensors(one, (*path, step), f"{name}.{step[1]}" if name else first)


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiouAEIOU' else 'a'} {word}"


def _at(value: Any, path: tuple[_Step, ...]) -> Any:
    for kind, key in path:
        value = value[key] if kind == "item" else getattr(value, key)
    return value
