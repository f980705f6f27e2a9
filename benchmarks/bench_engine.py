"""Time and bytes of an engine for TensorRT for RTX, against a build by the bare library. Needs no GPU.

    python -m benchmarks.bench_engine [--rounds N] [--network NAME]... [--json FILE]

Networks with random weights, 2:4 wherever the reduction axis allows it, as fp16, batch 1 to 32. In each round
one engine is built from the graph by `build_engine`, one by a script of nothing but the library's calls in a
process of its own, with the same options, in alternating order. The packed file must give the same engine to
the byte. The bare script's must be ours but for the numbers in the library's own names of inner values
(`__mye2382`): it draws them in an order that hangs on what lies where in memory, and another process has
other things there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
import torch

from sparse_export import models
from sparse_export.engines.build import build_engine, engine_from_file
from sparse_export.engines.options import EngineOptions
from sparse_export.graph.example import example_of_shape
from sparse_export.graph.export import onnx_from_module
from sparse_export.graph.passes.float16 import in_half
from sparse_export.graph.passes.pack24 import pack
from sparse_export.instruments.machine import machine_facts
from sparse_export.signature import class_signature
from sparse_export.sparsity.pattern import NMPattern, fits, largest_per_group
from sparse_export.version import library_versions, now

SHAPES = {
    "digits-cnn": (1, 8, 8),
    "lenet5": (1, 28, 28),
    "resnet18": (3, 224, 224),
    "resnet50": (3, 224, 224),
}
OPTIONS = EngineOptions(target="tensorrt-rtx")
_GIVEN_NAME = re.compile(rb"__mye\d+")
FIXED = ("setarch", "-R") if shutil.which("setarch") else ()
BARE = """
import tensorrt_rtx as trt
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
assert trt.OnnxParser(network, logger).parse_from_file("model.onnx")
config = builder.create_builder_config()
config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
profile = builder.create_optimization_profile()
tensor = network.get_input(0)
sizes = [trt.Dims([n, *list(tensor.shape)[1:]]) for n in (1, 8, 32)]
profile.set_shape(tensor.name, *sizes)
config.add_optimization_profile(profile)
open("bare.engine", "wb").write(builder.build_serialized_network(network, config))
"""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a network gave. Times are of every round, in order: wall seconds, and CPU seconds of all
    processes.

    Ours holds everything from the graph in memory to the engine flushed to its place; bare starts from the
    file.  packed_is_the_same: to the byte.  bare_is_the_same: but for the numbers in names that the library
    gave.
    """

    network: str
    dense_bytes: int
    packed_bytes: int
    engine_bytes: int
    sha256: str
    packed_is_the_same: bool
    bare_is_the_same: bool
    ours_s: list[float]
    bare_s: list[float]
    ours_cpu_s: list[float]
    bare_cpu_s: list[float]

    def ratio(self, ours: list[float], bare: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(ours, bare, strict=True))


def two_four_graph(name: str) -> onnx.ModelProto:
    """The network as a float16 graph."""
    pattern = NMPattern(n=2, m=4)
    torch.manual_seed(0)
    module = models.create(name).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1 and fits(tuple(parameter.shape), 1, pattern):
                parameter.mul_(largest_per_group(parameter.detach(), 1, pattern))
    return in_half(onnx_from_module(module, example_of_shape(SHAPES[name]), masks={}), "fp16")


def measure(name: str, rounds: int) -> Found:
    """Build a network `rounds` times both ways."""
    model = two_four_graph(name)
    n_classes = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    signature = class_signature(SHAPES[name], n_classes)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "model.onnx").write_bytes(model.SerializeToString())
        (work / "packed.onnx").write_bytes(pack(model).SerializeToString())
        ways: dict[str, Callable[[], object]] = {
            "ours": lambda: build_engine(model, work / "ours.engine", OPTIONS, signature),
            "bare": lambda: subprocess.run([*FIXED, sys.executable, "-c", BARE], cwd=work, check=True),
        }
        for way in ways.values():
            way()
        times: dict[str, list[tuple[float, float]]] = {key: [] for key in ways}
        for index in range(rounds):
            for key in sorted(ways, reverse=bool(index % 2)):
                times[key].append(_timed(ways[key]))
        engine_from_file(work / "packed.onnx", work / "packed.engine", OPTIONS, signature)
        digests = {key: _sha256(work / f"{key}.engine") for key in ("ours", "packed")}
        return Found(
            network=name,
            dense_bytes=(work / "model.onnx").stat().st_size,
            packed_bytes=(work / "packed.onnx").stat().st_size,
            engine_bytes=(work / "ours.engine").stat().st_size,
            sha256=digests["ours"],
            packed_is_the_same=digests["packed"] == digests["ours"],
            bare_is_the_same=renumbered(work / "bare.engine") == renumbered(work / "ours.engine"),
            ours_s=[wall for wall, _ in times["ours"]],
            bare_s=[wall for wall, _ in times["bare"]],
            ours_cpu_s=[cpu for _, cpu in times["ours"]],
            bare_cpu_s=[cpu for _, cpu in times["bare"]],
        )


def _timed(call: Callable[[], object]) -> tuple[float, float]:
    before, start = os.times(), time.perf_counter()
    call()
    wall, after = time.perf_counter() - start, os.times()
    return wall, sum(after[:4]) - sum(before[:4])


def renumbered(engine: Path) -> bytes:
    """The engine's bytes with the numbers in the library's own names drawn anew, in the order in which they
    appear.
    """
    new: dict[bytes, bytes] = {}
    return _GIVEN_NAME.sub(
        lambda found: new.setdefault(found[0], b"__mye#%d" % len(new)), engine.read_bytes()
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--network", action="append", choices=list(SHAPES))
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    found = []
    for name in words.network or SHAPES:
        one = measure(name, words.rounds)
        found.append(one)
        print(
            f"{name}: {one.engine_bytes:,} bytes, same from packed: {one.packed_is_the_same}, same from the "
            "bare library: "
            f"{one.bare_is_the_same}; {statistics.median(one.ours_s):.2f} s, bare "
            f"{statistics.median(one.bare_s):.2f} s, "
            f"ratio {one.ratio(one.ours_s, one.bare_s):.2f} (CPU time "
            f"{one.ratio(one.ours_cpu_s, one.bare_cpu_s):.2f})",
            flush=True,
        )
    if words.json is not None:
        document = {
            "created": now(),
            "machine": machine_facts(),
            "versions": library_versions(),
            "rounds": words.rounds,
            "networks": [asdict(one) for one in found],
        }
        words.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
