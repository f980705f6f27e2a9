"""A torch network written as an ONNX graph in which every masked weight is +0.0."""

from __future__ import annotations

import ast
import contextlib
import copy
import io
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from sparse_export.errors import GateFailed, UsageError
from sparse_export.graph.capture import captured
from sparse_export.graph.constants import attribute
from sparse_export.graph.layers import FLOATS, layer_weight
from sparse_export.graph.model import MAX_WEIGHT_BYTES
from sparse_export.graph.names import free_name, names_of_values, rename_values
from sparse_export.graph.passes.fold_norms import fold_batch_norm
from sparse_export.version import __version__

OPSET = 20
IR_VERSION = 10
INPUT_NAME = "input"
OUTPUT_NAME = "logits"

_ENDS = {"graph:input": INPUT_NAME, "graph:logits": OUTPUT_NAME}
"""What the ends are called while torch exports, which gives a parameter its own name: these are no Python
names.
"""

_SCOPES = "pkg.torch.onnx.name_scopes"


def onnx_from_module(
    module: nn.Module, input_shape: Sequence[int], *, masks: Mapping[str, Tensor]
) -> onnx.ModelProto:
    """The network as ONNX, opset 20, IR 10, with input `input` (batch, *input_shape) and output `logits`.

    The graph holds for every batch size, as far as torch.export can tell; see `captured`.

    module: float32, on any device, in any mode; it is not changed. It takes one tensor and returns one.
    input_shape: of one sample.  masks: by parameter name, True = kept; applied to the copy that is exported.
    Batch norm is folded into the layer before it. No zero is negative, and the graph holds no source path.
    A masked weight has the name of its parameter in the graph, also where it is stored transposed. Another
    parameter or buffer called `input` or `logits` gets an underscore there.

    Raises UsageError when the network cannot be exported or takes a branch that depends on the batch size,
    and GateFailed when a layer of the graph is not the layer of the network: a masked weight that is not
    +0.0, or a kept one that was lost.
    """
    _require_exportable(module, masks)
    network = copy.deepcopy(module).cpu().eval().requires_grad_(False)
    parameters = dict(network.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        parameters[name].masked_fill_(~mask.cpu().bool(), 0.0)
    expected = {name: parameters[name].numpy().copy() for name in masks}
    same = {name: [other for other, p in parameters.items() if p is parameters[name]] for name in masks}
    sample = torch.zeros(2, *input_shape)  # a batch of 1 could be mistaken for a constant
    fold_batch_norm(network, sample)
    try:
        model = _exported(network, sample)
    except UsageError:  # says itself what is wrong
        raise
    except Exception as cause:
        raise UsageError(
            f"The network {type(module).__name__} cannot be exported: {_reason(cause)}.",
            expected=f"A network was expected that torch.export can trace with an input (batch, "
            f"{', '.join(map(str, input_shape))}), batch being free.",
            do="Run torch.export.export on it to see the whole reason.",
        ) from cause
    _require_one_tensor(model, module)
    _unshare(model, dict(network.named_parameters(remove_duplicate=False)))
    positive_zeros(model)
    stored = {}
    for name, mask in masks.items():
        others = parameters.keys() - set(same[name])
        weight = _check_layer(model, name, same[name], others, expected[name], mask.cpu().bool().numpy())
        if weight not in masks:  # stored transposed, or under another name of the same parameter
            stored[weight] = name
    _name_weights(model, stored)
    _name_ends(model.graph)
    _strip(model)
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    onnx.checker.check_model(model, full_check=True)
    return model


def _require_exportable(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        if parameter.dtype is not torch.float32:
            raise UsageError(
                f"{name} is {parameter.dtype}.",
                expected="float32 parameters were expected.",
                do="Convert the network with .float().",
            )
    size_bytes = sum(p.numel() * p.element_size() for p in module.parameters())
    if size_bytes > MAX_WEIGHT_BYTES:
        raise UsageError(
            f"The weights of {type(module).__name__} take {size_bytes:,} bytes.",
            expected=f"At most {MAX_WEIGHT_BYTES:,} were expected: one ONNX file cannot hold more.",
            do="Export a smaller network.",
        )
    for name, mask in masks.items():
        if name not in parameters:
            raise UsageError(
                f"There is a mask for {name!r}, which is not a parameter of {type(module).__name__}.",
                expected=f"Its parameters are: {', '.join(parameters)}.",
            )
        if name in _ENDS.values():
            raise UsageError(
                f"There is a mask for the parameter {name}, which is the name of an end of the graph.",
                expected="Masked weights keep their names in the graph, so other names were expected.",
                do="Rename the parameter, or leave it dense.",
            )
        if mask.shape != parameters[name].shape:
            raise UsageError(
                f"The mask for {name} has shape {tuple(mask.shape)}.",
                expected=f"{tuple(parameters[name].shape)} was expected, the shape of the weight.",
            )


def _exported(network: nn.Module, sample: Tensor) -> onnx.ModelProto:
    chatter = io.StringIO()
    with contextlib.redirect_stdout(chatter), contextlib.redirect_stderr(chatter), torch.no_grad():
        program = torch.onnx.export(
            captured(network, sample),
            (sample,),
            input_names=list(_ENDS)[:1],
            output_names=list(_ENDS)[1:],
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            dynamic_shapes=({0: "batch"},),
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    model = program.model_proto
    model.ir_version = IR_VERSION
    return model


def _reason(cause: BaseException) -> str:
    """The first line of the innermost cause: the exporter wraps it in pages of advice."""
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0].rstrip('.')}" if lines else type(cause).__name__


def _require_one_tensor(model: onnx.ModelProto, module: nn.Module) -> None:
    if len(model.graph.output) != 1:
        raise UsageError(
            f"The network {type(module).__name__} returns {len(model.graph.output)} tensors.",
            expected="One tensor of logits (batch, classes) was expected.",
            do="Wrap it in a module that returns the logits alone.",
        )


def _unshare(model: onnx.ModelProto, parameters: Mapping[str, Tensor]) -> None:
    """Give layers a weight of their own again, in place, where the exporter made one of several that are
    equal.

    It does so with those of up to 1,024 entries: of layers that are all zero, or copies that nobody has
    trained.  parameters: of the network that was exported, by all their names.
    """
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    taken = {*initializers, *(name for node in model.graph.node for name in node.output)}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        found = layer_weight(node, initializers)
        if found is not None:
            users.setdefault(found[0], []).append(node)
    for weight, nodes in users.items():
        if len(nodes) < 2:
            continue
        values = numpy_helper.to_array(initializers[weight])
        stored = {id(parameters[weight]): weight} if weight in parameters else {}
        for node in nodes:
            name = _parameter_of(node, values, parameters)
            if name is None:
                continue
            if stored and id(parameters[name]) not in stored:
                # Stored transposed it has a name that is no parameter's, and is found by where it is used.
                copied = numpy_helper.from_array(values, name if weight in parameters else weight)
                while copied.name in taken:
                    copied.name += "_"
                taken.add(copied.name)
                model.graph.initializer.append(copied)
                stored[id(parameters[name])] = copied.name
            here = stored.setdefault(id(parameters[name]), weight)
            node.input[:] = [here if one == weight else one for one in node.input]


def _parameter_of(
    node: onnx.NodeProto, values: np.ndarray[Any, Any], parameters: Mapping[str, Tensor]
) -> str | None:
    """The parameter of these values that belongs to the torch module a node comes from; None when that is not
    sure.
    """
    scope = next(iter(_scopes(node)[-2:-1]), "")
    equal = [
        name
        for name, parameter in parameters.items()
        if any(np.array_equal(parameter.numpy(), form) for form in (values, values.T))
    ]
    own = [name for name in equal if name.rpartition(".")[0] == scope]
    below = [name for name in equal if not scope or name.startswith(f"{scope}.")]
    found = own or below
    return found[0] if len({id(parameters[name]) for name in found}) == 1 else None


def positive_zeros(model: onnx.ModelProto) -> None:
    """Make every -0.0 of the float initializers +0.0, in place. Folding by a negative scale leaves such."""
    for tensor in model.graph.initializer:
        if tensor.data_type in FLOATS:
            values = numpy_helper.to_array(tensor)
            if np.any((values == 0) & np.signbit(values)):
                values = np.where(values == 0, values.dtype.type(0), values)
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _scopes(node: onnx.NodeProto) -> list[str]:
    """Names of the torch modules a node comes from, outermost ("") first, the operation last."""
    text = next((prop.value for prop in node.metadata_props if prop.key == _SCOPES), "[]")
    return list(ast.literal_eval(text))


def _graph_weight(
    model: onnx.ModelProto, names: Sequence[str], others: AbstractSet[str], expected: np.ndarray[Any, Any]
) -> tuple[onnx.NodeProto, str, np.ndarray[Any, Any]] | None:
    """The node that uses a parameter, the name of its weight, and the weight in torch's axis order.

    names: all names of the parameter; others: those of the other parameters. The exporter keeps the name,
    except where it stores a linear weight transposed: then the node still tells the torch module it is from.
    That is another module where one multiplies by a layer's weight past the layer, as torchvision's Swin does
    in its attention: such a weight is known by its values.
    """
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    users = [(node, *found) for node in model.graph.node if (found := layer_weight(node, initializers))]
    for node, weight, _ in users:
        if weight in names:
            return node, weight, numpy_helper.to_array(initializers[weight])
    owners = {name.rpartition(".")[0] for name in names}
    turned_shape = list(expected.shape[::-1])
    transposed = {
        weight: (node, weight, numpy_helper.to_array(initializers[weight]).T)
        for node, weight, axis in users
        if weight not in others and axis == 0 and list(initializers[weight].dims) == turned_shape
    }
    fitting = [found for found in transposed.values() if owners.intersection(_scopes(found[0])[-2:-1])]
    if len(fitting) != 1:  # none, or a module that multiplies by several parameters of its own
        fitting = [found for found in fitting or transposed.values() if np.array_equal(found[2], expected)]
    return fitting[0] if len(fitting) == 1 else None


def _check_layer(
    model: onnx.ModelProto,
    name: str,
    names: Sequence[str],
    others: AbstractSet[str],
    expected: np.ndarray[Any, Any],
    mask: np.ndarray[Any, Any],
) -> str:
    """Name of the weight in the graph. Raises GateFailed when it is not the parameter, masked."""
    found = _graph_weight(model, names, others, expected)
    if found is None or found[2].shape != expected.shape:
        raise GateFailed(
            f"{name} is not the weight of a Conv, ConvTranspose, Gemm or MatMul in the exported graph.",
            expected=(
                "Each masked parameter was expected to be the weight of one, so that its zeros can be seen."
            ),
            do="Keep it dense (`keep_dense` in a recipe, --keep-dense for sparsify), above all where the "
            "network does not "
            "use it in evaluation, like an auxiliary head; or use it in such a layer.",
        )
    node, stored, weight = found
    n_wrong = int(np.count_nonzero((weight[~mask] != 0) | np.signbit(weight[~mask])))
    if n_wrong:
        raise GateFailed(
            f"{n_wrong} masked weights of {name} are not +0.0 in the exported graph.",
            expected=f"All {int(np.count_nonzero(~mask))} were expected to be.",
        )
    n_lost = _count_lost(_by_output(expected, node), _by_output(weight, node))
    if n_lost:
        raise GateFailed(
            f"{n_lost} kept weights of {name} are zero in the exported graph.",
            expected=(
                "Only those that are zero in the network, or that batch norm scales to zero, were expected."
            ),
        )
    return stored


def _name_weights(model: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """Give stored weights other names, in place; not where the name is taken."""
    taken = names_of_values(model.graph)
    rename_values(model.graph, {weight: name for weight, name in names.items() if name not in taken})


def _name_ends(graph: onnx.GraphProto) -> None:
    """Call the ends of the graph `input` and `logits`; whatever else is called so gets another name."""
    taken = names_of_values(graph) | set(_ENDS.values())
    others = {name: free_name(f"{name}_", taken) for name in _ENDS.values()}
    rename_values(graph, others | _ENDS)


def _by_output(weight: np.ndarray[Any, Any], node: onnx.NodeProto) -> np.ndarray[Any, Any]:
    """A weight as (output channels, inputs of each)."""
    if node.op_type == "ConvTranspose":
        groups = attribute(node, "group", 1)
        weight = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).swapaxes(1, 2)
        return weight.reshape(groups * weight.shape[1], -1)
    return weight.reshape(weight.shape[0], -1)


def _count_lost(before_OI: np.ndarray[Any, Any], after_OI: np.ndarray[Any, Any]) -> int:
    """Weights that became zero without their channel's scale being so small.

    Folding multiplies a channel by one scale; it is read off the channel's largest weight. What it brings
    below the smallest normal number may be zero.
    """
    largest = np.abs(before_OI).argmax(axis=1)[:, None]
    top = np.take_along_axis(before_OI, largest, axis=1).astype(np.float64)
    scale = np.divide(
        np.take_along_axis(after_OI, largest, axis=1), top, out=np.zeros_like(top), where=top != 0
    )
    reachable = np.abs(before_OI * scale) >= np.finfo(np.float32).tiny
    return int(np.count_nonzero(reachable & (after_OI == 0)))


def _strip(model: onnx.ModelProto) -> None:
    """Remove what the exporter notes about sources (stack traces with paths), and sign the model."""
    for holder in _annotated(model):
        holder.ClearField("doc_string")
        holder.ClearField("metadata_props")
    model.producer_name = "sparse-export"
    model.producer_version = __version__
    onnx.helper.set_model_props(model, {"producer": "sparse-export", "producer_version": __version__})


def _annotated(model: onnx.ModelProto) -> Iterator[Any]:
    yield model
    for function in model.functions:
        yield function
        yield from _annotated_nodes(function.node)
        yield from function.value_info
    yield from _annotated_graph(model.graph)


def _annotated_graph(graph: onnx.GraphProto) -> Iterator[Any]:
    yield graph
    yield from (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    yield from _annotated_nodes(graph.node)


def _annotated_nodes(nodes: Sequence[onnx.NodeProto]) -> Iterator[Any]:
    for node in nodes:
        yield node
        for found in node.attribute:
            found.ClearField("doc_string")
            for graph in (*found.graphs, *([found.g] if found.HasField("g") else [])):
                yield from _annotated_graph(graph)
