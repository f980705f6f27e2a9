"""An ONNX graph taken apart: its nodes, and its constants as arrays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sparse_export.errors import GateFailed
from sparse_export.graph.concrete import free_sizes, two_examples
from sparse_export.graph.nodes import ONNX_DOMAINS
from sparse_export.graph.stored_tensors import array_of

Array = np.ndarray[Any, Any]


Shape = tuple[int, ...]


_SMALL = 1024


@dataclass(kw_only=True)
class Graph:
    """A model taken apart: nodes, and the constants as arrays. Constant nodes have become arrays."""

    model: onnx.ModelProto
    nodes: list[onnx.NodeProto]
    arrays: dict[str, Array]
    _taken: set[str] = field(default_factory=set)

    @staticmethod
    def of(model: onnx.ModelProto) -> Graph:
        """A copy; a constant that callers may override is not among the arrays.

        Raises ArtefactError for a damaged one.
        """
        given = {value.name for value in model.graph.input}
        arrays = {t.name: array_of(t) for t in model.graph.initializer if t.name not in given}
        nodes = []
        for node in model.graph.node:
            if node.op_type == "Constant" and [a.name for a in node.attribute] == ["value"]:
                arrays[node.output[0]] = array_of(node.attribute[0].t)
                continue
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            nodes.append(copy)
        return Graph(model=model, nodes=nodes, arrays=arrays)

    @property
    def opset(self) -> int:
        return next((e.version for e in self.model.opset_import if e.domain in ONNX_DOMAINS), 0)

    def readers(self, name: str) -> list[onnx.NodeProto]:
        """The nodes that read a value, subgraphs included; the graph's own outputs are not told."""
        return [node for node in self.nodes if name in node.input or name in set(captured(node))]

    def fresh_name(self, like: str) -> str:
        """A name that nothing has; it is taken then."""
        if not self._taken:
            self._taken.update(self.arrays, *((*node.input, *node.output) for node in self.nodes))
            self._taken.update(value.name for value in self.model.graph.input)
            self._taken.update(value.name for value in self.model.graph.initializer)
        found = next(
            name
            for n in range(len(self._taken) + 1)
            if (name := f"{like}_compact{n or ''}") not in self._taken
        )
        self._taken.add(found)
        return found

    def shapes(self) -> dict[str, Shape]:
        """Shapes that can be told, with an example of each free size."""
        shadow = onnx.ModelProto(ir_version=self.model.ir_version)
        shadow.opset_import.extend(self.model.opset_import)
        shadow.functions.extend(self.model.functions)
        graph = shadow.graph
        graph.name = "shapes"
        graph.node.extend(self.nodes)
        graph.input.extend(self.model.graph.input)
        graph.output.extend(self.model.graph.output)
        for value in graph.output:
            value.type.tensor_type.ClearField("shape")
        places = free_sizes(self.model)
        numbers, _ = two_examples(places)
        sizes = {at: numbers[name] for name, found in places.items() for at in found}
        for value in graph.input:
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                if (value.name, axis) in sizes:
                    dim.dim_value = sizes[value.name, axis]
        for name, array in self.arrays.items():
            if array.size <= _SMALL:
                graph.initializer.append(numpy_helper.from_array(array, name))
            else:  # only its shape matters, and large ones cost time
                kind = helper.np_dtype_to_tensor_dtype(array.dtype)
                graph.input.append(helper.make_tensor_value_info(name, kind, array.shape))
        shapes: dict[str, Shape] = {name: array.shape for name, array in self.arrays.items()}
        try:
            known = onnx.shape_inference.infer_shapes(shadow, data_prop=True).graph
        except (onnx.shape_inference.InferenceError, ValueError):  # somebody's graph
            return shapes
        for value in (*known.input, *known.value_info, *known.output):
            tensor = value.type.tensor_type
            if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
                shapes[value.name] = tuple(dim.dim_value for dim in tensor.shape.dim)
        return shapes

    def assembled(self) -> onnx.ModelProto:
        """The graph as a model with shapes, its constants in the old order, unused ones left out.

        Raises GateFailed when its sizes do not fit.
        """
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        read = {name for node in self.nodes for name in node.input}
        read |= {value.name for value in model.graph.output}
        read |= {name for node in self.nodes for name in captured(node)}
        overridable = {value.name for value in model.graph.input}
        same = {t.name: t for t in self.model.graph.initializer if t.name in overridable}
        tensors = [
            numpy_helper.from_array(array, name) for name, array in self.arrays.items() if name in read
        ]
        del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
        model.graph.node.extend(self.nodes)
        model.graph.initializer.extend([*same.values(), *tensors])
        try:
            model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
            onnx.checker.check_model(model, full_check=True)
        except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as cause:
            raise GateFailed(
                f"The rewritten graph is not valid: {str(cause).strip().partition(chr(10))[0]}",
                expected="Sizes that fit were expected.",
                do="Build the graph as it was exported, and report the network.",
            ) from cause
        return model


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """The value of an attribute of a node."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def title(node: onnx.NodeProto) -> str:
    """A node as messages call it."""
    return f"{node.op_type} {node.name or node.output[0]}"


def captured(node: onnx.NodeProto) -> Iterator[str]:
    """Names that the subgraphs of a node read from outside, and perhaps names of their own."""
    for found in node.attribute:
        for graph in (*found.graphs, *([found.g] if found.HasField("g") else [])):
            yield from (value.name for value in graph.output)
            for inner in graph.node:
                yield from inner.input
                yield from captured(inner)


def padded(node: onnx.NodeProto) -> bool:
    auto = attribute(node, "auto_pad", b"NOTSET")
    return auto not in (b"NOTSET", b"VALID") or (auto == b"NOTSET" and any(attribute(node, "pads", ())))
