"""Engines of a small precision have no product that computes in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from sparse_export.engines.build import build_engine
from sparse_export.engines.options import EngineOptions, Precision
from sparse_export.engines.precision import convert_precision
from sparse_export.errors import UsageError
from sparse_export.graph.passes.quantize_typed import quantized_for_engines
from sparse_export.signature import Feeds
from tests.engines.conftest import SMALL, small_graph

OPTIONS = EngineOptions(target="tensorrt-rtx", architectures=("sm89",))


def _samples() -> list[Feeds]:
    return [{"input": np.random.default_rng(7).standard_normal((32, 16), dtype=np.float32)}]


def _graph(precision: Precision) -> onnx.ModelProto:
    if precision == "int8" or precision == "fp8":
        return quantized_for_engines(small_graph(), _samples(), precision)
    return convert_precision(small_graph(), precision)


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "fp8"])
def test_a_graph_of_that_precision_is_built(precision: Precision, rtx: None, tmp_path: Path) -> None:
    built = build_engine(_graph(precision), tmp_path / "x", OPTIONS, SMALL, precision=precision)
    assert built.n_layers > 0
    assert (tmp_path / "x").stat().st_size > 0


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_product_in_float32_is_refused_before_the_build(
    precision: Precision, rtx: None, tmp_path: Path
) -> None:
    """onnxruntime's form of int8 multiplies float32 values between its pairs, as a network of fp32 does."""
    graph = small_graph() if precision == "fp16" else convert_precision(small_graph(), "int8", _samples())
    phases: list[object] = []
    with pytest.raises(UsageError, match=r"product .* computes in float32"):
        build_engine(graph, tmp_path / "x", OPTIONS, SMALL, precision=precision, progress=phases.append)
    assert phases == []
    assert not (tmp_path / "x").exists()
    build_engine(graph, tmp_path / "x", OPTIONS, SMALL)  # of anybody's graph nothing is asked
