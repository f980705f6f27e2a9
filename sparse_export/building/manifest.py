"""What the manifest of a bundle and its table of layers say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from sparse_export.building.dense_baseline import TimedEngines
from sparse_export.building.engines import Engines
from sparse_export.building.golden import ATOL
from sparse_export.building.graph import MadeGraph
from sparse_export.engines.options import Precision
from sparse_export.engines.precision import TOLERANCE
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import BundleInfo, PatternInfo, RunReference
from sparse_export.formats.layers import GraphLayer
from sparse_export.formats.listed import FileInfo
from sparse_export.formats.run import RUN_FILE, Run
from sparse_export.graph.export import INPUT_NAME, IR_VERSION, OUTPUT_NAME
from sparse_export.version import command_line, library_versions, now

__all__ = ["bundle_info", "layers_document"]


def layers_document(layers: Sequence[GraphLayer], built: Engines, timed: TimedEngines) -> dict[str, object]:
    """The table of layers: of the graph, of each engine, and times where there are any."""
    rows = {file: [asdict(row) for row in rows] for file, rows in built.layers.items()}
    document: dict[str, object] = {"layers": [asdict(layer) for layer in layers], "engines": rows}
    if timed.times:
        document["times"] = {file: [asdict(one) for one in times] for file, times in timed.times.items()}
    return document


def bundle_info(
    run: Run,
    made: MadeGraph,
    *,
    precision: Precision,
    built: Engines,
    fitted: PatternInfo | None,
    files: Mapping[str, FileInfo],
) -> BundleInfo:
    """The manifest of the bundle of a run.

    files: every other one of the bundle.
    """
    info = run.info
    return BundleInfo(
        method=info.method,
        model=info.model,
        data=info.data,
        run=RunReference(path=str(run.path.resolve()), run_sha256=sha256_file(run.path / RUN_FILE)),
        precision=precision,
        n_calibration=made.n_calibration,
        targets=("onnx", *(one.target for one in built.facts)),
        opset=max(entry.version for entry in made.model.opset_import if entry.domain in ("", "ai.onnx")),
        ir_version=IR_VERSION,
        input_name=INPUT_NAME,
        output_name=OUTPUT_NAME,
        density=made.density,
        layers=made.promising,
        n_parameters=made.n_parameters,
        n_nonzero=made.n_nonzero,
        macs=_total([layer.macs for layer in made.layers]),
        nonzero_macs=_total([layer.nonzero_macs for layer in made.layers]),
        accuracy=info.test,
        atol=ATOL,
        rtol=TOLERANCE[precision],
        versions=library_versions(),
        command=command_line(),
        created=now(),
        files=dict(files),
        compacted=made.compacted,
        fitted=fitted,
        engines=built.facts,
    )


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
