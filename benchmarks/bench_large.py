"""What `sparsify` takes for whole networks of full-size pictures: CPU time and peak memory of the command.

    python -m benchmarks.bench_large --photographs FOLDER [--network NAME]... [--json FILE]

FOLDER holds pictures as `imagefolder:` takes them. Weights are random; 128 pictures of 224 x 224 calibrate. Each
network is a command of its own, whose times and largest memory the system tells, those of its children in them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sparse_export.files import write_json
from sparse_export.instruments.machine import machine_facts
from sparse_export.version import library_versions, now

NETWORKS = ("resnet50", "vit-b-16")
N_SAMPLES = 128


def measured(network: str, photographs: Path, out: Path) -> dict[str, Any]:
    """One network by reconstruction.

    Args:
        network: a name that `sparsify` knows.
        photographs: of `imagefolder:`.
        out: for the run; not there yet.

    Returns:
        Seconds of the CPU and by the clock, peak memory in GiB, and the error of each layer by its name.
    """
    words = ["sparsify", network, "--weights", "random", "--method", "reconstruction", "--out", str(out)]
    words += ["--calibration-samples", str(N_SAMPLES), "--data", f"imagefolder:{photographs}", "--json"]
    wall_s = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "sparse_export", *words], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        text = child.stdout.read()
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"sparsify {network} ended with {child.returncode}: {text[-500:]}")
    layers = json.loads(text)["layers"]
    return {
        "cpu_s": used.ru_utime + used.ru_stime,
        "wall_s": time.perf_counter() - wall_s,
        "peak_gib": used.ru_maxrss / 2**20,
        "n_pruned": sum(layer["pattern"] is not None for layer in layers),
        "n_layers": len(layers),
        "errors": {layer["name"]: layer["error"] for layer in layers if layer["pattern"] is not None},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What sparsify takes for networks of full-size pictures.")
    parser.add_argument("--photographs", type=Path, required=True, help="folder of pictures by class")
    parser.add_argument("--network", action="append", choices=NETWORKS, help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results and the machine's facts")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for network in options.network or NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            results[network] = measured(network, options.photographs, Path(folder) / "run")
        short = {key: value for key, value in results[network].items() if key != "errors"}
        print(json.dumps({network: short}), flush=True)
        if options.json:
            facts = {"created": now(), "versions": library_versions(), "machine": machine_facts()}
            write_json(options.json, facts | {"networks": results})


if __name__ == "__main__":
    main()
