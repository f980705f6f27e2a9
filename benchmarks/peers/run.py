"""The same networks and samples through this program and through others, in one run.

    make bench-peers PEERS_ARGS="--data-dir DIR [--network NAME] [--tool NAME] [--json FILE]"

DIR holds `cifar10.npz`. Each program works in a process of its own, with one thread. CPU time is without
imports and without reading the network; peak memory is that of the process, imports included. Outputs are
compared by onnxruntime on samples that no program saw: the error is the norm of the difference over the norm of
the dense network's outputs. Layers are counted by `counting.py`, which shares no line with this program, and by
`sparse-export inspect`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from benchmarks.peers.counting import counted
from benchmarks.peers.networks import NETWORKS, Arrays, Peer, Samples, export
from benchmarks.peers.tools import SIMPLIFIES, TOOLS
from sparse_export.files import write_json
from sparse_export.inspect import inspect
from sparse_export.instruments.machine import machine_facts
from sparse_export.onnxruntime_import import load_onnxruntime
from sparse_export.version import now

__all__ = ["measured", "table"]

PACKAGES = ("torch", "onnx", "onnxruntime-gpu", "transformers", "nvidia-modelopt", "polygraphy", "onnxsim")
LIMIT_S = 3600


def _prepared(peer: Peer, work: Path, data_dir: Path) -> Samples:
    """Write what every program is given."""
    torch.manual_seed(0)
    network, samples = peer.make(), peer.samples(data_dir)
    peer.ready(network, data_dir)
    network.eval()
    torch.save(network.state_dict(), work / "weights.pt")
    export(network, samples.calibration, work / "dense.onnx")
    np.savez(work / "calibration.npz", **samples.calibration)  # type: ignore[arg-type]
    write_json(work / "network.json", {"name": peer.name})
    return samples


def outputs(file: Path, arrays: Arrays) -> np.ndarray:
    """The outputs of a graph on all samples, by onnxruntime with one thread."""
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    n = len(next(iter(arrays.values())))
    parts = [
        session.run(None, {name: value[at : at + 64] for name, value in arrays.items()})[0]
        for at in range(0, n, 64)
    ]
    return np.concatenate(parts)


def _found(file: Path, dense: np.ndarray, samples: Samples) -> dict[str, Any]:
    """What a graph is worth."""
    y = outputs(file, samples.held_out)
    seen = inspect(file).graph
    found: dict[str, Any] = {
        "relative_error": float(np.linalg.norm(y - dense) / np.linalg.norm(dense)),
        "counted": asdict(counted(file)),
        "inspect_two_four": sum(bool(layer.pattern_holds) for layer in seen),
        "inspect_layers": len(seen),
        "n_nodes": len(onnx.load(file).graph.node),
    }
    if samples.labels is not None:
        found["score_percent"] = 100 * float((y.argmax(1) == samples.labels).mean())
    return found


def _cost(key: str, work: Path, peers_python: str) -> dict[str, Any]:
    """Run a program; what it cost, or the end of what it said where it failed."""
    python = sys.executable if TOOLS[key].is_ours else peers_python
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [python, "-m", "benchmarks.peers.tools", key, str(work)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=LIMIT_S,
    )
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    cost: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return cost


def measured(
    peer: Peer, tools: list[str], data_dir: Path, peers_python: str, save: Callable[[dict[str, Any]], None]
) -> None:
    """One network through the programs.

    Args:
        peer: the network.
        tools: keys of `TOOLS`.
        data_dir: with `cifar10.npz`.
        peers_python: of the environment that holds the other programs.
        save: called with what there is, after each program.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        samples = _prepared(peer, work, data_dir)
        dense = outputs(work / "dense.onnx", samples.held_out)
        results = {"dense": _found(work / "dense.onnx", dense, samples)}
        for key in tools:
            cost = _cost(key, work, peers_python)
            file = work / f"{key}.onnx"
            results[key] = cost | (_found(file, dense, samples) if file.is_file() else {})
            print(json.dumps({peer.name: {key: results[key]}}), flush=True)
            save({"what": peer.what, "results": results})


def table(networks: dict[str, Any]) -> str:
    """Both tables in Markdown: 2:4, then what leaves the weights as they are."""
    lines = [
        "| network | program | CPU s | peak MB | error | score % | 2:4, counted | 2:4, `inspect` |",
        "|---|---|---|---|---|---|---|---|",
    ]
    simple = ["| network | program | CPU s | peak MB | error | nodes |", "|---|---|---|---|---|---|"]
    for network, one in networks.items():
        for key, found in one["results"].items():
            name = TOOLS[key].name if key in TOOLS else key
            if "relative_error" not in found:
                lines.append(f"| {network} | {name} | failed: {' '.join(found['failed'])} | | | | | |")
                continue
            cost = [f"{found[part]:.1f}" if part in found else "" for part in ("cpu_s", "peak_mb")]
            error = f"{found['relative_error']:.3f}" if key in TOOLS else ""
            if key in SIMPLIFIES:
                error = f"{found['relative_error']:.1e}"
            if key not in SIMPLIFIES:
                score = f"{found['score_percent']:.1f}" if "score_percent" in found else ""
                count = found["counted"]
                by_count = f"{count['n_two_four']} of {count['n_layers']}"
                if count["n_flat"] > count["n_two_four"]:
                    by_count += f" ({count['n_flat']} along the kernel)"
                lines.append(
                    f"| {network} | {name} | {' | '.join(cost)} | {error} | {score} | {by_count} "
                    f"| {found['inspect_two_four']} |"
                )
            if key in SIMPLIFIES or key == "dense":
                simple.append(f"| {network} | {name} | {' | '.join(cost)} | {error} | {found['n_nodes']} |")
    return "\n".join([*lines, "", *simple])


def _versions(python: str) -> dict[str, str]:
    code = (
        "import json, importlib.metadata as m, sys; names = {d.name.lower().replace('_', '-'): d.version "
        "for d in m.distributions()}; print(json.dumps({n: names[n] for n in sys.argv[1:] if n in names}))"
    )
    done = subprocess.run([python, "-c", code, *PACKAGES], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data-dir", type=Path, required=True)
    options.add_argument("--network", action="append", choices=sorted(NETWORKS), help="default: all")
    options.add_argument("--tool", action="append", choices=sorted(TOOLS), help="default: all")
    options.add_argument("--peers-python", default=".venv-peers/bin/python", help="of their environment")
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    torch.set_num_threads(1)
    versions = {"ours": _versions(sys.executable), "peers": _versions(given.peers_python)}
    networks: dict[str, Any] = {}

    def save(name: str, found: dict[str, Any]) -> None:
        networks[name] = found
        if given.json:  # a run that is stopped leaves what it has
            document = {
                "created": now(),
                "command": ["python", "-m", "benchmarks.peers.run", *sys.argv[1:]],
                "machine": machine_facts(),
                "versions": versions,
                "networks": networks,
            }
            write_json(given.json, document)

    tools = given.tool or list(TOOLS)
    for name in given.network or NETWORKS:
        measured(NETWORKS[name], tools, given.data_dir, given.peers_python, partial(save, name))
    print(table(networks))


if __name__ == "__main__":
    main()
