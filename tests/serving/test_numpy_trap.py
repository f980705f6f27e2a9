"""The server answers 200 with no data to models that hand it arrays of numpy 2.

The golden check catches that.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from sparse_export.errors import GateFailed
from sparse_export.serving import repository
from sparse_export.serving.probe import is_ready, require_golden
from sparse_export.serving.process import free_ports, start, work_folder
from sparse_export.serving.repository import open_served, write_config, write_version
from sparse_export.serving.server_files import find_server
from sparse_export.serving.settings import ModelSettings
from tests.serving.conftest import Bundles

NAIVE = """
import os

import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "input").as_numpy()
            y = self.session.run(None, {"input": x})[0]
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("logits", y)]))
        return answers
"""


def test_a_model_with_arrays_of_numpy_2_answers_200_and_no_data_and_is_caught(
    server: Path, bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert int(np.__version__.split(".")[0]) >= 2
    naive = tmp_path / "naive.py"
    naive.write_text(NAIVE)
    monkeypatch.setattr(repository, "_TEMPLATE", naive)
    served = open_served(bundles.dense)
    settings = ModelSettings(instances=1)
    ports = free_ports("127.0.0.1", http=0, grpc=0, metrics=0, health=0)
    with work_folder() as folder:
        model = folder.repository / "dense"
        write_version(model / "1", served, "python", settings, str(folder.activity))
        write_config(model, "dense", served, "python", settings)
        process = start(find_server(), folder, ports)
        try:
            deadline = time.monotonic() + 60
            while not is_ready(ports.host, ports.http):
                assert process.exit_code() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            with pytest.raises(GateFailed, match=r"HTTP 200, logits of shape \(8, 10\) and 0 bytes of data"):
                require_golden(
                    ports.host, ports.http, served, model="dense", version=1, max_batch=64, timeout_s=30
                )
        finally:
            process.end()
