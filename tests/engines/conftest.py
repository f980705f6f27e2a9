"""Graphs to build engines of, and a TensorRT that is TensorRT for RTX under the other name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

from sparse_export.cli.main import cli
from sparse_export.engines import tensorrt_import
from sparse_export.signature import class_signature

SMALL = class_signature((16,), 8, names=("input", "output"))
"""Of `small_graph`."""


def small_graph(
    *, n_features: int = 16, n_hidden: int = 32, seed: int = 4, op: str = "Relu"
) -> onnx.ModelProto:
    """Two Gemm layers with 2:4 weights, float32, batch free."""
    generator = np.random.default_rng(seed)
    weights = []
    for name, shape in (("w1", (n_hidden, n_features)), ("w2", (8, n_hidden))):
        groups = generator.standard_normal((*shape[:-1], shape[-1] // 4, 4), dtype=np.float32)
        groups[..., 2:] = 0
        weights.append(numpy_helper.from_array(groups.reshape(shape), name))
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["input", "w1"], ["h"], name="first", transB=1),
            helper.make_node(op, ["h"], ["a"], name="activation"),
            helper.make_node("Gemm", ["a", "w2"], ["output"], name="second", transB=1),
        ],
        "small",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", n_features])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 8])],
        weights,
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


@pytest.fixture(scope="session")
def call() -> Callable[..., Result]:
    """Call the program in this process: `call("build", run)` gives exit_code, stdout, stderr."""

    def invoke(*words: object) -> Result:
        return CliRunner().invoke(cli, [str(word) for word in words], prog_name="sparse-export")

    return invoke


@pytest.fixture(scope="session")
def rtx() -> None:
    """Skip, with the reason, where TensorRT for RTX is not installed."""
    if not tensorrt_import.is_installed("tensorrt-rtx"):
        pytest.skip("no TensorRT for RTX: pip install '.[rtx]'")


@pytest.fixture
def stand_in(rtx: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module `tensorrt` for the building process: the library for RTX, named and numbered otherwise.

    It builds without a GPU, so that the path of the target `tensorrt` runs too; a test may append to the
    file.
    """
    folder = tmp_path / "stand-in"
    folder.mkdir()
    module = folder / "tensorrt.py"
    module.write_text("from tensorrt_rtx import *\n__version__ = '11.1.0'\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    yield module
