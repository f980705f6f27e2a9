"""Weights that lie beside the graph, as those of more than two gigabytes do, as Triton itself serves them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tritonclient import grpc

from sparse_export.building import build
from sparse_export.graph import saved
from sparse_export.runtimes.onnxruntime import open_session
from tests.making_runs import digits_run
from tests.serving.serving import serving


@pytest.mark.usefixtures("server")
def test_weights_beside_the_graph_are_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "MAX_WEIGHT_BYTES", 1000)
    bundle = build(digits_run(tmp_path / "run"), tmp_path / "net")
    assert "model.onnx.data" in bundle.info.files
    x = np.random.default_rng(0).standard_normal((3, 1, 8, 8)).astype(np.float32)
    with open_session(bundle.onnx_path, n_threads=1) as session:
        wanted = session.run({"input": x})["logits"]
    with (
        serving(bundle.path, log=tmp_path / "log") as one,
        grpc.InferenceServerClient(f"127.0.0.1:{one.grpc_port}") as client,
    ):
        tensor = grpc.InferInput("input", list(x.shape), "FP32")
        tensor.set_data_from_numpy(x)
        found = client.infer("net", [tensor]).as_numpy("logits")
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
