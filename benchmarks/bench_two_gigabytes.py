"""A network of 2.2 GB of random weights through every command that makes or reads a bundle.

    python -m benchmarks.bench_two_gigabytes FOLDER [--only STEP]... [--json FILE]

Each command is a process of its own: seconds of the CPU, its own children's among them, and the most memory that it
or one of its children had at once, libraries and what it mapped of files included. FOLDER gets some 20 GB. The
result of each step is added to FILE as soon as it is there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparse_export.files import write_json
from sparse_export.instruments.machine import machine_facts
from sparse_export.version import library_versions, now

WIDTH = int(os.environ.get("TWO_GIGABYTES_WIDTH", "4096"))
DEPTH = 33
FACTORY = "benchmarks.bench_two_gigabytes:network"


class Block(nn.Module):
    """Adds a layer of what came in, normalized. Of four of its weights two are a hundredth of the others."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(width), nn.Linear(width, width)
        with torch.no_grad():
            self.layer.weight.view(-1, 4)[:, ::2] *= 0.01

    def forward(self, values: Tensor) -> Tensor:
        added: Tensor = self.layer(torch.relu(self.norm(values)))
        return values + added


def network() -> nn.Module:
    """The network, with the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(WIDTH) for _ in range(DEPTH)), nn.Linear(WIDTH, 10)).eval()


def weights_bytes() -> int:
    """Of the network."""
    return 4 * (DEPTH * (WIDTH * WIDTH + 3 * WIDTH) + 10 * (WIDTH + 1))


def sparse_run(folder: Path) -> None:
    """Write the run of the network made 2:4, which the factory makes again."""
    from sparse_export.formats.run import LayerInfo, ModelInfo
    from sparse_export.signature import class_signature
    from sparse_export.sparsity.pattern import NMPattern, largest_per_group
    from sparse_export.train.record import n_entries, new_run_info
    from sparse_export.train.run_folder import finish_run

    made, masks, layers = network(), {}, []
    for name, weight in made.named_parameters():
        if weight.dim() < 2:
            continue
        masked = weight.shape[0] > 10
        if masked:
            masks[name] = largest_per_group(weight.detach(), 1, NMPattern(n=2, m=4))
            with torch.no_grad():
                weight.mul_(masks[name]).add_(0.0)
        n_active = int(masks[name].sum()) if masked else weight.numel()
        shape, pattern = tuple(weight.shape), "2:4" if masked else None
        layers.append(
            LayerInfo(
                name=name,
                shape=shape,
                n_weights=weight.numel(),
                n_active=n_active,
                masked=masked,
                pattern=pattern,
            )
        )
    info = new_run_info(
        n_parameters=n_entries(made),
        method="magnitude",
        model=ModelInfo(name=FACTORY),
        signature=class_signature((WIDTH,), 10),
        data=None,
        layers=tuple(layers),
        seed=0,
        n_threads=1,
        device="cpu",
    )
    folder.mkdir()
    finish_run(folder, made, masks, info)


def steps(folder: Path) -> dict[str, list[str]]:
    """The words of each command, by a name; later ones read what earlier ones wrote."""
    dense, sparse, inputs = str(folder / "dense"), str(folder / "sparse"), str(folder / "inputs.npz")
    run = str(folder / "runs" / f"{FACTORY.replace(':', '-')}-dense" / "model.onnx")
    timed = ["--batch", "1", "--rounds", "8", "--budget", "20"]
    return {
        "build of a factory": [
            *("build", FACTORY, "--input-shape", str(WIDTH), "--inputs", inputs, "--out", dense)
        ],
        "build of an ONNX file": ["build", run, "--out", str(folder / "of-file")],
        "build of a run, 2:4": ["build", str(folder / "sparse-run"), "--out", sparse],
        "build of a run, packed": [
            *("build", str(folder / "sparse-run"), "--onnx", "packed", "--out", str(folder / "packed"))
        ],
        "inspect": ["inspect", sparse],
        "validate": ["validate", sparse, "--against", dense, "--inputs", inputs],
        "compare": ["compare", dense, sparse, "--inputs", inputs, "--out", str(folder / "compared"), *timed],
        "gate": ["gate", sparse, "--against", dense, "--inputs", inputs, "--max-drop", "5%"],
        "package": ["package", sparse, "--out", str(folder / "package")],
    }


def measured(words: Sequence[str], folder: Path) -> dict[str, Any]:
    """One command.

    Args:
        words: of the command line.
        folder: that it runs in.
    """
    places = os.pathsep.join((str(Path.cwd()), str(folder)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    began = time.perf_counter()
    with (folder / "log").open("w+") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "sparse_export", *words],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
        )
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        text = log.read()
    if child.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {child.returncode}: {text[-3000:]}")
    peak = used.ru_maxrss * 1024
    return {
        "cpu_s": used.ru_utime + used.ru_stime,
        "wall_s": time.perf_counter() - began,
        "peak_bytes": peak,
        "peak_over_weights": peak / weights_bytes(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="A network of 2.2 GB through every command.")
    parser.add_argument("folder", type=Path, help="an empty or new folder")
    parser.add_argument("--only", action="append", metavar="STEP", help="may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results and the machine's facts")
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "sparse-run").exists():
        drawn = np.random.default_rng(0).standard_normal((64, WIDTH)).astype(np.float32)
        np.savez(folder / "inputs.npz", input=drawn)
        code = f"from pathlib import Path\nfrom {FACTORY.partition(':')[0]} import sparse_run\n"
        code += f"sparse_run(Path({str(folder)!r}) / 'sparse-run')"
        subprocess.run([sys.executable, "-c", code], check=True)
    known = options.json and options.json.is_file()
    results: dict[str, Any] = json.loads(options.json.read_text())["steps"] if known else {}
    for name, words in steps(folder).items():
        if options.only and name not in options.only:
            continue
        results[name] = measured(words, folder)
        print(name, json.dumps({key: round(one, 2) for key, one in results[name].items()}), flush=True)
        if options.json:
            document: dict[str, Any] = {"created": now(), "versions": library_versions()}
            document |= {"machine": machine_facts(), "weights_bytes": weights_bytes(), "steps": results}
            dense = (one for one in (folder / "dense").iterdir() if one.is_file())
            write_json(options.json, document | {"bundle": {one.name: one.stat().st_size for one in dense}})


if __name__ == "__main__":
    main()
