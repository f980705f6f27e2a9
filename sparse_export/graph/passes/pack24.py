"""2:4 weights of an ONNX graph stored packed: two values and one nibble for every four.

The format is docs/packed-format.md.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sparse_export.errors import UsageError
from sparse_export.graph.names import names_of_values
from sparse_export.graph.nodes import ONNX_DOMAINS
from sparse_export.graph.passes.expand24 import expand
from sparse_export.graph.passes.format24 import (
    DOMAIN,
    FORMAT_KEY,
    FORMAT_VERSION,
    FUNCTION,
    MIN_IR_VERSION,
    MIN_OPSET,
    TENSOR_KEY,
    fill,
    is_format_key,
    is_packed,
    set_prop,
    tensor_prop,
    unpack_function,
)
from sparse_export.graph.passes.packable import pack_choices
from sparse_export.graph.passes.weight24 import bits_of, pack_weight

__all__ = ["pack"]


def pack(model: onnx.ModelProto) -> onnx.ModelProto:
    """Pack every weight that `pack_choices` finds to be 2:4.

    Args:
        model: dense or packed; it stays as it is.

    Returns:
        A new model. A packed model gives an equal one, a model with nothing to pack a copy.

    Raises:
        UsageError: the opset or the IR version is too old for the function, or the names of the format are
            used for something else.
        ArtefactError: the model is packed, and damaged.
    """
    _require_names_free(model)
    packed = expand(model)
    chosen = {choice.weight: choice for choice in pack_choices(packed) if choice.reason is None}
    if not chosen:
        return packed
    opset = _require_functions(packed)
    graph = packed.graph
    taken = names_of_values(graph)
    nodes: list[onnx.NodeProto] = []
    extra: list[TensorProto] = []
    for tensor in graph.initializer:
        choice = chosen.get(tensor.name)
        if choice is None or choice.axis is None:
            continue
        weight, axis = tensor.name, choice.axis
        array = numpy_helper.to_array(tensor)
        small = pack_weight(array, axis)
        set_prop(packed, TENSOR_KEY + weight, tensor_prop(tensor.data_type, bits_of(array, tensor.data_type)))
        names = [_free(f"{weight}.{part}", taken) for part in ("values", "meta", "shape")]
        fill(tensor, names[0], small.values)
        extra.append(numpy_helper.from_array(small.meta, names[1]))
        extra.append(numpy_helper.from_array(np.array(small.shape, dtype=np.int64), names[2]))
        if axis == array.ndim - 1:
            nodes.append(helper.make_node(FUNCTION, names, [weight], domain=DOMAIN))
        else:
            moved = _free(f"{weight}.moved", taken)
            perm = [*range(axis), array.ndim - 1, *range(axis, array.ndim - 1)]
            nodes.append(helper.make_node(FUNCTION, names, [moved], domain=DOMAIN))
            nodes.append(helper.make_node("Transpose", [moved], [weight], perm=perm))
    graph.initializer.extend(extra)
    for index, node in enumerate(nodes):
        graph.node.insert(index, node)
    set_prop(packed, FORMAT_KEY, FORMAT_VERSION)
    packed.functions.append(unpack_function(opset))
    packed.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return packed


def _require_names_free(model: onnx.ModelProto) -> None:
    props = [prop.key for prop in model.metadata_props if is_format_key(prop.key)]
    domain = [
        *(f"the function {f.domain}::{f.name}" for f in model.functions if f.domain == DOMAIN),
        *(f"the operator set {DOMAIN}" for entry in model.opset_import if entry.domain == DOMAIN),
    ]
    if FORMAT_KEY in props and is_packed(model):
        return
    if domain or props:
        raise UsageError(
            f"The model already has {[*domain, *(f'metadata {key!r}' for key in props)][0]}, and is not "
            "packed.",
            expected=f"The domain {DOMAIN!r} and metadata keys that begin so were expected to be free.",
            do="Rename them, or leave the model dense.",
        )


def _require_functions(model: onnx.ModelProto) -> int:
    """The opset of the model, when it and the IR version have what the function is built of."""
    opset = max((entry.version for entry in model.opset_import if entry.domain in ONNX_DOMAINS), default=0)
    if opset < MIN_OPSET or model.ir_version < MIN_IR_VERSION:
        raise UsageError(
            f"The model has opset {opset} and IR version {model.ir_version}.",
            expected=(
                f"Opset {MIN_OPSET} and IR version {MIN_IR_VERSION} or later were expected, for its "
                "functions."
            ),
            do="Convert it with onnx.version_converter, or export it anew.",
        )
    return opset


def _free(name: str, taken: set[str]) -> str:
    """The name, numbered when it is taken; it is taken from now on."""
    free, n = name, 1
    while free in taken:
        free, n = f"{name}.{n}", n + 1
    taken.add(free)
    return free
