"""Builds one engine in a child process, so that a crash of the library ends nothing else.

    python -m sparse_export.engines.worker REQUEST.json [EVENTS]

REQUEST.json is what `build.py` writes. EVENTS is the number of an open file descriptor, stdout by default,
that gets one JSON object a line. The log goes to stderr. Closing stdin cancels the build, where stdin is a
pipe.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sparse_export.engines import tensorrt_import
from sparse_export.errors import MissingCapability, SparseExportError

if TYPE_CHECKING:
    import tensorrt as trt  # noqa: TC004 - at run time the library is the one that the request names

__all__ = ["main"]

SPARSITY_MARK = "(Sparsity)"
SendEvent = Callable[..., None]


class _BuildError(Exception):
    """No engine was built, and why. kind: `graph`, `build`, `usage` or `cancelled`."""

    def __init__(self, kind: str, what: str) -> None:
        self.kind = kind
        super().__init__(what)


def main(words: list[str]) -> int:
    """Build the engine of a request.

    Args:
        words: path of the request, and the number of the file descriptor for events, if any.

    Returns:
        0, or 1 after a `failed` event.
    """
    with open(words[0], encoding="utf-8") as file:  # noqa: PTH123 - pathlib would be imported for this alone
        request = json.load(file)
    stream = os.fdopen(int(words[1]), "w") if len(words) > 1 else sys.stdout
    lock = threading.Lock()

    def send_event(event: str, **fields: Any) -> None:
        with lock:
            stream.write(json.dumps({"event": event, **fields}) + "\n")
            stream.flush()

    cancelled = threading.Event()
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=_wait_for_end_of_stdin, args=(cancelled,), daemon=True).start()
    try:
        _build(request, send_event, cancelled)
    except SparseExportError as error:
        kind = "missing" if isinstance(error, MissingCapability) else "usage"
        send_event("failed", kind=kind, what=error.what, expected=error.expected, do=error.do)
        return 1
    except _BuildError as error:
        send_event("failed", kind=error.kind, what=str(error))
        return 1
    return 0


def _wait_for_end_of_stdin(cancelled: threading.Event) -> None:
    while os.read(0, 4096):
        pass
    cancelled.set()


def _build(request: dict[str, Any], send_event: SendEvent, cancelled: threading.Event) -> None:
    """Build the engine, with TensorRT 10, TensorRT 11 or TensorRT for RTX alike."""
    # One process builds one engine with one library; the import above is for mypy.
    globals()["trt"] = tensorrt_import.library(request["target"])
    gpu = tensorrt_import.gpu()
    send_event(
        "started",
        version=tensorrt_import.version(request["target"]),
        gpu=gpu and gpu.name,
        architecture=gpu and gpu.architecture,
    )

    logger = _logger(send_event)
    builder = trt.Builder(logger)
    # TensorRT 10 needs the flag; in 11 every network is strongly typed, and the flag is still there (NVIDIA,
    # "Migrating from TensorRT 10.x to 11.x", Strongly Typed Networks Are Now Required).
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    start = time.perf_counter()
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["onnx"]):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        reported = [
            f"node {error.node_name()!r} of type {error.node_operator()}: {error.desc()}" for error in errors
        ]
        raise _BuildError("graph", "; ".join(reported) or "the parser gave no reason")
    parse_s = time.perf_counter() - start
    _require_types(network, request["precision"])

    config = builder.create_builder_config()
    _configure(config, request)
    _require_tensors(network)
    for shapes in request["profiles"]:
        profile = builder.create_optimization_profile()
        for name, bounds in shapes.items():
            smallest, usual, largest = (trt.Dims(shape) for shape in bounds)
            profile.set_shape(name, smallest, usual, largest)
        if config.add_optimization_profile(profile) < 0:
            raise _BuildError("usage", f"The shapes {_shapes_text(shapes)} do not fit the graph.")
    # In TensorRT for RTX a timing cache does nothing since 1.2: it times nothing (its own
    # DeprecationWarning).
    times_kernels = request["target"] == "tensorrt"
    cache_used = times_kernels and _load_timing_cache(config, request)
    monitor = _monitor(send_event, cancelled)
    config.progress_monitor = monitor

    start = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    build_s = time.perf_counter() - start
    if plan is None:
        raise _BuildError("cancelled" if cancelled.is_set() else "build", "the builder returned no engine")
    content = memoryview(plan)
    _write(request["engine"], content)
    if times_kernels:
        _save_timing_cache(config, request)
    send_event(
        "built",
        parse_s=parse_s,
        build_s=build_s,
        n_layers=network.num_layers,
        cache_used=cache_used,
        inspection=_inspection(logger, plan, request["version_compatible"]),
    )


def _require_tensors(network: trt.INetworkDefinition) -> None:
    """Raise for an input whose values, not only whose sizes, the engine would have to know bounds of."""
    for at in range(network.num_inputs):
        tensor = network.get_input(at)
        if tensor.is_shape_tensor:
            raise _BuildError(
                "usage",
                f"The values of the input {tensor.name} decide about sizes inside the graph, and an engine "
                "would hold for a few of them only. Make it a constant of the network.",
            )


def _require_types(network: trt.INetworkDefinition, precision: str | None) -> None:
    """Raise for a product that computes in float32 in a network that is meant to have none.

    The network is strongly typed: its products run in the types that the parser gave their inputs.
    """
    if precision in (None, "fp32"):
        return
    products = (trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION, trt.LayerType.MATRIX_MULTIPLY)
    wide = []
    for at in range(network.num_layers):
        layer = network.get_layer(at)
        inputs = [layer.get_input(number) for number in range(layer.num_inputs)]
        if layer.type in products and any(one is not None and one.dtype == trt.float32 for one in inputs):
            wide.append(layer.name)
    if wide:
        more = f" and {len(wide) - 1} more" if len(wide) > 1 else ""
        raise _BuildError(
            "usage",
            f"The product {wide[0]}{more} computes in float32, and an engine of {precision} is to have none. "
            "Its graph is not in that precision.",
        )


def _shapes_text(shapes: dict[str, list[list[int]]]) -> str:
    return ", ".join(
        f"{name} {' : '.join('x'.join(map(str, shape)) for shape in bounds)}"
        for name, bounds in shapes.items()
    )


def _configure(config: trt.IBuilderConfig, request: dict[str, Any]) -> None:
    """Set the builder's options; those of one library alone are only set for its target."""
    if request["sparse"]:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if request["workspace_bytes"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace_bytes"])
    if request["optimization_level"] is not None:
        config.builder_optimization_level = request["optimization_level"]
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the inspector names no kernels
    if request["hardware"] != "none":
        level = request["hardware"].upper().replace("-", "_")
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.__members__[level]
    if request["version_compatible"]:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if request["architectures"]:
        tensorrt_import.set_architectures(config, request["architectures"])


def _load_timing_cache(config: trt.IBuilderConfig, request: dict[str, Any]) -> bool:
    """Attach the cache of an earlier build, or an empty one where that is for another device or version."""
    old = request["timing_cache_in"]
    content = b""
    if old is not None:
        with open(old, "rb") as file:  # noqa: PTH123 - as above
            content = file.read()
    if content:
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return True
    config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return False


def _save_timing_cache(config: trt.IBuilderConfig, request: dict[str, Any]) -> None:
    cache = config.get_timing_cache()
    if cache is not None:
        _write(request["timing_cache_out"], bytes(cache.serialize()))


def _write(path: str, content: bytes | memoryview) -> None:
    with open(path, "wb") as file:  # noqa: PTH123 - as above
        file.write(content)


def _logger(send_event: SendEvent) -> trt.ILogger:
    """A logger that writes INFO and above to stderr, and sends lines on sparsity of any level as events."""
    marks = {
        trt.ILogger.Severity.INTERNAL_ERROR: "F",
        trt.ILogger.Severity.ERROR: "E",
        trt.ILogger.Severity.WARNING: "W",
        trt.ILogger.Severity.INFO: "I",
    }

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            on_sparsity = SPARSITY_MARK in msg
            mark = marks.get(severity)
            if on_sparsity:
                send_event("sparsity", line=msg)
            if mark is None and on_sparsity:
                mark = "V"
            if mark is not None:
                print(f"[{mark}] {msg}", file=sys.stderr, flush=True)

    return Logger()


def _monitor(send_event: SendEvent, cancelled: threading.Event) -> trt.IProgressMonitor:
    """A monitor that sends the phases of the build as events, and ends the build when it is cancelled."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            send_event("phase", name=phase_name, parent=parent_phase, n_steps=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            send_event("step", name=phase_name, step=step)
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            send_event("finished", name=phase_name)

    return Monitor()


def _inspection(logger: trt.ILogger, plan: trt.IHostMemory, version_compatible: bool) -> str | None:
    """The inspector's JSON; None where the engine cannot be loaded, as without a GPU.

    version_compatible: the engine holds a runtime of its own, which may run here since it was just built.
    """
    if tensorrt_import.gpu() is None:
        return None
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = version_compatible
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return None
    text: str = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
