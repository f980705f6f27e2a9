"""How the time of pruning a graph grows with its depth and with the samples, and what the walk itself takes.

    python -m benchmarks.bench_walk [--rounds N] [--walk-only] [--json FILE]

Networks are chains of equal residual blocks with random weights: of two convolutions, or of two matrix
products over tokens. Times are of the CPU, on one thread, the median over rounds. An exponent is the slope of
a line through the logarithms: 1 where twice as much takes twice as long. The walk without linear algebra runs
every segment and keeps what later ones read; it is held against one session's calls of the whole graph on the
same batches, without the making of that session. Both are warmed up by a round that is not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sparse_export.graph.model import prepared, signature_of
from sparse_export.instruments.machine import machine_facts
from sparse_export.oneshot.graph_pruning import sparsify_graph
from sparse_export.oneshot.graph_weights import weights_of_graph
from sparse_export.oneshot.segments import Stop, plan_segments
from sparse_export.oneshot.walk import Walk
from sparse_export.oneshot.wiring import wiring_of
from sparse_export.onnxruntime_import import load_onnxruntime
from sparse_export.signature import Feeds
from sparse_export.sparsity.pattern import NMPattern
from sparse_export.version import library_versions, now

DEPTHS = (6, 12, 24, 48)
SAMPLES = (32, 64, 128, 256)
DEPTH, N_SAMPLES = 12, 32  # while the other one grows
BATCH = 16
WIDTHS = {"conv": 32, "tokens": 128}
SIZES = {"conv": (32, 16, 16), "tokens": (64, 128)}
TWO_FOUR = NMPattern(n=2, m=4)
METHODS = ("activation", "reconstruction")


def chain(kind: str, depth: int, seed: int = 0) -> onnx.ModelProto:
    """A network of `depth` residual blocks with two layers each, and a mean at the end."""
    drawn = np.random.default_rng(seed)
    width = WIDTHS[kind]
    shape = (width, width, 3, 3) if kind == "conv" else (width, width)
    n_summed = math.prod(shape[1:])
    nodes, stored = [], []

    def layer(value: str, name: str) -> str:
        weight = (drawn.standard_normal(shape) / math.sqrt(n_summed)).astype(np.float32)
        stored.append(numpy_helper.from_array(weight, name))
        if kind == "conv":
            nodes.append(helper.make_node("Conv", [value, name], [f"{name}.out"], pads=[1, 1, 1, 1]))
        else:
            nodes.append(helper.make_node("MatMul", [value, name], [f"{name}.out"]))
        return f"{name}.out"

    value = "x"
    for block in range(depth):
        inner = layer(value, f"{block}.first")
        nodes.append(helper.make_node("Relu", [inner], [f"{inner}.relu"]))
        inner = layer(f"{inner}.relu", f"{block}.second")
        nodes.append(helper.make_node("Add", [value, inner], [f"{block}.sum"]))
        value = f"{block}.sum"
    nodes.append(helper.make_node("Flatten", [value], ["y"]))
    sizes = SIZES[kind]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *sizes])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", math.prod(sizes)])],
        stored,
    )
    return prepared(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def inputs(kind: str, n_samples: int) -> list[Feeds]:
    drawn = np.random.default_rng(1)
    sizes = (BATCH, *SIZES[kind])
    return [{"x": drawn.standard_normal(sizes).astype(np.float32)} for _ in range(n_samples // BATCH)]


def cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def pruning(kind: str, depth: int, n_samples: int, method: Any, rounds: int) -> list[float]:
    model, batches = chain(kind, depth), inputs(kind, n_samples)
    signature = signature_of(model)

    def work() -> None:
        sparsify_graph(
            model, signature=signature, batches=batches, pattern=TWO_FOUR, method=method, n_threads=1
        )

    return [cpu_seconds(work) for _ in range(rounds)]


def walking(kind: str, rounds: int) -> dict[str, list[float]]:
    """Times of the walk without linear algebra and of plain calls, in turns."""
    model, batches = chain(kind, DEPTH), inputs(kind, SAMPLES[-1])
    wiring = wiring_of(model)
    weights = weights_of_graph(model, wiring, TWO_FOUR).pruned
    stops = [
        Stop(
            nodes=frozenset(use.node for use in weight.uses),
            values=tuple(use.factor.value for use in weight.uses),
        )
        for weight in weights
    ]
    segments = plan_segments(wiring, stops, to_outputs=True)
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def walk() -> None:
        with Walk(model, wiring, segments, batches, memory_bytes=2**30, n_threads=1) as it:
            for _ in segments:
                it.run(None)

    def plain() -> None:
        for feeds in batches:
            session.run(None, feeds)

    plain()
    walk()
    times: dict[str, list[float]] = {"walk": [], "plain": []}
    for _ in range(rounds):
        times["walk"].append(cpu_seconds(walk))
        times["plain"].append(cpu_seconds(plain))
    return times | {"n_segments": [float(len(segments))]}


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """The slope of log(time) over log(size), by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def measured(rounds: int, *, walk_only: bool = False) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for kind in WIDTHS:
        times = walking(kind, rounds)
        ratio = statistics.median(a / b for a, b in zip(times["walk"], times["plain"], strict=True))
        results.append({"what": "walk over plain calls", "kind": kind, "cpu_s": times, "ratio": ratio})
        print(f"{kind:<8} walk over plain calls: {ratio:.2f}", flush=True)
        for method in () if walk_only else METHODS:
            for what, sizes in (("depth", DEPTHS), ("samples", SAMPLES)):
                found = {
                    size: pruning(
                        kind,
                        size if what == "depth" else DEPTH,
                        size if what == "samples" else N_SAMPLES,
                        method,
                        rounds,
                    )
                    for size in sizes
                }
                medians = [statistics.median(one) for one in found.values()]
                slope = exponent(sizes, medians)
                results.append(
                    {"what": what, "kind": kind, "method": method, "cpu_s": found, "exponent": slope}
                )
                shown = ", ".join(f"{size}: {one:.2f} s" for size, one in zip(sizes, medians, strict=True))
                print(f"{kind:<8} {method:<15} {what:<8} exponent {slope:.2f}  ({shown})", flush=True)
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="How the time of pruning grows with depth and samples.")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of each measurement (default: 3)")
    parser.add_argument(
        "--walk-only", action="store_true", help="measure the walk over plain calls, and no growth"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times and the machine's facts")
    options = parser.parse_args(arguments)
    document = {
        "results": measured(options.rounds, walk_only=options.walk_only),
        "chain": {"depth": DEPTH, "n_samples": N_SAMPLES, "batch": BATCH, "sizes": SIZES},
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
