"""Graphs of float16 with a Transpose before a product that ended onnxruntime's process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparse_export.graph.passes.float16 import in_half
from sparse_export.graph.passes.guarded_transposes import guard_transposes

MOVING = [(1, 0, 2), (1, 2, 0), (1, 2, 0, 3), (1, 2, 3, 0)]
OTHERS = [(0, 2, 1), (0, 1, 2), (2, 0, 1, 3), (0, 1, 3, 2)]

_RUN = """
import sys
import numpy as np, onnxruntime
with np.load(sys.argv[2]) as stored:
    found = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"]).run(None, dict(stored))
np.save(sys.argv[3], found[0])
"""


def product(order: tuple[int, ...], *, weight_first: bool = False, n_readers: int = 1) -> onnx.ModelProto:
    """A product of a transposed input and a weight."""
    axis = -2 if weight_first else -1
    sizes = [4, 5, 6, 7][: len(order)]
    n_in = sizes[order[axis]]
    shape: list[int] = [sizes[place] for place in order]
    shape[axis] = 3
    weight = np.random.default_rng(0).normal(size=(3, n_in) if weight_first else (n_in, 3))
    nodes = [helper.make_node("Transpose", ["x"], ["turned"], perm=list(order))]
    pair = ["w", "turned"] if weight_first else ["turned", "w"]
    nodes += [helper.make_node("MatMul", pair, [f"y{index}"]) for index in range(n_readers)]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)],
        [helper.make_tensor_value_info(f"y{index}", TensorProto.FLOAT, shape) for index in range(n_readers)],
        [numpy_helper.from_array(weight.astype(np.float32), "w")],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


@pytest.mark.parametrize("weight_first", [False, True])
@pytest.mark.parametrize("order", MOVING)
def test_a_half_graph_is_loaded_and_gives_the_same(
    order: tuple[int, ...], weight_first: bool, tmp_path: Path
) -> None:
    model = product(order, weight_first=weight_first)
    half = in_half(model, "fp16")
    assert [node.op_type for node in half.graph.node].count("Concat") == 1
    onnx.checker.check_model(half, full_check=True)
    files = [str(tmp_path / name) for name in ("m.onnx", "x.npz", "y.npy")]
    onnx.save(half, files[0])
    x = np.random.default_rng(1).normal(size=[4, 5, 6, 7][: len(order)]).astype(np.float32)
    np.savez(files[1], x=x)
    # A process of its own: the fault that is held here ends the one that it happens in.
    done = subprocess.run([sys.executable, "-c", _RUN, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    weight = numpy_helper.to_array(model.graph.initializer[0])
    turned = x.transpose(order)
    wanted = weight @ turned if weight_first else turned @ weight
    np.testing.assert_allclose(np.load(files[2]), wanted, atol=0.02)


@pytest.mark.parametrize("order", OTHERS)
def test_other_orders_stay_as_they_are(order: tuple[int, ...]) -> None:
    model = product(order)
    assert guard_transposes(model.graph, set()) == 0
    assert model == product(order)


def test_what_two_products_read_stays_as_it_is() -> None:
    assert guard_transposes(product((1, 0, 2), n_readers=2).graph, set()) == 0
