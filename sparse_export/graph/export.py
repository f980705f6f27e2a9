"""A torch network written as an ONNX graph in which every masked weight is +0.0."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import numpy_helper
from onnx_ir.passes import common
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from sparse_export.errors import GateFailed, UsageError
from sparse_export.graph.capture import Captured, captured
from sparse_export.graph.copies import copy_of
from sparse_export.graph.example import Example
from sparse_export.graph.layer_uses import LAYOUT
from sparse_export.graph.layers import FLOATS
from sparse_export.graph.model import prepared
from sparse_export.graph.named_network import NamedNetwork
from sparse_export.graph.names import free_name
from sparse_export.graph.passes.fold_norms import fold_norms
from sparse_export.graph.passes.simplify import remove_unused, simplify, transpose_weights
from sparse_export.graph.saved import MAX_WEIGHT_BYTES, tensor_bytes
from sparse_export.graph.shapes import infer_shapes, with_weights_as_inputs
from sparse_export.signature import Array, size_text
from sparse_export.version import __version__

OPSET = 20
IR_VERSION = 10
INPUT_NAME = "input"
OUTPUT_NAME = "logits"

_LAYERS = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
_PREFIX = "network."  # of what belongs to the network, inside NamedNetwork
_SYMBOL = re.compile(r"[A-Za-z_]\w*")


def onnx_from_module(
    module: nn.Module,
    example: Example,
    *,
    masks: Mapping[str, Tensor],
    fold: bool = True,
    transpose: bool = True,
    named: NamedNetwork | None = None,
) -> onnx.ModelProto:
    """Write a network as ONNX, opset 20, IR 10.

    The graph holds for every length of the free sizes, as far as torch.export can tell; see `captured`. Its
    inputs and free sizes are called as in the example, its outputs as `NamedNetwork` says. Every parameter
    stands under its own name, of tied ones under the first (with a mask), and a weight that MatMul multiplies
    by may be stored transposed (see `transpose`). Another parameter or buffer that has the name of an input or output gets an
    underscore. Batch norm is folded into the layer before it. No zero is negative, and the graph holds no
    source path.

    Args:
        module: float32, on any device, in any mode; it is not changed.
        example: of its inputs.
        masks: by parameter name, True = kept; applied to the copy that is exported. Where all that they leave
            out is zero, the copy shares the memory of the parameters.
        fold: fold batch norms; without it every weight keeps its values.
        transpose: store a weight transposed where MatMul multiplies by it so; without it every weight keeps
            its axes, and a Transpose stands before the product.
        named: of this module and example; None to run it once for the names of its outputs.

    Raises:
        UsageError: the network cannot be exported, or takes a branch that depends on a free size.
        GateFailed: a layer of the graph is not the layer of the network: a masked weight is not +0.0, or a
            kept one was lost.
    """
    _require_exportable(module, masks)
    is_masked = _is_masked(module, masks)
    network = copy_of(module, share=is_masked).cpu().eval().requires_grad_(False)
    parameters = dict(network.named_parameters(remove_duplicate=False))
    for name, mask in () if is_masked else masks.items():
        parameters[name].masked_fill_(~mask.cpu().bool(), 0.0)
    try:
        here = example.on("cpu")
        named = (NamedNetwork(network, here) if named is None else named.of(network, here)).eval()
        _require_other_names(named, masks)
        with _quietly():
            found = captured(named)
            model = _exported(found)
    except UsageError:  # says itself what is wrong
        raise
    except Exception as cause:
        raise _not_exported(module, example, cause) from cause
    stored = _name_weights(model, parameters, masks)
    simplify(model, set(stored.values()), whole={stored[name] for name in masks if name in stored})
    transposed = transpose_weights(model, dict.fromkeys(stored.values())) if transpose else set()
    scales = fold_norms(model) if fold else {}
    remove_unused(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _name_ends(model.graph, list(example.tensors), named.outputs)
    proto = ir.to_proto(model)
    for value in model.graph.initializers.values():
        value.const_value = None  # the rules of `simplify` remember the last graph that they saw
    positive_zeros(proto)
    arrays = {tensor.name: tensor for tensor in proto.graph.initializer}
    for name in masks:
        _require_layer(model, name, stored.get(name))
    for name, mask in masks.items():
        weight = numpy_helper.to_array(arrays[stored[name]])
        _require_masked(
            name,
            weight.T if stored[name] in transposed else weight,
            mask.cpu().bool().numpy(),
            _scaled(parameters[name].numpy(), stored[name], scales, transposed),
        )
    _strip(proto)
    _infer_and_check(proto)
    return proto


def _is_masked(module: nn.Module, masks: Mapping[str, Tensor]) -> bool:
    """Are all weights zero that masks leave out?"""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return not any(
        bool(((parameters[name].detach() != 0) & ~mask.to(parameters[name].device).bool()).any())
        for name, mask in masks.items()
    )


def _infer_and_check(model: onnx.ModelProto) -> None:
    """Write the shapes of values into a model, in place, and hold it to onnx's checker, without copies of its weights."""
    problem = infer_shapes(model)
    if problem is not None:
        raise GateFailed(
            f"The shapes of the exported graph cannot be inferred: {problem}.",
            expected="A graph was expected whose shapes follow from its inputs.",
            do="Report it, with the network; nothing was written.",
        )
    onnx.checker.check_model(with_weights_as_inputs(model), full_check=True)
    for tensor in model.graph.initializer:
        if tensor_bytes(tensor) <= MAX_WEIGHT_BYTES:  # the checker is given it as protobuf
            onnx.checker.check_tensor(tensor)


def _require_exportable(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        if parameter.dtype is not torch.float32:
            raise UsageError(
                f"{name} is {parameter.dtype}.",
                expected="float32 parameters were expected.",
                do="Convert the network with .float().",
            )
    for name, mask in masks.items():
        if name not in parameters:
            raise UsageError(
                f"There is a mask for {name!r}, which is not a parameter of {type(module).__name__}.",
                expected=f"Its parameters are: {', '.join(parameters)}.",
            )
        if mask.shape != parameters[name].shape:
            raise UsageError(
                f"The mask for {name} has shape {tuple(mask.shape)}.",
                expected=f"{tuple(parameters[name].shape)} was expected, the shape of the weight.",
            )


def _require_other_names(network: NamedNetwork, masks: Mapping[str, Tensor]) -> None:
    """Raise UsageError where a masked weight and an input or output would have one name."""
    for name in masks:
        if name in network.example.tensors or name in network.outputs:
            raise UsageError(
                f"There is a mask for the parameter {name}, whose name an input or output of the graph has too.",
                expected="Masked weights keep their names in the graph, so other names were expected.",
                do="Rename the parameter, or leave it dense.",
            )


def graphs_of_parameters(network: nn.Module, example: Example) -> list[onnx.ModelProto]:
    """A network's graph as it is in evaluation, and that in training where it is another one.

    Nothing is folded: each parameter and buffer that is computed with is an initializer under its own name,
    of tied ones under the first, with its own axes. Layers of torch are as in evaluation in both.

    Args:
        network: float32, on the CPU; its modes are changed.
        example: of its inputs.

    Raises:
        Exception: whatever forward or torch.export raises.
    """
    found: list[onnx.ModelProto] = []
    in_evaluation = ""
    for is_training in (False, True):
        for part in network.modules():
            part.training = is_training and _may_train_otherwise(part)
        with _quietly():
            program = captured(NamedNetwork(network, example))
            if is_training and (str(program.program.graph) == in_evaluation):
                break
            in_evaluation = str(program.program.graph)
            model = _exported(program)
        tensors: dict[str, Tensor] = dict(network.named_buffers(remove_duplicate=False))
        tensors |= network.named_parameters(remove_duplicate=False)
        own = {one for one in _name_weights(model, tensors, ()).values() if tensors[one].is_floating_point()}
        weights = {one: model.graph.initializers[one] for one in own if one in model.graph.initializers}
        values = {name: weight.const_value for name, weight in weights.items()}
        for weight in weights.values():
            weight.const_value = None  # no rule may look at it: a bias of zeros is one nevertheless
        simplify(model, own, whole=own)
        for name, weight in weights.items():
            weight.const_value = values[name]
        remove_unused(model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        found.append(prepared(ir.to_proto(model)))
        for value in model.graph.initializers.values():
            value.const_value = None  # the rules of `simplify` remember the last graph that they saw
    return found


def _may_train_otherwise(part: nn.Module) -> bool:
    """May a module take another way in training, as one with auxiliary heads does? Layers of torch do not."""
    plain = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
    own = all(base in plain or not base.__module__.startswith("torch.nn") for base in type(part).__mro__)
    return own and any(True for _ in part.parameters())


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    chatter = io.StringIO()
    with contextlib.redirect_stdout(chatter), contextlib.redirect_stderr(chatter), torch.no_grad():
        yield


def _exported(found: Captured) -> ir.Model:
    """The graph as torch has it, with the names of free sizes, and everything else inside `network.`"""
    program = torch.onnx.export(
        found.program,
        opset_version=OPSET,
        dynamo=True,
        optimize=False,
        external_data=False,
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    _name_sizes(program.model, found.symbols)
    program.model.ir_version = IR_VERSION
    return program.model


def _name_sizes(model: ir.Model, names: Mapping[str, str]) -> None:
    """Call free sizes by their names, also in such as are computed of them, in place."""
    made = (value for node in model.graph.all_nodes() for value in node.outputs)
    for value in (*model.graph.inputs, *made):
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and size.value is not None and value.shape is not None:
                value.shape[axis] = _SYMBOL.sub(lambda found: names.get(found[0], found[0]), size.value)


def _name_weights(
    model: ir.Model, parameters: Mapping[str, Tensor], masks: Collection[str]
) -> dict[str, str]:
    """Give parameters and buffers their own names, in place, and whatever else has one of these another.

    Returns:
        By each name of a parameter that the graph has the name that it has there: of tied ones the first with
        a mask, else the first.
    """
    shared: dict[Any, list[str]] = {}
    for name, parameter in parameters.items():
        shared.setdefault(_memory(parameter), []).append(name)
    new = {name: name.removeprefix(_PREFIX) for name in model.graph.initializers}
    stored: dict[str, str] = {}
    for names in shared.values():
        found = [name for name in names if f"{_PREFIX}{name}" in new]
        if not found:
            continue
        first = next((name for name in names if name in masks), names[0])
        new |= {f"{_PREFIX}{name}": first if name == found[0] else name for name in found}
        stored |= dict.fromkeys(names, first)
    _rename(model.graph, new)
    return stored


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """What tensors that are one have in common."""
    if tensor.numel() == 0:
        return (id(tensor),)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _name_ends(graph: ir.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Name the inputs and outputs of a graph, in place; whatever else is called so gets another name."""
    seen: set[ir.Value] = set()
    for number, value in enumerate(graph.outputs):
        if value.producer() is None or value in seen:  # an input, a constant, or one that is there already
            copied = ir.node("Identity", [value])
            copied.outputs[0].shape, copied.outputs[0].type = value.shape, value.type
            graph.append(copied)
            graph.outputs[number] = copied.outputs[0]
        seen.add(graph.outputs[number])
    ends = zip((*graph.inputs, *graph.outputs), (*inputs, *outputs), strict=True)
    _rename(graph, {value.name or "": name for value, name in ends})


def _rename(graph: ir.Graph, new: Mapping[str, str]) -> None:
    """Give values other names, in place. One that has such a name already gets underscores."""
    values = [value for value in _values(graph) if value.name]
    taken = {str(value.name) for value in values if value.name not in new} | set(new.values())
    wanted = set(new.values())
    pending = []
    for value in values:
        name = str(value.name)
        if name in new:
            pending.append((value, new[name]))
        elif name in wanted:
            other = free_name(f"{name}_", taken)
            taken.add(other)
            pending.append((value, other))
    for number, (value, _) in enumerate(pending):  # initializers are kept by name, so out of the way first
        value.name = f"{_PREFIX}:{number}"
    for value, name in pending:
        value.name = name


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    """All values of a graph, those of the graphs inside it too."""
    yield from graph.inputs
    yield from list(graph.initializers.values())
    for inner in graph.subgraphs():
        yield from inner.inputs
        yield from list(inner.initializers.values())
    for node in graph.all_nodes():
        yield from node.outputs


def _require_layer(model: ir.Model, name: str, stored: str | None) -> None:
    """Raise GateFailed for a parameter that is not the weight of a layer, perhaps in another layout."""
    reached = [] if stored is None else [model.graph.initializers.get(stored)]
    while reached:
        value = reached.pop()
        for use in () if value is None else value.uses():
            if use.node.op_type in _LAYERS and not use.node.domain and use.idx < 2:
                return
            if use.node.op_type in LAYOUT and not use.node.domain and use.idx == 0:
                reached.append(use.node.outputs[0])
    raise GateFailed(
        f"{name} is not the weight of a Conv, ConvTranspose, Gemm or MatMul in the exported graph.",
        expected="Each masked parameter was expected to be the weight of one, so that its zeros can be seen.",
        do="Keep it dense (`keep_dense` in a recipe, --keep-dense for sparsify), above all where the network "
        "does not use it in evaluation, like an auxiliary head; or use it in such a layer.",
    )


def _scaled(parameter: Array, stored: str, scales: Mapping[str, Array], transposed: Collection[str]) -> Array:
    """A parameter multiplied by what batch norms multiplied it by."""
    if stored not in scales:
        return parameter
    scale = scales[stored]
    scaled: Array = parameter * (scale.T if stored in transposed else scale)
    return scaled


def _require_masked(name: str, weight: Array, kept: Array, scaled: Array) -> None:
    """Raise GateFailed where a weight is not the parameter, masked and then scaled."""
    n_wrong = int(np.count_nonzero(~kept & ((weight != 0) | np.signbit(weight))))
    if n_wrong:
        raise GateFailed(
            f"{n_wrong} masked weights of {name} are not +0.0 in the exported graph.",
            expected=f"All {int(np.count_nonzero(~kept))} were expected to be.",
        )
    # What a scale brings below the smallest normal number may be zero.
    tiny = np.finfo(np.float32).tiny
    n_lost = int(np.count_nonzero(((scaled >= tiny) | (scaled <= -tiny)) & (weight == 0)))
    if n_lost:
        raise GateFailed(
            f"{n_lost} kept weights of {name} are zero in the exported graph.",
            expected=(
                "Only those that are zero in the network, or that batch norm scales to zero, were expected."
            ),
        )


def _shape_text(example: Example, name: str) -> str:
    sizes = zip(example.axes[name], example.tensors[name].shape, strict=True)
    return size_text([size if free is None else free for free, size in sizes])


def _not_exported(module: nn.Module, example: Example, cause: BaseException) -> UsageError:
    name = type(module).__name__
    if _is_branch_on_values(cause):
        return UsageError(
            f"The network {name} cannot be exported: its forward branches on values that it computes, as the "
            "number of boxes that are left, and a graph takes one way.",
            do="Wrap it in a module that returns its raw outputs, and choose among them outside.",
        )
    inputs = ", ".join(f"{one} {_shape_text(example, one)}" for one in example.tensors)
    return UsageError(
        f"The network {name} cannot be exported: {reason_of(cause)}.",
        expected=f"A network was expected that torch.export can trace with {inputs}, the named sizes being "
        "free.",
        do="Run torch.export.export on it to see the whole reason.",
    )


def _is_branch_on_values(cause: BaseException | None) -> bool:
    while cause is not None and not isinstance(cause, GuardOnDataDependentSymNode):
        cause = cause.__cause__
    return cause is not None


def reason_of(cause: BaseException) -> str:
    """The first line of the innermost cause: the exporter wraps it in pages of advice."""
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0].rstrip('.')}" if lines else type(cause).__name__


def positive_zeros(model: onnx.ModelProto) -> None:
    """Make every -0.0 of the float initializers +0.0, in place. Folding by a negative scale leaves such."""
    for tensor in model.graph.initializer:
        if tensor.data_type in FLOATS:
            values = numpy_helper.to_array(tensor)
            sign = 1 << 8 * values.dtype.itemsize - 1  # alone it is -0.0
            if np.any(values.view(f"u{values.dtype.itemsize}") == sign):
                values = np.where(values == 0, values.dtype.type(0), values)
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _strip(model: onnx.ModelProto) -> None:
    """Remove what the exporter notes about sources (stack traces with paths), and sign the model."""
    for holder in _annotated(model):
        holder.ClearField("doc_string")
        holder.ClearField("metadata_props")
    model.producer_name = "sparse-export"
    model.producer_version = __version__
    onnx.helper.set_model_props(model, {"producer": "sparse-export", "producer_version": __version__})


def remove_source_notes(model: onnx.ModelProto) -> None:
    """Remove what torch's exporters note about sources from a file of somebody's, in place.

    These are stack traces with paths of the machine, in nodes' texts or in properties called `pkg.torch…`. What
    the model itself says, and properties of other names, stay.

    Args:
        model: any.
    """
    for holder in _annotated(model):
        if holder is model:
            continue
        if isinstance(holder, onnx.NodeProto):
            holder.ClearField("doc_string")
        kept = [one for one in holder.metadata_props if not one.key.startswith("pkg.torch")]
        if len(kept) < len(holder.metadata_props):
            copies = [onnx.StringStringEntryProto(key=one.key, value=one.value) for one in kept]
            holder.ClearField("metadata_props")
            holder.metadata_props.extend(copies)


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
