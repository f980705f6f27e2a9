"""Input that is wrong: refused as the client's fault where Triton does so, never a hang, a dead server or
lost memory.

Connections are few, short and to this machine only.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient import grpc, http

from tests.serving.conftest import Bundles
from tests.serving.serving import Serving, infer, post, resident_mb

PATH = "/v2/models/dense/infer"
ZEROS = [0.0] * 64


@pytest.fixture(autouse=True)
def _still_right(running: Serving, bundles: Bundles) -> Iterator[None]:
    """After each test the same process gives the golden answer over both protocols."""
    before = running.server_pid()
    yield
    x, y = (np.load(bundles.dense / "golden" / f"{part}.npy") for part in ("input", "output"))
    assert running.server_pid() == before
    for protocol, port in ((http, running.http_port), (grpc, running.grpc_port)):
        with protocol.InferenceServerClient(f"127.0.0.1:{port}") as client:
            assert np.allclose(infer(protocol, client, "dense", x), y, atol=1e-3)


def _input(**changes: Any) -> dict[str, Any]:
    return {"name": "input", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": ZEROS} | changes


def _request(*inputs: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **fields}).encode()


REFUSED = {
    "wrong shape": _request(_input(shape=[1, 1, 4, 16])),
    "rank too small": _request(_input(shape=[1, 64])),
    "rank too large": _request(_input(shape=[1, 1, 8, 8, 1])),
    "wrong dtype": _request(_input(datatype="INT32", data=[0] * 64)),
    "unknown dtype": _request(_input(datatype="FP33")),
    "wrong name": _request(_input(name="inputs")),
    "name that is a path": _request(_input(name="../../etc/passwd")),
    "no input": _request(),
    "two of one input": _request(_input(), _input()),
    "batch 0": _request(_input(shape=[0, 1, 8, 8], data=[])),
    "batch above the largest": _request(_input(shape=[65, 1, 8, 8], data=[0.0] * 64 * 65)),
    "unknown output": _request(_input(), outputs=[{"name": "logit"}]),
    "100k deep": b'{"inputs":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
}
# What Triton 2.51 calls its own fault although it is the client's.
SERVER_ERRORS = {
    "malformed": b'{"inputs": [',
    "not an object": b"[1, 2, 3]",
    "empty": b"",
    "binary": bytes(range(256)) * 4,
    "negative dimension": _request(_input(shape=[-1, 1, 8, 8])),
    "huge dimension": _request(_input(shape=[2**62, 1, 8, 8])),
    "too little data": _request(_input(data=ZEROS[:-1])),
    "too much data": _request(_input(data=[*ZEROS, 0.0])),
    "text as data": _request(_input(data=["a"] * 64)),
    "null as data": _request(_input(data=None)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_the_clients_fault_is_refused_as_such(name: str, running: Serving) -> None:
    status, body = post(running.http_port, PATH, REFUSED[name])
    assert 400 <= status < 500, body
    assert json.loads(body)["error"]


@pytest.mark.parametrize("name", SERVER_ERRORS)
def test_what_the_server_takes_for_its_own_fault_is_an_error_all_the_same(
    name: str, running: Serving
) -> None:
    status, body = post(running.http_port, PATH, SERVER_ERRORS[name])
    assert status in {400, 500}, body
    assert json.loads(body)["error"]


@pytest.mark.parametrize(
    "path", ["/v2/models/../dense/infer", "/v2/models/nothing/infer", "/v2/models/%2e%2e/infer"]
)
def test_a_model_that_there_is_not_is_not_found(path: str, running: Serving) -> None:
    status, _ = post(running.http_port, path, _request(_input()))
    assert status in {400, 404}


def test_a_name_with_words_for_a_shell_is_only_a_name(running: Serving, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    status, _ = post(running.http_port, f"/v2/models/$(touch${{IFS}}{touched})/infer", _request(_input()))
    assert (400 <= status < 500, touched.exists()) == (True, False)


def test_nan_and_infinity_go_through_and_stay_with_their_sample(running: Serving, bundles: Bundles) -> None:
    x = np.load(bundles.dense / "golden" / "input.npy")[:3].copy()
    with http.InferenceServerClient(f"127.0.0.1:{running.http_port}") as client:
        clean = infer(http, client, "dense", x)
        x[1, 0, 0, 0] = np.nan
        found = infer(http, client, "dense", x)
    assert not np.isfinite(found[1]).all()
    assert np.array_equal(found[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(np.zeros((1, 1, 4, 16), np.float32), id="shape"),
        pytest.param(np.zeros((1, 64), np.float32), id="rank"),
        pytest.param(np.zeros((0, 1, 8, 8), np.float32), id="batch 0"),
        pytest.param(np.zeros((65, 1, 8, 8), np.float32), id="batch 65"),
    ],
)
def test_grpc_refuses_what_http_refuses(x: np.ndarray, running: Serving) -> None:
    with (
        grpc.InferenceServerClient(f"127.0.0.1:{running.grpc_port}") as client,
        pytest.raises(grpc.InferenceServerException) as error,
    ):
        infer(grpc, client, "dense", x)
    assert error.value.status() == "StatusCode.INVALID_ARGUMENT"


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    document=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(
                    ["inputs", "outputs", "name", "shape", "datatype", "data", "parameters", "id"]
                ),
                inner,
            )
        ),
        max_leaves=20,
    )
)
def test_any_json_is_answered(document: Any, running: Serving) -> None:
    status, body = post(running.http_port, PATH, json.dumps(document).encode(), timeout=30)
    assert status in {400, 500}, body


def test_a_body_of_70_mb_is_refused_and_its_memory_given_back(running: Serving) -> None:
    data = bytes(70 << 20)
    head = json.dumps({"inputs": [_input(shape=[1, 1, 8, 8], parameters={"binary_data_size": len(data)})]})
    head = head.replace(f', "data": {json.dumps(ZEROS)}', "")
    headers = {"Inference-Header-Content-Length": str(len(head))}
    post(running.http_port, PATH, head.encode() + data, headers)  # once, so that pools have their size
    before = resident_mb(running.server_pid())
    for _ in range(6):
        status, body = post(running.http_port, PATH, head.encode() + data, headers)
        assert 400 <= status < 500, body
    # Kept bodies would be 420 MB. One at a time may still be in the allocator's hands: 70 MB were seen under
    # load.
    assert resident_mb(running.server_pid()) < before + 105


def test_connections_that_are_dropped_or_never_finished_cost_nothing(running: Serving) -> None:
    before = resident_mb(running.server_pid())
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" % PATH.encode()
    waiting = []
    for port in (running.http_port, running.grpc_port, int(running.document["ports"]["health"])):
        for n in range(40):
            one = socket.create_connection(("127.0.0.1", port), timeout=5)
            if n % 4 == 0:  # says nothing
                waiting.append(one)
                continue
            one.sendall(head + b"x" * 1000)
            if n % 4 == 1:  # a reset in the middle of the body
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if n % 4 == 2:  # stays, unfinished
                waiting.append(one)
                continue
            one.close()
    try:
        assert running.health() == (200, "ready")
        status, _ = post(running.http_port, PATH, _request(_input()))
        assert status == 200
    finally:
        for one in waiting:
            one.close()
    assert resident_mb(running.server_pid()) < before + 40


def test_memory_does_not_grow_over_thousands_of_bad_requests(running: Serving) -> None:
    bodies = [*REFUSED.values(), *SERVER_ERRORS.values()]
    small = [body for body in bodies if len(body) < 20_000]
    for body in small * 4:
        post(running.http_port, PATH, body)
    before = resident_mb(running.server_pid())
    for body in small * 40:
        post(running.http_port, PATH, body)
    assert resident_mb(running.server_pid()) < before + 20
