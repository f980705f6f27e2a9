"""How the time of each stage grows: from training and sweeping to comparing and packaging.

    python -m benchmarks.bench_growth [--only NAME]... [--rounds N] [--json FILE]

Each stage is run at several sizes of one thing, the others held. Times are of the CPU, on one thread, those of
other processes that a stage starts included; of each size the median over rounds, which take the sizes in
turns. An exponent is the slope of a line through the logarithms: 1 where twice as much takes twice as long.
What a stage costs whatever the size makes it smaller, so sizes go as far as a minute allows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from benchmarks.bench_permutation import PATTERN, gauss
from benchmarks.bench_walk import exponent
from benchmarks.dense_runs import dense_run
from sparse_export import SparseTraining
from sparse_export.building import build
from sparse_export.evaluate.compare import compare
from sparse_export.formats.run import save_run_info
from sparse_export.graph.example import example_of_shape
from sparse_export.graph.export import onnx_from_module
from sparse_export.graph.passes.compact import compact
from sparse_export.inspect import inspect
from sparse_export.instruments.machine import machine_facts
from sparse_export.serving.package import package
from sparse_export.sparsity.permute import find_permutation
from sparse_export.sweep.sweep import page_of_runs, sweep
from sparse_export.version import library_versions, now

MOST = 1.15  # the exponent that is wanted
STEPS, BATCH, UPDATE_EVERY = 20, 32, 10
Work = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A stage, and what grows.

    Attributes:
        name: of stage and size.
        sizes: in rising order.
        work: makes ready what is timed, for a size and a folder of its own.
        counts: what the exponent is over, for a size; the size itself by default.
    """

    name: str
    sizes: tuple[int, ...]
    work: Callable[[int, Path], Work]
    counts: Callable[[int], float] = float


def mlp(width: int, depth: int) -> nn.Module:
    """Square layers with activations between, and ten outputs."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def training(width: int, depth: int) -> Work:
    """Steps of sparse training, two mask updates among them."""
    inputs, labels = torch.randn(BATCH, width), torch.randint(10, (BATCH,))

    def work() -> None:
        network = mlp(width, depth)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        trainer = SparseTraining(
            network, optimizer, density=0.2, total_steps=STEPS, update_every=UPDATE_EVERY
        )
        for _ in range(STEPS):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(inputs), labels).backward()
            trainer.step()

    return work


def building(width: int, depth: int, folder: Path) -> Work:
    run = dense_run(mlp(width, depth).eval(), (width,), folder / "run")
    return lambda: build(run, folder / "bundle")


def chain(width: int, depth: int, path: Path) -> Path:
    """An ONNX file of matrix products one after the other."""
    drawn = np.random.default_rng(0)
    names = ["x", *(f"v{i}" for i in range(depth))]
    weights = [drawn.standard_normal((width, width)).astype(np.float32) for _ in range(depth)]
    graph = helper.make_graph(
        [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(depth)],
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", width])],
        [helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, ["n", width])],
        [numpy_helper.from_array(one, f"w{i}") for i, one in enumerate(weights)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def inspecting(width: int, depth: int, folder: Path) -> Work:
    path = chain(width, depth, folder / "chain.onnx")
    return lambda: inspect(path)


def compacting(depth: int) -> Work:
    """Of a network whose layers have lost a quarter of their channels."""
    network = mlp(64, depth).eval()
    with torch.no_grad():
        layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
        for layer in layers[:-1]:
            layer.weight[::4] = 0
            layer.bias[::4] = 0
    model = onnx_from_module(network, example_of_shape((64,)), masks={})
    return lambda: compact(model)


def permuting(size: int) -> Work:
    matrix = torch.from_numpy(gauss(size)).float()
    return lambda: find_permutation(matrix, PATTERN)


def packaging(width: int, folder: Path) -> Work:
    bundle = build(dense_run(mlp(width, 4).eval(), (width,), folder / "run"), folder / "bundle")
    return lambda: package([bundle.path], [None], folder / "package")


def comparing(width: int, n_samples: int, folder: Path) -> Work:
    """Outputs on samples held against each other, and the least that a comparison times: 8 short rounds."""
    run = dense_run(mlp(width, 4).eval(), (width,), folder / "run")
    dense, sparse = (build(run, folder / name) for name in ("dense", "sparse"))
    drawn = np.random.default_rng(0).standard_normal((n_samples, width)).astype(np.float32)
    np.savez(folder / "inputs.npz", input=drawn)
    timed: dict[str, Any] = {"batches": (1,), "rounds": 8, "block_s": 1e-4, "warmup_limit_s": 0.0}
    return lambda: compare(
        dense.path, sparse.path, inputs=folder / "inputs.npz", budget_s=60.0, n_threads=1, **timed
    )


def sweeping(n_cells: int, folder: Path) -> Work:
    """Cells of one epoch on the digits, each in a process of its own, into a new folder each time."""
    grid = folder / "grid.toml"
    seeds = list(range(n_cells))
    grid.write_text(
        f'recipe = "digits"\nmethods = ["set"]\ndensities = [0.1]\nseeds = {seeds}\nchanges = {{ epochs = 1 }}\n'
    )
    outs = (folder / f"out-{number}" for number in itertools.count())
    return lambda: sweep(grid, next(outs), n_jobs=1, device="cpu")


def collecting(n_runs: int, folder: Path) -> Work:
    """The table and the page of runs that are there: of one network, in as many seeds."""
    first = dense_run(mlp(64, 2).eval(), (64,), folder / "runs" / "0")
    for seed in range(1, n_runs):
        copied = folder / "runs" / str(seed)
        shutil.copytree(first.path, copied)
        save_run_info(copied, replace(first.info, seed=seed))
    runs = [folder / "runs" / str(seed) for seed in range(n_runs)]
    return lambda: page_of_runs(runs, folder / "out")


def _n_weights(depth: int) -> Callable[[int], float]:
    return lambda width: float(depth * width * width)


CASES = (
    Case(
        name="train, weights",
        sizes=(512, 768, 1024, 1536),
        work=lambda size, _: training(size, 4),
        counts=_n_weights(4),
    ),
    Case(name="train, layers", sizes=(8, 16, 32, 64), work=lambda size, _: training(256, size)),
    Case(name="build, depth", sizes=(8, 16, 32, 64), work=lambda size, folder: building(64, size, folder)),
    Case(
        name="build, weights",
        sizes=(512, 1024, 2048),
        work=lambda size, folder: building(size, 4, folder),
        counts=_n_weights(4),
    ),
    Case(
        name="inspect, weights",
        sizes=(512, 1024, 2048),
        work=lambda size, folder: inspecting(size, 8, folder),
        counts=_n_weights(8),
    ),
    Case(
        name="inspect, layers",
        sizes=(250, 500, 1000, 2000),
        work=lambda size, folder: inspecting(16, size, folder),
    ),
    Case(name="compact, depth", sizes=(8, 16, 32, 64), work=lambda size, _: compacting(size)),
    Case(name="permute, width", sizes=(256, 512, 1024), work=lambda size, _: permuting(size)),
    Case(
        name="compare, weights",
        sizes=(512, 1024, 2048),
        work=lambda size, folder: comparing(size, 64, folder),
        counts=_n_weights(4),
    ),
    Case(
        name="compare, samples",
        sizes=(512, 1024, 2048, 4096),  # of which it takes 4,096 at most
        work=lambda size, folder: comparing(1024, size, folder),
    ),
    Case(name="sweep, cells", sizes=(1, 2, 4), work=lambda size, folder: sweeping(size, folder)),
    Case(
        name="sweep --from, runs",
        sizes=(16, 32, 64, 128),
        work=lambda size, folder: collecting(size, folder),
    ),
    Case(
        name="package, weights",
        sizes=(512, 1024, 2048),
        work=lambda size, folder: packaging(size, folder),
        counts=_n_weights(4),
    ),
)


def cpu_seconds(work: Work) -> float:
    """Seconds of a core, those of other processes that ended meanwhile included."""

    def taken() -> float:
        times = os.times()
        return time.process_time() + times.children_user + times.children_system

    began = taken()
    work()
    return taken() - began


def measured(case: Case, rounds: int) -> dict[str, Any]:
    """Times of a case at each size, and the exponent."""
    with tempfile.TemporaryDirectory() as folder:
        works = {}
        for size in case.sizes:
            own = Path(folder) / str(size)
            own.mkdir()
            works[size] = case.work(size, own)
        works[case.sizes[0]]()  # loads the libraries
        times: dict[int, list[float]] = {size: [] for size in case.sizes}
        for _ in range(rounds):
            for size, work in works.items():
                times[size].append(cpu_seconds(work))
    medians = [statistics.median(one) for one in times.values()]
    slope = exponent([case.counts(size) for size in case.sizes], medians)
    shown = ", ".join(f"{size}: {one:.3f} s" for size, one in zip(case.sizes, medians, strict=True))
    print(f"{case.name:<18} exponent {slope:.2f}{'' if slope <= MOST else ' (!)'}  ({shown})", flush=True)
    last = math.log(medians[-1] / medians[-2]) / math.log(
        case.counts(case.sizes[-1]) / case.counts(case.sizes[-2])
    )
    return {"what": case.name, "cpu_s": times, "exponent": slope, "exponent_of_the_last_two": last}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="How the time of each stage grows.")
    parser.add_argument("--only", action="append", metavar="NAME", help="a case; may be repeated")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of each size (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times and the machine's facts")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases = [case for case in CASES if not options.only or any(name in case.name for name in options.only)]
    document = {
        "results": [measured(case, options.rounds) for case in cases],
        "rounds": options.rounds,
        "created": now(),
        "machine": machine_facts(),
        "versions": library_versions(),
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")
        print(options.json)


if __name__ == "__main__":
    main()
