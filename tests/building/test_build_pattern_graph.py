"""An ONNX graph built for a pattern: orders of channels in which nothing has to be cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import sparse_export as se
from sparse_export.errors import GateFailed, UsageError
from sparse_export.formats.bundle import Bundle
from sparse_export.graph.channels.graph_proof import Difference
from sparse_export.graph.layers import graph_layers
from sparse_export.graph.passes import permute_graph
from tests.oneshot.graphs import drawn, model_from, outputs_of

_FOUR = """(float[batch,64] x) => (float[batch,256] y) {
    h0 = MatMul(x, w0)
    a0 = Relu(h0)
    h1 = MatMul(a0, w1)
    a1 = Relu(h1)
    y = MatMul(a1, w2)
}"""


def crowded(*shape: int, seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Each output (axis 1) reads one run of four inputs, as no order but a mixed one can have it."""
    rng = np.random.default_rng(seed)
    n_in, n_out = shape
    live = np.zeros((n_in // 4, n_out), np.bool_)
    live[rng.integers(0, n_in // 4, n_out), np.arange(n_out)] = True
    return drawn(*shape, seed=seed) * live.repeat(4, axis=0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The run of a file whose weights are sparse, and not 2:4 in their order."""
    file = tmp_path / "four.onnx"
    onnx.save(
        model_from(
            _FOUR, w0=crowded(64, 64, seed=0), w1=crowded(64, 64, seed=1), w2=crowded(64, 256, seed=2)
        ),
        file,
    )
    se.sparsify(file, tmp_path / "r")
    return tmp_path / "r-dense"


def methods(bundle: Bundle) -> dict[str, str]:
    assert bundle.info.fitted is not None
    return {layer.name: layer.road for layer in bundle.info.fitted.layers}


def test_layers_become_two_four_with_nothing_cut(run: Path, tmp_path: Path) -> None:
    bundle = se.build(run, tmp_path / "b", pattern="2:4")
    assert methods(bundle) == {"w0": "gathered", "w1": "permuted", "w2": "permuted"}
    built, old = onnx.load(bundle.onnx_path), onnx.load(run / "model.onnx")
    assert all(layer.pattern_holds for layer in graph_layers(built))
    x = {"x": drawn(7, 64, seed=5)}
    np.testing.assert_allclose(outputs_of(built, x)[0], outputs_of(old, x)[0], rtol=1e-4, atol=1e-4)
    for name in ("w0", "w1", "w2"):
        before, after = (
            np.sort(
                numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name)), axis=None
            )
            for model in (old, built)
        )
        np.testing.assert_array_equal(after, before)
    assert bundle.info.fitted is not None and bundle.info.fitted.difference < 1e-5
    assert all(layer.n_cut == 0 for layer in bundle.info.fitted.layers)
    assert not any(layer.pattern_holds for layer in graph_layers(old))
    se.validate(bundle.path)


def test_without_a_gather_what_reads_the_input_stays_dense_and_says_why(run: Path, tmp_path: Path) -> None:
    bundle = se.build(run, tmp_path / "b", pattern="2:4", gather="none", compact=True, onnx="packed")
    assert methods(bundle) == {"w0": "dense", "w1": "permuted", "w2": "permuted"}
    assert bundle.info.fitted is not None
    (reason,) = (layer.reason for layer in bundle.info.fitted.layers if layer.name == "w0")
    assert "no gather was asked for" in reason


def test_nothing_of_a_graph_is_cut(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="of which nothing is cut"):
        se.build(run, tmp_path / "b", pattern="2:4", max_cut=0.01)
    assert not (tmp_path / "b").exists()


def test_an_order_that_changes_the_function_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        permute_graph, "difference_by_orders", lambda *_: Difference(largest=0.5, allowed=1e-6)
    )
    with pytest.raises(GateFailed, match=r"outputs differ by 0\.5"):
        se.build(run, tmp_path / "b", pattern="2:4")
    assert not (tmp_path / "b").exists()
