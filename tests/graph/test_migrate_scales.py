"""Scales of channels move from values into weights: the network computes the same, and zeros stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from sparse_export.building.engine_form import engine_form
from sparse_export.graph.layers import graph_layers
from sparse_export.graph.model import signature_of
from sparse_export.graph.passes.migrate_scales import with_migrated_scales
from sparse_export.graph.passes.quantize_typed import quantized_for_engines
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.signature import Feeds

# `before` is read by the products alone; `after` by a sum too, so that a Mul has to stand before the products.
_BEFORE = "[last] y = MatMul (r, w3)"
_AFTER = "s = Add (r, n) \n [last] y = MatMul (s, w3)"
_TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 8] x) => (float[batch, 8] y)
<float[8] g, float[8] b, float[8, 8] w1, float[8, 8] w2, float[8, 8] w3>
{{
    n = LayerNormalization (x, g, b)
    p = MatMul (n, w1)
    q = Gemm <transB = 1> (n, w2)
    m = Mul (p, q)
    r = Relu (m)
    {rest}
}}
"""


def _model(rest: str) -> onnx.ModelProto:
    """With 2:4 weights, and a normalization that gives one channel a hundred times the size of the others."""
    model, generator = onnx.parser.parse_model(_TEXT.format(rest=rest)), np.random.default_rng(0)
    del model.graph.value_info[:]
    for name in ("g", "b", "w1", "w2", "w3"):
        values = generator.standard_normal((8, 8) if name[0] == "w" else 8, dtype=np.float32)
        if name == "g":
            values[:] = 1.0
            values[3] = 100.0
        if name[0] == "w":
            moved = np.moveaxis(values, 1 if name == "w2" else 0, 0)
            moved[2::4] = moved[1::4] = 0
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


def _samples() -> list[Feeds]:
    return [{"x": np.random.default_rng(1).standard_normal((64, 8), dtype=np.float32)}]


def _output(model: onnx.ModelProto, folder: Path) -> np.ndarray:
    onnx.save(model, folder / "m.onnx")
    with open_session(folder / "m.onnx") as session:
        return session.run(_samples()[0])["y"]


@pytest.mark.parametrize(("rest", "n_more"), [(_BEFORE, 0), (_AFTER, 1)])
def test_the_network_computes_the_same(rest: str, n_more: int, tmp_path: Path) -> None:
    """A scale goes into the normalization where only products read it, and into a Mul elsewhere."""
    model = _model(rest)
    moved = with_migrated_scales(model, _samples())
    wanted, found = (_output(one, tmp_path) for one in (model, moved))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    assert len(moved.graph.node) == len(model.graph.node) + n_more
    before, after = (
        {tensor.name: numpy_helper.to_array(tensor) for tensor in one.graph.initializer}
        for one in (model, moved)
    )
    assert np.abs(after["g"] - before["g"]).max() > 1 or n_more
    assert np.abs(after["w1"]).max() > 2 * np.abs(before["w1"]).max()
    np.testing.assert_array_equal(after["w3"], before["w3"])  # nothing normalizes what it reads


@pytest.mark.parametrize("rest", [_BEFORE, _AFTER])
def test_every_zero_stays(rest: str) -> None:
    model = _model(rest)
    moved = with_migrated_scales(model, _samples())
    before, after = graph_layers(model), graph_layers(moved)
    assert [one.n_nonzero for one in after] == [one.n_nonzero for one in before]
    assert all(one.pattern_holds for one in after)


def _with_outlier() -> onnx.ModelProto:
    """The large channel has small weights."""
    model = _model(_BEFORE)
    for tensor in model.graph.initializer:
        if tensor.name in ("w1", "w2"):
            values = numpy_helper.to_array(tensor).copy()
            np.moveaxis(values, 1 if tensor.name == "w2" else 0, 0)[3] /= 100
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return model


def test_int8_is_nearer_to_a_network_with_a_channel_far_out(tmp_path: Path) -> None:
    """The large channel reaches the output through small weights, as outliers of transformers do."""
    model = _with_outlier()
    wanted, errors = _output(model, tmp_path), []
    for one in (model, with_migrated_scales(model, _samples())):
        found = _output(quantized_for_engines(one, _samples(), "int8"), tmp_path)
        errors.append(float(np.sqrt(np.mean(np.square(found - wanted))) / wanted.std()))
    assert errors[1] < errors[0] / 2


def test_the_graph_for_engines_takes_it_where_it_is_nearer_unless_told_not_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sparse_export.building.engine_form.METHODS", ("max",))  # the quick one
    model = _with_outlier()
    signature = signature_of(model)
    found = engine_form(model, signature, _samples(), "int8")
    assert found is not None
    assert found.migrated
    assert found.rms["migrated"] < found.rms[found.ranges] / 2
    plain = engine_form(model, signature, _samples(), "int8", migrate=False)
    assert plain is not None
    assert not plain.migrated
    assert "migrated" not in plain.rms


def test_a_network_without_normalizations_stays_as_it_is() -> None:
    model = _model(_BEFORE)
    norm = model.graph.node[0]
    norm.op_type = "Identity"
    del norm.input[1:]
    assert with_migrated_scales(model, _samples()).SerializeToString() == model.SerializeToString()
