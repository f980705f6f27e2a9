"""Graphs of older opsets, converted to a later one: for functions of a model's own, and for quantization."""

from __future__ import annotations

import onnx
from onnx import version_converter

from sparse_export.errors import UsageError
from sparse_export.graph.nodes import ONNX_DOMAINS
from sparse_export.graph.passes.format24 import MIN_IR_VERSION, MIN_OPSET

__all__ = ["with_opset", "with_packable_opset"]


def with_opset(model: onnx.ModelProto, lowest: int, what: str) -> onnx.ModelProto:
    """A model of an opset at least: converted where its own is older.

    Args:
        model: with its weights read; not changed.
        lowest: the opset.
        what: needs it, for the message.

    Returns:
        Another model, or the same where it is new enough.

    Raises:
        UsageError: onnx has no rule for one of its operators.
    """
    opset = max((entry.version for entry in model.opset_import if entry.domain in ONNX_DOMAINS), default=0)
    if opset >= lowest:
        return model
    try:
        return version_converter.convert_version(model, lowest)
    except (version_converter.ConvertError, RuntimeError, ValueError) as cause:
        reason = str(cause).strip().rpartition("\n")[2].rstrip(".")
        raise UsageError(
            f"The model has opset {opset}, {what} needs {lowest}, and onnx cannot convert it: {reason}.",
            do="Build it as fp16 or fp32 with --onnx dense, or export it anew.",
        ) from cause


def with_packable_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model whose weights can be packed: of a later opset and IR version where its own are too old.

    What it computes stays; whoever builds holds the outputs of the new graph against those of the old one.

    Args:
        model: with its weights read; not changed.

    Returns:
        Another model, or the same where it is new enough.

    Raises:
        UsageError: onnx has no rule for one of its operators.
    """
    converted = with_opset(model, MIN_OPSET, "packing")
    if converted.ir_version < MIN_IR_VERSION:
        if converted is model:
            converted = onnx.ModelProto()
            converted.CopyFrom(model)
        converted.ir_version = MIN_IR_VERSION
    return converted
