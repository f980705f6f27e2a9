"""Sparsify of an ONNX file in an order of channels that loses less."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import sparse_export as se
from sparse_export.errors import GateFailed, UsageError
from sparse_export.formats.run import GRAPH_FILE
from sparse_export.graph.channels import graph_proof
from sparse_export.graph.channels.graph_proof import Difference
from sparse_export.graph.passes import permute_graph
from tests.oneshot.graphs import drawn, model_from, outputs_of

_THREE = """(float[batch,64] x) => (float[batch,8] y) {
    h0 = MatMul(x, w0)
    a0 = Relu(h0)
    h1 = MatMul(a0, w1)
    a1 = Relu(h1)
    y = MatMul(a1, w2)
}"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Three products; the columns of the second are worth the less the later they come."""
    falling = np.exp(-np.arange(64) / 8).astype(np.float32)[:, None]
    path = tmp_path / "three.onnx"
    model = model_from(_THREE, w0=drawn(64, 64), w1=drawn(64, 64, seed=1) * falling, w2=drawn(64, 8, seed=2))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("method", ["magnitude", "activation", "reconstruction"])
def test_an_order_keeps_more_and_computes_the_same(method: str, file: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=drawn(40, 64, seed=3))
    inputs = tmp_path / "x.npz"
    plain = se.sparsify(file, tmp_path / "plain", method=method, inputs=inputs)
    done = se.sparsify(file, tmp_path / "moved", method=method, inputs=inputs, permute=True)
    report = done.report
    assert report.permute and report.permuted_spaces == 1
    assert 0 < report.output_difference < 1e-5
    kept = {layer.name: layer for layer in report.layers}
    before = {layer.name: layer.kept_share for layer in plain.report.layers}
    assert kept["w1"].kept_share is not None and before["w1"] is not None
    assert kept["w1"].kept_share > before["w1"] + 0.05
    assert kept["w1"].kept_in_order == pytest.approx(0.7, abs=0.15)
    assert kept["w0"].kept_in_order is not None
    assert "input" in kept["w0"].reason  # its channels are the network's input
    # What is left of the weights are entries of the old ones, in another order.
    x = {"x": drawn(5, 64, seed=4)}
    found = onnx.load(done.run.path / GRAPH_FILE)
    dense = onnx.load(tmp_path / "moved-dense" / GRAPH_FILE)
    np.testing.assert_array_equal(outputs_of(dense, x)[0], outputs_of(onnx.load(file), x)[0])
    assert outputs_of(found, x)[0].shape == (5, 8)
    assert "in order" in str(report) and "channel spaces got another order" in str(report)


def test_the_sparse_file_is_the_dense_one_in_that_order_but_for_what_was_cut(
    file: Path, tmp_path: Path
) -> None:
    done = se.sparsify(file, tmp_path / "moved", permute=True, keep_dense=["w0", "w2"])
    found = {
        t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(done.run.path / GRAPH_FILE).graph.initializer
    }
    w0, w1 = drawn(64, 64), drawn(64, 64, seed=1) * np.exp(-np.arange(64) / 8).astype(np.float32)[:, None]
    order = [int(np.flatnonzero((w0 == column[:, None]).all(axis=0))[0]) for column in found["w0"].T]
    assert sorted(order) == list(range(64)) and order != list(range(64))
    left = found["w1"] != 0
    np.testing.assert_array_equal(found["w1"][left], w1[order][left])
    assert (left.reshape(16, 4, 64).sum(axis=1) == 2).all()


def test_an_order_that_changes_the_function_leaves_nothing(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        permute_graph, "difference_by_orders", lambda *_: Difference(largest=0.5, allowed=1e-6)
    )
    with pytest.raises(GateFailed, match=r"outputs differ by 0\.5 of the largest"):
        se.sparsify(file, tmp_path / "moved", permute=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["three.onnx"]


def test_inputs_that_cannot_be_drawn_are_asked_for(tmp_path: Path) -> None:
    text = "(int64[batch,4] ids) => (float[batch,256] y) { a = Cast<to=1>(ids)\n h = MatMul(a, w0)\n y = MatMul(h, w1) }"
    file = tmp_path / "ids.onnx"
    onnx.save(model_from(text, w0=drawn(4, 256), w1=drawn(256, 256)), file)
    with pytest.raises(UsageError, match="--permute compares outputs in both orders"):
        se.sparsify(file, tmp_path / "moved", permute=True)


def test_the_allowed_difference_follows_how_much_a_graph_enlarges_rounding() -> None:
    assert Difference(largest=1e-6, allowed=1e-5).ok and not Difference(largest=1e-4, allowed=1e-5).ok
    assert not Difference(largest=0.0, allowed=2 * graph_proof._MOST).tells
