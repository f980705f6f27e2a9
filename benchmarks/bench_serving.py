"""Latency of two served bundles against the number of clients, with and without dynamic batching.

    python -m benchmarks.bench_serving DENSE SPARSE [--seconds N] [--rounds N] [--long N] [--json FILE]

Starts `sparse-export serve` on both bundles, once with and once without batching, and loads one model after
the other, in alternating order, from a client process of its own. A client sends one sample, waits, and sends
the next. With `--long N`, 32 clients then load the dense model for N seconds. CPU is that of the server and
the models' processes. Needs the server (`sparse-export serve --install-server`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparse_export.errors import ServerFailed
from sparse_export.files import temporary_folder, write_json
from sparse_export.instruments.machine import machine_facts
from sparse_export.serving.golden_files import write_golden_files
from sparse_export.serving.repository import open_served
from sparse_export.version import library_versions, now

CLIENTS = (1, 8, 32)
MODELS = ("dense", "sparse")
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


def _sample(
    document: dict[str, Any], golden: Path, model: str, clients: int, seconds: float
) -> dict[str, Any]:
    before = _cpu_seconds(document["server_pid"])
    words = ["--model", model, "--golden", str(golden), "--url", f"127.0.0.1:{document['ports']['grpc']}"]
    words += ["--clients", str(clients), "--seconds", str(seconds)]
    done = subprocess.run([sys.executable, str(LOAD), *words], check=False, capture_output=True, text=True)
    told: dict[str, Any] = json.loads(done.stdout)
    spent = _cpu_seconds(document["server_pid"]) - before
    return {
        **told,
        "model": model,
        "server_cpu_ms_per_request": round(1e3 * spent / max(told["requests"], 1), 4),
    }


def _samples(given: argparse.Namespace, bundles: tuple[Path, Path], work: Path) -> list[dict[str, Any]]:
    """Every sample, of both bundles; `work` gets their golden pairs."""
    golden = {folder: work / str(at) for at, folder in enumerate(bundles)}
    for folder, written in golden.items():
        write_golden_files(written, open_served(folder))
    samples: list[dict[str, Any]] = []
    names = [word for name in MODELS for word in ("--name", name)]
    for batching, words in ((True, names), (False, [*names, "--no-batching"])):
        with serving(bundles, words) as document:
            for clients in CLIENTS:
                for number in range(given.rounds + 1):  # the first warms up
                    for model, folder in sorted(zip(MODELS, bundles, strict=True), reverse=bool(number % 2)):
                        seconds = given.seconds if number else 1.0
                        sample = _sample(document, golden[folder], model, clients, seconds)
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
    options.add_argument("sparse", type=Path)
    options.add_argument("--seconds", type=float, default=5.0)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--long", type=float, default=0.0)
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    bundles = (given.dense, given.sparse)
    with temporary_folder() as work:
        samples = _samples(given, bundles, work)
    print("| model | clients | batching | p50 ms | p99 ms | requests/s | server CPU ms/request | errors |")
    print("|---|---|---|---|---|---|---|---|")
    for batching in (True, False):
        for clients in CLIENTS:
            for model in MODELS:
                chosen = [
                    s
                    for s in samples
                    if (s["model"], s["clients"], s["batching"]) == (model, clients, batching) and s["round"]
                ]
                row = [_median([float(s[key]) for s in chosen]) for key in _COLUMNS]
                cells = " | ".join(f"{value:.3g}" for value in row)
                errors = sum(int(s["errors"]) for s in chosen)
                print(f"| {model} | {clients} | {'on' if batching else 'off'} | {cells} | {errors} |")
    if given.json:
        document = {
            "command": ["python", "-m", "benchmarks.bench_serving", *sys.argv[1:]],
            "created": now(),
            "machine": machine_facts(),
            "versions": library_versions(),
            "samples": samples,
        }
        write_json(given.json, document)


_COLUMNS = ("p50_ms", "p99_ms", "requests_per_s", "server_cpu_ms_per_request")


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


if __name__ == "__main__":
    main()
