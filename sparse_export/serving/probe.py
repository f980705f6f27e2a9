"""Requests to a running server over HTTP: is it ready, is its golden output right, its counters."""

from __future__ import annotations

import http.client
import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_export.errors import GateFailed
from sparse_export.runtimes.tolerance import differences, spread
from sparse_export.serving.repository import Served

__all__ = ["Counters", "is_ready", "read_counters", "require_golden"]

_NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "FP32": np.dtype("<f4"),
    "FP16": np.dtype("<f2"),
    "FP64": np.dtype("<f8"),
}
_LINE = re.compile(r"^(nv_inference_\w+)\{[^}]*\} ([0-9.e+]+)$", re.MULTILINE)
_LENGTH = "Inference-Header-Content-Length"


@dataclass(frozen=True, kw_only=True)
class Counters:
    """Sums over all models.

    Attributes:
        n_done: requests that were answered or failed.
        n_pending: requests that wait for an execution.
    """

    n_done: int
    n_pending: int


def is_ready(host: str, port: int, model: str | None = None, version: int | None = None) -> bool:
    """Is the server ready, or one of its models? False also where it does not answer.

    Args:
        host: of the server.
        port: its HTTP port.
        model: name of a model, None for the server.
        version: of the model, None for any.
    """
    path = "/v2/health/ready" if model is None else f"/v2/models/{model}{_version(version)}/ready"
    try:
        return _call(host, port, "GET", path, timeout=5.0)[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def read_counters(host: str, port: int) -> Counters | None:
    """Read the counters of the metrics page.

    Args:
        host: of the server.
        port: its metrics port.

    Returns:
        The counters; None where the server does not answer.
    """
    try:
        status, _, body = _call(host, port, "GET", "/metrics", timeout=5.0)
    except (OSError, http.client.HTTPException):
        return None
    if status != 200:
        return None
    sums: dict[str, float] = {}
    for name, value in _LINE.findall(body.decode()):
        sums[name] = sums.get(name, 0.0) + float(value)
    done = sums.get("nv_inference_request_success", 0.0) + sums.get("nv_inference_request_failure", 0.0)
    return Counters(n_done=int(done), n_pending=int(sums.get("nv_inference_pending_request_count", 0.0)))


def require_golden(
    host: str, port: int, served: Served, *, model: str, version: int | None, max_batch: int, timeout_s: float
) -> float:
    """Send the golden input to a model, in batches, and compare the answer with the golden output.

    Args:
        host: of the server.
        port: its HTTP port.
        served: the bundle that the model was made from.
        model: its name on the server.
        version: of the model, None for any.
        max_batch: largest batch that the model takes.
        timeout_s: seconds for each request.

    Returns:
        The largest absolute difference.

    Raises:
        GateFailed: it is outside the bundle's tolerance, or there is no valid answer.
    """
    x, wanted = served.golden_input, served.golden_output
    parts = [
        _answer(host, port, served, x[start : start + max_batch], model, version, timeout_s)
        for start in range(0, len(x), max_batch)
    ]
    info = served.bundle.info
    name = info.signature.output_names[0]
    (found,) = differences({name: np.concatenate(parts)}, {name: wanted}, atol=info.atol, rtol=info.rtol)
    largest = found.max_abs_difference or 0.0
    if not found.ok:
        raise GateFailed(
            f"The server's answer to the golden input of {model} differs by {largest:.3g}.",
            expected=f"At most {info.atol:g} + {info.rtol:g} * {spread(wanted):.3g} is allowed.",
            do="Do not use this server: look at its log for the runtime, and build the bundle again.",
        )
    return largest


def _version(version: int | None) -> str:
    """The part of a URL that names a version."""
    return "" if version is None else f"/versions/{version}"


def _call(
    host: str,
    port: int,
    method: str,
    path: str,
    *,
    timeout: float,
    body: bytes = b"",
    headers: dict[str, str] | None = None,
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Status, headers and body of a response."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    try:
        connection.request(method, path, body or None, headers or {})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def _answer(
    host: str, port: int, served: Served, batch: np.ndarray, model: str, version: int | None, timeout_s: float
) -> np.ndarray:
    """The server's output for a batch, by the protocol's binary form."""
    data = np.ascontiguousarray(batch, dtype=_NUMPY_DTYPES[served.inputs.dtype]).tobytes()
    document = {
        "inputs": [
            {
                "name": served.inputs.name,
                "shape": list(batch.shape),
                "datatype": served.inputs.dtype,
                "parameters": {"binary_data_size": len(data)},
            }
        ],
        "outputs": [{"name": served.outputs.name, "parameters": {"binary_data": True}}],
    }
    head = json.dumps(document).encode()
    path = f"/v2/models/{model}{_version(version)}/infer"
    try:
        status, headers, body = _call(
            host, port, "POST", path, timeout=timeout_s, body=head + data, headers={_LENGTH: str(len(head))}
        )
    except (OSError, http.client.HTTPException) as cause:
        raise _wrong(model, f"no answer: {cause or type(cause).__name__}") from cause
    if status != 200:
        raise _wrong(model, f"HTTP {status} {body[:500].decode(errors='replace')}")
    try:
        split = int(headers.get(_LENGTH) or len(body))
        output = json.loads(body[:split])["outputs"][0]
        shape, dtype = tuple(output["shape"]), _NUMPY_DTYPES[output["datatype"]]
    except (ValueError, KeyError, IndexError, TypeError) as cause:
        raise _wrong(model, f"HTTP 200 without a valid answer: {body[:200]!r}") from cause
    expected_shape = (len(batch), *served.outputs.dims)
    content = body[split:]
    if shape != expected_shape or len(content) != dtype.itemsize * int(np.prod(expected_shape)):
        raise _wrong(model, f"HTTP 200, shape {shape} and {len(content)} bytes of data")
    found: np.ndarray = np.frombuffer(content, dtype).reshape(shape)
    return found


def _wrong(model: str, what: str) -> GateFailed:
    """The error for an answer without a valid output. what: ends the sentence."""
    return GateFailed(
        f"The server's answer to the golden input of {model} is {what}.",
        do="Look at the server's log, above.",
    )
