"""Builds the engines of a bundle, with their records for the manifest and the table of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from sparse_export import trust
from sparse_export.engines.build import BuiltEngine, build_engine
from sparse_export.engines.options import Bounds, EngineOptions, Precision, engine_file
from sparse_export.engines.progress import BuildProgress
from sparse_export.engines.tactics import engine_layers
from sparse_export.errors import EngineBuildFailed, MissingCapability, SparseExportError
from sparse_export.files import sha256_file, write_bytes
from sparse_export.formats.bundle import BUNDLE_FILE, Bundle, read_bundle_info
from sparse_export.formats.engines import EngineInfo
from sparse_export.formats.layers import EngineLayer, GraphLayer
from sparse_export.formats.listed import bytes_of
from sparse_export.graph.saved import model_sha256
from sparse_export.signature import Signature

__all__ = ["EngineProgress", "Engines", "add_engines"]

EngineProgress = Callable[[str, BuildProgress], None]
"""Called with the target and how far its build is."""


@dataclass(frozen=True, kw_only=True)
class Engines:
    """The engines that were built.

    Attributes:
        infos: one record for each engine.
        files: paths within the bundle, to list in the manifest.
        layers: of each engine, by its file.
        failures: by target, where this machine or the library is the cause.
    """

    infos: tuple[EngineInfo, ...]
    files: tuple[str, ...]
    layers: Mapping[str, tuple[EngineLayer, ...]]
    failures: Mapping[str, SparseExportError]


def add_engines(
    stage: Path,
    model: onnx.ModelProto,
    signature: Signature,
    layers: Sequence[GraphLayer],
    options: Sequence[EngineOptions],
    *,
    precision: Precision,
    previous: Path,
    progress: EngineProgress | None = None,
) -> Engines:
    """Build the engines of a dense graph into the folder of a bundle, one after the other.

    Args:
        stage: that folder, as yet under a temporary name.
        model: the dense graph, in `precision`.
        signature: of the graph.
        layers: of the graph.
        options: one for each engine.
        precision: for the names and records of the engines.
        previous: where the bundle will stand. The timing cache of this user's own bundle there is reused, and
            the files that repeat a failed build are kept beside it.
        progress: called with the target and how far its build is.

    Returns:
        The engines; a target that cannot be built here is among the failures.

    Raises:
        UsageError: no machine could build this.
        OutputError: a file cannot be written.
    """
    infos: list[EngineInfo] = []
    files: list[str] = []
    rows: dict[str, tuple[EngineLayer, ...]] = {}
    failures: dict[str, SparseExportError] = {}
    digest = model_sha256(model) if options else ""
    for one in options:
        observe = None if progress is None else (lambda state, target=one.target: progress(target, state))
        cache = f"engines/{one.target}.timing.cache"
        file = engine_file(one.target, precision, one.architectures)
        try:
            built = build_engine(
                model,
                stage / file,
                one,
                signature,
                precision=precision,
                timing_cache=_read_own_file(previous, cache),
                progress=observe,
                failure_folder=previous.with_name(f"{previous.name}-{one.target}-failed"),
            )
        except (MissingCapability, EngineBuildFailed) as cause:
            failures[one.target] = cause
            continue
        if one.target == "tensorrt" and built.architecture is not None:
            native = engine_file(one.target, precision, (built.architecture,))
            (stage / file).rename(stage / native)
            file = native
        if built.timing_cache:
            write_bytes(stage / cache, built.timing_cache)
        written = {file: None, f"{file}.log": built.log, f"{file}.json": built.inspection}
        for name, text in written.items():
            if text is not None:
                write_bytes(stage / name, text.encode())
        rows[file] = engine_layers(
            layers,
            target=one.target,
            sparse=one.sparse,
            lines=built.sparsity_lines,
            inspection=built.inspection,
        )
        files += [name for name in (*written, cache) if (stage / name).is_file()]
        kept = cache if built.timing_cache else None
        infos.append(_engine_info(file, one, one.bounds(signature), precision, built, digest, kept))
    return Engines(infos=tuple(infos), files=tuple(files), layers=rows, failures=failures)


def _engine_info(
    file: str,
    options: EngineOptions,
    profiles: tuple[dict[str, Bounds], ...],
    precision: Precision,
    built: BuiltEngine,
    digest: str,
    cache: str | None,
) -> EngineInfo:
    """The record of an engine. digest: of the dense graph."""
    return EngineInfo(
        file=file,
        target=options.target,
        precision=precision,
        version=built.version,
        gpu=built.gpu,
        architecture=built.architecture,
        architectures=options.architectures,
        hardware=options.hardware,
        version_compatible=options.version_compatible,
        profiles=profiles,
        sparse=options.sparse,
        parse_s=built.parse_s,
        build_s=built.build_s,
        onnx_sha256=digest,
        timing_cache=cache,
    )


def _read_own_file(bundle: Path, name: str) -> bytes | None:
    """Read a file of a bundle that this user built and nobody changed; None otherwise."""
    try:
        if not trust.is_trusted(sha256_file(bundle / BUNDLE_FILE)):
            return None
        return bytes_of(Bundle(path=bundle, info=read_bundle_info(bundle)), name)
    except (SparseExportError, OSError):
        return None
