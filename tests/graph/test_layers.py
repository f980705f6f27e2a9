"""Facts that are read off a graph, against graphs small enough to count by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparse_export.errors import ArtefactError, UsageError
from sparse_export.graph.export import onnx_from_module
from sparse_export.graph.foreign import onnx_from_file
from sparse_export.graph.layers import count_parameters, graph_layers
from tests.making_runs import network_and_masks


def one_node(
    op: str,
    weight_shape: tuple[int, ...],
    input_shape: tuple[int | str, ...],
    *,
    weight_first: bool = False,
    n_zeros: int = 0,
    **attributes: Any,
) -> onnx.ModelProto:
    """A graph of one layer, whose first `n_zeros` weights are zero."""
    values = np.ones(weight_shape, dtype=np.float32)
    values.flat[:n_zeros] = 0
    names = ["w", "x"] if weight_first else ["x", "w"]
    graph = helper.make_graph(
        [helper.make_node(op, names, ["y"], name="layer", **attributes)],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, input_shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(values, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


@pytest.mark.parametrize(
    ("model", "axis", "uses"),
    [
        (one_node("Conv", (4, 3, 3, 3), ("n", 3, 8, 8)), 1, 36),
        (one_node("Conv", (4, 3, 3, 3), ("n", 3, 8, 8), pads=[1, 1, 1, 1], strides=[2, 2]), 1, 16),
        (one_node("Conv", (4, 1, 3, 3), ("n", 4, 8, 8), group=4), 1, 36),
        (one_node("Conv", (4, 3, 5), (1, 3, 8)), 1, 4),
        (one_node("Conv", (4, 3, 5), (6, 3, 8)), 1, 4),
        (one_node("ConvTranspose", (3, 4, 2, 2), ("n", 3, 5, 5), strides=[2, 2]), 0, 25),
        (one_node("ConvTranspose", (4, 2, 3), ("n", 4, 5), group=2), 0, 5),
        (one_node("Gemm", (10, 6), ("n", 6), transB=1), 1, 1),
        (one_node("Gemm", (6, 10), ("n", 6)), 0, 1),
        (one_node("MatMul", (6, 10), ("n", 7, 6)), 0, 7),
        (one_node("MatMul", (7, 6, 10), ("n", 7, 3, 6)), 1, 3),
        (one_node("MatMul", (10, 6), ("n", 6, 5), weight_first=True), 1, 5),
        (one_node("MatMul", (6,), ("n", 7, 6)), 0, 7),
    ],
)
def test_reduction_axis_and_work_come_from_the_node(model: onnx.ModelProto, axis: int, uses: int) -> None:
    (layer,) = graph_layers(model)
    assert layer.reduction_axis == axis
    assert layer.macs == layer.n_weights * uses


def test_zero_weights_are_counted_and_do_no_work() -> None:
    (layer,) = graph_layers(one_node("Conv", (4, 3, 3, 3), ("n", 3, 8, 8), n_zeros=100))
    assert (layer.n_weights, layer.n_nonzero) == (108, 8)
    assert (layer.macs, layer.nonzero_macs) == (108 * 36, 8 * 36)


def test_work_is_unknown_where_the_picture_size_is_free() -> None:
    (layer,) = graph_layers(one_node("Conv", (4, 3, 3, 3), ("n", 3, "h", "w")))
    assert (layer.n_weights, layer.macs, layer.nonzero_macs) == (108, None, None)


def test_a_product_of_two_inputs_has_no_weight_and_does_no_work_by_weights() -> None:
    node = helper.make_node("MatMul", ["a", "b"], ["y"])
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in "ab"]
    graph = helper.make_graph(
        [node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])]
    )
    (layer,) = graph_layers(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
    assert (layer.n_weights, layer.macs, layer.constant, layer.eligible) == (0, 0, False, "no")
    assert [reason.code for reason in layer.reasons] == ["activations"]


def test_looking_at_a_graph_does_not_change_it() -> None:
    model = one_node("Conv", (4, 3, 3, 3), ("n", 3, 8, 8))
    before = model.SerializeToString(deterministic=True)
    graph_layers(model)
    assert model.SerializeToString(deterministic=True) == before


def test_layers_of_an_exported_network_agree_with_its_masks() -> None:
    module, masks = network_and_masks()
    layers = graph_layers(onnx_from_module(module, (1, 8, 8), masks=masks))
    assert {layer.weight: layer.n_nonzero for layer in layers} == {
        name: int(mask.sum()) for name, mask in masks.items()
    }
    assert sum(layer.macs or 0 for layer in layers) == 64 * 144 + 64 * 4608 + 16 * 18432 + 16384 + 640


def test_parameters_are_counted_over_float_initializers_only() -> None:
    model = one_node("Gemm", (10, 6), ("n", 6), transB=1, n_zeros=11)
    model.graph.initializer.append(numpy_helper.from_array(np.arange(5), "integers"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, 1], dtype=np.float16), "halves"))
    assert count_parameters(model) == (62, 50)


def test_a_saved_model_is_read_back(tmp_path: Path) -> None:
    model = one_node("Gemm", (10, 6), ("n", 6), transB=1)
    onnx.save(model, tmp_path / "m.onnx")
    assert graph_layers(onnx_from_file(tmp_path / "m.onnx")) == graph_layers(model)


def test_weights_beside_the_model_are_read_too(tmp_path: Path) -> None:
    model = one_node("Gemm", (100, 60), ("n", 60), transB=1, n_zeros=7)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    assert count_parameters(onnx_from_file(tmp_path / "m.onnx")) == (6000, 5993)


def test_a_model_whose_weights_beside_it_are_gone_is_refused(tmp_path: Path) -> None:
    model = one_node("Gemm", (100, 60), ("n", 60), transB=1)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    (tmp_path / "m.data").unlink()
    with pytest.raises(ArtefactError, match=r"m\.onnx cannot be read as ONNX"):
        onnx_from_file(tmp_path / "m.onnx")


@pytest.mark.parametrize("kept", [0.01, 0.5, 0.99])
def test_a_truncated_model_is_refused(tmp_path: Path, kept: float) -> None:
    content = one_node("Gemm", (10, 6), ("n", 6), transB=1).SerializeToString()
    (tmp_path / "m.onnx").write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ArtefactError, match="cannot be read as ONNX"):
        onnx_from_file(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "content", [b"", b"hello, this is text\n", b"\x00" * 100, b"\x89PNG\r\n\x1a\n" + b"a" * 50]
)
def test_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ArtefactError, match="cannot be read as ONNX"):
        onnx_from_file(tmp_path / "m.onnx")


@pytest.mark.parametrize("name", [b"batch", b"fc1", b"first"])
@pytest.mark.parametrize("check", [False, True])
def test_names_that_are_no_text_are_told(name: bytes, check: bool, tmp_path: Path) -> None:
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
        onnx_from_file(tmp_path / "m.onnx", check=check)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a file"):
        onnx_from_file(tmp_path / "absent.onnx")


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    file = folder / "m.onnx"
    file.write_bytes(model.SerializeToString())
    return file


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
    read = onnx_from_file(file)
    (layer,) = graph_layers(read)
    assert (layer.weight, layer.n_nonzero) == ("w", 5993)
    if change is unsorted:
        assert [node.name for node in read.graph.node] == ["layer", "after", "last"]


def test_a_weight_that_an_unsorted_graph_computes_later_is_worked_out(tmp_path: Path) -> None:
    model = one_node("MatMul", (6, 10), ("n", 6), n_zeros=7)
    model.graph.node[0].input[1] = "turned"
    model.graph.node.append(helper.make_node("Identity", ["w"], ["turned"]))
    (layer,) = graph_layers(onnx_from_file(saved(model, tmp_path)))
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
        (in_a_circle, "Nodes in a graph must be topologically sorted, however input 'a'"),
        (too_short, "Field 'shape' of 'type' is required but missing"),
    ],
)
def test_what_onnxruntime_refuses_is_told_in_the_words_of_the_checker(
    change: Callable[[onnx.ModelProto], None], words: str, tmp_path: Path
) -> None:
    model = one_node("Gemm", (100, 60), ("n", 60), transB=1)
    change(model)
    with pytest.raises(ArtefactError, match=re.escape(words)) as caught:
        onnx_from_file(saved(model, tmp_path))
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


def test_weights_that_are_links_into_a_cache_are_read_where_links_are_followed(tmp_path: Path) -> None:
    file = in_a_cache(tmp_path)
    assert count_parameters(onnx_from_file(file, links=True)) == (6000, 5993)
    with pytest.raises(ArtefactError, match="symbolic link"):
        onnx_from_file(file)


def test_a_linked_file_that_ends_too_early_is_told(tmp_path: Path) -> None:
    file = in_a_cache(tmp_path)
    blob = tmp_path / "blobs" / "0b"
    blob.write_bytes(blob.read_bytes()[:-4])
    with pytest.raises(ArtefactError, match="ends before the data of w do"):
        onnx_from_file(file, links=True)


@pytest.mark.parametrize("location", ["../m.data", "/etc/hostname"])
def test_links_lead_only_to_files_beside_the_model(location: str, tmp_path: Path) -> None:
    file = in_a_cache(tmp_path)
    model = onnx.load(file, load_external_data=False)
    second = model.graph.initializer.add()
    second.CopyFrom(model.graph.initializer[0])
    second.name = "other"
    second.external_data[0].value = location
    file.unlink()
    with pytest.raises(ArtefactError, match="not beside the model"):
        onnx_from_file(saved(model, file.parent), links=True)
