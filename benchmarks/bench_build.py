"""What `build` of a torch network takes, over a bare export of it with one check.

    python -m benchmarks.bench_build [--compact] [--network NAME]... [--rounds N] [--json FILE]

With --compact it is what `build --compact` takes over a plain build, of a network a quarter of whose channels,
behind the first convolution, are read by zeros alone. Bare is `torch.onnx.export` with its defaults and a free batch, the file written, and one batch of it by
onnxruntime held against torch's. Networks have random weights and are in memory for both. Each is a process of
its own, one thread, the two in turns; times are of the CPU from when the libraries are loaded, memory is what the
process takes at its peak beyond the libraries and the network itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
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
WAYS = ("bare", "build", "compact")
BATCH = 8


def _peak_bytes() -> int:
    """Largest memory of this program; what getrusage gives is never less than that of who started it."""
    status = Path("/proc/self/status").read_text()
    return int(next(one for one in status.splitlines() if "VmHWM" in one).split()[1]) * 1024


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _bare(network: Any, shape: tuple[int, ...], folder: Path) -> None:
    import numpy as np
    import torch

    from sparse_export.onnxruntime_import import load_onnxruntime

    onnxruntime: Any = load_onnxruntime()

    samples = torch.randn(BATCH, *shape)
    torch.onnx.export(
        network,
        (samples,),
        folder / "model.onnx",
        dynamo=True,
        external_data=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    with torch.no_grad():
        wanted = network(samples).numpy()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: samples.numpy()})
    np.testing.assert_allclose(found, wanted, atol=1e-3, rtol=1e-3)


def work(way: str, name: str, *, emptied: bool) -> dict[str, float]:
    """Do it in this process.

    Args:
        way: one of WAYS; `build` and `compact` are to be compared of the same network.
        name: of a network.
        emptied: with a quarter of its inner channels zero.

    Returns:
        Seconds of the CPU, and bytes beyond libraries and network; the weights' own beside it.
    """
    import torch
    from torch import nn

    from benchmarks.dense_runs import dense_run
    from sparse_export import models
    from sparse_export.building import build

    torch.set_num_threads(1)
    torch.manual_seed(0)

    def once(network: nn.Module, shape: tuple[int, ...], n_classes: int, folder: Path) -> tuple[float, int]:
        folder.mkdir()
        run = dense_run(network, shape, folder / "run", n_classes) if way != "bare" else None
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
        before, began = _peak_bytes(), _cpu_s()
        if run is None:
            _bare(network, shape, folder)
        else:
            build(run, folder / "bundle", compact=way == "compact")
        return _cpu_s() - began, _peak_bytes() - before

    with tempfile.TemporaryDirectory() as folder:
        once(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), (4,), 2, Path(folder) / "a")
        network = models.create(name).eval()
        with torch.no_grad():
            for parameter in network.parameters():  # torchvision's heads are zero
                if not parameter.any():
                    parameter.normal_(0, 0.02)
        if emptied:
            _empty(network)
        shape = models.input_shape(name)
        assert shape is not None
        n_classes = network(torch.zeros(1, *shape)).shape[1]
        cpu_s, n_bytes = once(network, shape, n_classes, Path(folder) / "b")
    weights = sum(one.numel() * one.element_size() for one in network.state_dict().values())
    return {"cpu_s": cpu_s, "bytes": n_bytes, "weights_bytes": weights}


def _empty(network: Any) -> None:
    """Set a quarter of the inputs of each convolution but the first to zero, in place."""
    import torch
    from torch import nn

    layers = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
    with torch.no_grad():
        for layer in layers[1:]:
            layer.weight[:, : layer.weight.shape[1] // 4] = 0


def _other_process(way: str, name: str, *, emptied: bool) -> dict[str, float]:
    words = [sys.executable, "-m", "benchmarks.bench_build", "--work", way, "--network", name]
    words += ["--compact"] if emptied else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "wall_s": time.perf_counter() - began}


def compared(name: str, rounds: int, *, compact: bool) -> dict[str, Any]:
    """Two ways in turns; medians, and the ratio of their times.

    Args:
        name: of a network.
        rounds: of each way.
        compact: hold compacting against a plain build, not this against a bare export.
    """
    base, other = ("build", "compact") if compact else ("bare", "build")
    samples: dict[str, list[dict[str, float]]] = {base: [], other: []}
    for _ in range(rounds):
        for way, found in samples.items():
            found.append(_other_process(way, name, emptied=compact))

    def median(way: str, key: str) -> float:
        return statistics.median(one[key] for one in samples[way])

    result = {
        "ratio": median(other, "cpu_s") / median(base, "cpu_s"),
        f"{base}_s": median(base, "cpu_s"),
        f"{other}_s": median(other, "cpu_s"),
        "peak_over_weights": median(other, "bytes") / median(other, "weights_bytes"),
        f"{base}_peak_over_weights": median(base, "bytes") / median(base, "weights_bytes"),
    }
    print(name, json.dumps({key: round(value, 3) for key, value in result.items()}), flush=True)
    return {**result, "samples": samples}


def main() -> None:
    parser = argparse.ArgumentParser(description="What build takes over a bare export with one check.")
    parser.add_argument("--network", action="append", help=f"default: {', '.join(NETWORKS)}")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of each way (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results and the machine's facts")
    parser.add_argument("--compact", action="store_true", help="build --compact over a plain build")
    parser.add_argument("--work", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    networks = options.network or NETWORKS
    if options.work:
        print(json.dumps(work(options.work, networks[0], emptied=options.compact)))
        return
    results = {name: compared(name, options.rounds, compact=options.compact) for name in networks}
    if options.json:
        facts = {"created": now(), "versions": library_versions(), "machine": machine_facts()}
        write_json(options.json, {**facts, "rounds": options.rounds, "networks": results})


if __name__ == "__main__":
    main()
