"""ONNX files as they are read, also those that onnxruntime opens and onnx's own checker or loader refuses.

The latter are no rarities: tools leave out the shape of an output, or write nodes in any order, and caches of
downloaded models hold links to the files.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from sparse_export.errors import ArtefactError, UsageError, first_line
from sparse_export.graph.linked import place_of
from sparse_export.graph.names import graphs_of, inner_graphs, node_lists
from sparse_export.graph.protobuf import parsed_without_large_data
from sparse_export.graph.shapes import SMALL

__all__ = [
    "bare_from_file",
    "linked_tensors",
    "load_linked_data",
    "onnx_from_file",
    "readable",
    "require_linked_data",
    "require_readable",
]

_MOST_WORDS = 300  # characters of the checker's
_FIRST_IR_OF_PLAIN_WEIGHTS = 4  # before it every stored tensor had to be listed as an input
# Types of attributes; old files do not say them.
_OLD = onnx.AttributeProto.UNDEFINED
_WITH_TENSORS = frozenset((onnx.AttributeProto.TENSOR, onnx.AttributeProto.TENSORS, _OLD))
_WITH_SPARSE = frozenset((onnx.AttributeProto.SPARSE_TENSOR, _OLD))


def onnx_from_file(path: str | Path) -> onnx.ModelProto:
    """Read an ONNX model as it is, with its external data, from protobuf whatever the file is called.

    It is for files of this program's own making: onnx's checker does not see them, and data are not read
    through symbolic links. `open_model` opens anybody's.

    Args:
        path: of the file.

    Raises:
        UsageError: there is no such file.
        ArtefactError: it is truncated or something else.
    """
    path = Path(path)
    with readable(path):
        model = _loaded(path)
        linked = [*linked_tensors(model), *linked_tensors(model, sparse=True)]
        load_linked_data(linked, path, links=False)
    return model


def bare_from_file(path: Path, *, links: bool) -> onnx.ModelProto:
    """Read and check an ONNX model but for the data of large tensors that are not sparse.

    Args:
        path: of the file.
        links: as in `load_linked_data`.

    Returns:
        The model. Large tensors say where their data lie: in files beside it, or in this one.

    Raises:
        UsageError: there is no such file.
        ArtefactError: it is truncated or something else.
    """
    with readable(path):
        model = _loaded(path)
        linked = linked_tensors(model)
        small = [one for one in linked if math.prod(one.dims) <= SMALL]
        load_linked_data([*small, *linked_tensors(model, sparse=True)], path, links=links)
        _check(model, path, is_parted=any(_lies_in(tensor, path) for tensor in linked))
    return model


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Say of what goes wrong inside that the file cannot be read.

    Args:
        path: of the model.

    Raises:
        UsageError: there is no such file.
        ArtefactError: protobuf, onnx's checker or the system refuses it.
    """
    if not path.is_file():
        raise UsageError(
            f"{path} is not a file.", expected="An .onnx file was expected.", do="Correct the path."
        )
    try:
        yield
    except onnx.checker.ValidationError as cause:
        raise ArtefactError(
            f"{path} cannot be read as ONNX: {_words(cause)}.",
            expected="A valid ONNX model was expected; these are the words of onnx's checker.",
            do="Export it again.",
        ) from cause
    except (DecodeError, ValueError, OSError) as cause:
        raise ArtefactError(
            f"{path} cannot be read as ONNX: {first_line(cause)}.",
            expected="A whole, valid ONNX model was expected; this one is truncated or something else.",
            do=(
                "Copy it again, with the files beside it that hold its weights if it has any, or export "
                "it again."
            ),
        ) from cause


def _loaded(path: Path) -> onnx.ModelProto:
    """The model but for data that lie in other files, and large ones, which are left in this one."""
    if not path.stat().st_size:
        raise ValueError("it is empty")
    model = parsed_without_large_data(path)
    _require_text(model)
    return model


def _words(cause: BaseException) -> str:
    """What the checker says, in one line of bounded length."""
    text = " ".join(str(cause).split()).rstrip(".") or type(cause).__name__
    return text if len(text) <= _MOST_WORDS else f"{text[:_MOST_WORDS]}…"


def _require_text(message: Message) -> None:
    """Raise UnicodeDecodeError, a ValueError, for a name that is no UTF-8: protobuf gives bytes for it,
    without a word.
    """
    parts: list[Message] = []
    texts: list[str | bytes] = []
    if isinstance(message, onnx.TensorProto):  # whose data would be copied by ListFields
        texts += [message.name, message.doc_string]
        parts += message.external_data
    else:
        for field, value in message.ListFields():
            if field.message_type is not None:
                parts += [value] if isinstance(value, Message) else value
            elif field.type == field.TYPE_STRING:
                texts += [value] if isinstance(value, str | bytes) else value
    for text in texts:
        if isinstance(text, bytes):
            text.decode()
    for part in parts:
        _require_text(part)


def _check(model: onnx.ModelProto, path: Path, *, is_parted: bool) -> None:
    """By path where the weights lie beside the model. is_parted: some lie in its own file, and were not read.

    Raises ValidationError with the checker's words on the model as it is.
    """
    beside = any(tensor.HasField("data_location") for tensor in model.graph.initializer)
    try:
        if not is_parted:  # the checker takes data of other files only for such
            onnx.checker.check_model(path if beside else model)
            return
    except onnx.checker.ValidationError:
        pass
    try:
        require_readable(model, path if is_parted else None)
    except (RuntimeError, ValueError) as fault:  # onnx_ir's
        raise onnx.checker.ValidationError(str(fault)) from None


def require_readable(model: onnx.ModelProto, path: Path | None = None) -> None:
    """Hold a model to onnx's checker but for what onnxruntime makes up for.

    That is: shapes and types of outputs and shapes of inputs that are missing, a graph without a name,
    domains of operators without a version, weights that an old model does not list as inputs, a name that
    is stored twice, and nodes in any order.

    Args:
        model: not changed. Its stored tensors may lie in files that the checker does not open.
        path: of the model, where large tensors were left in its file.

    Raises:
        onnx.checker.ValidationError: something else is wrong with it.
        RuntimeError, ValueError: likewise, by onnx_ir.
    """
    for tensor in model.graph.initializer:
        if not uses_external_data(tensor):
            onnx.checker.check_tensor(tensor)
    for sparse in model.graph.sparse_initializer:
        onnx.checker.check_sparse_tensor(sparse)
    whole = _completed(model)
    for tensor in () if path is None else linked_tensors(whole):
        if path is not None and _lies_in(
            tensor, path
        ):  # an empty one stands for it, which the checker does not look for
            del tensor.external_data[:]
            tensor.ClearField("data_location")
            tensor.dims[:] = [0]
    try:
        onnx.checker.check_model(whole)
    except onnx.checker.ValidationError:
        import onnx_ir as ir  # it takes longer to load than most files to check

        parts = ir.from_proto(whole)
        parts.graph.sort()
        onnx.checker.check_model(ir.to_proto(parts))


def _completed(model: onnx.ModelProto) -> onnx.ModelProto:
    """What the checker is to see of a model: without large weights, which become inputs, and with what is
    missing.
    """
    whole = onnx.ModelProto(ir_version=max(model.ir_version, _FIRST_IR_OF_PLAIN_WEIGHTS))
    if not model.ir_version:
        whole.ClearField("ir_version")
    whole.opset_import.extend(model.opset_import)
    whole.functions.extend(model.functions)
    graph = whole.graph
    graph.name = model.graph.name or "graph"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    for value in (*graph.input, *graph.output):
        if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape"):
            value.type.tensor_type.shape.SetInParent()
    for value in graph.output:
        if not value.HasField("type"):
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
            value.type.tensor_type.shape.SetInParent()
    inputs = {value.name for value in graph.input}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, tensor in stored.items():
        if math.prod(tensor.dims) <= SMALL and not uses_external_data(tensor):
            graph.initializer.append(tensor)
        elif name not in inputs:
            graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    for sparse in model.graph.sparse_initializer:
        values = sparse.values
        graph.input.append(onnx.helper.make_tensor_value_info(values.name, values.data_type, sparse.dims))
    versioned = {entry.domain for entry in whole.opset_import}
    for domain in (
        {node.domain for one in graphs_of(graph) for node in one.node} - versioned - {"", "ai.onnx"}
    ):
        whole.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    return whole


def linked_tensors(model: onnx.ModelProto, *, sparse: bool = False) -> list[onnx.TensorProto]:
    """Find the stored tensors of a model that name a file which has their data.

    Args:
        model: read without them.
        sparse: values and indices of sparse tensors, rather than all other tensors.
    """
    return [one for one in (_parts_of_sparse if sparse else tensors_of)(model) if uses_external_data(one)]


def load_linked_data(tensors: Iterable[onnx.TensorProto], path: Path, *, links: bool = True) -> None:
    """Read the data of tensors from the files that they name, through links as well, which onnx does not follow.

    Args:
        tensors: `linked_tensors` of a model; changed in place.
        path: of the model.
        links: follow symbolic links to these files, rather than refuse them.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is named that is not beside the model, is no plain file, or is too short.
    """
    for tensor in tensors:
        file, offset, length = place_of(tensor, path, links=links)
        with file.open("rb") as stream:
            stream.seek(offset)
            tensor.raw_data = stream.read(length)
        tensor.ClearField("data_location")
        del tensor.external_data[:]


def require_linked_data(tensors: Iterable[onnx.TensorProto], path: Path, *, links: bool) -> None:
    """Hold tensors to having the data that they say the places of; the lengths are written into them.

    Args:
        tensors: as `load_linked_data` takes them, as are `path` and `links`.
        path: of the model.
        links: likewise.

    Raises:
        OSError, ValueError: as `load_linked_data`.
    """
    for tensor in tensors:
        _, _, length = place_of(tensor, path, links=links)
        if not ExternalDataInfo(tensor).length:
            tensor.external_data.add(key="length", value=str(length))


def _lies_in(tensor: onnx.TensorProto, path: Path) -> bool:
    """Do the data of a tensor lie in the file of the model?"""
    return uses_external_data(tensor) and ExternalDataInfo(tensor).location == path.name


def external_files(path: Path) -> tuple[str, ...]:
    """Names of the files beside an ONNX file that hold data of it, each once.

    Args:
        path: of the file.

    Raises:
        UsageError: there is no such file.
        ArtefactError: it is no ONNX file.
    """
    with readable(path):
        model = _loaded(path)
    linked = [*linked_tensors(model), *linked_tensors(model, sparse=True)]
    return tuple(sorted({ExternalDataInfo(one).location for one in linked} - {path.name}))


def _parts_of_sparse(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Values and indices of every sparse tensor of a model."""
    sparse = [one for graph in graphs_of(model.graph) for one in graph.sparse_initializer] + [
        found.sparse_tensor for found in sparse_values(model)
    ]
    yield from (part for one in sparse for part in (one.values, one.indices))


def tensors_of(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Find every tensor that is stored in a model, but for sparse ones: in graphs, functions and nodes."""
    for graph in graphs_of(model.graph):
        yield from graph.initializer
        yield from _tensors_in(graph.node)
    for function in model.functions:
        yield from _tensors_in(function.node)
        for graph in inner_graphs(function.node):
            yield from graph.initializer
            yield from _tensors_in(graph.node)


def _tensors_in(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for found in node.attribute:
            if found.type in _WITH_TENSORS:
                yield from found.tensors
                if found.HasField("t"):
                    yield found.t


def sparse_values(model: onnx.ModelProto) -> Iterator[onnx.AttributeProto]:
    """Find the attributes of nodes of a model that hold a sparse tensor, in its graphs and functions."""
    for nodes in node_lists(model):
        for node in nodes:
            for found in node.attribute:
                if found.type in _WITH_SPARSE and found.HasField("sparse_tensor"):
                    yield found
