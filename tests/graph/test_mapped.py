"""A model parsed without the data of its large tensors is the same model, and its data are where it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from sparse_export.errors import ArtefactError
from sparse_export.graph import protobuf
from sparse_export.graph.foreign import (
    external_files,
    linked_tensors,
    load_linked_data,
    onnx_from_file,
    tensors_of,
)
from sparse_export.graph.mapped import MappedData
from sparse_export.graph.model import open_mapped, open_model
from sparse_export.graph.protobuf import parsed_without_large_data, serialized
from tests.graph.hostile import many_branches, nested_alone

Array = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file counts as large, and so does every tensor of a hundred bytes."""
    monkeypatch.setattr(protobuf, "_LEAST_BYTES", 1)
    monkeypatch.setattr(protobuf, "_LARGE_BYTES", 100)


def weight(name: str, *shape: int, dtype: Any = np.float32, seed: int = 0) -> TensorProto:
    values = np.random.default_rng(seed).normal(size=shape) * 3
    return numpy_helper.from_array(values.astype(dtype), name)


def network() -> onnx.ModelProto:
    """Large tensors wherever a model may have them, raw and not, beside small ones."""
    inner = helper.make_graph(
        [helper.make_node("MatMul", ["x", "inside"], ["t"])],
        "branch",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
        [weight("inside", 32, 32, seed=1)],
    )
    numbers = helper.make_tensor("numbers", TensorProto.FLOAT, [32, 32], [float(i) for i in range(1024)])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=weight("", 32, 40, seed=2)),
        helper.make_node("If", ["flag"], ["b"], then_branch=inner, else_branch=inner),
        helper.make_node("MatMul", ["b", "numbers"], ["n"]),
        helper.make_node("MatMul", ["n", "w"], ["m"]),
        helper.make_node("MatMul", ["m", "c"], ["k"]),
        helper.make_node("own", ["k"], ["o"], domain="own"),
        helper.make_node("Add", ["o", "bias"], ["y"]),
    ]
    body = [
        helper.make_node("Constant", [], ["f"], value=weight("", 40, 50, seed=3)),
        helper.make_node("MatMul", ["a", "f"], ["z"]),
    ]
    function = helper.make_function("own", "own", ["a"], ["z"], body, [helper.make_opsetid("", 20)])
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 50])],
        [
            weight("w", 32, 32, seed=4),
            weight("bias", 50, seed=5),
            helper.make_tensor("flag", TensorProto.BOOL, [], [True]),
            numbers,
        ],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[function])


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_large_raw_data_stay_in_the_file_wherever_they_stand(tmp_path: Path) -> None:
    path = saved(network(), tmp_path)
    bare = parsed_without_large_data(path)
    outside = [one for one in tensors_of(bare) if one.data_location == TensorProto.EXTERNAL]
    assert sorted(one.name for one in outside) == ["", "", "bias", "inside", "inside", "w"]
    assert bare.ByteSize() < 8000 < path.stat().st_size
    load_linked_data(linked_tensors(bare), path)
    assert bare == network()
    assert external_files(path) == ()


@pytest.mark.parametrize("made", [network, onnx.ModelProto, lambda: many_branches(3)])
def test_a_model_is_written_tensor_by_tensor_to_the_same_bytes(made: Any) -> None:
    model = made()
    model.metadata_props.add(key="k", value="v")
    assert b"".join(serialized(model)) == model.SerializeToString(deterministic=True)


@pytest.mark.parametrize("made", [network, lambda: many_branches(20), lambda: nested_alone(20)])
def test_files_are_opened_as_if_they_were_parsed_whole(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(made(), tmp_path)
    in_parts = open_model(path), onnx_from_file(path)
    monkeypatch.setattr(protobuf, "_LEAST_BYTES", 2**40)
    assert in_parts == (open_model(path), onnx_from_file(path))
    assert in_parts[1] == made()


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, np.float64, np.int8, np.int64, np.bool_, np.complex64]
)
def test_mapped_values_are_those_that_are_stored(dtype: Any, tmp_path: Path) -> None:
    tensors = [weight(f"w{i}", 40 + i, 60, dtype=dtype, seed=i) for i in range(3)]
    assert mapped(tensors, tmp_path)


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4, ml_dtypes.uint4]
)
def test_mapped_values_of_other_types_are_those_that_are_stored(dtype: Any, tmp_path: Path) -> None:
    tensors = [numpy_helper.from_array(np.ones((41, 61), dtype), f"w{i}") for i in range(2)]
    assert mapped(tensors, tmp_path)


def mapped(tensors: list[TensorProto], folder: Path) -> bool:
    """Are the values that are mapped in turns, twice each, those that the tensors hold?"""
    nodes = [helper.make_node("Identity", [one.name], [f"y{one.name}"]) for one in tensors]
    graph = helper.make_graph(nodes, "g", [], [], tensors)
    path = saved(helper.make_model(graph), folder)
    bare = parsed_without_large_data(path)
    assert all(one.data_location == TensorProto.EXTERNAL for one in bare.graph.initializer)
    read = MappedData(path, links=False)
    for _ in range(2):
        arrays = [read(one) for one in bare.graph.initializer]
        for array, tensor in zip(arrays, tensors, strict=True):  # those before are valid too
            wanted = numpy_helper.to_array(tensor)
            assert array.dtype == wanted.dtype
            np.testing.assert_array_equal(array.astype(wanted.dtype), wanted)
    return True


def test_data_beside_the_model_are_mapped_as_well(tmp_path: Path) -> None:
    onnx.save_model(network(), tmp_path / "m.onnx", save_as_external_data=True, size_threshold=100)
    model, read = open_mapped(tmp_path / "m.onnx")
    whole = open_model(tmp_path / "m.onnx")
    for bare, stored in zip(model.graph.initializer, whole.graph.initializer, strict=True):
        np.testing.assert_array_equal(read(bare), numpy_helper.to_array(stored))


def test_a_file_that_is_changed_after_it_was_opened_is_told(tmp_path: Path) -> None:
    path = saved(helper.make_model(helper.make_graph([], "g", [], [], [weight("w", 90, 90)])), tmp_path)
    bare = parsed_without_large_data(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ArtefactError, match="ends before the data of w do"):
        MappedData(path, links=False)(bare.graph.initializer[0])


def test_a_shape_that_the_data_do_not_fill_is_told(tmp_path: Path) -> None:
    tensor = weight("w", 40, 60)
    tensor.dims[0] = 41
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 41])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 60])],
        [tensor],
    )
    path = saved(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path
    )
    with pytest.raises(ArtefactError, match=r"raw_data size \(9600 bytes\) is too small"):
        open_mapped(path)


@settings(max_examples=200)
@given(st.data())
def test_damaged_files_are_refused_or_read_as_the_whole_parser_does(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(network().SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        if not content:
            break
        match data.draw(st.sampled_from(["flip", "cut", "drop"])):
            case "flip":
                content[at] ^= data.draw(st.integers(1, 255))
            case "cut":
                del content[max(at, 1) :]
            case "drop":
                del content[at : at + data.draw(st.integers(1, 5))]
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    path.write_bytes(bytes(content) or b"\0")
    try:
        whole = onnx.load_from_string(path.read_bytes())
    except DecodeError:
        with pytest.raises(DecodeError):
            parsed_without_large_data(path)
        return
    found = parsed_without_large_data(path)
    moved = [one for one in tensors_of(found) if _is_moved(one, path)]
    for tensor in moved:
        start = int(next(one.value for one in tensor.external_data if one.key == "offset"))
        length = int(next(one.value for one in tensor.external_data if one.key == "length"))
        tensor.raw_data = bytes(content[start : start + length])
        tensor.ClearField("data_location")
        del tensor.external_data[:]
    assert found.SerializeToString(deterministic=True) == whole.SerializeToString(deterministic=True)


def _is_moved(tensor: TensorProto, path: Path) -> bool:
    return any(one.key == "location" and one.value == path.name for one in tensor.external_data)
