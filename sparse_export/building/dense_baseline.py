"""Times each engine, layer by layer, against its dense baseline: the same build without sparse kernels."""

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
from sparse_export.signature import Signature

__all__ = ["TimedEngines", "time_engines", "time_in_child"]

TimeEngines = Callable[[Mapping[str, Path], EngineInfo, Signature, Mapping[str, int]], dict[str, TimedLayers]]
"""Times engines, by name, at certain sizes; the record of the sparse engine comes second."""

_ROUNDS = 24
_BLOCK_S = 0.02
_WORKER = "sparse_export.runtimes.layer_times_worker"
_LIMIT_S = 600.0
_SAME = (
    "The engine is byte for byte the one that is built without sparse kernels: the library used none, "
    "so there is nothing to compare."
)


@dataclass(frozen=True, kw_only=True)
class TimedEngines:
    """The times of the layers of engines.

    Attributes:
        times: by an engine's file, one entry for each of its profiles.
        files: paths of the files that were written, to list in the manifest.
        failures: by target, where this machine or the library is the cause.
    """

    times: Mapping[str, tuple[EngineTimes, ...]]
    files: tuple[str, ...]
    failures: Mapping[str, SparseExportError]


def time_engines(
    stage: Path,
    model: onnx.ModelProto,
    signature: Signature,
    options: Sequence[EngineOptions],
    built: Engines,
    *,
    beside: Path,
    progress: EngineProgress | None = None,
    time: TimeEngines | None = None,
) -> TimedEngines:
    """Time each engine that was built into the folder of a bundle, at the optimum of each of its profiles.

    Every round is written to `ENGINE.times.json`.

    Args:
        stage: folder of the bundle, as yet under a temporary name.
        model: the dense graph that the engines were built from.
        signature: of the graph.
        options: as the engines were built with. The dense baseline is built with the same, sparse kernels not
            allowed, and with the timing cache of the engine's own build, so that all other layers get the
            same kernels.
        built: the engines.
        beside: where the bundle will stand; the files that repeat a failed build are kept beside it.
        progress: called with the target and how far the build of its baseline is.
        time: times engines; a process of its own by default.

    Returns:
        The times; an engine that cannot be timed here is among the failures.
    """
    timer = time or time_in_child
    by_target = {one.target: one for one in options}
    times: dict[str, tuple[EngineTimes, ...]] = {}
    files: list[str] = []
    failures: dict[str, SparseExportError] = {}
    nodes = [node.name for node in model.graph.node]
    for engine in built.infos:
        try:
            rows, samples = _time_engine(
                stage,
                model,
                signature,
                engine,
                by_target[engine.target],
                built.layers[engine.file],
                nodes,
                beside,
                progress,
                timer,
            )
        except (MissingCapability, EngineBuildFailed) as cause:
            failures[f"{engine.target}, timed layer by layer"] = cause
            continue
        times[engine.file] = rows
        if samples:
            name = f"{engine.file}.times.json"
            write_json(stage / name, {"batches": samples})
            files.append(name)
    return TimedEngines(times=times, files=tuple(files), failures=failures)


def _time_engine(
    stage: Path,
    model: onnx.ModelProto,
    signature: Signature,
    engine: EngineInfo,
    options: EngineOptions,
    layers: Sequence[EngineLayer],
    nodes: Collection[str],
    beside: Path,
    progress: EngineProgress | None,
    timer: TimeEngines,
) -> tuple[tuple[EngineTimes, ...], dict[str, object]]:
    """The table of each profile, and the samples, by its sizes; none where both engines are equal."""
    observe = (
        None
        if progress is None
        else (lambda state: progress(f"{engine.target} without sparse kernels", state))
    )
    cache = None if engine.timing_cache is None else (stage / engine.timing_cache).read_bytes()
    with temporary_folder() as folder:
        baseline = folder / "dense.engine"
        built = build_engine(
            model,
            baseline,
            replace(options, sparse=False),
            signature,
            timing_cache=cache,
            progress=observe,
            failure_folder=beside.with_name(f"{beside.name}-{engine.target}-twin-failed"),
        )
        optima = [{name: bounds[1] for name, bounds in one.items()} for one in engine.profiles]
        if sha256_file(baseline) == sha256_file(stage / engine.file):
            return tuple(_not_timed(signature, one, _SAME) for one in optima), {}
        inspection = stage / f"{engine.file}.json"
        inspected = inspection.read_text() if inspection.is_file() else None
        engines = {"dense": baseline, "dense again": baseline, "sparse": stage / engine.file}
        found, samples = [], {}
        for sizes in optima:
            timed = timer(engines, engine, signature, sizes)
            times = compare_layers(
                timed,
                layers,
                dense_kernels=kernels_from_inspection(built.inspection),
                sparse_kernels=kernels_from_inspection(inspected),
                nodes=nodes,
            )
            times = replace(times, sizes=_others(signature, sizes))
            found.append(times)
            key = times.sizes_text if times.sizes else str(times.batch)
            samples[key] = {name: one.samples_ms for name, one in timed.items()}
    return tuple(found), dict(samples)


def _others(signature: Signature, sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes but for the batch."""
    return {name: size for name, size in sizes.items() if name != signature.batch}


def _not_timed(signature: Signature, sizes: Mapping[str, int], note: str) -> EngineTimes:
    """A table without rows; the note says why."""
    return EngineTimes(
        batch=sizes.get(str(signature.batch), 1),
        rows=(),
        whole=None,
        rounds=0,
        steady=True,
        note=note,
        sizes=_others(signature, sizes),
    )


def time_in_child(
    engines: Mapping[str, Path], engine: EngineInfo, signature: Signature, sizes: Mapping[str, int]
) -> dict[str, TimedLayers]:
    """Time the layers of engines in a child process.

    Args:
        engines: paths, by name.
        engine: the record of the sparse one.
        signature: of the network.
        sizes: every free size, by name.

    Returns:
        The times of each engine, by its name.

    Raises:
        MissingCapability: an engine cannot be loaded here.
        EngineBuildFailed: the process crashed, or an engine failed in it.
    """
    links = {f"{at}.engine": path for at, path in enumerate(engines.values())}
    request = {
        "engines": dict(zip(engines, links, strict=True)),
        "engine": asdict(engine),
        "signature": asdict(signature),
        "sizes": dict(sizes),
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
            do="Build without --time-layers.",
        ) from None
