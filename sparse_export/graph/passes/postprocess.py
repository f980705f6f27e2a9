"""Appends what is done to a network's scores: probabilities, the best class, the best K classes.

The scores stay the first output, and the new outputs come behind all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sparse_export.errors import UsageError
from sparse_export.graph.names import free_name, names_of_values
from sparse_export.graph.nodes import ONNX_DOMAINS
from sparse_export.signature import FLOATS, Signature, TensorInfo

__all__ = ["require_steps", "with_postprocess"]

_SCORES = ("softmax", "sigmoid")
_FORMS = (*_SCORES, "argmax", "topk:K")
_MIN_OPSET = 13  # Softmax along one axis


def require_steps(steps: Sequence[str], signature: Signature) -> None:
    """Check what is to be appended to a network.

    Args:
        steps: `softmax` or `sigmoid`, `argmax`, and `topk:K`, each at most once.
        signature: of the network.

    Raises:
        UsageError: there is no such step, two exclude each other, or the first output is not made for one.
    """
    if not steps:
        return
    kinds = [step.partition(":")[0] for step in steps]
    for step, kind in zip(steps, kinds, strict=True):
        if step not in (*_SCORES, "argmax") and not (kind == "topk" and step[5:].isdecimal()):
            raise UsageError(f"--postprocess {step} is not known.", do=f"Give one of {', '.join(_FORMS)}.")
    if len(set(kinds)) < len(kinds) or set(_SCORES) <= set(kinds):
        raise UsageError(
            f"--postprocess was given {', '.join(steps)}.",
            do="Give softmax or sigmoid, argmax and topk:K once at most.",
        )
    scores = signature.outputs[0]
    if scores.dtype not in FLOATS:
        raise UsageError(
            f"--postprocess {steps[0]} was given, and the first output is {scores}.",
            do="It takes scores, which are floats.",
        )
    axis = scores.class_axis
    for step, kind in zip(steps, kinds, strict=True):
        if kind == "sigmoid":
            continue
        n = None if axis is None else scores.shape[axis]
        if not isinstance(n, int) or n < 2:
            raise UsageError(
                f"--postprocess {step} was given, and the first output is {scores}, with no axis of two "
                "classes or more.",
                expected="Scores (batch, classes), (batch, sequence, classes) or (batch, classes, height, "
                "width) were expected, with a fixed number of classes.",
                do="Use sigmoid for a score that stands alone."
                if len(scores.shape) < 3
                else "Leave it out, and read the classes off the output in your own program.",
            )
        if kind == "topk" and not 1 <= int(step[5:]) <= n:
            raise UsageError(f"--postprocess {step} was given for {n} classes.", do=f"Give 1 to {n}.")


def with_postprocess(
    model: onnx.ModelProto, signature: Signature, steps: Sequence[str]
) -> tuple[onnx.ModelProto, Signature]:
    """Append steps to a graph. Classes are chosen by their scores, which rounding leaves apart for longest.

    Args:
        model: with its data; not changed.
        signature: of it.
        steps: that `require_steps` lets pass.

    Returns:
        Another graph of opset 13 or later, and its signature, with what was appended: `probabilities` like the scores;
        `class`, int64, without the axis of classes; `top_scores` and `top_classes`, with K along that axis,
        of which the first are probabilities where these are computed.

    Raises:
        UsageError: the opset of the graph is older.
    """
    opset = max((one.version for one in model.opset_import if one.domain in ONNX_DOMAINS), default=0)
    if opset < _MIN_OPSET:
        raise UsageError(
            f"The graph has opset {opset}, and --postprocess appends operators of opset {_MIN_OPSET}.",
            do="Export it with a newer opset, or leave --postprocess out.",
        )
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = _Appended(made.graph, signature.outputs[0])
    for step in sorted(steps, key=lambda one: one not in _SCORES):
        graph.append(step)
    return made, replace(signature, appended=tuple(graph.added))


class _Appended:
    """A graph that grows at its end."""

    def __init__(self, graph: onnx.GraphProto, scores: TensorInfo) -> None:
        self._graph, self._taken = graph, names_of_values(graph)
        self._scores, self._axis = scores, scores.class_axis
        self._source, self._probabilities = scores.name, ""
        self.added: list[TensorInfo] = []
        if scores.dtype != "float32":  # onnxruntime has not each of these operators for the others
            self._source = self._name(f"{scores.name}_float32")
            self._node("Cast", [scores.name], [self._source], to=TensorProto.FLOAT)

    def append(self, step: str) -> None:
        """Append a step, with its outputs."""
        shape = self._scores.shape
        if step in _SCORES:
            output = self._output("probabilities", "float32", shape)
            axis = {"axis": self._axis} if step == "softmax" else {}
            self._node(step.capitalize(), [self._source], [output], **axis)
            self._probabilities = output
            return
        assert self._axis is not None
        before, after = shape[: self._axis], shape[self._axis + 1 :]
        if step == "argmax":
            output = self._output("class", "int64", (*before, *after))
            self._node("ArgMax", [self._source], [output], axis=self._axis, keepdims=0)
            return
        k = int(step.partition(":")[2])
        count = self._name("top_k")
        self._graph.initializer.append(numpy_helper.from_array(np.array([k], np.int64), count))
        values, classes = (
            self._output(name, dtype, (*before, k, *after))
            for name, dtype in (("top_scores", "float32"), ("top_classes", "int64"))
        )
        if not self._probabilities:
            self._node("TopK", [self._source, count], [values, classes], axis=self._axis)
            return
        self._node("TopK", [self._source, count], [self._name("top_logits"), classes], axis=self._axis)
        self._node("GatherElements", [self._probabilities, classes], [values], axis=self._axis)

    def _name(self, wanted: str) -> str:
        name = free_name(wanted, self._taken)
        self._taken.add(name)
        return name

    def _node(self, operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        self._graph.node.append(
            helper.make_node(operator, inputs, outputs, name=f"postprocess/{outputs[0]}", **attributes)
        )

    def _output(self, wanted: str, dtype: str, shape: Sequence[int | str]) -> str:
        info = TensorInfo(name=self._name(wanted), dtype=dtype, shape=tuple(shape))
        self.added.append(info)
        element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self._graph.output.append(helper.make_tensor_value_info(info.name, element, list(info.shape)))
        return info.name
