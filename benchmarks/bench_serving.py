"""Latency of served bundles against the number of clients, with and without dynamic batching, part by part.

    python -m benchmarks.bench_serving DENSE [SPARSE] [--seconds N] [--rounds N] [--long N] [--json FILE]

Starts `sparse-export serve` on the bundles, once with and once without batching, and loads one model after
the other, in alternating order, over gRPC and over HTTP, from a client process of its own. A client sends one
sample, waits, and sends the next. With `--long N`, 32 clients then load the dense model for N seconds. CPU is
that of the server and the models' processes. Needs the server (`sparse-export serve --install-server`).

Parts are means, which add up to the mean a client sees: the server counts how long requests wait in its queue, are
in the model (of which the bundle's graph alone takes what bare onnxruntime takes) and have their tensors read and
written; the rest is client, protocol and the way between. Percentiles are the client's. Bare is the same file by
onnxruntime in this process, one sample a call, one thread a call, as many calls at once as there are clients.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sparse_export.errors import ServerFailed
from sparse_export.files import temporary_folder, write_json
from sparse_export.instruments.machine import machine_facts
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.serving.golden_files import write_golden_files
from sparse_export.serving.repository import open_served
from sparse_export.version import library_versions, now

CLIENTS = (1, 8, 32)
MODELS = ("dense", "sparse")
PROTOCOLS = ("grpc", "http")
PARTS = ("queue", "compute_input", "compute_infer", "compute_output")
LOAD = Path(__file__).resolve().parents[1] / "sparse_export" / "serving" / "client_load.py"
ANY_PORTS = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--health-port", "0")


@contextmanager
def serving(bundles: Sequence[Path], words: Sequence[str]) -> Iterator[dict[str, Any]]:
    """`serve` on bundles; what it says when it is ready, and its own process."""
    command = [
        sys.executable,
        "-m",
        "sparse_export",
        "serve",
        *map(str, bundles),
        *words,
        *ANY_PORTS,
        "--json",
    ]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        lines = []
        try:
            for line in process.stdout:
                lines.append(line)
                if line == "}\n":
                    break
            document = json.loads("".join(lines))
            if "error" in document:
                raise ServerFailed(document["error"]["message"])
            yield {**document, "serve_pid": process.pid}
        finally:
            process.terminate()
            process.wait()


def _cpu_seconds(leader: int) -> float:
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == leader:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _counted(document: dict[str, Any], model: str) -> dict[str, float]:
    """What the server counted of a model since it started: requests, executions, and ms by part."""
    url = f"http://127.0.0.1:{document['ports']['http']}/v2/models/{model}/stats"
    with urllib.request.urlopen(url) as answer:
        versions = json.load(answer)["model_stats"]
    of_version = [one["inference_stats"] for one in versions]
    return {
        "requests": sum(one["success"]["count"] for one in of_version),
        "executions": sum(one["execution_count"] for one in versions),
        **{part: sum(one[part]["ns"] for one in of_version) / 1e6 for part in ("success", *PARTS)},
    }


def _parts(before: dict[str, float], after: dict[str, float], mean_ms: float) -> dict[str, float]:
    """Means of a request in ms by part, and the mean number of requests in an execution."""
    spent = {key: after[key] - before[key] for key in after}
    n = max(spent["requests"], 1)
    parts = {f"{part}_ms": round(spent[part] / n, 4) for part in PARTS}
    parts["client_and_protocol_ms"] = round(mean_ms - sum(parts.values()), 4)
    return {**parts, "requests_an_execution": round(n / max(spent["executions"], 1), 3)}


def bare(bundle: Path, clients: int, seconds: float) -> dict[str, Any]:
    """Percentiles of calls of onnxruntime alone.

    Args:
        bundle: whose `model.onnx` runs, on the first sample of its golden input.
        clients: threads that call it, each waiting for its answer.
        seconds: that they do.
    """
    served = open_served(bundle)
    feeds = served.signature.part(served.golden_inputs, 0, 1)
    times: list[list[float]] = [[] for _ in range(clients)]
    with open_session(served.bundle.onnx_path, n_threads=1) as session:
        session.run(feeds)
        end = time.monotonic() + seconds

        def calls(own: list[float]) -> None:
            while time.monotonic() < end:
                began = time.perf_counter()
                session.run(feeds)
                own.append(time.perf_counter() - began)

        threads = [threading.Thread(target=calls, args=(own,)) for own in times]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = np.concatenate([np.array(own) for own in times]) * 1e3
    p50, p99 = np.percentile(found, [50, 99])
    return {
        "clients": clients,
        "calls": len(found),
        "mean_ms": round(float(found.mean()), 4),
        "p50_ms": round(float(p50), 4),
        "p99_ms": round(float(p99), 4),
    }


def _sample(
    document: dict[str, Any], golden: Path, model: str, clients: int, seconds: float, protocol: str = "grpc"
) -> dict[str, Any]:
    before, counted = _cpu_seconds(document["server_pid"]), _counted(document, model)
    words = ["--model", model, "--golden", str(golden), "--protocol", protocol]
    words += ["--url", f"127.0.0.1:{document['ports'][protocol]}"]
    words += ["--clients", str(clients), "--seconds", str(seconds)]
    done = subprocess.run([sys.executable, str(LOAD), *words], check=False, capture_output=True, text=True)
    told: dict[str, Any] = json.loads(done.stdout)
    spent = _cpu_seconds(document["server_pid"]) - before
    return {
        **told,
        **_parts(counted, _counted(document, model), told["mean_ms"]),
        "model": model,
        "server_cpu_ms_per_request": round(1e3 * spent / max(told["requests"], 1), 4),
    }


def _samples(given: argparse.Namespace, bundles: Sequence[Path], work: Path) -> list[dict[str, Any]]:
    """Every sample, of both bundles; `work` gets their golden pairs."""
    golden = {folder: work / str(at) for at, folder in enumerate(bundles)}
    for folder, written in golden.items():
        write_golden_files(written, open_served(folder))
    samples: list[dict[str, Any]] = []
    models = MODELS[: len(bundles)]
    names = [word for name in models for word in ("--name", name)]
    for batching, words in ((True, names), (False, [*names, "--no-batching"])):
        with serving(bundles, words) as document:
            for clients, protocol in itertools.product(CLIENTS, PROTOCOLS):
                for number in range(given.rounds + 1):  # the first warms up
                    for model, folder in sorted(zip(models, bundles, strict=True), reverse=bool(number % 2)):
                        seconds = given.seconds if number else 1.0
                        sample = _sample(document, golden[folder], model, clients, seconds, protocol)
                        if number:
                            samples.append({**sample, "batching": batching, "round": number})
                            print(json.dumps(samples[-1]), flush=True)
            if batching and given.long:
                sample = _sample(document, golden[bundles[0]], "dense", 32, given.long)
                samples.append({**sample, "batching": True, "round": 0, "long": given.long})
                print(json.dumps(samples[-1]), flush=True)
    return samples


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("dense", type=Path)
    options.add_argument("sparse", type=Path, nargs="?")
    options.add_argument("--seconds", type=float, default=5.0)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--long", type=float, default=0.0)
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    bundles = [given.dense] if given.sparse is None else [given.dense, given.sparse]
    with temporary_folder() as work:
        samples = _samples(given, bundles, work)
    alone = {
        name: [bare(folder, clients, given.seconds) for clients in CLIENTS]
        for name, folder in zip(MODELS, bundles, strict=False)
    }
    print(f"| model | clients | batching | protocol | {' | '.join(_COLUMNS)} | errors |")
    print(f"|{'---|' * (5 + len(_COLUMNS))}")
    for batching, clients, protocol, model in itertools.product((True, False), CLIENTS, PROTOCOLS, alone):
        key = (model, clients, batching, protocol)
        chosen = [
            s
            for s in samples
            if (s["model"], s["clients"], s["batching"], s["protocol"]) == key and s["round"]
        ]
        cells = " | ".join(f"{_median([float(s[column]) for s in chosen]):.3g}" for column in _COLUMNS)
        errors = sum(int(s["errors"]) for s in chosen)
        print(f"| {model} | {clients} | {'on' if batching else 'off'} | {protocol} | {cells} | {errors} |")
    for name, rows in alone.items():
        print(f"bare, {name}: {json.dumps(rows)}")
    if given.json:
        document = {
            "seconds": given.seconds,
            "rounds": given.rounds,
            "created": now(),
            "machine": machine_facts(),
            "versions": library_versions(),
            "bare": alone,
            "samples": samples,
        }
        write_json(given.json, document)


_COLUMNS = (
    *("p50_ms", "p99_ms", "mean_ms", "client_and_protocol_ms", *(f"{part}_ms" for part in PARTS)),
    *("requests_an_execution", "requests_per_s", "server_cpu_ms_per_request"),
)


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


if __name__ == "__main__":
    main()
