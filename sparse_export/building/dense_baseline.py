"""Repeats the builder's own measurement: each engine against a twin built without sparse kernels, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import onnx

from sparse_export import child
from sparse_export.building.engines import EngineProgress, Engines
from sparse_export.engines.build import build_engine
from sparse_export.engines.options import EngineOptions
from sparse_export.engines.tactics import kernels_from_inspection
from sparse_export.errors import EngineBuildFailed, MissingCapability, SparseExportError
from sparse_export.files import sha256_file, temporary_folder, write_json
from sparse_export.formats.engines import EngineInfo
from sparse_export.formats.layers import EngineLayer, EngineTimes
from sparse_export.runtimes.layer_times import TimedLayers, compare_layers
from sparse_export.runtimes.layer_times_worker import timed_from_document

__all__ = ["TimedEngines", "time_engines", "timed_in_child"]

TimeEngines = Callable[[Mapping[str, Path], EngineInfo, int], dict[str, TimedLayers]]
"""Times engines, by name, at a batch size."""

_ROUNDS = 24
_BLOCK_S = 0.02
_WORKER = "sparse_export.runtimes.layer_times_worker"
_LIMIT_S = 600.0
_SAME = (
    "The engine is the same to the byte as one that was built without sparse kernels, so there is nothing to compare: "
    "the library did not use the permission."
)


@dataclass(frozen=True, kw_only=True)
class TimedEngines:
    """times: by an engine's file, one entry for each of its profiles.  files: written, to list in the manifest.

    failures: by target, what a machine or the library is to blame for.
    """

    times: Mapping[str, tuple[EngineTimes, ...]]
    files: tuple[str, ...]
    failures: Mapping[str, SparseExportError]


def time_engines(
    stage: Path,
    model: onnx.ModelProto,
    options: Sequence[EngineOptions],
    built: Engines,
    *,
    beside: Path,
    progress: EngineProgress | None = None,
    time: TimeEngines | None = None,
) -> TimedEngines:
    """Time each engine that was built into the folder of a bundle, at the optimum of each of its profiles.

    model: the dense graph that they were built from.  Its twin takes the timing cache of the engine's own build, so
    that layers without a sparse kernel get the same kernels. Every round is written to `ENGINE.times.json`.
    beside: where the bundle will stand; what repeats a failed build of a twin is kept beside it.
    time: by default in a process of its own.
    """
    timer = time or timed_in_child
    by_target = {one.target: one for one in options}
    times: dict[str, tuple[EngineTimes, ...]] = {}
    files: list[str] = []
    failures: dict[str, SparseExportError] = {}
    nodes = [node.name for node in model.graph.node]
    for fact in built.facts:
        try:
            rows, samples = _of_engine(
                stage,
                model,
                fact,
                by_target[fact.target],
                built.layers[fact.file],
                nodes,
                beside,
                progress,
                timer,
            )
        except (MissingCapability, EngineBuildFailed) as cause:
            failures[f"{fact.target}, timed layer by layer"] = cause
            continue
        times[fact.file] = rows
        if samples:
            name = f"{fact.file}.times.json"
            write_json(stage / name, {"batches": samples})
            files.append(name)
    return TimedEngines(times=times, files=tuple(files), failures=failures)


def _of_engine(
    stage: Path,
    model: onnx.ModelProto,
    fact: EngineInfo,
    options: EngineOptions,
    layers: Sequence[EngineLayer],
    nodes: Collection[str],
    beside: Path,
    progress: EngineProgress | None,
    timer: TimeEngines,
) -> tuple[tuple[EngineTimes, ...], dict[str, object]]:
    observe = (
        None if progress is None else (lambda state: progress(f"{fact.target} without sparse kernels", state))
    )
    cache = None if fact.timing_cache is None else (stage / fact.timing_cache).read_bytes()
    with temporary_folder() as folder:
        twin = folder / "dense.engine"
        built = build_engine(
            model,
            twin,
            replace(options, sparse=False),
            timing_cache=cache,
            progress=observe,
            failure_folder=beside.with_name(f"{beside.name}-{fact.target}-twin-failed"),
        )
        if sha256_file(twin) == sha256_file(stage / fact.file):
            batches = [optimum for _, optimum, _ in fact.profiles]
            return tuple(_not_timed(batch, _SAME) for batch in batches), {}
        inspection = stage / f"{fact.file}.json"
        told = inspection.read_text() if inspection.is_file() else None
        engines = {"dense": twin, "dense again": twin, "sparse": stage / fact.file}
        found, samples = [], {}
        for _, batch, _ in fact.profiles:
            timed = timer(engines, fact, batch)
            found.append(
                compare_layers(
                    timed,
                    layers,
                    dense_kernels=kernels_from_inspection(built.inspection),
                    sparse_kernels=kernels_from_inspection(told),
                    nodes=nodes,
                )
            )
            samples[str(batch)] = {name: one.samples_ms for name, one in timed.items()}
    return tuple(found), dict(samples)


def _not_timed(batch: int, note: str) -> EngineTimes:
    return EngineTimes(batch=batch, rows=(), whole=None, rounds=0, steady=True, note=note)


def timed_in_child(engines: Mapping[str, Path], engine: EngineInfo, batch: int) -> dict[str, TimedLayers]:
    """Time engines in a process of its own. Raises MissingCapability, or EngineBuildFailed when that crashed."""
    links = {f"{at}.engine": path for at, path in enumerate(engines.values())}
    request = {
        "engines": dict(zip(engines, links, strict=True)),
        "engine": asdict(engine),
        "batch": batch,
        "rounds": _ROUNDS,
        "block_s": _BLOCK_S,
    }
    try:
        return timed_from_document(child.call(_WORKER, request, limit_s=_LIMIT_S, links=links))
    except child.ChildError as error:
        raise error.as_one_of(MissingCapability, otherwise=EngineBuildFailed) from None
    except child.ChildFailed as failed:
        raise EngineBuildFailed(
            f"The process that timed the layers of {engine.file} {failed.how}.",
            expected="The time of each layer was expected.",
            do="Build without --time-layers.",
        ) from None
