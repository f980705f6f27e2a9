"""Sparsify of an ONNX file: where the dense network is left, and what is left where it is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparse_export as se
from sparse_export.errors import UsageError
from sparse_export.formats.run import open_run
from sparse_export.oneshot import graph_steps
from sparse_export.oneshot.steps import dense_torch_run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two products of 64 inputs, with a free batch and a free length."""
    generator = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(generator.standard_normal((64, 64), dtype=np.float32), f"w{i}")
        for i in range(2)
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "length", 64]) for name in ("x", "y")
    ]
    nodes = [helper.make_node("MatMul", ["x", "w0"], ["h"]), helper.make_node("MatMul", ["h", "w1"], ["y"])]
    graph = helper.make_graph(nodes, "two", ends[:1], ends[1:], weights)
    path = tmp_path / "two.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_the_dense_network_is_left_beside_it_and_taken_again(file: Path, tmp_path: Path) -> None:
    first = se.sparsify(file, tmp_path / "a", sizes=["length=3"])
    (tmp_path / "a-dense").rename(tmp_path / "b-dense")
    stamp = (tmp_path / "b-dense" / "run.json").read_bytes()
    second = se.sparsify(file, tmp_path / "b", sizes=["length=3"])
    assert (tmp_path / "b-dense" / "run.json").read_bytes() == stamp
    assert second.run.info.dense is not None
    assert second.run.info.dense.path == str(tmp_path / "b-dense")
    assert first.report.layers == second.report.layers
    assert open_run(tmp_path / "b-dense").info.density == 1.0


@pytest.mark.parametrize("what", ["something else", "another network", "with other inputs"])
def test_what_stands_in_the_place_of_the_dense_network_is_told_before_any_work(
    what: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "a-dense"
    if what == "something else":
        place.mkdir()
        (place / "notes.txt").write_text("mine")
    else:
        se.sparsify(file, tmp_path / "a", sizes=["length=3"])
        (tmp_path / "a").rename(tmp_path / "before")
        if what == "another network":
            model = onnx.load(file)
            model.graph.initializer[0].CopyFrom(
                numpy_helper.from_array(np.eye(64, dtype=np.float32), model.graph.initializer[0].name)
            )
            onnx.save(model, file)
    axes = ["x=batch,time,_"] if what == "with other inputs" else []
    size = "time=3" if axes else "length=3"
    monkeypatch.setattr(graph_steps, "sparsify_graph", lambda *_, **__: pytest.fail("it was pruned"))
    with pytest.raises(
        UsageError, match=f"a-dense is where the dense network is left, and it holds .*{what}"
    ):
        se.sparsify(file, tmp_path / "a", sizes=[size], axes=axes)


def test_a_damaged_dense_network_is_not_taken_again(file: Path, tmp_path: Path) -> None:
    se.sparsify(file, tmp_path / "a", sizes=["length=3"])
    (tmp_path / "a").rename(tmp_path / "before")
    damaged = tmp_path / "a-dense" / "model.onnx"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    with pytest.raises(UsageError, match="holds something else"):
        se.sparsify(file, tmp_path / "a", sizes=["length=3"])


def test_a_refused_call_leaves_no_folder(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there are none"):
        se.sparsify(file, tmp_path / "a", method="reconstruction", sizes=["length=3"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two.onnx"]


def test_other_weights_in_the_place_of_a_dense_torch_network_are_told(tmp_path: Path) -> None:
    place = tmp_path / "runs" / "lenet-dense"
    made = [dense_torch_run("lenet300-100", place, weights="random", seed=0) for _ in range(2)]
    assert made[0].info == made[1].info
    with pytest.raises(
        UsageError, match=r"lenet-dense is where .* other weights of this one\. Move that away"
    ):
        dense_torch_run("lenet300-100", place, weights="random", seed=1)
