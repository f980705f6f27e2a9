"""The links that need files alone: they are whole, the graph keeps its pattern, engines are of that graph."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

from sparse_export import trust
from sparse_export.building import DENSE_MODEL_FILE, MODEL_FILE
from sparse_export.engines.loadable import require_genuine
from sparse_export.errors import ArtefactError, GateFailed
from sparse_export.evaluate.links.case import Case
from sparse_export.evaluate.links.chain import Figure, Finding
from sparse_export.evaluate.parity import golden_parity
from sparse_export.evaluate.validation import differing
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import BUNDLE_FILE
from sparse_export.formats.engines import EngineInfo
from sparse_export.formats.layers import LAYERS_FILE, GraphLayer, read_engine_layers
from sparse_export.formats.listed import bytes_of, file_of, listed_graph
from sparse_export.graph.foreign import external_files, onnx_from_file
from sparse_export.graph.promises import broken_patterns, promised_patterns
from sparse_export.graph.saved import model_sha256

__all__ = ["engines_are_of_the_graph", "files_are_whole", "graph_keeps_its_pattern"]

# What is compared of a layer. Reasons are left out: their wording may change from release to release.
_SAME = (
    *("node", "op_type", "weight", "shape", "reduction_axis"),
    *("n_weights", "n_nonzero", "constant", "pattern_holds"),
)


def files_are_whole(case: Case) -> Finding:
    """Every file of both bundles is the one that its manifest lists; the indispensable ones are listed."""
    n_files, n_dense = len(case.bundle.info.files), len(case.dense.info.files)  # opened, and so checked, here
    n_bytes = sum(file.size_bytes for file in case.bundle.info.files.values())
    digest = case.bundle.manifest_sha256
    vouched = "this user vouches for" if trust.is_trusted(digest) else "nobody here has vouched for yet"
    return Finding(
        told=(
            f"{n_files} files of {n_bytes:,} bytes have the SHA-256 that the manifest lists",
            f"the manifest is {digest[:12]}, which {vouched}",
            f"{n_dense} files of the dense bundle have theirs too",
        ),
        figures={"n_files": n_files, "size_bytes": n_bytes, "manifest_sha256": digest},
    )


def graph_keeps_its_pattern(case: Case) -> Finding:
    """The layers of the graph are those that were built, keep their patterns, and give the golden answer."""
    info = case.bundle.info
    promised = promised_patterns(info.layers)
    if broken := broken_patterns(case.graph, promised):
        raise GateFailed(
            f"The graph of {case.bundle.path} does not keep what was promised: {'; '.join(broken[:5])}.",
            expected=(
                "Layers that multiply by those weights, N of M along the axis they sum over, were expected."
            ),
            do="Build it again from its run.",
        )
    _require_same_layers(case)
    if DENSE_MODEL_FILE in info.files and _dense_file_digest(case) != _graph_digest(case):
        raise ArtefactError(
            f"{case.bundle.path / DENSE_MODEL_FILE} is not the graph of {MODEL_FILE} with dense weights.",
            expected="The same network in both files was expected.",
            do="Build the bundle again with --onnx both.",
        )
    golden = golden_parity(case.bundle, n_threads=case.n_threads, trust=case.trust)
    usable = Counter(layer.eligible for layer in case.layers)
    holds = sum(layer.pattern_holds is True for layer in case.layers)
    told = (
        (
            f"{len(case.layers)} layers are unchanged since the build; {len(promised)} have a promised "
            "pattern, which the graph keeps"
        ),
        f"{holds} hold 2:4; hardware can use {usable['yes']} of them",
        f"the golden answer differs by {golden.max_abs_difference:.3g} at most",
    )
    figures: dict[str, Figure] = {
        "n_layers": len(case.layers),
        "n_two_four": holds,
        "n_eligible": usable["yes"],
        "golden_difference": golden.max_abs_difference,
    }
    problem = None
    if not golden.ok:
        wrong = differing(golden, "the golden pair", atol=info.atol, rtol=info.rtol, rms=info.rms)
        problem = GateFailed(
            f"{case.bundle.path / MODEL_FILE} gives another answer than the stored one: {'; '.join(wrong)}.",
            do="Build it again from its run.",
        )
    return Finding(told=told, figures=figures, problem=problem)


def _require_same_layers(case: Case) -> None:
    """Raise ArtefactError when the layers of the graph are not those that `build` wrote down."""
    content = bytes_of(case.bundle, LAYERS_FILE)
    try:
        rows = json.loads(content)["layers"]
        recorded = [{key: row[key] for key in _SAME} for row in rows]
    except (ValueError, KeyError, TypeError, RecursionError) as cause:
        raise ArtefactError(
            f"{case.bundle.path / LAYERS_FILE} cannot be read: {cause!r}.",
            expected="The table of layers that a build writes was expected.",
            do="Build the bundle again.",
        ) from cause
    found = [_row(layer) for layer in case.layers]
    for wanted, got in zip(recorded, found, strict=False):
        for key in _SAME:
            if wanted[key] != got[key]:
                raise _another_graph(case, f"{wanted['node']} has {key} {got[key]}", f"{wanted[key]}")
    if len(recorded) != len(found):
        raise _another_graph(case, f"it has {len(found)} layers", f"{len(recorded)}")


def _row(layer: GraphLayer) -> dict[str, object]:
    row = asdict(layer)
    return {key: list(row[key]) if isinstance(row[key], tuple) else row[key] for key in _SAME}


def _another_graph(case: Case, found: str, wanted: str) -> ArtefactError:
    return ArtefactError(
        f"The graph of {case.bundle.path} is not the one that was built: {found}.",
        expected=f"{LAYERS_FILE}, written by the build, tells of {wanted}.",
        do="Build it again from its run, and find out who changed the file.",
    )


def _dense_file_digest(case: Case) -> str:
    """SHA-256 of the graph in the dense file, as if it were one file."""
    bundle = case.bundle
    file = listed_graph(bundle.path, bundle.info.files, DENSE_MODEL_FILE, described_by=BUNDLE_FILE)
    return sha256_file(file) if not external_files(file) else model_sha256(onnx_from_file(file))


def _graph_digest(case: Case) -> str:
    """SHA-256 of the graph with dense weights, as engines are built from it."""
    return model_sha256(case.graph)


def engines_are_of_the_graph(case: Case) -> Finding:
    """Each engine is the file that was built, from this very graph, and this user vouches for it.

    No library and no GPU is asked. That an engine holds what its manifest says cannot be read from the
    engine: it is believed because of who vouches for the manifest.
    """
    engines = case.bundle.info.engines
    if not engines:
        return Finding(told=("the bundle has no engine, only its ONNX file",), checked=False)
    own = case.bundle.info.engine_graph
    graph = MODEL_FILE if own is None else own.file
    digest = _graph_digest(case) if own is None else sha256_file(file_of(case.bundle, own.file))
    told = []
    for engine in engines:
        require_genuine(case.bundle, engine, trusted=case.trust)
        if engine.onnx_sha256 != digest:
            raise ArtefactError(
                f"The engine {case.bundle.path / engine.file} was built from the graph "
                f"{engine.onnx_sha256[:12]}….",
                expected=(
                    f"The graph of {graph} was expected, {digest[:12]}…: its engine computes something else."
                ),
                do="Build the bundle again, engine and graph together.",
            )
        told.append(f"{engine.file} was built from this graph, {digest[:12]}; {_kernels(case, engine)}")
    return Finding(told=tuple(told), figures={"n_engines": len(engines), "graph_sha256": digest})


def _kernels(case: Case, engine: EngineInfo) -> str:
    rows = read_engine_layers(file_of(case.bundle, LAYERS_FILE), engine.file)
    counts = Counter(row.state for row in rows)
    return "sparse kernels: " + (", ".join(f"{n} {state}" for state, n in counts.items()) or "not known")
