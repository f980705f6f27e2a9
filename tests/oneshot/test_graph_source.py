"""Opens ONNX files as networks, with what is told of their inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from sparse_export.errors import ArtefactError, UsageError
from sparse_export.oneshot.graph_source import Told, source_of_file
from tests.oneshot.graphs import drawn, model_from


def test_a_file_is_tried_with_integers_as_in_the_inputs_that_were_given(tmp_path: Path) -> None:
    """It runs with a rate of 8 or 9, and with no other."""
    model = model_from(
        "(float[N,8] x, int64 rate) => (float[N,8] y) { i = Sub(rate, eight) s = Gather(scales, i) "
        "a = MatMul(x, w) y = Mul(a, s) }",
        w=drawn(8, 8),
        scales=np.ones(2, dtype=np.float32),
        eight=np.array(8),
    )
    onnx.save(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=drawn(5, 8), rate=np.array(9))
    source = source_of_file(tmp_path / "m.onnx", Told(inputs=tmp_path / "x.npz"))
    assert source.signature.input_names == ("x", "rate")
    with pytest.raises(ArtefactError, match=r"give inputs that it was made for by --inputs"):
        source_of_file(tmp_path / "m.onnx", Told())


def test_free_sizes_that_nothing_else_tells_are_those_of_the_first_sample_of_the_data(tmp_path: Path) -> None:
    model = model_from("(float[N,3,H,W] x) => (float[N,3,H,W] y) { y = Mul(x, w) }", w=drawn(1))
    onnx.save(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=drawn(5, 3, 6, 8), targets=np.zeros(5, np.int64))
    with pytest.raises(UsageError, match="The sizes H, W of the inputs are free"):
        source_of_file(tmp_path / "m.onnx", Told())
    told = Told(data="npz:x.npz", data_dir=tmp_path)
    assert source_of_file(tmp_path / "m.onnx", told).signature.sizes == {"H": 6, "W": 8}
    told = Told(data="npz:x.npz", data_dir=tmp_path, sizes=["W=4"])
    assert source_of_file(tmp_path / "m.onnx", told).signature.sizes == {"H": 6, "W": 4}
