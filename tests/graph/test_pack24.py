"""Packing loses no bit, cuts nothing, and tells why a weight stays dense."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from hypothesis import given, settings
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from sparse_export.errors import ArtefactError, GateFailed, UsageError
from sparse_export.graph.dense_file import dense_from_file, may_be_packed
from sparse_export.graph.layers import graph_layers
from sparse_export.graph.passes.expand24 import expand
from sparse_export.graph.passes.format24 import is_packed, packed_weights
from sparse_export.graph.passes.pack24 import pack
from sparse_export.graph.passes.packable import pack_choices
from sparse_export.graph.passes.weight24 import PackedWeight, pack_weight, unpack_weight
from tests.graph.packed import (
    BF16,
    DTYPES,
    Array,
    convolutional,
    gemm,
    initializer,
    model_of,
    quantized,
    two_four,
)

MODELS: dict[str, Any] = {
    "fp32": lambda: convolutional(np.float32),
    "fp16": lambda: convolutional(np.float16),
    "int8": quantized,
}


def content(model: onnx.ModelProto) -> bytes:
    found: bytes = model.SerializeToString(deterministic=True)
    return found


def onnxruntime_output(model: onnx.ModelProto, x: Array, optimized: Path | None = None) -> Array:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    session = ort.InferenceSession(content(model), options, providers=["CPUExecutionProvider"])
    found: Array = session.run(None, {"x": x})[0]
    return found


def evaluated(model: onnx.ModelProto, x: Array) -> Array:
    """By onnx's own evaluator."""
    outputs: Any = ReferenceEvaluator(model).run(None, {"x": x})
    found: Array = outputs[0]
    return found


def input_of(model: onnx.ModelProto) -> Array:
    info = model.graph.input[0].type.tensor_type
    shape = [dim.dim_value or 2 for dim in info.shape.dim]
    x: Array = (
        np.random.default_rng(1)
        .standard_normal(shape)
        .astype(helper.tensor_dtype_to_np_dtype(info.elem_type))
    )
    return x


# ---- tensors

tensors = st.tuples(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(0, 3),
    st.sampled_from(DTYPES),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
)


@given(tensors)
def test_unpacking_undoes_packing(drawn: Any) -> None:
    shape, axis, dtype, density, seed = drawn
    axis %= len(shape)
    shape[axis] *= 4
    dense = two_four(shape, axis, dtype, seed=seed, density=density)
    packed = pack_weight(dense, axis)
    assert packed.values.shape == (dense.size // 4, 2)
    assert (packed.values.dtype, packed.meta.size) == (dtype, (dense.size // 4 + 1) // 2)
    again = np.moveaxis(unpack_weight(packed), -1, axis)
    assert (again.dtype, again.shape) == (dense.dtype, dense.shape)
    assert again.tobytes() == dense.tobytes()


def plainly_packed(dense: Array, axis: int) -> tuple[list[Any], list[int]]:
    """Loops over groups, from the words of docs/packed-format.md."""
    values, nibbles = [], []
    for group in np.moveaxis(dense, axis, -1).reshape(-1, 4):
        kept = [i for i in range(4) if group[i] != 0]
        if len(kept) < 2:
            kept = {(): [2, 3], (0,): [0, 2], (1,): [1, 2], (2,): [2, 3], (3,): [2, 3]}[tuple(kept)]
        values += [group[kept[0]], group[kept[1]]]
        nibbles.append(kept[0] | kept[1] << 2)
    nibbles += [0] * (len(nibbles) % 2)
    return values, [low | high << 4 for low, high in zip(nibbles[::2], nibbles[1::2], strict=True)]


@given(tensors)
def test_packing_is_what_the_document_says_group_by_group(drawn: Any) -> None:
    shape, axis, dtype, density, seed = drawn
    axis %= len(shape)
    shape[axis] *= 4
    dense = two_four(shape, axis, dtype, seed=seed, density=density)
    packed = pack_weight(dense, axis)
    values, meta = plainly_packed(dense, axis)
    assert packed.values.reshape(-1).tolist() == values
    assert packed.meta.tolist() == meta


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.0])
def test_values_and_metadata_are_those_of_torch_before_it_interleaves(
    dtype: torch.dtype, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its oracle takes rows by 32 and columns by 64 or 128, packs float32 as 1:2, and cuts silently what is
    # not 2:4.
    monkeypatch.setattr(
        "torch.sparse._semi_structured_conversions._calculate_meta_reordering_scatter_offsets",
        lambda rows, columns, meta_dtype, device: torch.arange(rows * columns),
    )
    dense = torch.from_numpy(two_four((64, 128), 1, np.float32, seed=3, density=density)).to(dtype)
    values, meta = sparse_semi_structured_from_dense_cutlass(dense)
    raw = dense.view(torch.int16).numpy().view(BF16) if dtype is torch.bfloat16 else dense.numpy()
    packed = pack_weight(raw, 1)
    assert packed.values.tobytes() == values.contiguous().view(torch.uint8).numpy().tobytes()
    assert packed.meta.tobytes() == meta.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_that_is_not_two_four_is_refused_and_never_cut(dtype: Any) -> None:
    dense = two_four((4, 8), 1, dtype)
    dense[2, 4:] = [1, 0, 1, 1]
    with pytest.raises(GateFailed, match="1 of 8 groups have more than 2 nonzeros"):
        pack_weight(dense, 1)


def test_nan_counts_as_a_nonzero() -> None:
    with pytest.raises(GateFailed):
        pack_weight(np.array([np.nan, np.nan, np.nan, 0], dtype=np.float32), 0)


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("<f4", [0x7F800001, 0xFFC12345, 0x7F800000, 1]), ("<f2", [0x7C01, 0xFE12, 0xFC00, 1])],
)
def test_payloads_of_nan_infinity_and_subnormal_numbers_keep_their_bits(dtype: str, bits: list[int]) -> None:
    words = np.zeros(8, dtype=dtype.replace("f", "u"))
    words[[0, 3, 5, 6]] = bits
    dense = words.view(dtype)
    assert unpack_weight(pack_weight(dense, 0)).tobytes() == dense.tobytes()


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_negative_zeros_become_positive_kept_or_not(dtype: Any) -> None:
    dense = np.array([[1, -0.0, -0.0, -0.0], [-0.0, -0.0, 2, 3]]).astype(dtype)
    again = unpack_weight(pack_weight(dense, 1))
    assert again.tobytes() == np.array([[1, 0, 0, 0], [0, 0, 2, 3]]).astype(dtype).tobytes()


@pytest.mark.parametrize(
    ("dense", "axis"),
    [
        (np.zeros((4, 4), dtype=np.float64), 0),
        (np.zeros((4, 4), dtype=np.uint8), 0),
        (np.zeros((4, 4), dtype=object), 0),
        (np.zeros((4, 6), dtype=np.float32), 1),
        (np.zeros((0, 4), dtype=np.float32), 1),
        (np.zeros((4, 0), dtype=np.float32), 1),
        (np.zeros((4, 4), dtype=np.float32), 2),
        (np.zeros((4, 4), dtype=np.float32), -1),
        (np.zeros((), dtype=np.float32), 0),
    ],
)
def test_other_types_axes_and_lengths_are_wrong_usage(dense: Array, axis: int) -> None:
    with pytest.raises(UsageError):
        pack_weight(dense, axis)


GOOD = pack_weight(two_four((3, 4), 1), 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"values": GOOD.values[:2]}, "metadata are uint8 of shape"),
        ({"values": GOOD.values.astype(np.float64)}, "values are float64"),
        ({"values": GOOD.values.reshape(-1)}, "values have shape"),
        ({"values": GOOD.values[:0], "meta": GOOD.meta[:0], "shape": (0,)}, "values have shape"),
        ({"meta": GOOD.meta.astype(np.int8)}, "metadata are int8"),
        ({"meta": np.array([0x44, 0x05], dtype=np.uint8)}, "indices 1 and 1"),
        ({"meta": np.array([0x14, 0x04], dtype=np.uint8)}, "group 1 has the indices 1 and 0"),
        ({"meta": np.array([0x44, 0x44], dtype=np.uint8)}, "nibble after the last group is 4"),
        ({"shape": (4, 3)}, "shape is"),
        ({"shape": (3, 8)}, "shape is"),
        ({"shape": ()}, "shape is"),
        ({"shape": (-3, -4)}, "shape is"),
        ({"shape": (2**62, 2**62, 4)}, "shape is"),
        ({"shape": (*[1] * 40, 12)}, "shape is"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], words: str) -> None:
    parts: dict[str, Any] = {"values": GOOD.values, "meta": GOOD.meta, "shape": GOOD.shape} | changes
    with pytest.raises(ArtefactError, match=words):
        unpack_weight(PackedWeight(**parts))


# ---- graphs


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
def test_expanding_gives_back_the_model_byte_for_byte(make: Any) -> None:
    model = make()
    before = content(model)
    packed = pack(model)
    assert content(model) == before
    assert is_packed(packed)
    assert not is_packed(model)
    kept = content(packed)
    assert content(expand(packed)) == before
    assert content(packed) == kept
    assert content(expand(model)) == before


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
def test_packing_twice_is_packing_once(make: Any) -> None:
    packed = pack(make())
    assert content(pack(packed)) == content(packed)


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
def test_dense_packed_and_expanded_give_the_same_bits_in_onnxruntime(make: Any, tmp_path: Path) -> None:
    model = make()
    packed = pack(model)
    onnx.checker.check_model(packed, full_check=True)
    x = input_of(model)
    wanted = onnxruntime_output(model, x)
    assert np.abs(wanted.astype(np.float64)).max() > 0
    assert onnxruntime_output(packed, x, tmp_path / "o.onnx").tobytes() == wanted.tobytes()
    assert onnxruntime_output(expand(packed), x).tobytes() == wanted.tobytes()
    folded = {one.op_type for one in onnx.load(tmp_path / "o.onnx").graph.node}
    assert not folded & {"Unpack24", "ScatterElements", "BitShift"}


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
def test_onnxs_own_evaluator_agrees(make: Any) -> None:
    model = make()
    x = input_of(model)
    np.testing.assert_array_equal(evaluated(pack(model), x), evaluated(model, x))


@pytest.mark.parametrize("opset", [15, 17, 18, 21, 24, 26])
def test_every_opset_with_functions_and_castlike_works(opset: int) -> None:
    model = gemm(two_four((6, 8), 1), opset=opset)
    packed = pack(model)
    onnx.checker.check_model(packed, full_check=True)
    x = input_of(model)
    assert onnxruntime_output(packed, x).tobytes() == onnxruntime_output(model, x).tobytes()
    assert content(expand(packed)) == content(model)


def test_bfloat16_is_packed_and_evaluated() -> None:
    model = gemm(two_four((6, 8), 1, BF16))
    packed = pack(model)
    onnx.checker.check_model(packed, full_check=True)
    assert content(expand(packed)) == content(model)
    x = input_of(model)
    assert evaluated(packed, x).tobytes() == evaluated(model, x).tobytes()


def test_bfloat16_weights_cast_to_float32_run_in_onnxruntime() -> None:
    model = model_of(
        [
            helper.make_node("Cast", ["w"], ["wf"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["x", "wf"], ["y"]),
        ],
        {"w": two_four((8, 5), 0, BF16)},
        inputs={"x": ["n", 8]},
    )
    packed = pack(model)
    assert packed_weights(packed) == ("w",)
    x = input_of(model)
    assert onnxruntime_output(packed, x).tobytes() == onnxruntime_output(model, x).tobytes()


def reasons(model: onnx.ModelProto) -> dict[str, str | None]:
    return {choice.weight: choice.reason for choice in pack_choices(model)}


def test_a_weight_without_entries_is_told_as_such() -> None:
    empty = {"w": np.zeros((16, 0), np.float32)}
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], empty, inputs={"x": ["n", 16]})
    assert reasons(model) == {"w": "it has no entries"}


def test_what_is_packed_is_what_is_said_and_the_rest_is_untouched() -> None:
    model = convolutional()
    assert [(c.weight, c.axis) for c in pack_choices(model) if c.reason is None] == [
        ("conv", 1),
        ("grouped", 1),
        ("up", 0),
        ("fc", 1),
        ("fc2", 0),
    ]
    assert reasons(model)["stem"] == "axis 1 has 3 entries, no multiple of 4"
    packed = pack(model)
    assert packed_weights(packed) == ("conv", "grouped", "up", "fc", "fc2")
    for name in ("stem", "bias"):
        assert initializer(packed, name) == initializer(model, name)
    assert packed.graph.node[-len(model.graph.node) :] == model.graph.node


def test_two_four_along_another_axis_is_not_two_four() -> None:
    weight = two_four((8, 8), 0)
    assert "groups have more than 2 nonzeros" in str(reasons(gemm(weight))["w"])
    assert not is_packed(pack(gemm(weight)))
    assert content(pack(gemm(weight))) == content(gemm(weight))


def node(op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, outputs, **attributes)


def square(nodes: list[onnx.NodeProto], weight: Array, **more: Array) -> onnx.ModelProto:
    return model_of(nodes, {"w": weight, **more}, inputs={"x": [8, 8]})


BOTH_WAYS = two_four((4, 8), 1).repeat(2, axis=0)
BOTH_WAYS[:, :] = np.kron(np.eye(2), np.diag([1, 2, 3, 4])).astype(np.float32)


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([node("MatMul", ["x", "w"], ["a"]), node("Gemm", ["a", "w"], ["y"])], None),
        ([node("MatMul", ["x", "w"], ["a"]), node("Gemm", ["a", "w"], ["y"], transB=1)], "different axes"),
        ([node("MatMul", ["x", "w"], ["a"]), node("Add", ["a", "w"], ["y"])], "Add y uses it too"),
        ([node("MatMul", ["w", "w"], ["y"])], "MatMul y uses it too"),
        ([node("Gemm", ["x", "w", "w"], ["y"])], "Gemm y uses it too"),
        ([node("Transpose", ["w"], ["t"]), node("Gemm", ["x", "t"], ["y"], transB=1)], None),
        ([node("Identity", ["w"], ["t"]), node("MatMul", ["x", "t"], ["y"])], None),
        ([node("Relu", ["w"], ["t"]), node("MatMul", ["t", "w"], ["y"])], "Relu t uses it too"),
    ],
)
def test_only_what_serves_as_weight_alone_along_one_axis_is_packed(
    nodes: list[onnx.NodeProto], reason: str | None
) -> None:
    model = square(nodes, BOTH_WAYS)
    found = reasons(model)["w"]
    assert (found is None) if reason is None else (found is not None and reason in found)
    packed = pack(model)
    assert is_packed(packed) == (reason is None)
    assert sum(one.op_type == "Unpack24" for one in packed.graph.node) == (reason is None)
    x = input_of(model)
    assert onnxruntime_output(packed, x).tobytes() == onnxruntime_output(model, x).tobytes()


def test_the_axis_is_followed_through_a_transpose() -> None:
    weight = two_four((6, 8), 1)
    nodes = [node("Transpose", ["w"], ["t"], perm=[1, 0]), node("MatMul", ["x", "t"], ["y"])]
    (choice,) = pack_choices(square(nodes, weight))
    assert (choice.axis, choice.reason) == (1, None)


def test_a_weight_that_is_also_an_output_stays_dense() -> None:
    model = gemm(two_four((8, 8), 1))
    model.graph.output.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [8, 8]))
    assert reasons(model) == {"w": "it is also an output of the graph"}
    assert not is_packed(pack(model))


def test_a_weight_that_may_be_fed_stays_dense() -> None:
    model = gemm(two_four((8, 8), 1))
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [8, 8]))
    assert reasons(model) == {"w": "it is also an input of the graph"}


def choosing(then: Sequence[onnx.NodeProto], other: Sequence[onnx.NodeProto]) -> onnx.ModelProto:
    """A choice between two branches over one weight, both of which end in `i`, and its double."""
    branches = [
        helper.make_graph(
            [*nodes, node("Identity", ["j"], [f"i_{at}"])],
            f"branch_{at}",
            [],
            [helper.make_tensor_value_info(f"i_{at}", TensorProto.FLOAT, None)],
        )
        for at, nodes in enumerate((then, other))
    ]
    nodes = [
        node("ReduceMax", ["x"], ["most"], keepdims=0),
        node("Greater", ["most", "zero"], ["yes"]),
        node("If", ["yes"], ["b"], then_branch=branches[0], else_branch=branches[1]),
        node("Add", ["b", "b"], ["y"]),
    ]
    return square(nodes, two_four((8, 8), 0), zero=np.array(0.0, dtype=np.float32))


def test_a_weight_of_branches_is_packed_and_they_give_the_same() -> None:
    product = [node("MatMul", ["x", "w"], ["j"])]
    turned = [node("Transpose", ["w"], ["t"], perm=[1, 0]), node("Gemm", ["x", "t"], ["j"], transB=1)]
    model = choosing(product, turned)
    assert reasons(model) == {"w": None}
    packed = pack(model)
    assert is_packed(packed)
    assert expand(packed).graph.initializer[0].name == "w"
    found = [(layer.weight, layer.pattern_holds) for layer in graph_layers(packed)]
    assert found == [("w.values", True)] * 2
    x = np.abs(input_of(model))
    for some in (x, -x):
        assert np.array_equal(onnxruntime_output(packed, some), onnxruntime_output(model, some))


def test_a_weight_that_a_branch_uses_otherwise_stays_dense() -> None:
    product = [node("MatMul", ["x", "w"], ["j"])]
    assert reasons(choosing(product, [node("Add", ["x", "w"], ["j"])])) == {"w": "Add j uses it too"}
    given = choosing(product, product)
    branch = given.graph.node[2].attribute[1].g
    branch.output.add().CopyFrom(helper.make_tensor_value_info("w", TensorProto.FLOAT, [8, 8]))
    assert reasons(given) == {"w": "it is also an output of a subgraph"}


@pytest.mark.parametrize(("zero", "reason"), [(0, None), (1, "the zero point of d is not 0")])
def test_an_int8_weight_is_two_four_only_where_its_zero_means_zero(zero: int, reason: str | None) -> None:
    nodes = [node("DequantizeLinear", ["w", "s", "z"], ["d"]), node("MatMul", ["x", "d"], ["y"])]
    scale, point = np.array(0.5, dtype=np.float32), np.array(zero, dtype=np.int8)
    assert reasons(square(nodes, two_four((8, 8), 0, np.int8), s=scale, z=point)) == {"w": reason}


def test_a_float_weight_behind_quantize_and_dequantize_is_packed() -> None:
    nodes = [
        node("QuantizeLinear", ["w", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        node("MatMul", ["x", "d"], ["y"]),
    ]
    scale, point = np.array(0.5, dtype=np.float32), np.array(0, dtype=np.int8)
    model = square(nodes, two_four((8, 8), 0), s=scale, z=point)
    assert reasons(model) == {"w": None}
    x = input_of(model)
    assert onnxruntime_output(pack(model), x).tobytes() == onnxruntime_output(model, x).tobytes()


def test_doubles_and_weights_in_another_file_stay_dense() -> None:
    assert reasons(gemm(two_four((8, 8), 1).astype(np.float64))) == {"w": "it is DOUBLE"}
    model = gemm(two_four((8, 8), 1))
    tensor = initializer(model, "w")
    tensor.data_location = TensorProto.EXTERNAL
    assert "another file" in str(reasons(model)["w"])


def test_values_in_typed_fields_are_packed_too() -> None:
    dense = two_four((8, 8), 1)
    model = gemm(dense)
    initializer(model, "w").CopyFrom(
        helper.make_tensor("w", TensorProto.FLOAT, dense.shape, dense.reshape(-1))
    )
    again = initializer(expand(pack(model)), "w")
    assert numpy_helper.to_array(again).tobytes() == dense.tobytes()


def test_negative_zeros_in_a_graph_come_back_positive() -> None:
    dense = -two_four((8, 8), 1)
    assert np.signbit(dense[dense == 0]).all()
    again = numpy_helper.to_array(initializer(expand(pack(gemm(dense))), "w"))
    assert again.tobytes() == (dense + np.float32(0)).tobytes()


def test_names_that_are_taken_are_avoided_and_notes_are_kept() -> None:
    model = square(
        [node("MatMul", ["x", "w"], ["w.moved"]), node("Add", ["w.moved", "w.values"], ["y"])],
        two_four((8, 8), 0),
        **{"w.values": np.ones(8, dtype=np.float32)},
    )
    initializer(model, "w").doc_string = "note"
    helper.set_model_props(model, {"producer": "somebody"})
    packed = pack(model)
    onnx.checker.check_model(packed, full_check=True)
    assert content(expand(packed)) == content(model)


@pytest.mark.parametrize("what", ["function", "other function", "metadata"])
def test_a_strangers_use_of_our_names_is_told(what: str) -> None:
    model = gemm(two_four((8, 8), 1))
    if what == "metadata":
        helper.set_model_props(model, {"sparse24.format": "mine"})
    else:
        name = "Unpack24" if what == "function" else "Other"
        model.functions.append(
            helper.make_function(
                "sparse24", name, ["a"], ["b"], [node("Relu", ["a"], ["b"])], [helper.make_opsetid("", 20)]
            )
        )
    with pytest.raises(UsageError, match="sparse24"):
        pack(model)


@pytest.mark.parametrize(("opset", "ir_version"), [(14, 10), (20, 7)])
def test_a_model_too_old_for_functions_is_told(opset: int, ir_version: int) -> None:
    with pytest.raises(UsageError, match=f"opset {opset} and IR version {ir_version}"):
        pack(gemm(two_four((8, 8), 1), opset=opset, ir_version=ir_version))


# ---- damage


def _prop(model: onnx.ModelProto, key: str, value: str | None) -> None:
    props = {prop.key: prop.value for prop in model.metadata_props} | ({} if value is None else {key: value})
    if value is None:
        del props[key]
    model.ClearField("metadata_props")
    helper.set_model_props(model, props)


def _raw(model: onnx.ModelProto, name: str, raw: bytes) -> None:
    initializer(model, name).raw_data = raw


def _dims(model: onnx.ModelProto, name: str, dims: list[int]) -> None:
    initializer(model, name).dims[:] = dims


def _short_meta(model: onnx.ModelProto) -> None:
    _raw(model, "w.meta", b"\x44" * 7)
    _dims(model, "w.meta", [7])


def _twice(model: onnx.ModelProto) -> None:
    call = model.graph.node.add()
    call.CopyFrom(model.graph.node[0])
    call.output[0] = "other"
    _prop(model, "sparse24.tensor:other", model.metadata_props[0].value)


def _body(model: onnx.ModelProto) -> None:
    next(one for one in model.functions[0].node if one.op_type == "BitShift").attribute[0].s = b"LEFT"


DAMAGE: dict[str, Any] = {
    "truncated values": lambda m: _raw(m, "w.values", initializer(m, "w.values").raw_data[:-1]),
    "no values": lambda m: _raw(m, "w.values", b""),
    "negative dims": lambda m: _dims(m, "w.values", [-16, -2]),
    "absurd dims": lambda m: _dims(m, "w.values", [2**62, 2]),
    "absurd shape": lambda m: _raw(m, "w.shape", np.array([2**40, 2**40]).tobytes()),
    "negative shape": lambda m: _raw(m, "w.shape", np.array([-8, -8]).tobytes()),
    "other shape": lambda m: _raw(m, "w.shape", np.array([4, 16]).tobytes()),
    "meta of a wrong order": lambda m: _raw(m, "w.meta", b"\x11" * 8),
    "meta of another order": lambda m: _raw(m, "w.meta", b"\x44" * 8),
    "short meta": _short_meta,
    "meta type": lambda m: setattr(initializer(m, "w.meta"), "data_type", TensorProto.INT8),
    "values type": lambda m: setattr(initializer(m, "w.values"), "data_type", TensorProto.INT32),
    "values elsewhere": lambda m: setattr(initializer(m, "w.values"), "data_location", TensorProto.EXTERNAL),
    "a value": lambda m: _raw(m, "w.values", b"\x01" + initializer(m, "w.values").raw_data[1:]),
    "no version": lambda m: _prop(m, "sparse24.format", None),
    "next version": lambda m: _prop(m, "sparse24.format", "2"),
    "no line": lambda m: _prop(m, "sparse24.tensor:w", None),
    "line too many": lambda m: _prop(m, "sparse24.tensor:v", "FLOAT 8,8 00"),
    "other key": lambda m: _prop(m, "sparse24.more", "1"),
    "other hash": lambda m: _prop(m, "sparse24.tensor:w", f"FLOAT 8,8 {'0' * 64}"),
    "key twice": lambda m: m.metadata_props.add(key="sparse24.format", value="1"),
    "not UTF-8": lambda m: m.ParseFromString(
        m.SerializeToString().replace(b"sparse24.tensor:w", b"sparse24.tensor:\xff")
    ),
    "no function": lambda m: m.ClearField("functions"),
    "another body": _body,
    "no domain": lambda m: m.opset_import.pop(),
    "other domain version": lambda m: setattr(m.opset_import[-1], "version", 2),
    "no call": lambda m: m.graph.node.pop(0),
    "values twice": _twice,
    "values fed": lambda m: m.graph.input.append(
        helper.make_tensor_value_info("w.values", TensorProto.FLOAT, [16, 2])
    ),
    "input gone": lambda m: m.graph.initializer.pop(),
    "initializer twice": lambda m: m.graph.initializer.append(initializer(m, "w.meta")),
    "two inputs": lambda m: m.graph.node[0].input.pop(),
    "output renamed": lambda m: m.graph.node[0].output.__setitem__(0, "v"),
    "other call": lambda m: setattr(m.graph.node[0], "op_type", "Unpack25"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_told_and_never_read(damage: Any) -> None:
    packed = pack(gemm(two_four((8, 8), 1)))
    damage(packed)
    with pytest.raises(ArtefactError):
        expand(packed)


def test_values_that_something_else_reads_are_told() -> None:
    packed = pack(gemm(two_four((8, 8), 1)))
    packed.graph.output.append(helper.make_tensor_value_info("w.values", TensorProto.FLOAT, [16, 2]))
    with pytest.raises(ArtefactError, match="values of 'w' are used 2 times"):
        expand(packed)


@pytest.mark.parametrize("perm", [[0, 1], [0, 0], [0], [1, 0, 2], []])
def test_another_transposition_is_told(perm: list[int]) -> None:
    packed = pack(square([node("MatMul", ["x", "w"], ["y"])], two_four((8, 4), 0)))
    del packed.graph.node[1].attribute[:]
    packed.graph.node[1].attribute.append(
        helper.make_attribute("perm", perm, attr_type=onnx.AttributeProto.INTS)
    )
    with pytest.raises(ArtefactError):
        expand(packed)


def test_a_second_reader_of_the_moved_weight_is_told() -> None:
    packed = pack(square([node("MatMul", ["x", "w"], ["y"])], two_four((8, 8), 0)))
    packed.graph.node.append(node("Relu", ["w.moved"], ["z"]))
    with pytest.raises(ArtefactError, match="not only transposed"):
        expand(packed)


def test_a_call_in_a_subgraph_is_told() -> None:
    inner = helper.make_graph(
        [node("Unpack24", ["w.values", "w.meta", "w.shape"], ["i"], domain="sparse24")], "i", [], []
    )
    packed = pack(gemm(two_four((8, 8), 1)))
    packed.graph.node.append(node("If", ["yes"], ["z"], then_branch=inner, else_branch=inner))
    with pytest.raises(ArtefactError, match="subgraph calls it"):
        expand(packed)


def test_shared_metadata_and_notes_of_tools_are_read() -> None:
    weights = {"w": two_four((8, 8), 1, seed=1), "v": -two_four((8, 8), 1, seed=1) + np.float32(0)}
    nodes = [node("Gemm", ["x", "w"], ["a"], transB=1), node("Gemm", ["a", "v"], ["y"], transB=1)]
    model = model_of(nodes, weights, inputs={"x": [8, 8]})
    packed = pack(model)
    for name in ("meta", "shape"):
        packed.graph.initializer.remove(initializer(packed, f"v.{name}"))
    packed.graph.node[1].input[1:] = ["w.meta", "w.shape"]
    packed.functions[0].node[0].name = "named"
    packed.functions[0].doc_string = "noted"
    assert content(expand(packed)) == content(model)


def fuzzed(original: bytes, seed: int) -> bytes:
    """A few bytes changed, cut out or put in, or the end cut off."""
    rng = np.random.default_rng(seed)
    spoilt = bytearray(original)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(spoilt)))
        kind = rng.integers(4)
        if kind == 0:
            spoilt[at] = int(rng.integers(256))
        elif kind == 1:
            spoilt[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            del spoilt[at : at + int(rng.integers(1, 9))]
        else:
            spoilt[at:at] = rng.bytes(int(rng.integers(1, 9)))
    return bytes(spoilt[: int(rng.integers(1, len(spoilt)))] if rng.random() < 0.1 else spoilt)


def _packed_content(model: onnx.ModelProto) -> dict[str, bytes]:
    return {t.name: t.raw_data for t in model.graph.initializer if t.name in ("w", "conv", "fc", "fc2", "up")}


@pytest.mark.parametrize("part", ["anywhere", "envelope"])
def test_random_damage_gives_an_artefact_error_or_the_very_weights(part: str, tmp_path: Path) -> None:
    """`envelope`: metadata, function and names, which are few bytes beside the weights."""
    model = gemm(two_four((8, 16), 1)) if part == "envelope" else convolutional()
    wanted = _packed_content(model)
    original = content(pack(model))
    refused = 0
    for seed in range(400):
        file = tmp_path / "m.onnx"
        file.write_bytes(fuzzed(original, seed))
        try:
            dense = dense_from_file(file)
        except ArtefactError:
            refused += 1
            continue
        if is_packed(dense):
            pytest.fail("still packed")
        found = _packed_content(dense)
        assert {name: raw for name, raw in found.items() if wanted[name] != raw} == {}, seed
    assert refused > 200


@settings(max_examples=200)
@given(st.integers(0, 2**32 - 1))
def test_random_damage_that_still_parses_raises_nothing_else(seed: int) -> None:
    """Without onnx's checker in between."""
    model = gemm(two_four((8, 16), 1))
    spoilt = onnx.ModelProto()
    try:
        spoilt.ParseFromString(fuzzed(FUZZ_ORIGINAL, seed))
    except DecodeError:
        return
    try:
        dense = expand(spoilt)
    except ArtefactError:
        return
    found = [t.raw_data for t in dense.graph.initializer if t.name == "w"]
    assert found in ([], [initializer(model, "w").raw_data])
    assert dense.ByteSize() < 10 * len(FUZZ_ORIGINAL)


FUZZ_ORIGINAL = content(pack(gemm(two_four((8, 16), 1))))


# ---- files


def test_files_are_told_apart_and_read(tmp_path: Path) -> None:
    model = convolutional()
    onnx.save(model, tmp_path / "dense.onnx")
    onnx.save(pack(model), tmp_path / "packed.onnx")
    assert not may_be_packed(tmp_path / "dense.onnx")
    assert may_be_packed(tmp_path / "packed.onnx")
    for name in ("dense", "packed"):
        assert content(dense_from_file(tmp_path / f"{name}.onnx")) == content(model)


@pytest.mark.parametrize("at", [0, 2**20 - 4, 2**20 - 1, 2**20, 2**20 + 5])
def test_the_name_of_the_format_is_found_across_blocks(tmp_path: Path, at: int) -> None:
    (tmp_path / "file").write_bytes(b"." * at + b"sparse24" + b"." * 9)
    assert may_be_packed(tmp_path / "file")


@pytest.mark.parametrize("content", [b"hello, this is text\n", b"\x0a\xff"])
def test_something_else_is_told_with_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ArtefactError, match=r"m\.onnx cannot be read as ONNX"):
        dense_from_file(tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="is not a file"):
        dense_from_file(tmp_path)


def test_damage_is_told_with_the_file(tmp_path: Path) -> None:
    packed = pack(gemm(two_four((8, 8), 1)))
    _raw(packed, "w.meta", b"\x44" * 8)
    onnx.save(packed, tmp_path / "spoilt.onnx")
    with pytest.raises(ArtefactError, match=r"spoilt\.onnx.*packed model is damaged"):
        dense_from_file(tmp_path / "spoilt.onnx")


def test_values_beside_the_file_are_read(tmp_path: Path) -> None:
    model = gemm(two_four((64, 64), 1))
    onnx.save(
        pack(model), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=16
    )
    found = numpy_helper.to_array(initializer(dense_from_file(tmp_path / "m.onnx"), "w"))
    assert found.tobytes() == initializer(model, "w").raw_data


@pytest.mark.slow
@pytest.mark.full
def test_a_resnet18_is_packed_to_54_percent_and_computes_the_same() -> None:
    from benchmarks.bench_packed import measure

    found = measure("resnet18 fp32", 1, 1)
    assert (found.n_packed, found.same_initializers, found.same_output) == (20, True, True)
    assert found.ratio <= 0.54
