"""Networks that nobody here wrote, through every link: sparsify, build, inspect, validate, compare, gate, package.

    python -m benchmarks.networks [--network NAME ...] [--magnitude] [--work DIR] [--json FILE]

Each is made 2:4 by magnitude and by reconstruction, and held against the dense one on inputs that no weight was
calibrated on. A link that stops is named with the error that it ended with. Runs in the work folder are used
again, so that an interrupted call goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.public_networks import NETWORKS, PublicNetwork, cache_folder, fetch, write_inputs
from sparse_export.building.bundle import build
from sparse_export.engines.options import engine_options
from sparse_export.errors import SparseExportError
from sparse_export.evaluate.compare import compare
from sparse_export.evaluate.gate import check_gate, gate
from sparse_export.evaluate.validate import validate
from sparse_export.evaluate.validation import Validation, check_gates
from sparse_export.formats.bundle import MODEL_FILE, open_bundle
from sparse_export.inspect import inspect
from sparse_export.instruments.machine import machine_facts
from sparse_export.oneshot import sparsify
from sparse_export.oneshot.report import REPORT_FILE
from sparse_export.serving.package import package
from sparse_export.version import library_versions, now

__all__ = ["Result", "Work", "measured"]

MAX_DROP = 60.0
"""Points of agreement that gates allow: what is lost is measured here, not judged."""


@dataclass(kw_only=True)
class Result:
    """What came of one network.

    Attributes:
        method: of the bundles but `by-magnitude`.
        n_layers: with weights.
        n_two_four: of them made 2:4.
        n_eligible: of these that hardware can use in float16, by the verifier.
        left_dense: number of the others by reason.
        kept_share: of the sum of |w| of the 2:4 layers, by reconstruction.
        agreement: with the dense network on inputs held back, percent with interval, by bundle.
        distance: relative, of each output of floats, by bundle.
        difference: of the graph from its run on the golden pair, relative to the spread, by bundle.
        stops: error of each link that did not pass.
        seconds, cpu_seconds: of each link.
    """

    name: str
    what: str
    requirement: str
    file: str
    options: tuple[str, ...]
    method: str = ""
    n_layers: int = 0
    n_two_four: int = 0
    n_eligible: int | None = None
    left_dense: dict[str, int] = field(default_factory=dict)
    kept_share: float | None = None
    dense_bytes: int | None = None
    packed_bytes: int | None = None
    speedup: float | None = None
    agreement: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    distance: dict[str, dict[str, float]] = field(default_factory=dict)
    difference: dict[str, float] = field(default_factory=dict)
    stops: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)


class Work:
    """One network on its way: its folder, and what was found out."""

    def __init__(self, network: PublicNetwork, model: Path, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.network, self.model, self.folder = network, model, folder
        self.result = Result(
            name=network.name,
            what=network.what,
            requirement=network.requirement,
            file=model.name,
            options=(*network.options, *(f"--profile {one}" for one in network.profiles)),
        )
        self.calibration = write_inputs(network, folder / "calibration.npz", n=network.n_calibration, seed=1)
        self.held = write_inputs(network, folder / "held-out.npz", n=network.n_held_out, seed=2)

    def link(self, name: str, run: Callable[[], object]) -> bool:
        """Run a link, time it, and note the error that stops it. Is it passed?"""
        began, cpu = time.monotonic(), _cpu_seconds()
        try:
            run()
        except SparseExportError as cause:
            self.result.stops[name] = str(cause)
        self.result.seconds[name] = round(time.monotonic() - began, 1)
        self.result.cpu_seconds[name] = round(_cpu_seconds() - cpu, 1)
        return name not in self.result.stops

    def sparsify(self, method: str) -> None:
        """Make the run of a method, or take the one that is there."""
        out = self.folder / method
        if not (out / REPORT_FILE).is_file():
            axes, sizes = self.network.told("--axes"), self.network.told("--size")
            sparsify(str(self.model), out, inputs=self.calibration, method=method, axes=axes, sizes=sizes)
        report = json.loads((out / REPORT_FILE).read_text())
        self.result.seconds[f"sparsify, {method}"] = round(report["stages"][-1]["seconds"], 1)
        layers = report["layers"]
        self.result.n_layers = len(layers)
        self.result.n_two_four = sum(layer["pattern"] is not None for layer in layers)
        self.result.kept_share = report["kept_share"]
        reasons = [_kind(layer["reason"]) for layer in layers if layer["pattern"] is None]
        self.result.left_dense = {reason: reasons.count(reason) for reason in sorted(set(reasons))}

    def build(self, run: str, bundle: str, **options: Any) -> None:
        """Build a bundle of a run, checked on real inputs: on noise outputs hardly differ."""
        build(self.folder / run, self.folder / bundle, inputs=self.calibration, **options)

    def look(self) -> None:
        """What `inspect` says of the bundles."""
        result = self.result
        result.dense_bytes = open_bundle(self.folder / "dense").info.files[MODEL_FILE].size_bytes
        result.packed_bytes = open_bundle(self.folder / "packed").info.files[MODEL_FILE].size_bytes
        found = inspect(self.folder / ("half" if (self.folder / "half").is_dir() else "packed"))
        assert not found.broken, found.broken
        if (self.folder / "half").is_dir():
            result.n_eligible = sum(one.eligible == "yes" for one in found.graph)

    def validate(self, bundle: str) -> Validation:
        """Hold a bundle against its run, and against the dense bundle."""
        found = validate(
            self.folder / bundle, against=self.folder / "dense", inputs=self.held, max_drop=MAX_DROP
        )
        self.result.difference[bundle] = found.golden.max_relative_difference
        agreement = found.agreement
        assert agreement is not None
        self.result.agreement[bundle] = (agreement.percent, agreement.low, agreement.high)
        self.result.distance[bundle] = {
            one.name: one.relative_distance for one in agreement.outputs if one.relative_distance is not None
        }
        check_gates(found)
        return found

    def compare(self) -> None:
        """Time the packed bundle against the dense one by onnxruntime, which has no sparse kernels."""
        dense, sparse = self.folder / "dense", self.folder / "packed"
        found = compare(
            dense, sparse, batches=(1,), rounds=20, block_s=0.01, warmup_limit_s=1, inputs=self.held
        )
        self.result.speedup = found.latency[0].ratio.estimate

    def gate(self) -> None:
        """All that deploying rests on."""
        check_gate(
            gate(
                self.folder / "packed", self.folder / "dense", inputs=self.held, max_drop=MAX_DROP, rounds=20
            )
        )

    def package(self) -> None:
        """Write a model repository."""
        package([self.folder / "packed"], [None], self.folder / "package")


def measured(
    network: PublicNetwork,
    model: Path,
    folder: Path,
    methods: Sequence[str] = ("magnitude", "reconstruction"),
) -> Result:
    """Put a network through every link.

    Args:
        network: which.
        model: its file.
        folder: of its runs and bundles.
        methods: of sparsify; what the last one gives goes through all links.
    """
    work = Work(network, model, folder)
    passed = [
        work.link(f"sparsify, {one}", lambda one=one: work.sparsify(one))  # type: ignore[misc]
        for one in methods
    ]
    if not all(passed):
        return work.result
    sparse = methods[-1]
    work.result.method = sparse
    work.link("build, dense", lambda: work.build(f"{sparse}-dense", "dense"))
    if sparse != "magnitude":
        work.link("build, magnitude", lambda: work.build("magnitude", "by-magnitude"))
    if not work.link("build, packed", lambda: work.build(sparse, "packed", onnx="packed")):
        work.build(sparse, "packed")
    half = work.link("build, fp16", lambda: work.build(sparse, "half", precision="fp16"))
    engines = engine_options(("tensorrt-rtx",), architectures="sm89", profiles=network.profiles)
    precision = "fp16" if half else "fp32"
    work.link(
        "build, engine",
        lambda: work.build(sparse, "engine", precision=precision, targets=("tensorrt-rtx",), engines=engines),
    )
    work.link("inspect", work.look)
    for bundle in ("by-magnitude", "packed", "half"):
        if not (folder / bundle).is_dir():
            continue
        work.link(f"validate, {bundle}", lambda bundle=bundle: work.validate(bundle))  # type: ignore[misc]
    work.link("compare", work.compare)
    work.link("gate", work.gate)
    work.link("package", work.package)
    return work.result


def _kind(reason: str) -> str:
    """A reason without the numbers of one layer."""
    for start, kind in (
        ("it sums over", "input channels no multiple of 4"),
        ("it is among the smallest", "among the smallest"),
        ("it gives the outputs", "gives the outputs"),
        ("LSTM", "inside an LSTM"),
    ):
        if reason.startswith(start):
            return kind
    return reason


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", action="append", choices=list(NETWORKS), help="may be repeated")
    parser.add_argument("--magnitude", action="store_true", help="leave reconstruction out")
    parser.add_argument("--work", type=Path, default=Path("runs/networks"))
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="of the wheels")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(words)
    earlier = json.loads(arguments.json.read_text())["networks"] if _is_there(arguments.json) else {}
    methods = ("magnitude",) if arguments.magnitude else ("magnitude", "reconstruction")
    for name in arguments.network or NETWORKS:
        network = NETWORKS[name]
        result = measured(network, fetch(network, arguments.cache), arguments.work / name, methods)
        print(json.dumps(asdict(result), indent=1), flush=True)
        earlier[name] = asdict(result)
        if arguments.json is not None:
            document = {
                "created": now(),
                "machine": machine_facts(),
                "versions": library_versions(),
                "networks": {one: earlier[one] for one in NETWORKS if one in earlier},
            }
            arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def _is_there(path: Path | None) -> bool:
    return path is not None and path.is_file()


if __name__ == "__main__":
    sys.exit(main())
