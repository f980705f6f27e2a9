"""Runs `serve` as its users do, and looks at its processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Self

import numpy as np
from tritonclient import grpc, http

CHECKOUT = Path(__file__).resolve().parents[2]
ANY_PORTS = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--health-port", "0")


@dataclass(frozen=True)
class Serving:
    """A running `serve`. log: what it and the server wrote to stderr."""

    process: subprocess.Popen[str]
    document: dict[str, Any]
    log_path: Path

    @property
    def http_port(self) -> int:
        return int(self.document["ports"]["http"])

    @property
    def grpc_port(self) -> int:
        return int(self.document["ports"]["grpc"])

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def server_pid(self) -> int:
        """Of the server that runs now: a restart gives another one."""
        children = [
            pid for pid in _pids() if _parent(pid) == self.process.pid and "tritonserver" in _name(pid)
        ]
        assert len(children) == 1, children
        return children[0]

    def health(self, path: str = "/ready") -> tuple[int, str]:
        status, body = get(int(self.document["ports"]["health"]), path)
        return status, json.loads(body)["state"]

    def wait_for(self, text: str, *, times: int = 1, timeout_s: float = 60.0) -> None:
        until(lambda: self.log.count(text) >= times, f"{text!r} in the log", timeout_s)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def get(port: int, path: str) -> tuple[int, bytes]:
    connection = http_connection(port)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def post(
    port: int, path: str, body: bytes, headers: dict[str, str] | None = None, *, timeout: float = 60.0
) -> tuple[int, bytes]:
    connection = http_connection(port, timeout)
    try:
        connection.request("POST", path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def http_connection(port: int, timeout: float = 60.0) -> HTTPConnection:
    return HTTPConnection("127.0.0.1", port, timeout=timeout)


def until(reached: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline, f"{what} did not come in {timeout_s:g} s"
        time.sleep(0.05)


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name: state, parent, group, ..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _parent(pid: int) -> int:
    return int((_stat(pid) or ["", "0"])[1])


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def group(pid: int) -> list[int]:
    """Processes, zombies apart, of the process group that `pid` leads."""
    return [one for one in _pids() if (fields := _stat(one)) and fields[0] != "Z" and int(fields[2]) == pid]


def cpu_seconds(pid: int) -> float:
    """User and system time of a process group so far."""
    ticks = sum(int(fields[11]) + int(fields[12]) for one in group(pid) if (fields := _stat(one)))
    return ticks / os.sysconf("SC_CLK_TCK")


def resident_mb(pid: int) -> float:
    """Memory of a process group, pages that are shared counted each time."""
    pages = sum(int(fields[21]) for one in group(pid) if (fields := _stat(one)))
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def serving(*words: object, log: Path) -> Iterator[Serving]:
    """Start `serve`, wait until it says ready, and end it."""
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "sparse_export", "serve", *map(str, words), *ANY_PORTS, "--json"],
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
        )
    assert process.stdout is not None
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line == "}\n":
                break
        assert lines, log.read_text(errors="replace")[-3000:]
        document = json.loads("".join(lines))
        assert "error" not in document, document
        yield Serving(process, document, log)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        process.stdout.close()


def infer(protocol: Any, client: Any, model: str, x: np.ndarray) -> np.ndarray:
    tensor = protocol.InferInput("input", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x)
    found: np.ndarray = client.infer(model, [tensor]).as_numpy("logits")
    return found


class Load:
    """Clients that send one sample after the other until told to stop.

    heed: asked before each request; a client that is told no goes home.
    """

    def __init__(
        self,
        serving: Serving,
        model: str,
        x: np.ndarray,
        *,
        clients: int,
        heed: Callable[[], bool] | None = None,
        wanted: np.ndarray | None = None,
    ) -> None:
        self.errors: list[str] = []
        self.n_answered = 0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(
                target=self._client,
                args=(
                    (grpc, serving.grpc_port) if n % 2 else (http, serving.http_port),
                    model,
                    x,
                    heed,
                    wanted,
                ),
            )
            for n in range(clients)
        ]

    def _client(
        self,
        where: tuple[Any, int],
        model: str,
        x: np.ndarray,
        heed: Callable[[], bool] | None,
        wanted: np.ndarray | None,
    ) -> None:
        protocol, port = where
        with protocol.InferenceServerClient(f"127.0.0.1:{port}") as client:
            while not self._stop.is_set() and (heed is None or heed()):
                try:
                    found = infer(protocol, client, model, x)
                    if wanted is not None and not np.allclose(found, wanted, rtol=1e-3, atol=1e-3):
                        raise AssertionError("a wrong answer")
                except Exception as error:  # noqa: BLE001 - whatever a client sees is counted
                    with self._lock:
                        self.errors.append(f"{protocol.__name__} {type(error).__name__}: {error}"[:300])
                    time.sleep(0.02)
                else:
                    with self._lock:
                        self.n_answered += 1

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def join(self) -> None:
        """Wait for the clients to go home by themselves."""
        for thread in self._threads:
            thread.join(60)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.join()
