"""Networks that nobody here wrote, through every link: sparsify, build, inspect, validate, compare, gate, package.

    python -m benchmarks.networks [--network NAME ...] [--magnitude] [--serve] [--work DIR] [--json FILE]

Each is made 2:4 by magnitude and by reconstruction, and held against the dense one on inputs that no weight was
calibrated on. With `--serve` Triton answers for the sparse bundle, and its answer is held against onnxruntime's
(needs `sparse-export serve --install-server`). A link that stops is named with the error that it ended with.
Runs in the work folder are used again, so that an interrupted call goes on where it was. FILE keeps the rows
of networks that are not measured again.
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

import numpy as np

from benchmarks.asking_triton import answer
from benchmarks.bench_serving import serving
from benchmarks.public_networks import NETWORKS, PublicNetwork, cache_folder, fetch, write_inputs
from benchmarks.torch_networks import TORCH_NETWORKS
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
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.runtimes.tolerance import differences
from sparse_export.serving.package import package
from sparse_export.version import library_versions, now

__all__ = ["Result", "Work", "measured"]

MAX_DROP = 100.0
"""Points of agreement that gates allow: what is lost is measured here, not judged."""

ALL_NETWORKS = {**NETWORKS, **TORCH_NETWORKS}
_ASKED = 3  # samples of a request


@dataclass(kw_only=True)
class Result:
    """What came of one network.

    Attributes:
        n_calibration: samples that `sparsify` got; it holds a fifth of them back.
        n_held_out: samples that agreement is measured on.
        method: of the bundles but `by-magnitude`.
        n_layers: with weights.
        n_two_four: of them made 2:4.
        n_eligible: of these that hardware can use in float16, by the verifier.
        speedup: dense over sparse at batch 1 by onnxruntime, with interval; other work disturbs it.
        left_dense: number of the others by reason.
        kept_share: of the sum of |w| of the 2:4 layers, by `method`.
        kept_by_magnitude: likewise.
        agreement: with the dense network on inputs held back, percent with interval, by bundle.
        distance: relative, of each output of floats, by bundle.
        difference: of the graph from its run on the golden pair, relative to the spread, by bundle.
        served: difference of what Triton answered from onnxruntime, by output, relative to the spread; of
            integers the share that differs.
        stops: error of each link that did not pass.
        seconds, cpu_seconds: of each link.
    """

    name: str
    what: str
    requirement: str
    file: str
    options: tuple[str, ...]
    n_calibration: int
    n_held_out: int
    method: str = ""
    n_layers: int = 0
    n_two_four: int = 0
    n_eligible: int | None = None
    left_dense: dict[str, int] = field(default_factory=dict)
    kept_share: float | None = None
    kept_by_magnitude: float | None = None
    dense_bytes: int | None = None
    packed_bytes: int | None = None
    half_bytes: int | None = None
    engine_bytes: int | None = None
    speedup: tuple[float, float, float] | None = None
    agreement: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    distance: dict[str, dict[str, float]] = field(default_factory=dict)
    difference: dict[str, float] = field(default_factory=dict)
    served: dict[str, float] = field(default_factory=dict)
    stops: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)


class Work:
    """One network on its way: its folder, and what was found out."""

    def __init__(self, network: PublicNetwork, model: Path | str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.network, self.model, self.folder = network, model, folder
        self.result = Result(
            name=network.name,
            what=network.what,
            requirement=network.requirement,
            file=Path(model).name,
            n_calibration=network.n_calibration,
            n_held_out=network.n_held_out,
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
            self.result.stops[name] = _sentences(cause)
        self.result.seconds.setdefault(name, round(time.monotonic() - began, 1))  # a report has its own
        self.result.cpu_seconds[name] = round(_cpu_seconds() - cpu, 1)
        return name not in self.result.stops

    def sparsify(self, method: str) -> None:
        """Make the run of a method, or take the one that is there."""
        out = self.folder / method
        if not (out / REPORT_FILE).is_file():
            axes, sizes = self.network.told("--axes"), self.network.told("--size")
            sparsify(
                str(self.model),
                out,
                inputs=self.calibration,
                method=method,
                axes=axes,
                sizes=sizes,
                input_shape=self.network.input_shape,
            )
        report = json.loads((out / REPORT_FILE).read_text())
        self.result.seconds[f"sparsify, {method}"] = round(report["stages"][-1]["seconds"], 1)
        layers = report["layers"]
        self.result.n_layers = len(layers)
        self.result.n_two_four = sum(layer["pattern"] is not None for layer in layers)
        self.result.kept_share = report["kept_share"]
        if method == "magnitude":
            self.result.kept_by_magnitude = report["kept_share"]
        reasons = [_kind(layer["reason"]) for layer in layers if layer["pattern"] is None]
        self.result.left_dense = {reason: reasons.count(reason) for reason in sorted(set(reasons))}

    def build(self, run: str, bundle: str, **options: Any) -> None:
        """Build a bundle of a run, checked on real inputs: on noise outputs hardly differ."""
        build(self.folder / run, self.folder / bundle, inputs=self.calibration, **options)

    def is_there(self, bundle: str) -> bool:
        """Was a bundle built?"""
        return (self.folder / bundle).is_dir()

    @property
    def sparse(self) -> str:
        """The bundle with packed weights, or where there is none the one with dense weights that are 2:4."""
        return "packed" if self.is_there("packed") else "sparse"

    def look(self) -> None:
        """What `inspect` says of the bundles, and their sizes."""
        result = self.result
        sizes = {
            name: open_bundle(self.folder / name).info.files[MODEL_FILE].size_bytes
            for name in ("dense", "packed", "half")
            if self.is_there(name)
        }
        result.dense_bytes, result.packed_bytes = sizes["dense"], sizes.get("packed")
        result.half_bytes = sizes.get("half")
        if self.is_there("engine"):
            info = open_bundle(self.folder / "engine").info
            result.engine_bytes = sum(info.files[one.file].size_bytes for one in info.engines) or None
        found = inspect(self.folder / ("half" if self.is_there("half") else self.sparse))
        assert not found.broken, found.broken
        if self.is_there("half"):
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
        """Time the sparse bundle against the dense one by onnxruntime, which has no sparse kernels."""
        dense, sparse = self.folder / "dense", self.folder / self.sparse
        found = compare(
            dense, sparse, batches=(1,), rounds=20, block_s=0.01, warmup_limit_s=1, inputs=self.held
        )
        ratio = found.latency[0].ratio
        self.result.speedup = (ratio.estimate, ratio.low, ratio.high)

    def gate(self) -> None:
        """All that deploying rests on."""
        check_gate(
            gate(
                self.folder / self.sparse,
                self.folder / "dense",
                inputs=self.held,
                max_drop=MAX_DROP,
                rounds=20,
            )
        )

    def package(self) -> None:
        """Write a model repository."""
        package([self.folder / self.sparse], [None], self.folder / "package")

    def serve(self) -> None:
        """Let Triton answer for the sparse bundle, and hold the answer against onnxruntime's."""
        folder = self.folder / self.sparse
        signature = open_bundle(folder).info.signature
        with np.load(self.held) as held:
            asked = signature.part({name: held[name] for name in signature.input_names}, 0, _ASKED)
        with serving((folder,), ("--name", self.network.name)) as document:
            found = answer(document["ports"]["http"], self.network.name, signature, asked)
        with open_session(self.folder / self.sparse / MODEL_FILE, signature=signature) as session:
            wanted = session.run(asked)
        for one in differences(found, wanted, atol=1e-6, rtol=1e-3):
            off = one.max_relative_difference
            self.result.served[one.name] = (
                off if off is not None else 1 - one.equal_share if one.equal_share is not None else 1.0
            )
            assert one.ok, one


def measured(
    network: PublicNetwork,
    model: Path | str,
    folder: Path,
    methods: Sequence[str] = ("magnitude", "reconstruction"),
    *,
    serve: bool = False,
) -> Result:
    """Put a network through every link.

    Args:
        network: which.
        model: its file, or a factory.
        folder: of its runs and bundles.
        methods: of sparsify; what the last one gives goes through all links.
        serve: let Triton answer too.
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
        work.link("build, sparse", lambda: work.build(sparse, "sparse"))
    half = work.link("build, fp16", lambda: work.build(sparse, "half", precision="fp16"))
    engines = engine_options(("tensorrt-rtx",), architectures="sm89", profiles=network.profiles)
    precision = "fp16" if half else "fp32"
    work.link(
        "build, engine",
        lambda: work.build(sparse, "engine", precision=precision, targets=("tensorrt-rtx",), engines=engines),
    )
    work.link("inspect", work.look)
    for bundle in ("by-magnitude", work.sparse, "half"):
        if not (folder / bundle).is_dir():
            continue
        work.link(f"validate, {bundle}", lambda bundle=bundle: work.validate(bundle))  # type: ignore[misc]
    work.link("compare", work.compare)
    work.link("gate", work.gate)
    work.link("package", work.package)
    if serve:
        work.link("serve", work.serve)
    return work.result


def _sentences(error: SparseExportError) -> str:
    """What happened and what was expected, without the end of a log."""
    words = f"{error.what} {error.expected}" if "\n" not in error.expected else error.what
    return words.partition(" The bundle ")[0].strip()


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
    parser.add_argument("--network", action="append", choices=list(ALL_NETWORKS), help="may be repeated")
    parser.add_argument("--magnitude", action="store_true", help="leave reconstruction out")
    parser.add_argument("--serve", action="store_true", help="let Triton answer too")
    parser.add_argument("--work", type=Path, default=Path("runs/networks"))
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="of the wheels")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(words)
    methods = ("magnitude",) if arguments.magnitude else ("magnitude", "reconstruction")
    for name in arguments.network or ALL_NETWORKS:
        network = ALL_NETWORKS[name]
        model = network.factory or fetch(network, arguments.cache)
        result = measured(network, model, arguments.work / name, methods, serve=arguments.serve)
        print(json.dumps(asdict(result), indent=1), flush=True)
        if arguments.json is not None:
            _merge(arguments.json, result)
    return 0


def _merge(file: Path, result: Result) -> None:
    """Write a result into a document beside those of other networks, with the machine that it is of."""
    document = json.loads(file.read_text()) if file.is_file() else {}
    row = {**asdict(result), "created": now(), "machine": machine_facts(), "versions": library_versions()}
    document.setdefault("networks", {})[result.name] = row
    file.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
