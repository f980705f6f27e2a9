"""ONNX files as they are read, also those that onnxruntime opens and onnx's own checker or loader refuses.

The latter are no rarities: tools leave out the shape of an output, or write nodes in any order, and caches of
downloaded models hold links to the files.
"""

from __future__ import annotations

import contextlib
import math
import stat
from collections.abc import Iterator
from pathlib import Path, PurePath

import onnx
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from sparse_export.errors import ArtefactError, UsageError
from sparse_export.graph.names import graphs_of, inner_graphs, node_lists
from sparse_export.graph.shapes import SMALL

__all__ = [
    "bare_from_file",
    "load_linked_data",
    "onnx_from_file",
    "readable",
    "require_readable",
]

_MOST_WORDS = 300  # characters of the checker's
_FIRST_IR_OF_PLAIN_WEIGHTS = 4  # before it every stored tensor had to be listed as an input


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
        onnx.load_external_data_for_model(model, str(path.parent))
    return model


def bare_from_file(path: Path, *, links: bool) -> onnx.ModelProto:
    """Read and check an ONNX model but for large tensors that lie in files beside it.

    Args:
        path: of the file.
        links: as in `load_linked_data`.

    Raises:
        UsageError: there is no such file.
        ArtefactError: it is truncated or something else.
    """
    with readable(path):
        model = _loaded(path)
        load_linked_data(model, path, links=links, most=SMALL)
        _check(model, path)
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
        reason = str(cause).strip().partition("\n")[0].rstrip(".") or type(cause).__name__
        raise ArtefactError(
            f"{path} cannot be read as ONNX: {reason}.",
            expected="A whole, valid ONNX model was expected; this one is truncated or something else.",
            do=(
                "Copy it again, with the files beside it that hold its weights if it has any, or export "
                "it again."
            ),
        ) from cause


def _loaded(path: Path) -> onnx.ModelProto:
    if not path.stat().st_size:
        raise ValueError("it is empty")
    # By default a suffix decides, also for onnx's forms of text.
    model = onnx.load(path, format="protobuf", load_external_data=False)
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


def _check(model: onnx.ModelProto, path: Path) -> None:
    """By path where the weights lie beside the model: protobuf cannot hold more than 2 GB.

    Raises ValidationError with the checker's words on the model as it is.
    """
    beside = any(tensor.HasField("data_location") for tensor in model.graph.initializer)
    try:
        onnx.checker.check_model(
            path if beside or model.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF else model
        )
    except onnx.checker.ValidationError:
        try:
            require_readable(model)
        except onnx.checker.ValidationError as fault:  # what onnxruntime does not make up for
            raise fault from None
        except (RuntimeError, ValueError) as fault:  # onnx_ir's
            raise onnx.checker.ValidationError(str(fault)) from None


def require_readable(model: onnx.ModelProto) -> None:
    """Hold a model to onnx's checker but for what onnxruntime makes up for.

    That is: shapes and types of outputs and shapes of inputs that are missing, a graph without a name,
    domains of operators without a version, weights that an old model does not list as inputs, a name that
    is stored twice, and nodes in any order.

    Args:
        model: not changed. Its stored tensors may lie in files that the checker does not open.

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


def load_linked_data(
    model: onnx.ModelProto, path: Path, *, links: bool = True, most: int | None = None
) -> None:
    """Read the data that lie beside a model into it, through links as well, which onnx does not follow.

    Args:
        model: read without them; changed in place.
        path: of the model.
        links: follow symbolic links to these files, rather than refuse them.
        most: entries of a tensor; larger ones are left. None for all.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is named that is not beside the model, is no plain file, or is too short.
    """
    for tensor in list(_outside(model)):
        if most is not None and math.prod(tensor.dims) > most:
            continue
        info = ExternalDataInfo(tensor)
        location = PurePath(info.location)
        if location.is_absolute() or ".." in location.parts or not location.parts:
            raise ValueError(
                f"the data of {tensor.name} are said to lie in {info.location!r}, not beside the model"
            )
        file = path.parent / location
        if file.is_symlink() and not links:
            raise ValueError(f"{file} is a symbolic link, which is not followed in a bundle")
        if not stat.S_ISREG(file.stat().st_mode):
            raise ValueError(f"{file} is no plain file")
        with file.open("rb") as stream:
            stream.seek(info.offset or 0)
            content = stream.read(info.length) if info.length else stream.read()
        if info.length and len(content) != info.length:
            raise ValueError(f"{file} ends before the data of {tensor.name} do")
        tensor.raw_data = content
        tensor.ClearField("data_location")
        del tensor.external_data[:]


def external_files(path: Path) -> tuple[str, ...]:
    """Names of the files beside an ONNX file that hold data of it, each once.

    Args:
        path: of the file.

    Raises:
        UsageError: there is no such file.
        ArtefactError: it is no ONNX file.
    """
    with readable(path):
        return tuple(sorted({ExternalDataInfo(tensor).location for tensor in _outside(_loaded(path))}))


def _outside(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """The tensors whose data lie in another file."""
    sparse = [one for graph in graphs_of(model.graph) for one in graph.sparse_initializer] + [
        found.sparse_tensor for found in attributes_of(model) if found.HasField("sparse_tensor")
    ]
    parts = (part for one in sparse for part in (one.values, one.indices))
    yield from (tensor for tensor in (*tensors_of(model), *parts) if uses_external_data(tensor))


def tensors_of(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Find every tensor that is stored in a model, but for sparse ones: in graphs, functions and nodes."""
    functions = (below for function in model.functions for below in inner_graphs(function.node))
    for graph in (*graphs_of(model.graph), *functions):
        yield from graph.initializer
    for found in attributes_of(model):
        yield from found.tensors
        if found.HasField("t"):
            yield found.t


def attributes_of(model: onnx.ModelProto) -> Iterator[onnx.AttributeProto]:
    """Find the attributes of every node of a model: of its graphs and functions."""
    for nodes in node_lists(model):
        for node in nodes:
            yield from node.attribute
