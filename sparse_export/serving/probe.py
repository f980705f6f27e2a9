"""Requests to a running server over HTTP: is it ready, is its golden output right, its counters."""

from __future__ import annotations

import http.client
import json
import math
import re
from dataclasses import dataclass

import numpy as np

from sparse_export.errors import GateFailed
from sparse_export.runtimes.tolerance import differences, spread
from sparse_export.serving.repository import Served
from sparse_export.serving.tensors import Interface, wire_dtype
from sparse_export.signature import Array, Feeds, joined

__all__ = ["Counters", "answer", "is_ready", "read_counters", "require_golden", "require_own_answers"]

_LINE = re.compile(r"^(nv_inference_\w+)\{[^}]*\} ([0-9.e+]+)$", re.MULTILINE)
_LENGTH = "Inference-Header-Content-Length"
_OTHER_ORDER = 0.05  # of the spread: sums in another order, and ranges of int8 that a whole batch shares


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
    host: str,
    port: int,
    served: Served,
    *,
    model: str,
    version: int | None,
    max_batch: int,
    timeout_s: float,
) -> float | None:
    """Send the golden inputs to a model, in batches, and compare the answers with the golden outputs.

    Args:
        host: of the server.
        port: its HTTP port.
        served: the bundle that the model was made from.
        model: its name on the server.
        version: of the model, None for any.
        max_batch: largest batch to send.
        timeout_s: seconds for each request.

    Returns:
        The largest absolute difference of a float; None where no output is one.

    Raises:
        GateFailed: an output is outside the bundle's tolerance, or there is no valid answer.
    """
    signature, info = served.signature, served.bundle.info
    n_samples = signature.n_samples(served.golden_inputs)
    parts = [
        answer(
            host,
            port,
            served.interface,
            signature.part(served.golden_inputs, start, start + max_batch),
            model=model,
            version=version,
            n_samples=min(max_batch, n_samples - start),
            timeout_s=timeout_s,
        )
        for start in range(0, n_samples, max_batch)
    ]
    found = joined(parts, signature.outputs, signature.batch)
    compared = differences(found, served.golden_outputs, atol=info.atol, rtol=info.rtol, rms=info.rms)
    for one in compared:
        if one.ok:
            continue
        if one.equal_share is None:
            off, size = f"{one.max_abs_difference:.3g}", spread(served.golden_outputs[one.name])
            typical = "" if info.rms is None else f", and a root mean square of {info.rms:g} of the spread,"
            allowed = f"At most {info.atol:g} + {info.rtol:g} * {size:.3g}{typical} is allowed."
        else:
            off = f"{1 - one.equal_share:.3g} of its values"
            allowed = f"A share of {info.rtol:g} may differ."
        raise GateFailed(
            f"The server's answer to the golden input of {model} differs by {off} in {one.name}.",
            expected=allowed,
            do="Do not use this server: look at its log for the runtime, and build the bundle again.",
        )
    floats = [one.max_abs_difference for one in compared if one.max_abs_difference is not None]
    return max(floats, default=None)


def require_own_answers(
    host: str, port: int, served: Served, *, model: str, version: int | None, timeout_s: float
) -> None:
    """Check that a sample's floats are the same alone and beside others, as where requests are merged.

    Args:
        host: of the server.
        port: its HTTP port.
        served: the bundle that the model was made from, whose golden output the server gives.
        model: its name on the server.
        version: of the model, None for any.
        timeout_s: seconds for the request.

    Raises:
        GateFailed: the answer for the first golden sample alone is another one, or there is no valid answer.
    """
    signature, info = served.signature, served.bundle.info
    sample = signature.part(served.golden_inputs, 0, 1)
    alone = answer(
        host,
        port,
        served.interface,
        sample,
        model=model,
        version=version,
        n_samples=1,
        timeout_s=timeout_s,
    )
    rtol = max(info.rtol, _OTHER_ORDER)
    for one in differences(
        alone,
        signature.part(served.golden_outputs, 0, 1),
        atol=info.atol,
        rtol=rtol,
        spread_of=served.golden_outputs,
    ):
        if not one.ok and one.equal_share is None:  # a label may turn where sums run in another order
            raise GateFailed(
                f"{one.name} of a sample of {model} is another one alone than beside others: its first axis, "
                f"{signature.batch}, does not count samples, or they look at each other.",
                do="Serve it with --no-batching, or name the axis of samples at build: "
                "--axes x=sequence,batch,_.",
            )


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


def answer(
    host: str,
    port: int,
    interface: Interface,
    feeds: Feeds,
    *,
    model: str,
    version: int | None,
    n_samples: int,
    timeout_s: float,
) -> dict[str, Array]:
    """Ask a model for its outputs, by the protocol's binary form.

    Args:
        host: of the server.
        port: its HTTP port.
        interface: of the model.
        feeds: inputs by name.
        model: its name on the server.
        version: of the model, None for any.
        n_samples: that the inputs hold.
        timeout_s: seconds that the answer may take.

    Raises:
        GateFailed: there is no valid answer.
    """
    inputs, contents = [], []
    for one in interface.inputs:
        array = one.to_wire(feeds[one.name])
        data = np.asarray(array, dtype=wire_dtype(one.dtype), order="C").tobytes()
        size = {"binary_data_size": len(data)}
        inputs.append(
            {"name": one.name, "shape": list(array.shape), "datatype": one.dtype, "parameters": size}
        )
        contents.append(data)
    outputs = [{"name": one.name, "parameters": {"binary_data": True}} for one in interface.outputs]
    head = json.dumps({"inputs": inputs, "outputs": outputs}).encode()
    path = f"/v2/models/{model}{_version(version)}/infer"
    try:
        status, headers, body = _call(
            host,
            port,
            "POST",
            path,
            timeout=timeout_s,
            body=head + b"".join(contents),
            headers={_LENGTH: str(len(head))},
        )
    except (OSError, http.client.HTTPException) as cause:
        raise _wrong(model, f"no answer: {cause or type(cause).__name__}") from cause
    if status != 200:
        raise _wrong(model, f"HTTP {status} {body[:500].decode(errors='replace')}")
    return _outputs(interface, model, n_samples, headers, body)


def _outputs(
    interface: Interface, model: str, n_samples: int, headers: http.client.HTTPMessage, body: bytes
) -> dict[str, Array]:
    """The outputs in the body of a response to so many samples."""
    try:
        start = int(headers.get(_LENGTH) or len(body))
        entries = [
            (one["name"], tuple(one["shape"]), one["datatype"], one["parameters"]["binary_data_size"])
            for one in json.loads(body[:start])["outputs"]
        ]
    except (ValueError, KeyError, TypeError) as cause:
        raise _wrong(model, f"HTTP 200 without a valid answer: {body[:200]!r}") from cause
    found = {}
    specs = {one.name: one for one in interface.outputs}
    for name, shape, dtype, size in entries:
        content, start = body[start : start + size], start + size
        spec = specs.get(name)
        if spec is None or dtype != spec.dtype:
            raise _wrong(model, f"HTTP 200, {name} of {dtype}")
        wanted = (n_samples, *spec.dims) if interface.batched else spec.dims
        fits = len(shape) == len(wanted) and all(a in (b, -1) for b, a in zip(shape, wanted, strict=True))
        if not fits or len(content) != wire_dtype(dtype).itemsize * math.prod(shape):
            raise _wrong(model, f"HTTP 200, {name} of shape {shape} and {len(content)} bytes of data")
        found[name] = spec.from_wire(np.frombuffer(content, wire_dtype(dtype)).reshape(shape))
    missing = [name for name in specs if name not in found]
    if missing:
        raise _wrong(model, f"HTTP 200 without {missing[0]}")
    return found


def _wrong(model: str, what: str) -> GateFailed:
    """The error for an answer without a valid output. what: ends the sentence."""
    return GateFailed(
        f"The server's answer to the golden input of {model} is {what}.",
        do="Look at the server's log, above.",
    )
