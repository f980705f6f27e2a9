"""Size, expansion time and output of packed 2:4 models against dense ones.

    python -m benchmarks.bench_packed [--rounds N] [--threads N] [--json FILE]

torchvision's networks with random weights, every weight whose reduction axis 4 divides pruned to 2:4 by
magnitude, exported by torch.onnx: ResNet-18 in float32, ResNet-50 in float16. Each is packed, expanded and
run: dense, packed (onnxruntime unpacks) and expanded must give the same bits. In each round expansion and
both ways of loading the packed file are timed, in alternating order.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torchvision
from torch import nn

from sparse_export.graph.export import IR_VERSION, OPSET, positive_zeros
from sparse_export.graph.passes.expand24 import expand
from sparse_export.graph.passes.format24 import packed_weights
from sparse_export.graph.passes.pack24 import pack
from sparse_export.instruments.machine import machine_facts
from sparse_export.onnxruntime_import import load_onnxruntime
from sparse_export.sparsity.pattern import NMPattern, fits, largest_per_group
from sparse_export.version import library_versions, now

TWO_FOUR = NMPattern(n=2, m=4)
NETWORKS: dict[str, tuple[Callable[..., nn.Module], torch.dtype]] = {
    "resnet18 fp32": (torchvision.models.resnet18, torch.float32),
    "resnet50 fp16": (torchvision.models.resnet50, torch.float16),
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What packing a network gave. The times are seconds of every round, in order."""

    network: str
    n_packed: int
    n_weights: int
    dense_bytes: int
    packed_bytes: int
    same_initializers: bool
    same_output: bool
    pack_s: float
    expand_s: list[float]
    expand_cpu_s: list[float]
    load_dense_s: list[float]
    load_expanded_s: list[float]
    load_packed_s: list[float]

    @property
    def ratio(self) -> float:
        """Packed bytes by dense ones."""
        return self.packed_bytes / self.dense_bytes


def two_four_network(name: str, seed: int = 0) -> tuple[nn.Module, torch.dtype]:
    """The network with random weights, 2:4 wherever the reduction axis allows it."""
    make, dtype = NETWORKS[name]
    torch.manual_seed(seed)
    network = make(weights=None).eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and fits(tuple(module.weight.shape), 1, TWO_FOUR):
            module.weight.mul_(largest_per_group(module.weight, 1, TWO_FOUR))
    return network.to(dtype), dtype


def exported(network: nn.Module, dtype: torch.dtype) -> onnx.ModelProto:
    """As `build` exports, in any float type."""
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        program = torch.onnx.export(
            network,
            (torch.zeros(2, 3, 64, 64, dtype=dtype),),
            input_names=["input"],
            output_names=["logits"],
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    model.ir_version = IR_VERSION
    positive_zeros(model)
    return model


def measure(name: str, n_rounds: int, n_threads: int) -> Sizes:
    """Pack, expand and run one network. n_threads: of onnxruntime."""
    model = exported(*two_four_network(name))
    start = time.perf_counter()
    packed = pack(model)
    pack_s = time.perf_counter() - start
    onnx.checker.check_model(packed, full_check=True)
    dense_file, packed_file = model.SerializeToString(), packed.SerializeToString()
    expanded = expand(packed)

    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.log_severity_level = 4

    def session(content: bytes) -> Any:
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    x = (
        np.random.default_rng(0)
        .standard_normal((2, 3, 64, 64))
        .astype(np.float16 if NETWORKS[name][1] is torch.float16 else np.float32)
    )
    outputs = [
        session(content).run(None, {"input": x})[0]
        for content in (dense_file, packed_file, expanded.SerializeToString())
    ]
    cpu_s: list[float] = []

    def expansion() -> None:
        before = time.process_time()
        expand(packed)
        cpu_s.append(time.process_time() - before)

    def load_expanded() -> None:
        session(expand(onnx.load_model_from_string(packed_file)).SerializeToString())

    actions: dict[str, Callable[[], object]] = {
        "expand_s": expansion,
        "load_dense_s": lambda: session(dense_file),
        "load_expanded_s": load_expanded,
        "load_packed_s": lambda: session(packed_file),
    }
    samples: dict[str, list[float]] = {key: [] for key in actions}
    for n in range(n_rounds):
        for key in list(actions)[:: -1 if n % 2 else 1]:
            start = time.perf_counter()
            actions[key]()
            samples[key].append(time.perf_counter() - start)
    return Sizes(
        network=name,
        n_packed=len(packed_weights(packed)),
        n_weights=sum(len(tensor.dims) > 1 for tensor in model.graph.initializer),
        dense_bytes=len(dense_file),
        packed_bytes=len(packed_file),
        same_initializers=expanded.SerializeToString(deterministic=True)
        == model.SerializeToString(deterministic=True),
        same_output=all(found.tobytes() == outputs[0].tobytes() for found in outputs[1:]),
        pack_s=pack_s,
        expand_cpu_s=cpu_s,
        **samples,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Size and expansion time of packed 2:4 models.")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="at least 1 (default: 7)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of onnxruntime (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples and the machine's facts")
    options = parser.parse_args(arguments)
    for name, value in (("--rounds", options.rounds), ("--threads", options.threads)):
        if value < 1:
            parser.error(f"{name} is {value}; at least 1 was expected.")
    facts = {
        "date": now(),
        "machine": machine_facts(),
        "n_threads": options.threads,
        "versions": library_versions(),
    }
    torch.set_num_threads(options.threads)
    results = []
    for name in NETWORKS:
        found = measure(name, options.rounds, options.threads)
        results.append(asdict(found) | {"ratio": found.ratio})
        print(f"{name}: {found.n_packed} of {found.n_weights} weights packed")
        print(f"  bytes          {found.dense_bytes:,} -> {found.packed_bytes:,}, {found.ratio:.4f} of dense")
        print(
            f"  identical      initializers and graph {found.same_initializers}, output {found.same_output}"
        )
        for key in ("expand_s", "load_dense_s", "load_expanded_s", "load_packed_s"):
            values = getattr(found, key)
            print(f"  {key:<15}{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        print(f"  expand_cpu_s   {statistics.median(found.expand_cpu_s):.3f}; pack_s {found.pack_s:.3f}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"networks": results} | facts, indent=2) + "\n")
        print(options.json)


if __name__ == "__main__":
    main()
