"""What clients see of a served bundle, by Triton's own client, over HTTP and gRPC."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient import grpc, http

from sparse_export.files import sha256_file
from sparse_export.formats.bundle import BUNDLE_FILE
from sparse_export.runtimes.onnxruntime import open_session
from tests.serving.conftest import DIGITS, Bundles
from tests.serving.serving import CHECKOUT, Serving, get, infer, post

PROTOCOLS = [pytest.param(http, "http_port", id="http"), pytest.param(grpc, "grpc_port", id="grpc")]
BATCH = 64


def _client(protocol: Any, serving: Serving, port: str) -> Any:
    return protocol.InferenceServerClient(f"127.0.0.1:{getattr(serving, port)}")


@pytest.mark.parametrize(("protocol", "port"), PROTOCOLS)
@pytest.mark.parametrize("model", ["dense", "sparse"])
def test_predictions_are_onnxruntimes_to_the_bit_on_the_whole_test_set(
    protocol: Any, port: str, model: str, running: Serving, bundles: Bundles, digits_test: np.ndarray
) -> None:
    with (
        open_session(getattr(bundles, model) / "model.onnx", n_threads=1) as session,
        _client(protocol, running, port) as client,
    ):
        for start in range(0, len(digits_test), BATCH):
            batch = digits_test[start : start + BATCH]
            assert infer(protocol, client, model, batch).tobytes() == session.run(batch).tobytes()


def test_the_two_networks_differ(running: Serving, digits_test: np.ndarray) -> None:
    with _client(http, running, "http_port") as client:
        dense, sparse = (infer(http, client, model, digits_test[:8]) for model in ("dense", "sparse"))
    assert np.abs(dense - sparse).max() > 0.01


def test_ready_tells_models_versions_and_the_golden_difference(running: Serving, bundles: Bundles) -> None:
    models = {model["name"]: model for model in running.document["models"]}
    assert models.keys() == {"dense", "sparse"}
    for name, model in models.items():
        assert model["manifest_sha256"] == sha256_file(getattr(bundles, name) / BUNDLE_FILE)
        assert (model["version"], model["runtime"]) == (1, "python")
        assert 0 <= model["largest_difference"] < 1e-3
    assert running.health() == (200, "ready")
    assert running.health("/live") == (200, "ready")


def test_the_manifests_hash_is_in_the_parameters(running: Serving, bundles: Bundles) -> None:
    with _client(http, running, "http_port") as client:
        told = client.get_model_config("dense")["parameters"]["manifest_sha256"]["string_value"]
    assert told == sha256_file(bundles.dense / BUNDLE_FILE)


def test_metrics_count_the_requests(running: Serving, digits_test: np.ndarray) -> None:
    def counted() -> int:
        _, page = get(running.document["ports"]["metrics"], "/metrics")
        found = re.search(
            rb'^nv_inference_request_success\{model="dense",version="1"\} (\d+)', page, re.MULTILINE
        )
        assert found
        return int(found[1])

    def settled() -> int:
        """The count once it stands still: earlier requests are counted some time after their answer."""
        now = counted()
        for _ in range(40):
            time.sleep(0.5)
            now, last = counted(), now
            if now == last:
                return now
        raise AssertionError("the count never stands still")

    before = settled()
    with _client(grpc, running, "grpc_port") as client:
        for _ in range(5):
            infer(grpc, client, "dense", digits_test[:1])
    assert settled() == before + 5


@pytest.mark.parametrize(
    "path",
    [
        "/v2/repository/index",
        "/v2/repository/models/dense/unload",
        "/v2/repository/models/dense/load",
        "/v2/systemsharedmemory/region/x/register",
        "/v2/logging",
        "/v2/trace/setting",
    ],
)
def test_control_calls_are_closed_to_clients(path: str, running: Serving) -> None:
    for headers in ({}, {"sparse-export": ""}, {"sparse-export": "x"}):
        status, body = post(running.http_port, path, b"{}", headers)
        assert status == 403, body


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("unload_model", ("dense",)),
        ("load_model", ("dense",)),
        ("get_model_repository_index", ()),
        ("register_system_shared_memory", ("x", "/etc", 16)),
        ("update_log_settings", ({"log_file": "/tmp/never"},)),
        ("update_trace_settings", ()),
    ],
)
def test_control_calls_are_closed_over_grpc_too(
    call: str, arguments: tuple[Any, ...], running: Serving
) -> None:
    with (
        _client(grpc, running, "grpc_port") as client,
        pytest.raises(grpc.InferenceServerException, match="restricted"),
    ):
        getattr(client, call)(*arguments)


def test_every_port_is_bound_to_this_machine_alone(running: Serving) -> None:
    ports = {int(value) for name, value in running.document["ports"].items() if name != "host"}
    listening: dict[int, set[str]] = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            address, port = fields[1].rsplit(":", 1)
            if fields[3] == "0A" and int(port, 16) in ports:
                listening.setdefault(int(port, 16), set()).add(
                    address[-8:]
                )  # of an IPv4 address inside IPv6 too
    loopback = socket.inet_aton("127.0.0.1")[::-1].hex().upper()
    assert listening == {port: {loopback} for port in ports}


@pytest.mark.parametrize(("protocol", "port"), PROTOCOLS)
def test_the_server_names_the_best_classes_where_a_client_asks_for_them(
    protocol: Any, port: str, running: Serving, digits_test: np.ndarray
) -> None:
    tensor = protocol.InferInput("input", [4, 1, 8, 8], "FP32")
    tensor.set_data_from_numpy(digits_test[:4])
    asked = [protocol.InferRequestedOutput("logits", class_count=2)]
    with _client(protocol, running, port) as client:
        logits = infer(protocol, client, "dense", digits_test[:4])
        found = client.infer("dense", [tensor], outputs=asked).as_numpy("logits")
        unnamed = client.infer("sparse", [tensor], outputs=asked).as_numpy("logits")
    best = [[text.decode().split(":")[1:] for text in row] for row in found]
    order = np.argsort(-logits, axis=1)[:, :2]
    assert best == [[[str(at), DIGITS[at]] for at in row] for row in order]
    assert all(len(text.decode().split(":")) == 2 for text in unnamed.ravel())


def test_the_client_example_gets_the_golden_answer_from_both_protocols(
    running: Serving, golden: Bundles
) -> None:
    script = CHECKOUT / "sparse_export" / "serving" / "client_example.py"
    words = ["--http", f"127.0.0.1:{running.http_port}", "--grpc", f"127.0.0.1:{running.grpc_port}"]
    done = subprocess.run(
        [
            sys.executable,
            str(script),
            "--model",
            "sparse",
            "--golden",
            str(golden.sparse),
            *words,
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout.count("right"), done.stderr) == (0, 2, "")
    wrong = subprocess.run(
        [sys.executable, str(script), "--model", "sparse", "--golden", str(golden.other), *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (wrong.returncode, wrong.stdout.count("WRONG")) == (1, 2)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_the_load_script_reports_percentiles(protocol: str, running: Serving, golden: Bundles) -> None:
    port = getattr(running, f"{protocol}_port")
    words = ["--protocol", protocol, "--url", f"127.0.0.1:{port}", "--clients", "4", "--seconds", "1"]
    script = CHECKOUT / "sparse_export" / "serving" / "client_load.py"
    done = subprocess.run(
        [sys.executable, str(script), "--model", "dense", "--golden", str(golden.dense), *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["errors"], told["clients"]) == (0, 4)
    assert told["requests"] > 10
    assert 0 < told["p50_ms"] <= told["p99_ms"] <= told["largest_ms"]
