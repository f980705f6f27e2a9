"""The signature of a graph: its inputs and outputs with their types, and names for the sizes that are free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from sparse_export.errors import ArtefactError, UsageError
from sparse_export.graph.collection import without_collection
from sparse_export.graph.concrete import Shape, free_sizes, output_shapes_at, two_examples
from sparse_export.graph.names import free_name
from sparse_export.graph.ranges import integer_ranges
from sparse_export.graph.shapes import without_weights
from sparse_export.signature import BATCH, DTYPES, Signature, TensorInfo, size_text

__all__ = ["axes_from_text", "signature_of", "sizes_from_text", "with_axes"]

AS_IT_IS = "_"
"""An axis of `--axes` that is left as the file has it."""

_BATCHES = (BATCH, "batch_size", "batchsize", "batch_dim", "n_batch", "bs", "n", "b")
_CLEAR = _BATCHES[:6]  # these mean nothing else
_Sizes = tuple[int | str, ...]


def axes_from_text(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read what `--axes` is given.

    Args:
        texts: each the name of an input or output, `=`, and a name for each of its axes, with commas between;
            `_` leaves an axis as it is. For example `state=_,batch,_`.

    Raises:
        UsageError: a text is of another form, or names a tensor twice.
    """
    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, equals, axes = text.rpartition("=")
        told = tuple(axis.strip() for axis in axes.split(","))
        if not equals or not name or not all(told):
            raise UsageError(
                f"--axes {text} does not name the axes of an input.",
                do="Write it as NAME=AXIS,AXIS with _ for an axis that stays, such as state=_,batch,_.",
            )
        if name in found:
            raise UsageError(f"--axes names the axes of {name} twice.", do="Give them once.")
        found[name] = told
    return found


def sizes_from_text(texts: Sequence[str]) -> dict[str, int]:
    """Read what `--size` is given.

    Args:
        texts: each the name of a free size, `=` and a number, such as `height=640`.

    Raises:
        UsageError: a text is of another form, or names a size twice.
    """
    found: dict[str, int] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        if name and number.lstrip("-").isdecimal() and int(number) < 1:
            raise UsageError(
                f"--size {text} is no size.", do=f"Write NAME=NUMBER with 1 or more, as {name}=1."
            )
        if not name or not (number.isascii() and number.isdigit()):
            raise UsageError(
                f"--size {text} is not a size.", do="Write it as NAME=NUMBER, such as height=640."
            )
        if name in found:
            raise UsageError(f"--size gives {name} twice.", do="Give it once.")
        found[name] = int(number)
    return found


@without_collection()
def signature_of(
    model: onnx.ModelProto,
    *,
    axes: Mapping[str, Sequence[str]] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Signature:
    """Determine what a graph takes and gives.

    Names that the file gives to free sizes stay. One without a name is the batch where it is the first of an
    input that has no other axis of that name, else it is called after input and axis. The batch is the size
    that is first in each input whose first size is free; where these differ, or another axis is called batch
    in plain words, the one that is called so.

    Args:
        model: as `open_model` opens it; not changed.
        axes: other names for the axes of inputs and outputs, `_` for an axis that stays. One that is called
            `batch` here is the batch; a first axis that is called otherwise is not.
        sizes: an example by the name of each free size.

    Raises:
        ArtefactError: a tensor is of a type that is not supported, or its number of axes is not known.
        UsageError: `axes` or `sizes` name something that the graph does not have.
    """
    told = dict(axes or {})
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    outputs = list(model.graph.output)
    dtypes = {value.name: _dtype(value) for value in (*inputs, *outputs)}
    _require_known("axes", told, [value.name for value in (*inputs, *outputs)], "The inputs and outputs are")
    shapes = _named([(value.name, _declared(value, told.get(value.name), "input")) for value in inputs], told)
    batch = _batch(shapes, told)
    ranges = integer_ranges(model)
    taken = tuple(
        TensorInfo(
            name=value.name,
            dtype=dtypes[value.name],
            shape=shapes[value.name],
            low=ranges.get(value.name, (None, None))[0],
            high=ranges.get(value.name, (None, None))[1],
        )
        for value in inputs
    )
    given = tuple(
        TensorInfo(name=value.name, dtype=dtypes[value.name], shape=shape)
        for value, shape in zip(outputs, _output_shapes(model, shapes, told), strict=True)
    )
    signature = Signature(inputs=taken, outputs=given, batch=batch, sizes=dict(sizes or {}))
    others = [size for size in signature.free if size != batch]
    if batch in signature.sizes:
        raise UsageError(
            f"--size gives {batch}, which counts the samples of a batch: it needs no example.",
            expected=f"The other free sizes are {', '.join(others)}." if others else "",
            do="Leave it out.",
        )
    _require_known("size", signature.sizes, others, "The free sizes are")
    return signature


def with_axes(model: onnx.ModelProto, signature: Signature) -> onnx.ModelProto:
    """Write the shapes of a signature, with the names of free sizes, into the inputs and outputs of a graph.

    Args:
        model: changed in place.
        signature: of this graph.

    Returns:
        The same model.
    """
    shapes = {one.name: one.shape for one in (*signature.inputs, *signature.outputs)}
    renamed: dict[str, str] = {}
    for value in (*model.graph.input, *model.graph.output):
        if value.name in shapes:
            known = value.type.tensor_type.shape
            old = [size.dim_param for size in known.dim]
            new = shapes[value.name]
            renamed.update(
                (before, after)
                for before, after in zip(old, new, strict=False)
                if before and isinstance(after, str)
            )
            del known.dim[:]
            for size in new:
                known.dim.add(**({"dim_value": size} if isinstance(size, int) else {"dim_param": size}))
    for value in model.graph.value_info:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in renamed:
                dim.dim_param = renamed[dim.dim_param]
    return model


def _require_known(option: str, told: Mapping[str, object], known: Sequence[str], are: str) -> None:
    unknown = [name for name in told if name not in known]
    if unknown:
        raise UsageError(
            f"--{option} names {unknown[0]}, which the network does not have.",
            expected=f"{are} {', '.join(known) or 'none'}.",
            do="Correct the name.",
        )


def _dtype(value: onnx.ValueInfoProto) -> str:
    kind = value.type.WhichOneof("value")
    number = value.type.tensor_type.elem_type
    if kind in (None, "tensor_type") and not number:
        raise ArtefactError(f"The type of {value.name} is not known.", do="Write it into the file.")
    name = kind.removesuffix("_type") if kind not in (None, "tensor_type") else ""
    if not name:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(number).name
        if number != onnx.TensorProto.STRING and dtype in DTYPES:
            return dtype
        name = f"tensor of {onnx.TensorProto.DataType.Name(number).lower()}"
    raise ArtefactError(
        f"{value.name} is a {name}.",
        expected=f"Tensors of {', '.join(DTYPES)} were expected.",
        do="Cut off the part of the graph that makes or takes it.",
    )


def _declared(value: onnx.ValueInfoProto, told: Sequence[str] | None, kind: str) -> _Sizes:
    """The sizes of an input or output by the file and by what was told; "" for one that is free and unnamed."""
    known = value.type.tensor_type
    if not known.HasField("shape") and told is None:
        raise ArtefactError(
            f"The file does not say how many axes its {kind} {value.name} has.",
            do=f"Name them by --axes {value.name}=AXIS,AXIS, with numbers for those that are not free.",
        )
    sizes: list[int | str] = [
        size.dim_value if size.HasField("dim_value") else size.dim_param for size in known.shape.dim
    ] or [""] * len(told or ())
    if told is None:
        return tuple(sizes)
    if len(told) != len(sizes):
        raise UsageError(
            f"--axes names {len(told)} axes of {value.name}, which has {len(sizes)}: "
            f"{size_text([size or '?' for size in sizes])}.",
            do="Name each of them; _ leaves one as it is.",
        )
    for axis, name in enumerate(told):
        size: int | str = int(name) if name.isdigit() else name
        if name == AS_IT_IS or size == sizes[axis]:
            continue
        if isinstance(sizes[axis], int) or (isinstance(size, int) and known.HasField("shape")):
            raise UsageError(
                f"--axes names axis {axis} of {value.name} {name}, and its size in the file is "
                f"{sizes[axis] or 'free'}.",
                do="Name free sizes only; _ leaves an axis as it is.",
            )
        sizes[axis] = size
    return tuple(sizes)


def _named(inputs: Sequence[tuple[str, _Sizes]], told: Mapping[str, Sequence[str]]) -> dict[str, _Sizes]:
    """Names for free sizes that have none."""
    taken = {size for _, shape in inputs for size in shape if isinstance(size, str)} - {""}
    batch = _called_batch(sorted(taken)) or BATCH
    found = {}
    for name, shape in inputs:
        sizes: list[int | str] = []
        for axis, size in enumerate(shape):
            if size == "":
                is_batch = axis == 0 and batch not in shape
                size = batch if is_batch else free_name(f"{name}_{axis}", taken)
                taken.add(size)
            sizes.append(size)
        found[name] = tuple(sizes)
    return found


def _called_batch(names: Sequence[str]) -> str | None:
    """The one that is called like a batch, the clearest first."""
    return next((name for wanted in _BATCHES for name in names if name.lower() == wanted), None)


def _batch(shapes: Mapping[str, _Sizes], told: Mapping[str, Sequence[str]]) -> str | None:
    if any(BATCH in axes for axes in told.values()):
        return BATCH
    firsts = {shape[0] for shape in shapes.values() if shape and isinstance(shape[0], str)}
    others = {axes[0] for name, axes in told.items() if name in shapes and axes} - {AS_IT_IS}
    free = sorted({size for shape in shapes.values() for size in shape if isinstance(size, str)})
    called = _called_batch(free)
    if len(firsts) != 1 or firsts & others:
        return called
    (first,) = firsts
    is_clearer = called is not None and called.lower() in _CLEAR and first.lower() not in _CLEAR
    return called if is_clearer else first


def _output_shapes(
    model: onnx.ModelProto, inputs: Mapping[str, _Sizes], told: Mapping[str, Sequence[str]]
) -> list[_Sizes]:
    """Sizes of the outputs: where they are those of an input, under its name."""
    named = without_weights(model)
    for value in named.graph.input:
        if value.name in inputs:
            del value.type.tensor_type.shape.dim[:]
            for size in inputs[value.name]:
                value.type.tensor_type.shape.dim.add(
                    **({"dim_value": size} if isinstance(size, int) else {"dim_param": size})
                )
    examples = two_examples(free_sizes(named))
    worked_out = zip(*(output_shapes_at(named, sizes) for sizes in examples), strict=True)
    known = {(examples[0][name], examples[1][name]): name for name in examples[0]}
    taken = {size for shape in inputs.values() for size in shape if isinstance(size, str)}
    found = []
    for value, shapes in zip(model.graph.output, worked_out, strict=True):
        declared = _declared_output(value, shapes, told.get(value.name))
        sizes: list[int | str] = []
        for axis, size in enumerate(declared):
            first, second = (one[axis] if one and len(one) == len(declared) else None for one in shapes)
            own = free_name(f"{value.name}_{axis}", taken)
            if _is_told(told.get(value.name), axis):
                sizes.append(size)
            elif first is None or second is None:
                sizes.append(size or own)
            elif first == second:
                sizes.append(first)
            else:
                named_own = own if size in taken or isinstance(size, int) else size or own
                sizes.append(known.get((first, second), named_own))
        found.append(tuple(sizes))
    return found


def _is_told(axes: Sequence[str] | None, axis: int) -> bool:
    return axes is not None and axes[axis] != AS_IT_IS


def _declared_output(
    value: onnx.ValueInfoProto, shapes: Sequence[Shape | None], told: Sequence[str] | None
) -> _Sizes:
    if not value.type.tensor_type.HasField("shape") and shapes[0] is not None:
        return _declared(value, told or [AS_IT_IS] * len(shapes[0]), "output")
    return _declared(value, told, "output")
