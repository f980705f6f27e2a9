"""What a node is: its operator, its name, its attributes."""

from __future__ import annotations

import onnx

from sparse_export.errors import ArtefactError

ONNX_DOMAINS = ("", "ai.onnx")
"""The two names of the domain of ONNX itself."""

QUANTIZING = frozenset(("QuantizeLinear", "DequantizeLinear"))
# Operators of onnxruntime that are those of ONNX, for types that ONNX got later.
_AS_STANDARD = frozenset(("com.microsoft", name) for name in QUANTIZING)


def is_standard(node: onnx.NodeProto) -> bool:
    """Is it an operator of ONNX itself, or the same under another name?

    Args:
        node: of any operator.

    Returns:
        True for ONNX's domain and for `com.microsoft` where its operator is that of ONNX.
    """
    return node.domain in ONNX_DOMAINS or (node.domain, node.op_type) in _AS_STANDARD


def node_name(node: onnx.NodeProto) -> str:
    """What to call a node.

    Args:
        node: with a name or without.

    Returns:
        Its name, else that of its first output, else its operator.
    """
    return node.name or next(iter(node.output), "") or node.op_type


def attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node.

    Args:
        node: of any operator.
        name: of the attribute.
        default: where the node does not have it.

    Returns:
        Its value.

    Raises:
        ArtefactError: it is of another type.
    """
    for found in node.attribute:
        if found.name == name:
            if found.type not in (onnx.AttributeProto.INT, onnx.AttributeProto.UNDEFINED):
                kind = onnx.AttributeProto.AttributeType.Name(found.type)
                raise ArtefactError(
                    f"The attribute {name} of the {node.op_type} {node_name(node)} is of type {kind}.",
                    expected="An integer was expected.",
                    do="Export the model again.",
                )
            return int(found.i)
    return default


def permutation(node: onnx.NodeProto, rank: int) -> tuple[int, ...]:
    """The order in which a Transpose puts axes.

    Args:
        node: the Transpose.
        rank: of what it gets.

    Returns:
        For each axis of the output that of the input.
    """
    perm = next((tuple(found.ints) for found in node.attribute if found.name == "perm"), ())
    return tuple(int(axis) % rank for axis in perm) if perm else tuple(reversed(range(rank)))
