"""Many clients at once, and what a request costs against a model that does the least that can be done."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparse_export.serving import repository
from sparse_export.serving.probe import is_ready, require_golden
from sparse_export.serving.process import Ports, free_ports, start, work_folder
from sparse_export.serving.repository import open_served, write_config, write_version
from sparse_export.serving.server_files import find_server
from sparse_export.serving.settings import ModelSettings
from tests.serving.conftest import Bundles
from tests.serving.serving import CHECKOUT, Serving, cpu_seconds

CLIENTS = 32
ROUNDS = 3
SECONDS = 4

BARE = """
import ctypes
import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

rename = ctypes.pythonapi.PyCapsule_SetName
rename.argtypes = [ctypes.py_object, ctypes.c_char_p]
USED = b"used_dltensor"


class TritonPythonModel:
    def initialize(self, args):
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        answers = []
        for request in requests:
            x = np.from_dlpack(pb_utils.get_input_tensor_by_name(request, "input"))
            capsule = self.session.run(None, {"input": x})[0].__dlpack__()
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor.from_dlpack("logits", capsule)]))
            rename(capsule, USED)
        return answers
"""


@pytest.fixture(scope="module")
def bare(
    server: Path, bundles: Bundles, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Ports, int]]:
    """The same server with a hand-written model of the fewest lines: its ports and process."""
    template = tmp_path_factory.mktemp("bare") / "bare.py"
    template.write_text(BARE)
    served = open_served(bundles.dense)
    settings = ModelSettings()
    ports = free_ports("127.0.0.1", http=0, grpc=0, metrics=0, health=0)
    with work_folder() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(repository, "_TEMPLATE", template)
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
            require_golden(
                ports.host, ports.http, served, model="dense", version=1, max_batch=64, timeout_s=30
            )
            yield ports, process.pid
        finally:
            process.end()


def _load(golden: Path, protocol: str, port: int) -> dict[str, Any]:
    words = [
        "--model",
        "dense",
        "--golden",
        str(golden),
        "--protocol",
        protocol,
        "--url",
        f"127.0.0.1:{port}",
    ]
    done = subprocess.run(
        [
            sys.executable,
            str(CHECKOUT / "sparse_export" / "serving" / "client_load.py"),
            *words,
            "--clients",
            str(CLIENTS),
            "--seconds",
            str(SECONDS),
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.mark.timing
@pytest.mark.full
@pytest.mark.slow  # the time under load is what is tested: two servers, three rounds of four seconds each
def test_32_clients_see_no_error_and_a_request_costs_at_most_1_3_of_the_bare_model(
    running: Serving, bare: tuple[Ports, int], golden: Bundles, capsys: pytest.CaptureFixture[str]
) -> None:
    bare_ports, bare_pid = bare
    servers = {
        "ours": (running.server_pid(), running.http_port, running.grpc_port),
        "bare": (bare_pid, bare_ports.http, bare_ports.grpc),
    }
    spent = dict.fromkeys(servers, 0.0)
    answered = dict.fromkeys(servers, 0)
    for number in range(ROUNDS):
        protocol = ("grpc", "http", "grpc")[number]
        for name, (pid, http_port, grpc_port) in sorted(servers.items(), reverse=bool(number % 2)):
            before = cpu_seconds(pid)
            told = _load(golden.dense, protocol, http_port if protocol == "http" else grpc_port)
            spent[name] += cpu_seconds(pid) - before
            answered[name] += told["requests"]
            with capsys.disabled():
                print(f"\n{name} {protocol} {told}", end="")
            assert told["errors"] == 0, told
            assert told["requests"] > 100
    cost_ms = {name: 1e3 * spent[name] / answered[name] for name in servers}
    with capsys.disabled():
        print(f"\nserver CPU per request, ms: {cost_ms}, ratio {cost_ms['ours'] / cost_ms['bare']:.3f}")
    assert cost_ms["ours"] <= 1.3 * cost_ms["bare"]
