"""Weights that are NaN or infinite are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from sparse_export.errors import ArtefactError, GateFailed
from sparse_export.graph.finite import naming_weights, not_finite
from sparse_export.inspect import inspect
from tests.graph.graphs import one_node, saved


def spoiled(n_wrong: int = 2) -> onnx.ModelProto:
    model = one_node("Gemm", (100, 60), ("n", 60), transB=1)
    values = np.ones((100, 60), np.float32)
    values.flat[:n_wrong] = [np.nan, np.inf][:n_wrong]
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, "w"))
    return model


def test_inspect_names_a_weight_that_is_not_finite(tmp_path: Path) -> None:
    found = inspect(saved(spoiled(), tmp_path))
    assert found.facts["NaN or infinity"] == "w (2 of 6,000 values)"
    assert "w (2 of 6,000 values)" in str(found)
    assert "NaN or infinity" not in inspect(saved(one_node("Gemm", (4, 4), ("n", 4)), tmp_path)).facts


def test_an_error_about_outputs_names_the_weight() -> None:
    words = r"NaN in y\. NaN or infinity is stored in w \(2 of 6,000"
    with pytest.raises(GateFailed, match=words), naming_weights(spoiled()):
        raise GateFailed("NaN in y.")
    with pytest.raises(GateFailed, match=r"^NaN in y$"), naming_weights(one_node("Gemm", (4, 4), ("n", 4))):
        raise GateFailed("NaN in y")


def test_many_are_counted() -> None:
    model = spoiled()
    for i in range(7):
        one = model.graph.initializer.add()
        one.CopyFrom(model.graph.initializer[0])
        one.name = f"w{i}"
    assert not_finite(model).endswith("w3 (2 of 6,000 values) and 3 more")


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    file.touch()
    with pytest.raises(ArtefactError, match="cannot be read as ONNX: it is empty"):
        inspect(file)
