"""The supervisor's own health endpoint: `/live` while it runs, `/ready` while requests should be sent."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from sparse_export.errors import MissingCapability

__all__ = ["Readiness", "health_endpoint"]

_TIMEOUT_S = 5.0
_MOST_CONNECTIONS = 64


@dataclass(kw_only=True)
class Readiness:
    """The state that the endpoint reports; the supervisor sets it.

    Attributes:
        state: `starting`, `ready`, `restarting` or `draining`.
    """

    state: str = "starting"


@contextmanager
def health_endpoint(host: str, port: int, readiness: Readiness) -> Iterator[int]:
    """Serve the endpoint on a thread until the block ends.

    Args:
        host: the address to bind to.
        port: 0 for any free one.
        readiness: the state to report.

    Yields:
        The port.

    Raises:
        MissingCapability: the port cannot be used.
    """
    try:
        server = _Server((host, port), _Handler, readiness)
    except OSError as cause:
        raise MissingCapability(
            f"Port {port} on {host} cannot be used: {cause.strerror}.",
            do="Give another one with --health-port.",
        ) from cause
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    """A server of at most `_MOST_CONNECTIONS` connections; it drops any more."""

    daemon_threads = True
    block_on_close = False

    def __init__(
        self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], readiness: Readiness
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.readiness = readiness
        self._room = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect."""


class _Handler(BaseHTTPRequestHandler):
    """Answers `/live` and `/ready` by status and JSON."""

    server: _Server
    timeout = _TIMEOUT_S

    def do_GET(self) -> None:
        state = self.server.readiness.state
        statuses = {"/live": 200, "/ready": 200 if state == "ready" else 503}
        body = json.dumps({"state": state}).encode()
        self.send_response(statuses.get(self.path, 404))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: probes come every second."""
