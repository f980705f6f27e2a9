"""A graph that is in order is left as it is, which gives what taking it apart would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from sparse_export.graph import model as models
from sparse_export.graph.in_order import is_in_order
from sparse_export.graph.model import open_model
from tests.graph import hostile
from tests.graph.hostile import chain, loop, many_branches, nested_ifs, node, shared, shared_by_turns, weight

Change = Callable[[onnx.ModelProto], None]


@pytest.mark.parametrize(
    "made",
    [
        chain(5),
        shared(4),
        shared_by_turns(3),
        many_branches(6),
        nested_ifs(4),
        loop(3),
        hostile.convolution(),
    ],
    ids=["chain", "shared", "turned", "branches", "ifs in ifs", "loop", "convolution"],
)
def test_what_is_in_order_is_opened_to_the_same_graph(
    made: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m.onnx"
    file.write_bytes(made.SerializeToString())
    assert is_in_order(made)
    found = open_model(file)
    assert is_in_order(found)
    monkeypatch.setattr(models, "is_in_order", lambda _: False)
    taken_apart = open_model(file)
    stored = {tensor.name for tensor in found.graph.initializer}
    others = [value for value in taken_apart.graph.value_info if value.name not in stored]
    del taken_apart.graph.value_info[:]  # with those of stored tensors, which say their shapes themselves
    taken_apart.graph.value_info.extend(others)
    assert taken_apart == found


def with_a_constant(made: onnx.ModelProto) -> None:
    made.graph.node.insert(0, node("Constant", [], ["c"], value_float=1.0))
    made.graph.node.append(node("Add", ["y", "c"], ["z"]))
    made.graph.output[0].name = "z"


def backwards(made: onnx.ModelProto) -> None:
    nodes = list(made.graph.node)[::-1]
    del made.graph.node[:]
    made.graph.node.extend(nodes)


def with_an_unused_node(made: onnx.ModelProto) -> None:
    made.graph.node.append(node("Relu", ["x"], ["unused"]))


def with_an_unused_output(made: onnx.ModelProto) -> None:
    made.graph.node[0].op_type = "Dropout"
    made.graph.node[0].output.append("mask")


def with_an_unused_tensor(made: onnx.ModelProto) -> None:
    made.graph.initializer.append(weight("unused", 2, 2))


def with_a_tensor_twice(made: onnx.ModelProto) -> None:
    made.graph.node.append(node("Add", ["y", "w"], ["z"]))
    made.graph.output[0].name = "z"
    made.graph.initializer.extend([weight("w", 8), weight("w", 8)])


def with_an_unknown_name(made: onnx.ModelProto) -> None:
    made.graph.node[1].input[0] = "nobody"


def with_an_empty_input_at_the_end(made: onnx.ModelProto) -> None:
    made.graph.node[0].input.append("")


def with_a_name_twice(made: onnx.ModelProto) -> None:
    made.graph.node[1].output[0] = made.graph.node[0].output[0]


def of_an_old_version(made: onnx.ModelProto) -> None:
    made.ir_version = 3


def with_a_norm_that_says_it_does_not_train(made: onnx.ModelProto) -> None:
    names = ["scale", "bias", "mean", "variance"]
    made.graph.initializer.extend([weight(name, 8) for name in names])
    made.graph.node.append(node("BatchNormalization", ["y", *names], ["z"], training_mode=0))
    made.graph.output[0].name = "z"


def with_a_tensor_inside(made: onnx.ModelProto) -> None:
    outputs = [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)]
    inner = helper.make_graph([node("Add", ["y", "inside"], ["t"])], "g", [], outputs, [weight("inside", 8)])
    made.graph.initializer.append(helper.make_tensor("flag", TensorProto.BOOL, [], [True]))
    made.graph.node.append(node("If", ["flag"], ["z"], then_branch=inner, else_branch=inner))
    made.graph.output[0].name = "z"


def with_a_hidden_name(made: onnx.ModelProto) -> None:
    outputs = [helper.make_tensor_value_info("v0", TensorProto.FLOAT, None)]
    inner = helper.make_graph([node("Relu", ["y"], ["v0"])], "g", [], outputs)
    made.graph.initializer.append(helper.make_tensor("flag", TensorProto.BOOL, [], [True]))
    made.graph.node.append(node("If", ["flag"], ["z"], then_branch=inner, else_branch=inner))
    made.graph.output[0].name = "z"


@pytest.mark.parametrize(
    "change",
    [
        with_a_constant,
        backwards,
        with_an_unused_node,
        with_an_unused_output,
        with_an_unused_tensor,
        with_a_tensor_twice,
        with_an_unknown_name,
        with_an_empty_input_at_the_end,
        with_a_name_twice,
        of_an_old_version,
        with_a_norm_that_says_it_does_not_train,
        with_a_tensor_inside,
        with_a_hidden_name,
    ],
    ids=lambda change: change.__name__,
)
def test_what_has_to_be_changed_or_refused_is_not_in_order(change: Change) -> None:
    made = chain(3)
    assert is_in_order(made)
    change(made)
    assert not is_in_order(made)
