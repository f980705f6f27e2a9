"""Graphs of any inputs and outputs: what is built of them computes what they do."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from sparse_export.building.bundle import build
from sparse_export.formats.bundle import Bundle
from sparse_export.graph.model import open_model, signature_of
from sparse_export.oneshot.graph_source import GraphSource
from sparse_export.oneshot.graph_steps import sparsify_source
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.signature import INTEGERS, Array, Feeds, Signature, TensorInfo
from sparse_export.sparsity.pattern import NMPattern
from tests.many import many

Draw = st.DrawFn
N_IDS = 11


class _Graph:
    """A graph under construction. vectors: width of each value (batch, width)."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.vectors: dict[str, int] = {}

    def node(self, op: str, inputs: list[str], **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"/{name}/{op}", **attributes))
        return name

    def weight(self, array: Array) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def drawn(self, *shape: int) -> str:
        scale = np.float32(1 / math.sqrt(max(1, math.prod(shape[1:]))))
        return self.weight(self.generator.standard_normal(shape).astype(np.float32) * scale)

    def product(self, value: str, width: int, form: Literal["MatMul", "Gemm"]) -> str:
        n_in = self.vectors[value]
        if form == "MatMul":
            found = self.node("MatMul", [value, self.drawn(n_in, width)])
        else:
            found = self.node("Gemm", [value, self.drawn(width, n_in), self.drawn(width)], transB=1)
        self.vectors[found] = width
        return found


def _input(draw: Draw, graph: _Graph, kind: str, number: int) -> None:
    """An input of a kind, and a vector that is made of it."""
    name, width = f"{kind}.{number}", draw(st.sampled_from([4, 8, 12]))
    if kind == "vector":
        shape: list[str | int] = ["batch", width]
        graph.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        graph.vectors[name] = width
        return
    if kind == "ids":
        kinds = draw(st.sampled_from([TensorProto.INT64, TensorProto.INT32]))
        length: list[str | int] = ["length", 5]
        shape = ["batch", draw(st.sampled_from(length))]
        graph.inputs.append(helper.make_tensor_value_info(name, kinds, shape))
        rows = graph.node("Gather", [graph.drawn(N_IDS, width), name])
        made = graph.node("ReduceMean", [rows], axes=[1], keepdims=0)
    elif kind == "image":
        height: list[str | int] = ["height", 6]
        shape = ["batch", 4, draw(st.sampled_from(height)), 7]
        graph.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        maps = graph.node("Conv", [name, graph.drawn(width, 4, 3, 3)], pads=[1, 1, 1, 1])
        made = graph.node("ReduceMean", [graph.node("Relu", [maps])], axes=[2, 3], keepdims=0)
    else:  # a number for all samples
        graph.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))
        first = next(iter(graph.vectors))
        made, width = graph.node("Mul", [first, name]), graph.vectors[first]
    graph.vectors[made] = width


@st.composite
def graphs(draw: Draw) -> onnx.ModelProto:
    graph = _Graph(draw(st.integers(0, 2**16)))
    _input(draw, graph, "vector", 0)
    for number, kind in enumerate(
        draw(st.lists(st.sampled_from(["vector", "ids", "image", "number"]), max_size=3)), 1
    ):
        _input(draw, graph, kind, number)
    known = list(graph.vectors)
    forms: tuple[Literal["MatMul"], Literal["Gemm"]] = ("MatMul", "Gemm")
    for form in forms:
        known.append(graph.product(known[-1], 16, form))
    for _ in range(draw(st.integers(0, 5))):
        value = draw(st.sampled_from(list(graph.vectors)))
        op = draw(st.sampled_from(["MatMul", "Gemm", "Relu", "Tanh", "Softmax", "Add", "Concat", "Identity"]))
        if op in forms:
            graph.product(value, draw(st.sampled_from([4, 5, 16])), "MatMul" if op == "MatMul" else "Gemm")
            continue
        width = graph.vectors[value]
        if op in ("Add", "Concat"):
            others = [one for one, size in graph.vectors.items() if op == "Concat" or size == width]
            other = draw(st.sampled_from(others))
            made = graph.node(op, [value, other], **({"axis": 1} if op == "Concat" else {}))
            graph.vectors[made] = width + (graph.vectors[other] if op == "Concat" else 0)
            continue
        graph.vectors[graph.node(op, [value])] = width
    last = graph.product(list(graph.vectors)[-1], 16, "MatMul")
    values = [name for name in graph.vectors if name.startswith("v") and "." not in name]
    # The chain from the first input is always read, so that one weight at least can take the pattern.
    for name in {last, known[-1], *draw(st.lists(st.sampled_from(values), max_size=2))}:
        shape: list[str | int] = ["batch", graph.vectors[name]]
        graph.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    if draw(st.booleans()):
        largest = graph.node("ArgMax", [draw(st.sampled_from(values))], axis=1, keepdims=0)
        graph.outputs.append(helper.make_tensor_value_info(largest, TensorProto.INT64, ["batch"]))
    built = helper.make_graph(graph.nodes, "random", graph.inputs, graph.outputs, graph.weights)
    opset, ir_version = draw(st.sampled_from([(11, 6), (13, 7), (17, 8)]))
    return helper.make_model(built, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def _outputs(path: Path, signature: Signature, feeds: Feeds) -> Mapping[str, Array]:
    with open_session(path, signature=signature) as session:
        return session.run(feeds)


def _with_range(one: TensorInfo) -> TensorInfo:
    """An input that no output hangs on does not tell its range."""
    return replace(one, low=0, high=N_IDS - 1) if one.dtype in INTEGERS else one


def _check_same(found: Mapping[str, Array], wanted: Mapping[str, Array]) -> None:
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
        if array.dtype == np.float32:
            np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


@many(60, every_day=4, suppress_health_check=list(HealthCheck))
@given(graphs(), st.sampled_from(["magnitude", "reconstruction"]), st.sampled_from(["dense", "packed"]))
def test_what_is_built_of_any_graph_gives_what_the_graph_does(
    model: onnx.ModelProto, method: Literal["magnitude", "reconstruction"], form: str
) -> None:
    """The dense bundle what the file does, the sparse one what its run does, in batches and sizes of any kind."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        onnx.save(model, folder / "file.onnx")
        opened = open_model(folder / "file.onnx")
        free = {"length": 5, "height": 6}
        known = signature_of(opened)
        signature = signature_of(opened, sizes={one: free[one] for one in known.free if one in free})
        source = GraphSource(
            name="file.onnx",
            model=opened,
            signature=signature,
            sha256=hashlib.sha256(model.SerializeToString()).hexdigest(),
            origin={},
        )
        ranged = replace(signature, inputs=tuple(map(_with_range, signature.inputs)))
        inputs = folder / "inputs.npz"
        np.savez(inputs, **ranged.draw(20, 3))  # type: ignore[arg-type]
        run, report = sparsify_source(
            source,
            folder / "sparse",
            pattern=NMPattern(n=2, m=4),
            method=method,
            inputs=inputs,
            calibration_samples=16,
            planned_dense={},
        )
        assert any(layer.pattern == "2:4" for layer in report.layers)
        dense: Bundle = build(folder / "sparse-dense", folder / "dense-bundle")
        sparse: Bundle = build(run.path, folder / "bundle", onnx=form)
        for n, seed in ((1, 4), (3, 5)):
            feeds = ranged.draw(n, seed)
            before = _outputs(folder / "file.onnx", signature, feeds)
            _check_same(_outputs(dense.onnx_path, signature, feeds), before)
            pruned = _outputs(run.path / "model.onnx", signature, feeds)
            _check_same(_outputs(sparse.onnx_path, signature, feeds), pruned)
