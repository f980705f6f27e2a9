"""Signatures of other people's graphs: names for free sizes, the batch, and which integers they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparse_export.errors import ArtefactError, UsageError
from sparse_export.graph.model import (
    axes_from_text,
    last_fixed_ancestors,
    prepared,
    signature_of,
    sizes_from_text,
    with_axes,
)
from tests.graph.graphs import one_node

Array = np.ndarray[Any, Any]
Sizes = Sequence[int | str | None] | None
F, I64, I32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32


def graph_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, Sizes]],
    outputs: Mapping[str, tuple[int, Sizes]],
    stored: Mapping[str, Any] | None = None,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, *of) for name, of in inputs.items()],
        [helper.make_tensor_value_info(name, *of) for name, of in outputs.items()],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in (stored or {}).items()],
    )
    for value in graph.output:
        if not value.type.tensor_type.elem_type:
            value.ClearField("type")
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return prepared(model)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), name=outputs, **attributes)


def recurrent() -> onnx.ModelProto:
    """A window and a state whose samples lie along its second axis, nothing of it named."""
    nodes = [
        node("MatMul", "x w", "h"),
        node("Unsqueeze", "h zero", "deep"),
        node("Concat", "deep deep", "both", axis=0),
        node("Add", "both state", "state_after"),
        node("ReduceSum", "state_after zero", "sum", keepdims=0),
    ]
    return graph_of(
        nodes,
        {"x": (F, [None, 16]), "state": (F, [2, None, 8])},
        {"sum": (F, None), "state_after": (F, [None, None, None])},
        {"w": np.ones((16, 8), np.float32), "zero": np.array([0])},
    )


def shapes_of(model: onnx.ModelProto, **options: Any) -> dict[str, tuple[int | str, ...]]:
    signature = signature_of(model, **options)
    return {one.name: one.shape for one in (*signature.inputs, *signature.outputs)}


def test_sizes_without_names_get_some_and_axes_can_be_told() -> None:
    model = recurrent()
    assert shapes_of(model)["state"] == (2, "state_1", 8)
    told = axes_from_text(["state=_,batch,_"])
    assert shapes_of(model, axes=told) == {
        "x": ("batch", 16),
        "state": (2, "batch", 8),
        "sum": ("batch", 8),
        "state_after": (2, "batch", 8),
    }
    assert signature_of(model, axes=told).batch == "batch"


@pytest.mark.parametrize(("shape", "axes"), [([None, "batch"], {}), ([None, None], {"x": ("_", "batch")})])
def test_a_first_axis_without_a_name_is_no_second_batch(
    shape: Sizes, axes: dict[str, tuple[str, ...]]
) -> None:
    model = graph_of([node("Relu", "x", "y")], {"x": (F, shape)}, {"y": (F, None)})
    assert shapes_of(model, axes=axes) == {"x": ("x_0", "batch"), "y": ("x_0", "batch")}


def test_the_names_are_written_into_the_graph() -> None:
    model = recurrent()
    signature = signature_of(model, axes={"state": ("_", "batch", "_")})
    assert with_axes(model, signature) is model
    assert signature_of(model) == signature
    onnx.checker.check_model(model)


def test_a_told_axis_overrides_the_name_of_the_file_everywhere() -> None:
    model = graph_of(
        [node("Relu", "x", "h"), node("Neg", "h", "y")], {"x": (F, ["a", "b"])}, {"y": (F, ["a", "b"])}
    )
    signature = signature_of(model, axes={"x": ("batch", "_")})
    assert [one.shape for one in signature.outputs] == [("batch", "b")]
    with_axes(model, signature)
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    assert {value.type.tensor_type.shape.dim[0].dim_param for value in values} == {"batch"}


@pytest.mark.parametrize(
    ("shapes", "axes", "batch"),
    [
        ([["n", 3], ["n", "s"]], {}, "n"),
        ([["unk__4", 3], [2, 4]], {}, "unk__4"),
        ([[1, 3], [2, "batch"]], {}, "batch"),
        ([["boxes", 3], ["Batch_Size", 4]], {}, "Batch_Size"),
        ([["boxes", 3], ["classes", 4]], {}, None),
        ([[1, 3], [1, "length"]], {}, None),
        ([["time", 3], [1, 4]], {"a": ("time", "_")}, None),
        ([["time", 3], ["n", 4]], {"a": ("batch", "_"), "b": ("batch", "_")}, "batch"),
        ([[None, 3], ["N", 4]], {}, "N"),
        ([[None, 3], [None, None]], {}, "batch"),
        ([["x", 3], []], {}, "x"),
        ([["seq", "batch"], [1, "batch"]], {}, "batch"),
        ([["time", "Batch_Size"], [2, 3]], {}, "Batch_Size"),
        ([["points", "n"], [2, 3]], {}, "points"),
        ([["n", "batch"], [2, 3]], {}, "batch"),
        ([["batch_size", "batch"], [2, 3]], {}, "batch_size"),
        ([[None, "batch"], [2, 3]], {}, "batch"),
    ],
)
def test_the_batch_is_the_first_size_of_all_or_called_so(
    shapes: list[Sizes], axes: dict[str, tuple[str, ...]], batch: str | None
) -> None:
    inputs = {name: (F, shape) for name, shape in zip("ab", shapes, strict=True)}
    nodes = [node("Relu", "a", "y"), node("Relu", "b", "z")]
    model = graph_of(nodes, inputs, {"y": (F, None), "z": (F, None)})
    assert signature_of(model, axes=axes).batch == batch


def test_sizes_of_outputs_are_those_that_follow_whatever_the_file_says() -> None:
    """Reshape by a computed shape, a wrong name, a wrong number, and a size that is half of another."""
    nodes = [
        node("Shape", "x", "shape"),
        node("Gather", "shape zero", "n"),
        node("Concat", "n minus", "flat", axis=0),
        node("Reshape", "x flat", "a"),
        node("MaxPool", "x", "b", kernel_shape=[2, 2], strides=[2, 2]),
        node("Transpose", "x", "c", perm=[2, 3, 0, 1]),
    ]
    model = graph_of(
        nodes,
        {"x": (F, ["n", 3, "h", "w"])},
        {"a": (F, ["w", None]), "b": (F, [1, 3, None, "half"]), "c": (F, [None, "q", None, None])},
        {"zero": np.array([0]), "minus": np.array([-1])},
    )
    assert shapes_of(model) == {
        "x": ("n", 3, "h", "w"),
        "a": ("n", "a_1"),
        "b": ("n", 3, "b_2", "half"),
        "c": ("h", "w", "n", 3),
    }


def test_examples_of_sizes_are_kept_and_must_be_free_ones() -> None:
    model = graph_of([node("Relu", "x", "y")], {"x": (F, ["n", 3, "h", "w"])}, {"y": (F, None)})
    assert signature_of(model, sizes=sizes_from_text(["h=64", "w=32"])).sizes == {"h": 64, "w": 32}
    with pytest.raises(UsageError, match=r"--size names height, .* The free sizes are h, w"):
        signature_of(model, sizes={"height": 3})


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"y_": ("_",)}, "The inputs and outputs are x, y"),
        ({"x": ("_",)}, r"names 1 axes of x, which has 2: \(\?, 3\)"),
        ({"x": ("_", "c")}, "axis 1 of x c, and its size in the file is 3"),
        ({"x": ("4", "_")}, "axis 0 of x 4, and its size in the file is free"),
    ],
)
def test_axes_that_do_not_fit_are_refused(axes: dict[str, tuple[str, ...]], words: str) -> None:
    model = graph_of([node("Relu", "x", "y")], {"x": (F, [None, 3])}, {"y": (F, None)})
    with pytest.raises(UsageError, match=words):
        signature_of(model, axes=axes)


@pytest.mark.parametrize("text", ["state", "=a,b", "state=a,,b", "state="])
def test_text_that_names_no_axes_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="NAME=AXIS,AXIS"):
        axes_from_text([text])


@pytest.mark.parametrize("text", ["height", "height=0", "height=-1", "=3", "height=1.5", "height=²"])
def test_text_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="NAME=NUMBER"):
        sizes_from_text([text])


def test_names_may_hold_an_equals_sign() -> None:
    assert axes_from_text(["a=b=x, _"]) == {"a=b": ("x", "_")}
    with pytest.raises(UsageError, match="twice"):
        sizes_from_text(["h=1", "h=2"])


def test_an_input_without_a_shape_is_asked_for_or_told() -> None:
    nodes = [node("MatMul", "x w", "y")]
    model = graph_of(nodes, {"x": (F, None)}, {"y": (F, None)}, {"w": np.ones((3, 4), np.float32)})
    with pytest.raises(ArtefactError, match="how many axes its input x has"):
        signature_of(model)
    assert shapes_of(model, axes={"x": ("batch", "3")}) == {"x": ("batch", 3), "y": ("batch", 4)}


@pytest.mark.parametrize(
    ("dtype", "words"), [(TensorProto.STRING, "tensor of string"), (TensorProto.COMPLEX64, "complex64")]
)
def test_a_type_that_is_not_supported_is_named(dtype: int, words: str) -> None:
    model = graph_of([node("Identity", "x", "y")], {"x": (dtype, [2])}, {"y": (dtype, [2])})
    with pytest.raises(ArtefactError, match=f"x is a {words}|x is a tensor of {words}"):
        signature_of(model)


def _embedding(*more: onnx.NodeProto) -> list[onnx.NodeProto]:
    return [node("Gather", "table ids", "rows"), *more]


TABLE = np.ones((100, 8), np.float32)


@pytest.mark.parametrize(
    ("dtype", "nodes", "stored", "expected"),
    [
        (I64, _embedding(), {"table": TABLE}, (0, 99)),
        (
            I32,
            [node("Cast", "x", "c", to=I64), node("Reshape", "c minus", "ids"), *_embedding()],
            {"table": TABLE, "minus": np.array([-1])},
            (0, 99),
        ),
        (
            I64,
            [node("Gather", "table x", "rows"), node("Gather", "small x", "others")],
            {"table": TABLE, "small": TABLE[:7]},
            (0, 6),
        ),
        (I64, [node("Gather", "table x", "rows", axis=1)], {"table": TABLE}, (0, 7)),
        (
            I64,
            [node("OneHot", "x depth values", "rows")],
            {"depth": np.array(11), "values": np.array([0.0, 1.0], np.float32)},
            (0, 10),
        ),
        (
            I32,
            [
                node("Unsqueeze", "x two", "deep"),
                node("Reshape", "range row", "classes"),
                node("Equal", "deep classes", "same"),
                node("Cast", "same", "rows", to=F),
            ],
            {"range": np.arange(257, dtype=np.int32), "row": np.array([1, 1, 257]), "two": np.array([2])},
            (0, 256),
        ),
        (
            I64,
            [
                node("Unsqueeze", "x two", "deep"),
                node("Cast", "deep", "f", to=F),
                node("Sub", "one f", "not"),
                node("Mul", "not far", "rows"),
            ],
            {"one": np.float32(1), "far": np.float32(-1e9), "two": np.array([2])},
            (0, 1),
        ),
        (I64, [node("Cast", "x", "b", to=TensorProto.BOOL), node("Not", "b", "rows")], {}, (0, 1)),
        (I64, [node("Equal", "x zero", "rows")], {"zero": np.int64(0)}, (0, 1)),
        (I64, [node("Equal", "x rate", "rows")], {"rate": np.int64(16000)}, None),
        (
            TensorProto.UINT8,
            [node("Cast", "x", "f", to=F), node("Mul", "f by", "rows")],
            {"by": np.float32(1 / 255)},
            None,
        ),
        (
            TensorProto.UINT8,
            [node("Cast", "x", "f", to=F), node("Sub", "f one", "g"), node("Mul", "g g", "rows")],
            {"one": np.float32(1)},
            None,
        ),
    ],
)
def test_integers_have_the_range_that_the_graph_tells(
    dtype: int, nodes: list[onnx.NodeProto], stored: dict[str, Array], expected: tuple[int, int] | None
) -> None:
    makes = {name for one in nodes for name in one.output}
    if "ids" not in makes:
        for one in nodes:
            one.input[:] = ["x" if name == "ids" else name for name in one.input]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, ["n", "s"])],
        [helper.make_tensor_value_info("rows", TensorProto.UNDEFINED, None)],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in stored.items()],
    )
    graph.output[0].ClearField("type")
    if any("others" in one.output for one in nodes):
        graph.output.add(name="others")
    opsets = [helper.make_opsetid("", 17)]
    (found,) = signature_of(prepared(helper.make_model(graph, opset_imports=opsets, ir_version=8))).inputs
    assert (found.low, found.high) == (expected or (None, None))


def test_a_scalar_has_no_range() -> None:
    model = graph_of([node("Gather", "table x", "y")], {"x": (I64, [])}, {"y": (F, None)}, {"table": TABLE})
    (found,) = signature_of(model).inputs
    assert (found.low, found.high) == (None, None)


# -- outputs whose size depends on data ---------------------------------------------------------------------


def detector() -> onnx.ModelProto:
    """Boxes and scores, and those that are left of them, picked by indices."""
    nodes = [
        node("MatMul", "x w", "features"),
        node("Relu", "features", "boxes"),
        node("Transpose", "features", "turned", perm=[0, 2, 1]),
        node("Slice", "turned zero one one", "scores"),
        node("NonMaxSuppression", "boxes scores most", "picked"),
        node("Gather", "picked last", "indices", axis=1),
        node("Squeeze", "indices one", "flat"),
        node("Gather", "boxes flat", "y", axis=1),
        node("Shape", "boxes", "counted"),
        node("TopK", "scores five", "best places"),
    ]
    return graph_of(
        nodes,
        {"x": (F, ["batch", "anchors", 16])},
        {"y": (F, None), "picked": (I64, None), "best": (F, None), "places": (I64, None), "boxes": (F, None)},
        {
            "w": np.ones((16, 4), np.float32),
            "zero": np.array([0]),
            "one": np.array([1]),
            "most": np.array(10),
            "last": np.array([2]),
            "five": np.array([5]),
        },
    )


@pytest.mark.parametrize(
    ("output", "expected"),
    [("y", {"boxes", "scores"}), ("picked", {"boxes", "scores"}), ("best", set()), ("boxes", set())],
)
def test_what_is_left_of_boxes_comes_from_boxes_and_scores(output: str, expected: set[str]) -> None:
    assert set(last_fixed_ancestors(detector(), output)) == expected


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([node("Greater", "h zero", "mask"), node("NonZero", "mask", "y")], ("h",)),
        ([node("NonZero", "x", "y")], ("x",)),
        ([node("Greater", "h zero", "mask"), node("Compress", "h mask", "y")], ("h",)),
        ([node("Unique", "h", "y")], ("h",)),
        (
            [
                node("ReduceMax", "h", "largest", keepdims=0),
                node("Cast", "largest", "n", to=I64),
                node("Range", "start n step", "y"),
            ],
            ("largest",),
        ),
        (
            [
                node("ReduceMax", "h", "largest", keepdims=1),
                node("Cast", "largest", "n", to=I64),
                node("TopK", "h n", "y places"),
            ],
            ("h", "largest"),
        ),
        (
            [
                node("Shape", "h", "shape"),
                node("Slice", "shape first second", "length"),
                node("Expand", "h length", "y"),
            ],
            (),
        ),
    ],
)
def test_values_of_data_dependent_length_are_followed_to_the_nearest_of_fixed_size(
    nodes: list[onnx.NodeProto], expected: tuple[str, ...]
) -> None:
    stored = {
        "zero": np.float32(0),
        "start": np.int64(0),
        "step": np.int64(1),
        "first": np.array([0]),
        "second": np.array([1]),
    }
    model = graph_of([node("Relu", "x", "h"), *nodes], {"x": (F, ["n"])}, {"y": (0, None)}, stored)
    assert last_fixed_ancestors(model, "y") == expected


def test_a_loop_that_runs_as_often_as_data_say_is_of_no_fixed_size() -> None:
    body = helper.make_graph(
        [node("Identity", "go", "go_on"), node("Mul", "h h", "out")],
        "body",
        [
            helper.make_tensor_value_info("i", I64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("out", F, None),
        ],
    )
    nodes = [
        node("Relu", "x", "h"),
        node("ReduceMax", "h", "largest", keepdims=0),
        node("Cast", "largest", "times", to=I64),
        helper.make_node("Loop", ["times", "yes"], ["y"], body=body),
    ]
    model = graph_of(nodes, {"x": (F, ["n"])}, {"y": (F, None)}, {"yes": np.bool_(True)})
    assert set(last_fixed_ancestors(model, "y")) == {"largest", "h"}


def test_an_output_that_does_not_exist_is_named() -> None:
    with pytest.raises(UsageError, match="no output z"):
        last_fixed_ancestors(recurrent(), "z")


@pytest.mark.parametrize("text", ["seq=0", "seq=-3"])
def test_a_size_below_1_is_told_as_such(text: str) -> None:
    with pytest.raises(UsageError, match=rf"--size {text} is no size\. Write NAME=NUMBER with 1 or more"):
        sizes_from_text([text])


def test_a_size_for_the_batch_is_told_to_need_none() -> None:
    """Before, the network was said not to have it."""
    model = one_node("MatMul", (8, 4), ("n", "length", 8))
    with pytest.raises(
        UsageError, match=r"--size gives n, which counts the samples.*other free sizes are length"
    ):
        signature_of(model, sizes={"n": 4})
    assert signature_of(model, sizes={"length": 4}).sizes == {"length": 4}
