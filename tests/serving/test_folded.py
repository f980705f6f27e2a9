"""A network with the normalization folded into it is asked with raw pixels, and answers as the network does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
from tritonclient import http

from sparse_export.building import build
from sparse_export.tasks import data
from tests.exporting import exported_once
from tests.making_runs import digits_run
from tests.serving.serving import serving


def test_raw_pixels_get_the_answer_that_normalized_ones_get(server: Path, tmp_path: Path) -> None:
    run = digits_run(tmp_path / "run")
    with exported_once():
        folded = build(run.path, tmp_path / "folded", fold="uint8")
        plain = build(run.path, tmp_path / "plain")
    digits = data.load("digits")
    raw = digits.x_test[:16].numpy()
    normalized = data.normalise(digits.x_test[:16], digits.mean, digits.std).numpy()
    (wanted,) = onnxruntime.InferenceSession(plain.path / "model.onnx").run(None, {"input": normalized})
    with serving(folded.path, log=tmp_path / "log") as running:
        client = http.InferenceServerClient(f"127.0.0.1:{running.http_port}")
        asked = http.InferInput("input", list(raw.shape), "UINT8")
        asked.set_data_from_numpy(raw)
        answer = client.infer("folded", [asked]).as_numpy("logits")
        client.close()
    assert answer is not None
    assert np.abs(answer - wanted).max() < 1e-4 * wanted.std()
