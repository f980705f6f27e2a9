"""Tells what a run, a bundle or an ONNX file holds, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparse_export.artefact import (
    BUNDLE_FILE,
    RUN_FILE,
    Accuracy,
    FileFact,
    LayerFact,
    read_bundle_info,
    read_run_info,
    verify_files,
)
from sparse_export.errors import ArtefactError, UsageError

__all__ = ["InspectedLayer", "Inspection", "inspect"]


@dataclass(frozen=True, kw_only=True)
class InspectedLayer:
    """One weight. n_nonzero: entries that are not zero; of a run or a bundle, those that the mask keeps."""

    name: str
    shape: tuple[int, ...]
    n_weights: int
    n_nonzero: int

    @property
    def density(self) -> float:
        return self.n_nonzero / self.n_weights if self.n_weights else 0.0


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was found. kind: `run`, `unfinished run`, `bundle` or `onnx`.

    n_parameters: over the whole network; n_weights, n_nonzero, density: over `layers`.  n_files: how many files
    are listed with a hash; problem: the first that is not what was written, None when all are.  facts: the rest,
    in words.
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

    def __str__(self) -> str:
        rows = [("path", self.path), ("kind", self.kind), *self.facts.items()]
        if self.accuracy is not None:
            found = self.accuracy
            rows.append(("test accuracy", f"{found.percent:.3f} % ({found.n_correct}/{found.n_samples})"))
        rows.append(("parameters", f"{self.n_parameters:,}"))
        if self.problem is not None:
            rows.append(("files", f"NOT verified: {self.problem}"))
        elif self.n_files:
            rows.append(("files", f"{self.n_files} verified by SHA-256"))
        width = max(len(label) for label, _ in rows)
        head = "\n".join(f"{label:<{width}}  {text}" for label, text in rows)
        return f"{head}\n\n{self._table()}" if self.layers else head

    def _table(self) -> str:
        cells = [("layer", "shape", "weights", "non-zero", "density")]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            counts = (f"{layer.n_weights:,}", f"{layer.n_nonzero:,}", f"{layer.density:.4f}")
            cells.append((layer.name, shape, *counts))
        cells.append(("total", "", f"{self.n_weights:,}", f"{self.n_nonzero:,}", f"{self.density:.4f}"))
        widths = [max(len(row[column]) for row in cells) for column in range(5)]
        return "\n".join(
            "  ".join(
                text.ljust(width) if column < 2 else text.rjust(width)
                for column, (text, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in cells
        )


def inspect(path: str | Path) -> Inspection:
    """Look at a run folder (finished or not), a bundle, or an ONNX file of anybody's making.

    Files that are not what was written are told in the result. Raises UsageError for a path that is none of
    these, ArtefactError for a description or a graph that cannot be read.
    """
    path = Path(path)
    if path.is_dir() and (path / RUN_FILE).is_file():
        return _of_run(path)
    if path.is_dir() and (path / BUNDLE_FILE).is_file():
        return _of_bundle(path)
    if path.is_file():
        return _of_onnx(path)
    what = f"{path} is neither a run nor a bundle" if path.exists() else f"{path} does not exist"
    raise UsageError(
        f"{what}.",
        expected=f"A run folder (with {RUN_FILE}), a bundle (with {BUNDLE_FILE}) or an .onnx file was expected.",
        do="Correct the path.",
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
    return _inspection(path, kind, layers, info.n_parameters, info.test, facts, info.files)


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
    if info.compacted is not None:
        facts["compacted"] = (
            f"{info.compacted.n_weights_after:,} of {info.compacted.n_weights_before:,} parameters left; "
            f"the layers below are those of the run"
        )
    layers = _kept(info.layers)
    return _inspection(path, "bundle", layers, info.n_parameters, info.accuracy, facts, info.files)


def _kept(layers: tuple[LayerFact, ...]) -> tuple[InspectedLayer, ...]:
    return tuple(
        InspectedLayer(
            name=layer.name, shape=layer.shape, n_weights=layer.n_weights, n_nonzero=layer.n_active
        )
        for layer in layers
    )


def _of_onnx(path: Path) -> Inspection:
    from sparse_export.graph.verify import count_parameters, graph_layers, onnx_from_file

    model = onnx_from_file(path)
    found = graph_layers(model)
    layers = {
        layer.weight: InspectedLayer(
            name=layer.weight, shape=layer.shape, n_weights=layer.n_weights, n_nonzero=layer.n_nonzero
        )
        for layer in found
    }
    opsets = ", ".join(f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in model.opset_import)
    producer = f"{model.producer_name} {model.producer_version}".strip()
    facts = {"producer": producer or "not told", "opset": opsets, "IR version": str(model.ir_version)}
    macs = [(layer.macs, layer.nonzero_macs) for layer in found]
    known = [(one, other) for one, other in macs if one is not None and other is not None]
    if found and len(known) == len(macs):
        total, nonzero = (sum(column) for column in zip(*known, strict=True))
        facts["multiply-accumulates"] = f"{total:,} for one sample, {nonzero:,} by non-zero weights"
    return _inspection(path, "onnx", tuple(layers.values()), count_parameters(model)[0], None, facts, {})


def _inspection(
    path: Path,
    kind: str,
    layers: tuple[InspectedLayer, ...],
    n_parameters: int,
    accuracy: Accuracy | None,
    facts: dict[str, str],
    files: dict[str, FileFact],
) -> Inspection:
    problem = None
    try:
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
