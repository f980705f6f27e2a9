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
    """What the endpoint tells; the supervisor sets it. state: `starting`, `ready`, `restarting` or `draining`."""

    state: str = "starting"


@contextmanager
def health_endpoint(host: str, port: int, readiness: Readiness) -> Iterator[int]:
    """Answer on a thread until the block ends; the port. Raises MissingCapability when it cannot be had."""
    try:
        server = _Server((host, port), _Handler, readiness)
    except OSError as cause:
        raise MissingCapability(
            f"Port {port} on {host} cannot be had: {cause.strerror}.",
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
        """A client that goes away is no news."""


class _Handler(BaseHTTPRequestHandler):
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
        """Probes come every second: they are not worth a line."""
