"""Any file as a graph to work on: it opens, computes what it did, and everything is where stages look for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparse_export.errors import ArtefactError, UsageError
from sparse_export.graph.foreign import onnx_from_file
from sparse_export.graph.layers import count_parameters, graph_layers
from sparse_export.graph.model import open_model, prepared, save_model, signature_of
from sparse_export.graph.names import graphs_of
from sparse_export.graph.passes.pack24 import pack
from sparse_export.signature import TensorInfo
from tests.graph.graphs import one_node, saved
from tests.graph.packed import model_of as packed_model_of
from tests.graph.packed import two_four

Array = np.ndarray[Any, Any]
F = TensorProto.FLOAT


def info(name: str, shape: Sequence[int | str | None] | None, dtype: int = F) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[str],
    stored: dict[str, Array] | None = None,
    *,
    opset: int = 17,
    ir_version: int = 8,
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(values, name) for name, values in (stored or {}).items()]
    graph = helper.make_graph(nodes, "g", inputs, [info(name, None) for name in outputs], tensors)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(one.domain, 1) for one in functions)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, functions=functions)


def constant(name: str, values: Any) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(values)))


def run(model: onnx.ModelProto | Path, feeds: dict[str, Array]) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    source = model if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(None, feeds)
    return found


def weight(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def branching() -> onnx.ModelProto:
    """Two branches with weights, in a Constant node and stored; the name c stands for two values."""
    then = helper.make_graph(
        [constant("c", weight(32, 32)), helper.make_node("MatMul", ["x", "c"], ["t"], name="first")],
        "then",
        [],
        [info("t", None)],
    )
    other = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["c"]),
            helper.make_node("MatMul", ["c", "w"], ["e"], name="second"),
        ],
        "else",
        [],
        [info("e", None)],
        [onnx.TensorProto(name="w", dims=[32, 32], data_type=F, float_data=weight(32, 32, seed=1).ravel())],
    )
    nodes = [
        constant("factor", np.float32(1.5)),
        helper.make_node("Mul", ["x", "factor"], ["scaled"]),
        helper.make_node("If", ["k"], ["branch"], then_branch=then, else_branch=other, name="if"),
        helper.make_node("Add", ["branch", "scaled"], ["y"]),
    ]
    return model_of(nodes, [info("x", ["n", 32]), info("k", [], TensorProto.BOOL)], ["y"])


def test_weights_in_branches_are_lifted_under_names_of_their_own(tmp_path: Path) -> None:
    model = branching()
    opened = open_model(saved(model, tmp_path))
    assert {layer.node: layer.weight for layer in graph_layers(opened)} == {
        "if/then_branch/first": "c_",
        "if/else_branch/second": "w",
    }
    assert {tensor.name for tensor in opened.graph.initializer} == {"factor", "c_", "w"}
    assert not [tensor for graph in list(graphs_of(opened.graph))[1:] for tensor in graph.initializer]
    assert "Constant" not in {node.op_type for graph in graphs_of(opened.graph) for node in graph.node}
    for k in (True, False):
        feeds = {"x": weight(3, 32, seed=2), "k": np.array(k)}
        np.testing.assert_array_equal(run(opened, feeds)[0], run(model, feeds)[0])


def looping() -> onnx.ModelProto:
    body = helper.make_graph(
        [
            constant("w", weight(32, 32)),
            helper.make_node("MatMul", ["state", "w"], ["next"], name="layer"),
            helper.make_node("Identity", ["go"], ["go_on"]),
        ],
        "body",
        [info("i", [], TensorProto.INT64), info("go", [], TensorProto.BOOL), info("state", None)],
        [info("go_on", [], TensorProto.BOOL), info("next", None)],
    )
    nodes = [
        constant("times", np.int64(3)),
        constant("yes", np.bool_(True)),
        helper.make_node("Loop", ["times", "yes", "x"], ["y"], body=body, name="loop"),
    ]
    return model_of(nodes, [info("x", ["n", 32])], ["y"])


def scanning() -> onnx.ModelProto:
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["one", "w"], ["out"], name="layer"),
            helper.make_node("Add", ["sum", "out"], ["sum_after"]),
        ],
        "body",
        [info("sum", [32]), info("one", [32])],
        [info("sum_after", [32]), info("out", [32])],
        [numpy_helper.from_array(weight(32, 32), "w")],
    )
    nodes = [
        constant("zeros", np.zeros(32, np.float32)),
        helper.make_node("Scan", ["zeros", "x"], ["sums", "y"], body=body, num_scan_inputs=1, name="scan"),
    ]
    return model_of(nodes, [info("x", ["n", 32])], ["y"])


def calling() -> onnx.ModelProto:
    """Two calls of a function whose weight is in a Constant node of its own."""
    function = helper.make_function(
        "mine",
        "Linear",
        ["a"],
        ["b"],
        [constant("w", weight(32, 32)), helper.make_node("MatMul", ["a", "w"], ["b"], name="inside")],
        [helper.make_opsetid("", 17)],
    )
    nodes = [
        helper.make_node("Linear", ["x"], ["h"], domain="mine", name="call1"),
        helper.make_node("Linear", ["h"], ["y"], domain="mine", name="call2"),
    ]
    return model_of(nodes, [info("x", ["n", 32])], ["y"], functions=[function])


def old() -> onnx.ModelProto:
    """Opset 9, IR 3: stored tensors are listed as inputs; and a Constant node."""
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], name="layer"),
        constant("two", np.full(16, 2, np.float32)),
        helper.make_node("Mul", ["h", "two"], ["y"]),
    ]
    stored = {"w": weight(32, 16), "b": weight(16)}
    inputs = [info("x", ["n", 32]), info("w", [32, 16]), info("b", [16])]
    return model_of(nodes, inputs, ["y"], stored, opset=9, ir_version=3)


def sparse() -> onnx.ModelProto:
    values = numpy_helper.from_array(np.arange(1, 2001, dtype=np.float32), "w")
    places = numpy_helper.from_array(np.arange(0, 4000, 2, dtype=np.int64), "places")
    model = model_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="layer")], [info("x", ["n", 40])], ["y"]
    )
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [40, 100]))
    return model


def sparse_constant() -> onnx.ModelProto:
    model = sparse()
    stored = model.graph.sparse_initializer[0]
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], sparse_value=stored))
    del model.graph.sparse_initializer[:]
    return model


def with_what_nothing_needs() -> onnx.ModelProto:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="layer"),
        helper.make_node("MatMul", ["x", "unused"], ["nowhere"], name="dead"),
    ]
    return model_of(nodes, [info("x", ["n", 32])], ["y"], {"w": weight(32, 8), "unused": weight(32, 8)})


def new() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"], name="layer"),
        helper.make_node("Gelu", ["h"], ["y"]),
    ]
    return model_of(nodes, [info("x", ["n", 32])], ["y"], {"w": weight(32, 16)}, opset=24, ir_version=11)


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (looping, {"loop/body/layer": ("w", 1024)}),
        (scanning, {"scan/body/layer": ("w", 1024)}),
        (old, {"layer": ("w", 512)}),
        (new, {"layer": ("w", 512)}),
        (sparse, {"layer": ("w", 4000)}),
        (sparse_constant, {"layer": ("w", 4000)}),
        (with_what_nothing_needs, {"layer": ("w", 256)}),
    ],
)
def test_layers_are_seen_wherever_they_are_and_outputs_stay(
    make: Callable[[], onnx.ModelProto], layers: dict[str, tuple[str, int]], tmp_path: Path
) -> None:
    model = make()
    opened = open_model(saved(model, tmp_path))
    assert {one.node: (one.weight, one.n_weights) for one in graph_layers(opened)} == layers
    width = (
        next(value for value in model.graph.input if value.name == "x")
        .type.tensor_type.shape.dim[1]
        .dim_value
    )
    feeds = {"x": weight(3, width, seed=3)}
    np.testing.assert_array_equal(run(opened, feeds)[0], run(model, feeds)[0])


def test_each_call_of_a_function_is_a_layer_of_its_own(tmp_path: Path) -> None:
    model = calling()
    opened = open_model(saved(model, tmp_path))
    assert not opened.functions
    layers = graph_layers(opened)
    assert [layer.n_weights for layer in layers] == [1024, 1024]
    assert len({layer.weight for layer in layers}) == 2
    feeds = {"x": weight(3, 32, seed=3)}
    np.testing.assert_array_equal(run(opened, feeds)[0], run(model, feeds)[0])


def test_shapes_are_inferred_and_sizes_that_are_not_positive_are_free(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"], name="layer", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h"], ["y"]),
    ]
    model = model_of(nodes, [info("x", [-1, 3, 0, 20])], ["y"], {"w": weight(8, 3, 3, 3)})
    opened = open_model(saved(model, tmp_path))
    assert [dim.WhichOneof("value") for dim in opened.graph.input[0].type.tensor_type.shape.dim] == [
        None,
        "dim_value",
        None,
        "dim_value",
    ]
    shapes = {v.name: v.type.tensor_type.shape.dim for v in (*opened.graph.value_info, *opened.graph.output)}
    assert [dim.dim_value for dim in shapes["h"]] == [dim.dim_value for dim in shapes["y"]] == [0, 8, 0, 20]


def test_shapes_that_contradict_the_graph_are_dropped_and_reported(tmp_path: Path) -> None:
    model = one_node("Gemm", (10, 6), ("n", 6), transB=1)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 7
    with pytest.warns(UserWarning, match=r"shapes of .*m\.onnx cannot be inferred in full.*\(10\) vs \(7\)"):
        opened = open_model(saved(model, tmp_path))
    assert opened.graph.output[0].type.tensor_type.shape.dim[1].dim_value == 10


def test_packed_weights_are_dense_under_their_names(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="layer")]
    dense = packed_model_of(nodes, {"w": two_four((64, 32), 0)}, inputs={"x": ("n", 64)})
    opened = open_model(saved(pack(dense), tmp_path))
    assert [tensor.SerializeToString() for tensor in opened.graph.initializer] == [
        tensor.SerializeToString() for tensor in dense.graph.initializer
    ]
    assert graph_layers(opened) == graph_layers(dense)


def test_outputs_that_are_no_tensors_stay(tmp_path: Path) -> None:
    nodes = [helper.make_node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml", classlabels_int64s=[3, 5])]
    model = model_of(nodes, [info("x", ["n", 2])], ["y"])
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 1))
    value = onnx.helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(F, []))
    model.graph.output[0].type.CopyFrom(helper.make_sequence_type_proto(value))
    opened = open_model(saved(model, tmp_path))
    assert run(opened, {"x": weight(1, 2)}) == run(model, {"x": weight(1, 2)})
    with pytest.raises(ArtefactError, match="y is a sequence"):
        signature_of(opened)


def test_a_function_of_another_opset_is_called_as_before(tmp_path: Path) -> None:
    model = calling()
    model.functions[0].opset_import[0].version = 15
    opened = open_model(saved(model, tmp_path))
    assert {one.code for layer in graph_layers(opened) for one in layer.reasons} == {"not-looked-into"}
    feeds = {"x": weight(3, 32, seed=3)}
    np.testing.assert_array_equal(run(opened, feeds)[0], run(model, feeds)[0])


def test_a_prepared_model_is_another_one() -> None:
    model = branching()
    before = model.SerializeToString()
    assert len(prepared(model).graph.initializer) == 3
    assert model.SerializeToString() == before


def test_a_large_model_is_saved_as_two_files_and_read_back(tmp_path: Path) -> None:
    model = branching()
    opened = prepared(model)
    (tmp_path / "whole").mkdir()
    assert save_model(opened, tmp_path / "whole" / "m.onnx") == ("m.onnx",)
    before = opened.SerializeToString()
    for _ in range(2):  # over what is there
        assert save_model(opened, tmp_path / "m.onnx", max_bytes=1000) == ("m.onnx", "m.onnx.data")
    assert opened.SerializeToString() == before
    assert (tmp_path / "m.onnx.data").stat().st_size == 2 * 32 * 32 * 4  # each at a page of its own
    assert (tmp_path / "m.onnx").stat().st_size < 2000
    feeds = {"x": weight(3, 32, seed=2), "k": np.array(False)}
    expected = run(model, feeds)[0]
    for file in (tmp_path / "m.onnx", tmp_path / "whole" / "m.onnx"):
        np.testing.assert_array_equal(run(file, feeds)[0], expected)
        np.testing.assert_array_equal(run(open_model(file), feeds)[0], expected)
    save_model(opened, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx.data").exists()


def test_a_saved_model_is_read_back(tmp_path: Path) -> None:
    model = one_node("Gemm", (10, 6), ("n", 6), transB=1)
    onnx.save(model, tmp_path / "m.onnx")
    assert graph_layers(onnx_from_file(tmp_path / "m.onnx")) == graph_layers(model)
    assert graph_layers(open_model(tmp_path / "m.onnx")) == graph_layers(model)


def test_weights_beside_the_model_are_read_too(tmp_path: Path) -> None:
    model = one_node("Gemm", (100, 60), ("n", 60), transB=1, n_zeros=7)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    assert count_parameters(onnx_from_file(tmp_path / "m.onnx")) == (6000, 5993)
    assert count_parameters(open_model(tmp_path / "m.onnx")) == (6000, 5993)


@pytest.mark.parametrize("read", [onnx_from_file, open_model])
def test_a_model_whose_weights_beside_it_are_gone_is_refused(
    read: Callable[[Path], onnx.ModelProto], tmp_path: Path
) -> None:
    model = one_node("Gemm", (100, 60), ("n", 60), transB=1)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    (tmp_path / "m.data").unlink()
    with pytest.raises(ArtefactError, match=r"m\.onnx cannot be read as ONNX"):
        read(tmp_path / "m.onnx")


@pytest.mark.parametrize("kept", [0.01, 0.5, 0.99])
def test_a_truncated_model_is_refused(tmp_path: Path, kept: float) -> None:
    content = one_node("Gemm", (10, 6), ("n", 6), transB=1).SerializeToString()
    (tmp_path / "m.onnx").write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ArtefactError, match="cannot be read as ONNX"):
        open_model(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "content", [b"", b"hello, this is text\n", b"\x00" * 100, b"\x89PNG\r\n\x1a\n" + b"a" * 50]
)
def test_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ArtefactError, match="cannot be read as ONNX"):
        open_model(tmp_path / "m.onnx")


@pytest.mark.parametrize("name", [b"batch", b"fc1", b"first"])
@pytest.mark.parametrize("read", [onnx_from_file, open_model])
def test_names_that_are_no_text_are_told(
    name: bytes, read: Callable[[Path], onnx.ModelProto], tmp_path: Path
) -> None:
    """Of a size, a tensor and a node; protobuf hands them over as bytes."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "fc1"], ["y"], name="first")],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1])],
        [numpy_helper.from_array(np.ones((1, 1), dtype=np.float32), "fc1")],
    )
    content = helper.make_model(graph).SerializeToString()
    (tmp_path / "m.onnx").write_bytes(content.replace(name, b"\xff" + name[1:]))
    with pytest.raises(ArtefactError, match=r"cannot be read as ONNX"):
        read(tmp_path / "m.onnx")


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a file"):
        open_model(tmp_path / "absent.onnx")


def without_output_shape(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.ClearField("shape")


def without_input_shape(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.ClearField("shape")


def without_output_type(model: onnx.ModelProto) -> None:
    model.graph.output[0].ClearField("type")


def without_name(model: onnx.ModelProto) -> None:
    model.graph.name = ""


def of_an_old_version(model: onnx.ModelProto) -> None:
    model.ir_version = 3


def with_a_foreign_operator(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Gelu", ["y"], ["z"], domain="com.microsoft"))


def unsorted(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Relu", ["y"], ["z"], name="after"))
    model.graph.node.insert(0, helper.make_node("Relu", ["z"], ["v"], name="last"))
    model.graph.output[0].name = "v"


@pytest.mark.parametrize(
    "change",
    [
        without_output_shape,
        without_input_shape,
        without_output_type,
        without_name,
        of_an_old_version,
        with_a_foreign_operator,
        unsorted,
    ],
)
def test_what_onnxruntime_opens_is_opened(change: Callable[[onnx.ModelProto], None], tmp_path: Path) -> None:
    model = one_node("Gemm", (100, 60), ("n", 60), transB=1, n_zeros=7)
    change(model)
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(model)
    file = saved(model, tmp_path)
    onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    read = open_model(file)
    onnxruntime.InferenceSession(read.SerializeToString(), providers=["CPUExecutionProvider"])
    (layer,) = graph_layers(read)
    assert (layer.weight, layer.n_nonzero) == ("w", 5993)
    if change is unsorted:
        assert [node.name for node in read.graph.node] == ["layer", "after", "last"]


def test_a_weight_that_an_unsorted_graph_computes_later_is_worked_out(tmp_path: Path) -> None:
    model = one_node("MatMul", (6, 10), ("n", 6), n_zeros=7)
    model.graph.node[0].input[1] = "turned"
    model.graph.node.append(helper.make_node("Identity", ["w"], ["turned"]))
    (layer,) = graph_layers(open_model(saved(model, tmp_path)))
    assert (layer.weight, layer.n_nonzero) == ("w", 53)


def with_an_unknown_attribute(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("color", 1))


def in_a_circle(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Relu", ["b"], ["a"]))
    model.graph.node.insert(0, helper.make_node("Relu", ["a"], ["b"]))


def too_short(model: onnx.ModelProto) -> None:
    without_output_shape(model)
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_an_unknown_attribute, "Unrecognized attribute: color for operator Gemm"),
        (in_a_circle, "Graph contains a cycle"),
        (too_short, "raw_data size (23996 bytes) is too small"),
    ],
)
def test_what_onnxruntime_refuses_is_told_in_the_words_of_the_checker(
    change: Callable[[onnx.ModelProto], None], words: str, tmp_path: Path
) -> None:
    model = one_node("Gemm", (100, 60), ("n", 60), transB=1)
    change(model)
    with pytest.raises(ArtefactError, match=re.escape(words)) as caught:
        open_model(saved(model, tmp_path))
    assert "truncated" not in str(caught.value)


def in_a_cache(folder: Path) -> Path:
    """A model and its weights as links to files named by their digests, as caches of downloads have them."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    model = one_node("Gemm", (100, 60), ("n", 60), transB=1, n_zeros=7)
    onnx.save(model, blobs / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    for name, blob in (("m.onnx", "0a"), ("m.data", "0b")):
        (blobs / name).rename(blobs / blob)
        (snapshot / name).symlink_to(Path("..", "..", "blobs", blob))
    return snapshot / "m.onnx"


def test_weights_that_are_links_into_a_cache_are_read_from_anybodys_file_only(tmp_path: Path) -> None:
    file = in_a_cache(tmp_path)
    assert count_parameters(open_model(file)) == (6000, 5993)
    for read in (onnx_from_file, partial(open_model, links=False)):
        with pytest.raises(ArtefactError, match="symbolic link"):
            read(file)


def test_a_linked_file_that_ends_too_early_is_told(tmp_path: Path) -> None:
    file = in_a_cache(tmp_path)
    blob = tmp_path / "blobs" / "0b"
    blob.write_bytes(blob.read_bytes()[:-4])
    with pytest.raises(ArtefactError, match="ends before the data of w do"):
        open_model(file)


@pytest.mark.parametrize("location", ["../m.data", "/etc/hostname"])
def test_links_lead_only_to_files_beside_the_model(location: str, tmp_path: Path) -> None:
    file = in_a_cache(tmp_path)
    model = onnx.load(file, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = location
    file.unlink()
    with pytest.raises(ArtefactError, match="not beside the model"):
        open_model(saved(model, file.parent))


@pytest.mark.filterwarnings("ignore:The shapes of")
@pytest.mark.parametrize("make", [branching, looping, calling, sparse_constant])
def test_a_damaged_file_is_refused_or_opened_and_nothing_else(
    make: Callable[[], onnx.ModelProto], tmp_path: Path
) -> None:
    """A few bytes of the graph are other ones."""
    whole = make().SerializeToString()
    drawn = np.random.default_rng(3)
    opened = 0
    for _ in range(40):
        content = bytearray(whole)
        for at in drawn.integers(0, min(len(content), 600), 2):
            content[at] = drawn.integers(0, 256)
        (tmp_path / "m.onnx").write_bytes(content)
        try:
            model = open_model(tmp_path / "m.onnx")
            opened += 1
            graph_layers(model)
            signature_of(model)
        except ArtefactError as error:
            assert error.do
    assert 0 < opened < 40


def test_a_long_formula_for_a_size_does_not_flood_a_text() -> None:
    formula = "floor(floor(height/2 - 1/2)/2 - 1/2)*floor(floor(width/2 - 1/2)/2 - 1/2)"
    one = TensorInfo(name="boxes", dtype="float32", shape=("batch", 84, formula))
    assert str(one) == "boxes float32 (batch, 84, floor(floor(height/2 - 1…)"
    assert str(replace(one, shape=("batch",))) == "boxes float32 (batch,)"
