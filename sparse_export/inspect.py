"""Tells what a run, a bundle or an ONNX file holds, layer by layer, and whether its zeros can be used."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from sparse_export.errors import ArtefactError, GateFailed, UsageError
from sparse_export.files import put_back, sha256_file
from sparse_export.formats.bundle import (
    BUNDLE_FILE,
    CACHE_FOLDER,
    SUMS_FILE,
    Bundle,
    BundleInfo,
    read_bundle_info,
)
from sparse_export.formats.engines import EngineInfo
from sparse_export.formats.layers import (
    LAYERS_FILE,
    EngineLayer,
    EngineState,
    EngineTimes,
    GraphLayer,
    LayerTiming,
    read_engine_layers,
    read_engine_times,
)
from sparse_export.formats.listed import FileInfo, file_of, require_complete, verify_files
from sparse_export.formats.run import RUN_FILE, Accuracy, LayerInfo, RunInfo, SpeedInfo, read_run_info

if TYPE_CHECKING:
    import onnx

__all__ = [
    "InspectedEngine",
    "InspectedLayer",
    "Inspection",
    "inspect",
    "require_promises",
    "require_unchanged",
    "told_speed",
]

_NAMES_SHOWN = 5
_ENGINE_SUFFIXES = (".engine", ".plan", ".trt")


@dataclass(frozen=True, kw_only=True)
class InspectedLayer:
    """One weight. n_nonzero: entries that are not zero; of a run or a bundle, those that the mask keeps.

    pattern: the N:M that a run or a bundle promises for it, or None.
    """

    name: str
    shape: tuple[int, ...]
    n_weights: int
    n_nonzero: int
    pattern: str | None = None

    @property
    def density(self) -> float:
        return self.n_nonzero / self.n_weights if self.n_weights else 0.0


@dataclass(frozen=True, kw_only=True)
class InspectedEngine:
    """An engine as its bundle tells of it, and what became of each layer.

    times: of layers against a twin without sparse kernels, where they were measured.
    """

    fact: EngineInfo
    layers: tuple[EngineLayer, ...]
    times: tuple[EngineTimes, ...] = ()

    def __str__(self) -> str:
        fact = self.fact
        gpus = ", ".join(fact.architectures) or fact.architecture or "the library's own choice of GPUs"
        profiles = ", ".join(":".join(map(str, sizes)) for sizes in fact.profiles)
        head = f"{fact.file}  {fact.target} {fact.version}, {fact.precision}, for {gpus}, batch {profiles}"
        if not self.layers:
            return head
        counts = Counter(row.state for row in self.layers)
        told = ", ".join(f"{counts[state]} {state}" for state in get_args(EngineState) if counts[state])
        rows = [["layer", "sparse kernel", "why"]]
        rows += [[row.weight or row.node, row.state, row.text] for row in self.layers]
        table = f"{head}\nSparse kernels: {told}.\n{_aligned(rows, left=3)}"
        return "\n\n".join((table, *(_times_table(one) for one in self.times)))


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was found. kind: `run`, `unfinished run`, `bundle`, `onnx` or `engine`.

    n_parameters: over the whole network; n_weights, n_nonzero, density: over `layers`.  n_files: how many files
    are listed with a hash; problem: the first that is not what was written, or that has to be listed and is not, None
    when there is none.  unlisted: files in the folder of a bundle that its manifest does not list; nothing uses them.
    facts: the rest, in words.  graph: the layers of a bundle's or a file's graph as they are now, whatever was recorded of them.
    broken: a clause for each promised pattern that the graph does not keep; unchecked: why the promises could
    not be looked at, None when they were or there are none.  speed: of a run's training, where it was timed.
    """

    path: str
    kind: str
    layers: tuple[InspectedLayer, ...]
    n_parameters: int
    n_weights: int
    n_nonzero: int
    density: float
    accuracy: Accuracy | None
    n_files: int
    problem: str | None
    facts: dict[str, str]
    graph: tuple[GraphLayer, ...] = ()
    engines: tuple[InspectedEngine, ...] = ()
    broken: tuple[str, ...] = ()
    unchecked: str | None = None
    speed: SpeedInfo | None = None
    unlisted: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [("path", self.path), ("kind", self.kind), *self.facts.items()]
        if self.accuracy is not None:
            found = self.accuracy
            rows.append(("test accuracy", f"{found.percent:.3f} % ({found.n_correct}/{found.n_samples})"))
        rows += told_speed(self.speed).items()
        if self.kind != "engine":
            rows.append(("parameters", f"{self.n_parameters:,}"))
        if self.problem is not None:
            rows.append(("files", f"NOT verified: {self.problem}"))
        elif self.n_files:
            rows.append(("files", f"{self.n_files} verified by SHA-256"))
        if self.unlisted:
            rows.append(("not listed", _unlisted_text(self.unlisted)))
        width = max(len(label) for label, _ in rows)
        head = "\n".join(f"{label:<{width}}  {text}" for label, text in rows)
        table = self._graph_table() if self.graph else self._table() if self.layers else ""
        return "\n\n".join(part for part in (head, table, *map(str, self.engines)) if part)

    def _table(self) -> str:
        promises = any(layer.pattern for layer in self.layers)
        cells = [["layer", "shape", "weights", "non-zero", "density", "promised"]]
        for layer in self.layers:
            counts = (f"{layer.n_weights:,}", f"{layer.n_nonzero:,}", f"{layer.density:.4f}")
            cells.append([layer.name, _shape(layer.shape), *counts, layer.pattern or "-"])
        cells.append(["total", "", f"{self.n_weights:,}", f"{self.n_nonzero:,}", f"{self.density:.4f}", ""])
        return _aligned([row if promises else row[:-1] for row in cells], left=2)

    def _graph_table(self) -> str:
        from sparse_export.graph.eligibility import MEANINGS

        promised = {layer.name: layer.pattern for layer in self.layers if layer.pattern}
        cells = [["layer", "op", "shape", "density", "promised", "2:4", "eligible", "why not"]]
        for layer in self.graph:
            why = ", ".join(dict.fromkeys(one.code for one in layer.reasons)) or "-"
            name = layer.weight if layer.constant and layer.weight else layer.node
            known = bool(layer.shape)
            density = f"{layer.n_nonzero / layer.n_weights:.4f}" if layer.n_weights else "-"
            told = (promised.get(layer.weight, "-"), _two_four(layer), layer.eligible, why)
            cells.append([name, layer.op_type, _shape(layer.shape) if known else "-", density, *told])
        table = _aligned([row if promised else [*row[:4], *row[5:]] for row in cells], left=8)
        codes = [
            code for code in MEANINGS if any(code == r.code for layer in self.graph for r in layer.reasons)
        ]
        width = max(map(len, codes), default=0)
        legend = "\n".join(f"{code:<{width}}  {MEANINGS[code][1]}" for code in codes)
        return "\n\n".join(part for part in (table, self._summary(), legend) if part)

    def _summary(self) -> str:
        eligible = [layer.eligible for layer in self.graph]
        holds = sum(layer.pattern_holds is True for layer in self.graph)
        text = (
            f"{holds} of {len(eligible)} layers hold 2:4; hardware can use the zeros of {eligible.count('yes')}, "
            f"of {eligible.count('unproven')} that is unproven. Density {self.density:.4f}, "
            f"{self.n_nonzero:,} of {self.n_weights:,} weights."
        )
        return "\n".join((text, *(f"BROKEN PROMISE: {clause}." for clause in self.broken)))


def _unlisted_text(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"{shown}{more}: in the folder, not in the manifest, and not used"


def _times_table(times: EngineTimes) -> str:
    """A row for each piece of work, in the engine's order, and one for all of them."""
    head = f"Batch {times.batch}, layer by layer, against the same graph built without sparse kernels"
    if not times.rows:
        return f"{head}: {times.note}"
    cells = [["layer", "dense ms", "sparse ms", "dense/sparse [95 %]", "outcome", "kernel", "verdict"]]
    cells += [_times_row(row) for row in (*times.rows, *([times.whole] if times.whole else []))]
    steady = "" if times.steady else "\nTimes had not settled when warm-up ended; repeat on a quiet machine."
    return f"{head}, {times.rounds} interleaved rounds:\n{_aligned(cells, left=7)}{steady}"


def _times_row(row: LayerTiming) -> list[str]:
    own = (*row.sparse_layers, *row.dense_layers)
    name = ", ".join(row.weights) or ", ".join(row.nodes) or (own[0] if len(own) <= 2 else "all layers")
    ms = ["-" if one is None else f"{one:.4f}" for one in (row.dense_ms, row.sparse_ms)]
    known = row.ratio is not None and row.low is not None and row.high is not None
    ratio = f"{row.ratio:.3f} [{row.low:.3f}, {row.high:.3f}]" if known else "-"
    return [name, *ms, ratio, row.outcome, ", ".join(row.sparse_kernels) or "-", row.verdict]


def _two_four(layer: GraphLayer) -> str:
    if layer.pattern_holds is None:
        return "-"
    if layer.n_groups is None:
        return "not divisible"
    return "yes" if layer.pattern_holds else f"{layer.n_groups_over:,} of {layer.n_groups:,} over"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _aligned(cells: Sequence[Sequence[str]], *, left: int) -> str:
    """Cells in columns; the first `left` columns flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column < left else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def told_speed(speed: SpeedInfo | None) -> dict[str, str]:
    """In words: what was measured of a training's speed, and apart from it what is only estimated. Empty for None."""
    if speed is None:
        return {}
    told = {"time of a step": f"{speed.step_ms:.4g} ms, measured, mask updates included"}
    of, channels, macs = "convolutions", speed.estimate_channels, speed.estimate_macs
    if channels is None or macs is None:
        of = "all layers, there being no convolution"
        channels, macs = speed.all_layers_estimate_channels, speed.all_layers_estimate_macs
    if channels is not None and macs is not None:
        told["estimates"] = (
            f"{channels:.3g}x without empty channels, {macs:.3g}x without multiplications by zero, of {of}; "
            "counted as the paper does, not measured"
        )
    return told


def require_unchanged(found: Inspection) -> None:
    """Raise ArtefactError when a file is not the one that was written."""
    if found.problem is not None:
        raise ArtefactError(
            f"The {found.kind} {found.path} is not what was written: {found.problem.rstrip('.')}.",
            expected="Every file was expected as it was listed with its size and SHA-256.",
            do="Copy it again, or make it again.",
        )


def require_promises(found: Inspection) -> None:
    """Raise GateFailed when the graph breaks a promised pattern, ArtefactError when that could not be seen."""
    if found.broken:
        more = f"; and {len(found.broken) - 5} more" if len(found.broken) > 5 else ""
        raise GateFailed(
            f"The graph of {found.path} does not keep what its manifest promises: "
            f"{'; '.join(found.broken[:5])}{more}.",
            expected="At most N nonzeros in every M along the reduction axis were promised.",
            do="Build it again from its run.",
        )
    if found.unchecked is not None:
        raise ArtefactError(
            f"The patterns that {found.path} promises cannot be checked: {found.unchecked}",
            expected="A graph that can be read was expected.",
            do="Copy the folder again, or rebuild it.",
        )


def inspect(path: str | Path) -> Inspection:
    """Look at a run folder (finished or not), a bundle, or an ONNX file or an engine of anybody's making.

    An engine is not loaded, for that would run its code: what its bundle and its first bytes tell is shown.

    Files that are not what was written are told in the result. Raises UsageError for a path that is none of
    these, and for another file of a run or a bundle; ArtefactError for a description or a graph that cannot be read.
    """
    path = Path(path)
    put_back(path)
    if path.is_dir() and (path / RUN_FILE).is_file():
        return _of_run(path)
    if path.is_dir() and (path / BUNDLE_FILE).is_file():
        return _of_bundle(path)
    if path.is_file():
        if path.suffix in _ENGINE_SUFFIXES:
            return _of_engine(path)
        _require_no_part(path)
        return _of_onnx(path)
    what = f"{path} is neither a run nor a bundle" if path.exists() else f"{path} does not exist"
    raise UsageError(
        f"{what}.",
        expected=f"A run folder (with {RUN_FILE}), a bundle (with {BUNDLE_FILE}), an .onnx file or an .engine was expected.",
        do="Correct the path.",
    )


def _require_no_part(path: Path) -> None:
    """Raise UsageError for a file of a run or a bundle that is no graph: only the folder tells what it is."""
    if path.suffix == ".onnx":
        return
    for folder in path.absolute().parents[:2]:
        for file, kind in ((RUN_FILE, "run"), (BUNDLE_FILE, "bundle")):
            if (folder / file).is_file():
                raise UsageError(
                    f"{path} is a file in the {kind} {folder}.",
                    expected=f"The folder of a {kind}, an .onnx file or an .engine was expected.",
                    do=f"Give the folder: sparse-export inspect {shlex.quote(str(folder))}",
                )


def _of_run(path: Path) -> Inspection:
    info = read_run_info(path)
    facts = {
        "method": info.method,
        "model": info.model.name or "in memory only",
        "data": info.data.name if info.data else "none",
        "epochs": str(info.epochs),
        "made": info.created,
    }
    kind = "run" if info.status == "complete" else "unfinished run"
    layers = _kept(info.layers)
    found = _inspection(path, kind, layers, info.n_parameters, info.test, facts, info.files, info)
    return replace(found, speed=info.speed)


def _of_bundle(path: Path) -> Inspection:
    info = read_bundle_info(path)
    facts = {
        "method": info.method,
        "model": info.model.name or "in memory only",
        "data": info.data.name if info.data else "none",
        "built for": ", ".join(info.targets),
        "precision": info.precision,
        "made": info.created,
    }
    if info.macs is not None and info.nonzero_macs is not None:
        facts["multiply-accumulates"] = (
            f"{info.macs:,} for one sample, {info.nonzero_macs:,} by non-zero weights"
        )
    bundle = Bundle(path=path, info=info)
    graph, broken, unchecked = _graph_of_bundle(bundle)
    if info.compacted is not None:
        facts["compacted"] = (
            f"{info.compacted.n_weights_after:,} of {info.compacted.n_weights_before:,} parameters left"
        )
    layers = _kept(info.layers)
    found = _inspection(path, "bundle", layers, info.n_parameters, info.accuracy, facts, info.files, info)
    engines = tuple(_inspected_engine(bundle, fact) for fact in info.engines)
    return replace(
        found,
        graph=graph,
        engines=engines,
        broken=broken,
        unchecked=unchecked,
        problem=found.problem or _problem_with_graph(bundle),
        unlisted=_unlisted(path, info),
    )


def _problem_with_graph(bundle: Bundle) -> str | None:
    """Why the graph, with all the files that it refers to, is not used."""
    try:
        _ = bundle.onnx_path
    except ArtefactError as cause:
        return cause.what
    return None


def _unlisted(path: Path, info: BundleInfo) -> tuple[str, ...]:
    """Files in the folder of a bundle that its manifest does not list, what running it left there apart."""
    own = {BUNDLE_FILE, SUMS_FILE, *info.files}
    found = []
    for folder, _, files in os.walk(path):
        below = Path(folder).relative_to(path)
        if not below.is_relative_to(CACHE_FOLDER):
            found += [(below / name).as_posix() for name in files]
    return tuple(sorted(os.fsencode(name).decode(errors="backslashreplace") for name in set(found) - own))


def _inspected_engine(bundle: Bundle, fact: EngineInfo) -> InspectedEngine:
    """With no layers where the table is not the one that was written; the problem with it is told elsewhere."""
    try:
        file = file_of(bundle, LAYERS_FILE)
    except ArtefactError:
        return InspectedEngine(fact=fact, layers=())
    return InspectedEngine(
        fact=fact, layers=read_engine_layers(file, fact.file), times=read_engine_times(file, fact.file)
    )


def _of_engine(path: Path) -> Inspection:
    from sparse_export.engines.header import read_header

    header = read_header(path)
    if header.size_bytes == 0:
        raise ArtefactError(f"{path} is empty.", expected="An engine was expected.", do="Build it again.")
    problem = None
    if header.stated_bytes not in (None, header.size_bytes):
        problem = f"it has {header.size_bytes} bytes and its header tells of {header.stated_bytes}"
    known = "unknown, to this release; it was not loaded, for that would run its code"
    facts = {
        "size": f"{header.size_bytes:,} bytes",
        "SHA-256": sha256_file(path),
        "header": f"{header.target} {header.version}" if header.target else known,
    }
    bundle = path.absolute().parent.parent
    found = None
    if (bundle / BUNDLE_FILE).is_file():
        info = read_bundle_info(bundle)
        name = path.absolute().relative_to(bundle).as_posix()
        found = next((fact for fact in info.engines if fact.file == name), None)
        facts["bundle"] = str(bundle) if found else f"{bundle}, which does not list it"
    if found is None:
        return replace(_inspection(path, "engine", (), 0, None, facts, {}), problem=problem)
    opened = Bundle(path=bundle, info=info)
    try:
        file_of(opened, found.file)
    except ArtefactError as cause:
        problem = cause.what
    listed = found.file in info.files
    return replace(
        _inspection(path, "engine", (), 0, None, facts, {}),
        n_files=int(listed),
        problem=problem,
        engines=(_inspected_engine(opened, found),),
    )


def _graph_of_bundle(
    bundle: Bundle,
) -> tuple[tuple[GraphLayer, ...], tuple[str, ...], str | None]:
    """The layers, the promises that they break, and why these could not be looked at."""
    from sparse_export.graph.layers import broken_patterns, graph_layers, promised_patterns

    promised = promised_patterns(bundle.info.layers)
    try:
        model = _whole_graph(bundle.onnx_path)
        return graph_layers(model), broken_patterns(model, promised), None
    except (ArtefactError, UsageError) as cause:  # which file is wrong is told with the others
        return (), (), cause.what if promised else None


def _whole_graph(path: Path) -> onnx.ModelProto:
    """A graph from a file, with packed weights expanded, so that they go by the names that they have dense."""
    from sparse_export.graph.layers import onnx_from_file
    from sparse_export.graph.passes.pack24 import expand, is_packed

    model = onnx_from_file(path)
    return expand(model) if is_packed(model) else model


def _kept(layers: tuple[LayerInfo, ...]) -> tuple[InspectedLayer, ...]:
    return tuple(
        InspectedLayer(
            name=layer.name,
            shape=layer.shape,
            n_weights=layer.n_weights,
            n_nonzero=layer.n_active,
            pattern=layer.pattern,
        )
        for layer in layers
    )


def _of_onnx(path: Path) -> Inspection:
    from sparse_export.graph.layers import count_parameters, graph_layers

    model = _whole_graph(path)
    found = graph_layers(model)
    layers = {
        layer.weight: InspectedLayer(
            name=layer.weight, shape=layer.shape, n_weights=layer.n_weights, n_nonzero=layer.n_nonzero
        )
        for layer in found
        if layer.shape
    }
    opsets = ", ".join(f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in model.opset_import)
    producer = f"{model.producer_name} {model.producer_version}".strip()
    facts = {"producer": producer or "not told", "opset": opsets, "IR version": str(model.ir_version)}
    macs = [(layer.macs, layer.nonzero_macs) for layer in found]
    known = [(one, other) for one, other in macs if one is not None and other is not None]
    if found and len(known) == len(macs):
        total, nonzero = (sum(column) for column in zip(*known, strict=True))
        facts["multiply-accumulates"] = f"{total:,} for one sample, {nonzero:,} by non-zero weights"
    n_parameters = count_parameters(model)[0]
    inspection = _inspection(path, "onnx", tuple(layers.values()), n_parameters, None, facts, {})
    return replace(inspection, graph=found)


def _inspection(
    path: Path,
    kind: str,
    layers: tuple[InspectedLayer, ...],
    n_parameters: int,
    accuracy: Accuracy | None,
    facts: dict[str, str],
    files: dict[str, FileInfo],
    described: RunInfo | BundleInfo | None = None,
) -> Inspection:
    """described: what the folder's description says, which then has to list what makes it whole."""
    problem = None
    try:
        if described is not None:
            require_complete(path, described)
        verify_files(path, files)
    except ArtefactError as cause:
        problem = cause.what
    n_weights = sum(layer.n_weights for layer in layers)
    n_nonzero = sum(layer.n_nonzero for layer in layers)
    return Inspection(
        path=str(path),
        kind=kind,
        layers=layers,
        n_parameters=n_parameters,
        n_weights=n_weights,
        n_nonzero=n_nonzero,
        density=n_nonzero / n_weights if n_weights else 1.0,
        accuracy=accuracy,
        n_files=len(files),
        problem=problem,
        facts=facts,
    )
