"""Opens ONNX files as networks, with what is told of their inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from sparse_export.errors import ArtefactError
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
