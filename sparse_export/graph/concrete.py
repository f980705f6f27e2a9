"""Shapes of the values of a graph once its free sizes are numbers: what follows from them alone is worked out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import onnx

from sparse_export.graph.output_sizes import n_made
from sparse_export.graph.shapes import SMALL, infer_shapes, n_entries, tensor_types, without_weights

if TYPE_CHECKING:  # the imports take longer than most graphs, which do not need them
    import onnx_ir as ir

__all__ = ["Shape", "free_sizes", "inferred_at", "output_shapes_at", "shapes_at", "two_examples"]

Shape = tuple[int | None, ...]
_FACTORS = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
_MOST = 4096  # entries of a value that is computed; it is a shape, or places in one


def free_sizes(model: onnx.ModelProto) -> dict[str, list[tuple[str, int]]]:
    """Find the free sizes of a graph's inputs.

    Args:
        model: whose stored tensors are no inputs, even where they are listed as such.

    Returns:
        By name the input and axis of each place that it stands at. One without a name is called `input[axis]`.
    """
    stored = {tensor.name for tensor in model.graph.initializer}
    found: dict[str, list[tuple[str, int]]] = {}
    for value in model.graph.input:
        if value.name not in stored:
            for axis, size in enumerate(value.type.tensor_type.shape.dim):
                if not size.HasField("dim_value"):
                    name = size.dim_param or f"{value.name}[{axis}]"
                    found.setdefault(name, []).append((value.name, axis))
    return found


def two_examples(places: Mapping[str, Sequence[tuple[str, int]]]) -> tuple[dict[str, int], dict[str, int]]:
    """Choose numbers for free sizes that networks are likely to take, all different.

    Args:
        places: as `free_sizes` finds them.

    Returns:
        Two of them by name, in which no two sizes have the same ratio, so that half of one is not taken for
        another; those of the second are larger, so that no product of them is the same. Sizes that are the first of an input are small; the others are divisible by 64, as those of
        pictures often have to be.
    """
    n_before = {True: 0, False: 0}
    first: dict[str, int] = {}
    second: dict[str, int] = {}
    for name, at in places.items():
        is_small = any(axis == 0 for _, axis in at)
        i = n_before[is_small]
        n_before[is_small] += 1
        a, b = (_FACTORS[(i + later) % len(_FACTORS)] for later in (0, 1))
        first[name], second[name] = (a + 1, b + 1) if is_small else (64 * a, 64 * b)
    return first, second


def shapes_at(model: onnx.ModelProto, sizes: Mapping[str, int]) -> dict[str, Shape]:
    """Work out the shapes of values for given sizes of the inputs.

    Args:
        model: not changed.
        sizes: a number by the name of each free size, as `free_sizes` calls it.

    Returns:
        By name of the value. A size is None where it depends on more than the sizes of the inputs. A value
        is missing where its number of axes is not known, or nothing is left of it.
    """
    return _shapes(_folded(_with_numbers(model, sizes)).graph)


def inferred_at(model: onnx.ModelProto, sizes: Mapping[str, int]) -> dict[str, Shape]:
    """Infer the shapes of values for given sizes of the inputs, without computing what follows from shapes.

    Args:
        model: not changed.
        sizes: likewise.

    Returns:
        As `shapes_at`, faster and with more that is not known.
    """
    bare = _with_numbers(model, sizes)
    infer_shapes(bare)
    return _shapes(bare.graph)


def output_shapes_at(model: onnx.ModelProto, sizes: Mapping[str, int]) -> list[Shape | None]:
    """Work out the shapes of a graph's outputs, as `shapes_at` does.

    Where one branch of an If does not tell a size and the other does, as when a network takes pictures of two
    sizes, it is that of the other.

    Args:
        model: not changed.
        sizes: likewise.

    Returns:
        The shapes in order, None where not even the number of axes is known.
    """
    quick = inferred_at(model, sizes)
    shapes_of_outputs = [quick.get(value.name, (None,)) for value in model.graph.output]
    if not any(None in shape for shape in shapes_of_outputs):
        return list(shapes_of_outputs)
    graph = _folded(_with_numbers(model, sizes)).graph
    makers = {name: node for node in graph.node for name in node.output}
    shapes = _shapes(graph)
    found = []
    for value in graph.output:
        shape = shapes.get(value.name)
        node = makers.get(value.name)
        if node is not None and node.op_type == "If":
            at = list(node.output).index(value.name)
            branches = [_shape(branch.g.output[at].type.tensor_type) for branch in node.attribute]
            shape = _merged([shape, *branches])
        found.append(shape)
    return found


def _merged(shapes: Sequence[Shape | None]) -> Shape | None:
    """Sizes that one of the shapes tells and no other contradicts."""
    known = [shape for shape in shapes if shape is not None]
    if len({len(shape) for shape in known}) != 1:
        return None
    told = [{size for size in axis if size is not None} for axis in zip(*known, strict=True)]
    return tuple(axis.pop() if len(axis) == 1 else None for axis in told)


def _shapes(graph: onnx.GraphProto) -> dict[str, Shape]:
    found = {name: _shape(known) for name, known in tensor_types(graph).items()}
    return {name: shape for name, shape in found.items() if shape is not None}


def _shape(known: onnx.TypeProto.Tensor) -> Shape | None:
    if not known.HasField("shape"):
        return None
    return tuple(size.dim_value if size.HasField("dim_value") else None for size in known.shape.dim)


def _with_numbers(model: onnx.ModelProto, sizes: Mapping[str, int]) -> onnx.ModelProto:
    """A model without large tensors, whose inputs have these sizes; nothing else is told of shapes."""
    bare = without_weights(model)
    numbers = {at: sizes[name] for name, found in free_sizes(bare).items() if name in sizes for at in found}
    for value in bare.graph.input:
        for axis, size in enumerate(value.type.tensor_type.shape.dim):
            if (value.name, axis) in numbers:
                size.dim_value = numbers[value.name, axis]
    for value in bare.graph.output:
        value.ClearField("type")
    inputs = {value.name for value in bare.graph.input}
    small = [tensor for tensor in bare.graph.initializer if n_entries(tensor) <= SMALL]
    for tensor in bare.graph.initializer:
        if n_entries(tensor) > SMALL and tensor.name not in inputs:  # it has no data that could be looked at
            stored = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            bare.graph.input.append(stored)
    small = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in small]
    del bare.graph.initializer[:]
    bare.graph.initializer.extend(small)
    return bare


def _folded(bare: onnx.ModelProto) -> onnx.ModelProto:
    """The model with what follows from known shapes computed, and shapes inferred; without the former where it
    fails.
    """
    import onnx_ir as ir
    from onnxscript.optimizer import fold_constants

    with _quiet("onnxscript.optimizer"):
        try:
            model = ir.from_proto(bare)
            fold_constants(
                model,
                onnx_shape_inference=True,
                input_size_limit=_MOST,
                output_size_limit=_MOST,
                should_fold=_is_bounded,
            )
            folded = ir.to_proto(model)
        except (RuntimeError, ValueError):  # the graph contradicts itself at these sizes: shapes stay unknown
            folded = bare
    infer_shapes(folded)
    return folded


def _is_bounded(node: ir.Node) -> bool:
    """May a node of constants be computed, since it makes a few values at most?"""
    from onnx_ir import serde

    arrays = [
        None if one is None or one.const_value is None else one.const_value.numpy() for one in node.inputs
    ]
    n = n_made(serde.serialize_node(node), arrays)
    return n is not None and n <= _MOST


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
