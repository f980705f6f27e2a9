"""What clients of `serve` see under load, and how soon it is back when its processes are killed.

    python -m benchmarks.bench_faults BUNDLE [--clients N] [--seconds N] [--kills N] [--json FILE]

Starts `sparse-export serve` on a bundle, loads it for `--seconds` over gRPC, then over HTTP. Then, while eight
clients go on, it kills the server, and likewise one process of a model, `--kills` times each by SIGKILL, and
measures from the signal on until `/ready` says 503, and until it says 200 again and the golden answer is right.
Needs the server (`sparse-export serve --install-server`).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from benchmarks.bench_serving import LOAD, serving
from sparse_export.errors import ServerFailed
from sparse_export.files import temporary_folder, write_json
from sparse_export.instruments.machine import machine_facts
from sparse_export.serving.golden_files import write_golden_files
from sparse_export.serving.probe import require_golden
from sparse_export.serving.repository import Served, open_served
from sparse_export.version import library_versions, now

MODEL = "net"
LIMIT_S = 60.0
BACKGROUND_CLIENTS = 8
LOOK_EVERY_S = 0.02


def _load(document: dict[str, Any], golden: Path, protocol: str, clients: int, seconds: float) -> list[str]:
    url = f"127.0.0.1:{document['ports'][protocol]}"
    words = ["--model", MODEL, "--golden", str(golden), "--protocol", protocol, "--url", url]
    return [sys.executable, str(LOAD), *words, "--clients", str(clients), "--seconds", str(seconds)]


def _is_ready(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in listed.read_text().split()]
    return found


def _line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def _server(serve: int) -> int:
    """The process of the server that runs now."""
    (found,) = [one for one in _children(serve) if "tritonserver" in _line(one).split(" ")[0]]
    return found


def _model_process(serve: int) -> int:
    """A process that runs the model."""
    return next(one for one in _children(_server(serve)) if f"/{MODEL}/1/" in _line(one))


def _wait(ready: bool, port: int, since: float) -> float:
    """Seconds from `since` until `/ready` says so."""
    while _is_ready(port) is not ready:
        if time.monotonic() - since > LIMIT_S:
            raise ServerFailed(f"/ready did not say {200 if ready else 503} within {LIMIT_S:g} s.")
        time.sleep(LOOK_EVERY_S)
    return time.monotonic() - since


def _killed(document: dict[str, Any], served: Served, what: str) -> dict[str, Any]:
    """Kill a process, and measure until the golden answer is right again."""
    ports, serve = document["ports"], document["serve_pid"]
    victim = _server(serve) if what == "server" else _model_process(serve)
    begin = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    not_ready_s = _wait(False, ports["health"], begin)
    _wait(True, ports["health"], begin)
    require_golden("127.0.0.1", ports["http"], served, model=MODEL, version=1, max_batch=1, timeout_s=LIMIT_S)
    recovered_s = time.monotonic() - begin
    return {"killed": what, "not_ready_s": round(not_ready_s, 3), "recovered_s": round(recovered_s, 3)}


def _measured(bundle: Path, golden: Path, given: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """The loads, and what became of each kill."""
    served = open_served(bundle)
    write_golden_files(golden, served)
    loads, kills = [], []
    with serving([bundle], ["--name", MODEL]) as document:
        for protocol in ("grpc", "http"):
            line = _load(document, golden, protocol, given.clients, given.seconds)
            done = subprocess.run(line, check=False, capture_output=True, text=True)
            loads.append({**json.loads(done.stdout), "seconds": given.seconds})
            print(json.dumps(loads[-1]), flush=True)
        for what in ("server", "model process"):
            for _ in range(given.kills):
                line = _load(document, golden, "grpc", BACKGROUND_CLIENTS, LIMIT_S)
                with subprocess.Popen(line, stdout=subprocess.DEVNULL) as clients:
                    try:
                        time.sleep(3)
                        kills.append(_killed(document, served, what))
                    finally:
                        clients.kill()
                print(json.dumps(kills[-1]), flush=True)
    return loads, kills


def main(words: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("bundle", type=Path)
    options.add_argument("--clients", type=int, default=32)
    options.add_argument("--seconds", type=float, default=60.0)
    options.add_argument("--kills", type=int, default=3)
    options.add_argument("--json", type=Path)
    given = options.parse_args(words)
    with temporary_folder() as work:
        loads, kills = _measured(given.bundle, work / "golden", given)
    if given.json:
        document = {
            "command": [
                "python",
                "-m",
                "benchmarks.bench_faults",
                *(sys.argv[1:] if words is None else words),
            ],
            "created": now(),
            "machine": machine_facts(),
            "versions": library_versions(),
            "loads": loads,
            "kills": kills,
        }
        write_json(given.json, document)


if __name__ == "__main__":
    main()
