"""Any ONNX file as one graph that every stage can work on, and such a graph as a file again."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx.external_data_helper import uses_external_data
from onnx_ir.passes import common as passes

from sparse_export.errors import ArtefactError
from sparse_export.graph.collection import without_collection
from sparse_export.graph.data_sized import last_fixed_ancestors
from sparse_export.graph.ends import axes_from_text, signature_of, sizes_from_text, with_axes
from sparse_export.graph.foreign import (
    bare_from_file,
    linked_tensors,
    load_linked_data,
    readable,
    require_linked_data,
    sparse_values,
    tensors_of,
)
from sparse_export.graph.functions import inlined
from sparse_export.graph.in_order import is_in_order
from sparse_export.graph.mapped import MappedData
from sparse_export.graph.names import free_name, graphs_of, node_lists
from sparse_export.graph.nodes import node_name
from sparse_export.graph.passes.expand24 import expand
from sparse_export.graph.passes.format24 import is_packed
from sparse_export.graph.saved import MAX_WEIGHT_BYTES, save_model, weight_bytes, without_initializers
from sparse_export.graph.shapes import SMALL, infer_shapes, n_entries
from sparse_export.graph.stored_tensors import Read

__all__ = [
    "MAX_WEIGHT_BYTES",
    "axes_from_text",
    "last_fixed_ancestors",
    "load_mapped",
    "open_mapped",
    "open_model",
    "prepared",
    "save_model",
    "signature_of",
    "sizes_from_text",
    "weight_bytes",
    "with_axes",
]

_FIRST_IR_OF_PLAIN_WEIGHTS = 4  # before it every stored tensor had to be listed as an input
_NO_NAMES = ("", "?", "-1", "None")  # of free sizes, by several tools
_Stored = onnx.TensorProto | onnx.SparseTensorProto
_Aside = dict[str, _Stored]


@without_collection()
def open_model(path: str | Path, *, links: bool = True) -> onnx.ModelProto:
    """Open an ONNX file, ready to be worked on.

    What onnxruntime opens is opened. Values keep their names, but for stored tensors of inner graphs whose
    name occurs in another graph too.

    Args:
        path: of the file.
        links: follow symbolic links to the files that hold its data, as in the cache of a download. Bundles
            have none.

    Returns:
        The model with its data, of any size in all. Functions are inlined; the nodes are in order; constants
        are stored tensors of the main graph, but for those that are the output of a graph; what no output
        needs is gone; packed weights are dense; shapes are inferred. A model of an IR version before 4 is one of 4, so that its stored
        tensors need not be inputs.

    Raises:
        UsageError: there is no such file.
        ArtefactError: it is truncated or something else.

    Warns:
        UserWarning: shapes of values could not be inferred.
    """
    path = Path(path)
    bare, linked = _opened(path, links=links)
    with readable(path):
        load_linked_data(linked, path, links=links)
    return bare


@without_collection()
def open_mapped(path: str | Path, *, links: bool = True) -> tuple[onnx.ModelProto, Read]:
    """Open an ONNX file as `open_model` does, but leave large data in its files, to look at them one by one.

    Args:
        path: of the file.
        links: as of `open_model`.

    Returns:
        The model, in which large tensors say where their data lie, and what gives the values of a stored
        tensor of it; but for packed weights, which are dense and in the model.

    Raises:
        UsageError: there is no such file.
        ArtefactError: it, or a file of its data, is truncated or something else.

    Warns:
        UserWarning: shapes of values could not be inferred.
    """
    path = Path(path)
    bare, linked = _opened(path, links=links)
    with readable(path):
        require_linked_data(linked, path, links=links)
    return bare, MappedData(path, links=links)


def load_mapped(model: onnx.ModelProto, path: Path, *, links: bool = True) -> None:
    """Read the data that `open_mapped` left in the files, so that a model is one that `open_model` opened.

    Args:
        model: of `open_mapped`; changed in place.
        path: of the file.
        links: as of `open_model`.

    Raises:
        ArtefactError: they cannot be read.
    """
    with readable(path):
        load_linked_data(linked_tensors(model), path, links=links)


def _opened(path: Path, *, links: bool) -> tuple[onnx.ModelProto, list[onnx.TensorProto]]:
    """A model ready to be worked on, and its large tensors, which say where their data lie."""
    bare = bare_from_file(path, links=links)
    if is_packed(bare):
        with readable(path):
            load_linked_data(linked_tensors(bare), path, links=links)
        bare = expand(bare)
    aside = _set_aside(bare)
    bare = _prepared(bare, str(path))
    return bare, _put_back(bare, aside)


@without_collection()
def prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    """Make a model ready to be worked on, as `open_model` does a file.

    Args:
        model: with its data; not changed.

    Returns:
        Another model.

    Raises:
        ArtefactError: the graph contradicts itself.

    Warns:
        UserWarning: shapes of values could not be inferred.
    """
    bare = without_initializers(model)
    aside = _set_aside(bare)
    for tensor in model.graph.initializer:  # large ones are copied once, in the end
        if _is_large(tensor):
            _leave_place(bare.graph.initializer.add(), tensor, aside)
        else:
            bare.graph.initializer.append(tensor)
    bare = _prepared(bare, model.graph.name or "The model")
    _put_back(bare, aside)
    return bare


def _is_large(tensor: onnx.TensorProto) -> bool:
    return n_entries(tensor) > SMALL and tensor.data_type != onnx.TensorProto.STRING


def _set_aside(model: onnx.ModelProto) -> _Aside:
    """Take the large tensors out of a model, in place; their names, types and sizes stay.

    Sparse tensors are taken too, and what stays looks dense: onnx_ir does not know them.
    """
    aside: _Aside = {}

    def take(place: onnx.TensorProto, stored: _Stored) -> None:
        kept = type(stored)()
        kept.CopyFrom(stored)
        place.Clear()
        _leave_place(place, kept, aside)

    for tensor in tensors_of(model):
        if _is_large(tensor):
            take(tensor, tensor)
    for graph in graphs_of(model.graph):
        for sparse in graph.sparse_initializer:
            take(graph.initializer.add(), sparse)
        del graph.sparse_initializer[:]
    for found in sparse_values(model):
        if found.name == "sparse_value":
            take(found.t, found.sparse_tensor)
            found.ClearField("sparse_tensor")
            found.name, found.type = "value", onnx.AttributeProto.TENSOR
    return aside


def _leave_place(place: onnx.TensorProto, stored: _Stored, aside: _Aside) -> None:
    """Fill an empty tensor with name, type and size of one that is set aside."""
    values = stored.values if isinstance(stored, onnx.SparseTensorProto) else stored
    key = str(len(aside))
    place.name, place.data_type, place.data_location = (
        values.name,
        values.data_type,
        onnx.TensorProto.EXTERNAL,
    )
    place.dims.extend(stored.dims)
    place.external_data.add(key="location", value=key)
    aside[key] = stored


def _put_back(model: onnx.ModelProto, aside: _Aside) -> list[onnx.TensorProto]:
    """Undo `_set_aside`, in place. Returns the tensors whose data are still in a file."""
    if not aside:
        return []

    def stored(place: onnx.TensorProto) -> _Stored | None:
        return aside[place.external_data[0].value] if uses_external_data(place) else None

    for found in [one for nodes in node_lists(model) for node in nodes for one in node.attribute]:
        if isinstance(sparse := stored(found.t), onnx.SparseTensorProto):
            found.sparse_tensor.CopyFrom(sparse)
            found.ClearField("t")
            found.name, found.type = "sparse_value", onnx.AttributeProto.SPARSE_TENSOR
    for graph in graphs_of(model.graph):
        for at in reversed(range(len(graph.initializer))):
            if isinstance(sparse := stored(graph.initializer[at]), onnx.SparseTensorProto):
                graph.sparse_initializer.add().CopyFrom(sparse)
                graph.sparse_initializer[-1].values.name = graph.initializer[at].name
                del graph.initializer[at]
    linked = []
    for tensor in list(tensors_of(model)):
        if isinstance(dense := stored(tensor), onnx.TensorProto):
            name = tensor.name
            tensor.CopyFrom(dense)
            tensor.name = name
            if uses_external_data(tensor):
                linked.append(tensor)
    return linked


def _prepared(bare: onnx.ModelProto, what: str) -> onnx.ModelProto:
    """A model without its large tensors, made ready. what: it is called in a warning or an error."""
    _complete(bare)
    bare = inlined(bare)
    _name_nodes(bare.graph)
    found = bare if is_in_order(bare) else _put_in_order(bare, what)
    problem = infer_shapes(found)
    if problem is not None:
        warnings.warn(f"The shapes of {what} cannot be inferred in full: {problem}.", stacklevel=3)
    return found


def _put_in_order(bare: onnx.ModelProto, what: str) -> onnx.ModelProto:
    """A model whose nodes are sorted and used, and whose stored tensors are those of the main graph."""
    ends = [*bare.graph.input, *bare.graph.output]
    kept = {value.name: onnx.TypeProto.FromString(value.type.SerializeToString()) for value in ends}
    for value in ends:
        if value.type.WhichOneof("value") == "map_type" or value.type.sequence_type.elem_type.HasField(
            "map_type"
        ):
            value.ClearField("type")  # onnx_ir does not know it
    try:
        model = ir.from_proto(bare)
        passes.TopologicalSortPass()(model)
        if bare.ir_version < _FIRST_IR_OF_PLAIN_WEIGHTS:
            passes.RemoveInitializersFromInputsPass()(model)
            model.ir_version = _FIRST_IR_OF_PLAIN_WEIGHTS
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        _name_inner_tensors(model)
        passes.LiftSubgraphInitializersToMainGraphPass()(model)
        passes.RemoveUnusedNodesPass()(model)
        found = ir.to_proto(model)
    except (RuntimeError, ValueError) as cause:
        reason = " ".join(str(cause.__cause__ or cause).split()).rstrip(".")
        raise ArtefactError(
            f"{what} cannot be read as a graph: {reason}.",
            expected="A graph that onnxruntime can run was expected.",
            do="Export it again.",
        ) from cause
    for value in (*found.graph.input, *found.graph.output):
        value.type.CopyFrom(kept[value.name])
    return found


def _complete(model: onnx.ModelProto) -> None:
    """Write into a model, in place, what onnxruntime supposes where it is missing.

    That is a graph's name and versions of operators' domains. Sizes that are not positive, or called `?`, are
    free ones without a name.
    """
    model.graph.name = model.graph.name or "graph"
    for holder in (model, *model.functions):
        for entry in holder.opset_import:
            entry.domain = _domain(entry.domain)
    domains = set()
    for nodes in node_lists(model):
        for node in nodes:
            if node.domain != _domain(node.domain):
                node.domain = _domain(node.domain)
            domains.add(node.domain)
    for domain in sorted(domains - {"", *(entry.domain for entry in model.opset_import)}):
        model.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    for graph in graphs_of(model.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            for size in value.type.tensor_type.shape.dim:
                if size.WhichOneof("value") and (size.dim_param in _NO_NAMES and size.dim_value <= 0):
                    size.Clear()


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Name the nodes that have no name by what they make, in place, inner graphs too."""
    for one in graphs_of(graph):
        taken = {node.name for node in one.node}
        for node in one.node:
            if not node.name:
                node.name = free_name(node_name(node), taken)
                taken.add(node.name)


def _name_inner_tensors(model: ir.Model) -> None:
    """Give stored tensors of inner graphs names that no other graph has, so that they can be lifted."""
    graphs = list(model.graphs())
    taken = Counter(name for graph in graphs for name in _names(graph))
    for graph in graphs[1:]:
        for value in list(graph.initializers.values()):
            name = value.name
            if name is not None and taken[name] > 1:
                taken[name] -= 1
                value.name = free_name(name, taken)
                taken[value.name] += 1


def _names(graph: ir.Graph) -> Iterator[str]:
    """Names of the values of a graph, each once."""
    values = (*graph.inputs, *graph.initializers.values(), *(one for node in graph for one in node.outputs))
    yield from {value.name for value in values if value.name}
