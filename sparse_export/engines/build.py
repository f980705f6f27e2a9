"""Builds an engine of an ONNX graph in a child process."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from sparse_export import child
from sparse_export.engines.options import Bounds, EngineOptions, Precision, require_types
from sparse_export.engines.progress import Phases, Progress
from sparse_export.engines.tensorrt_import import install_hint, module_name
from sparse_export.errors import (
    EngineBuildFailed,
    MissingCapability,
    OutputError,
    SparseExportError,
    UsageError,
)
from sparse_export.files import move_file, temporary_folder, write_bytes
from sparse_export.graph.dense_file import dense_from_file
from sparse_export.graph.saved import save_model
from sparse_export.signature import Signature

__all__ = ["BuiltEngine", "build_engine", "engine_from_file"]

_TAIL_LINES = 12
# TensorRT for RTX numbers inner values in an order that depends on addresses: of 40 builds of one ResNet-18
# at random addresses 15 differed in three such names, of 40 at fixed addresses none (1.7.1, 2026-11-25). So
# the process restarts itself at fixed addresses where the system allows it (Linux; some containers do not).
# The environment changes the addresses too: of 25 bare builds, each with more in its environment, 3 differed
# from the other 22 in such names.
_AT_FIXED_ADDRESSES = (
    "import ctypes, os, sys\n"
    "try:\n"
    "    libc = ctypes.CDLL(None)\n"
    "    libc.personality(libc.personality(0xFFFFFFFF) | 0x0040000)  # ADDR_NO_RANDOMIZE\n"
    "except (OSError, AttributeError):\n"
    "    pass\n"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
)
# -S: does not search site-packages again; PYTHONPATH names the folders that this process has.
_WORKER = ("-S", "-m", "sparse_export.engines.worker", "request.json")
_CANCEL_S = 20.0  # a step of the builder may be long; after that the process is killed


@dataclass(frozen=True, kw_only=True)
class BuiltEngine:
    """An engine that was just written.

    Attributes:
        version: of the library.
        gpu: name of the GPU that it was built on, None without one.
        architecture: of that GPU, as in `sm90`.
        n_layers: of the parsed network.
        parse_s: seconds that the library took to parse the graph.
        build_s: seconds that it took to build.
        cache_used: the timing cache of an earlier build was used.
        timing_cache: the new one, empty where the library has none.
        sparsity_lines: the builder's log lines on sparse kernels.
        inspection: the inspector's JSON, None where the engine could not be loaded.
        log: messages of level INFO and above.
    """

    version: str
    gpu: str | None
    architecture: str | None
    n_layers: int
    parse_s: float
    build_s: float
    cache_used: bool
    timing_cache: bytes
    sparsity_lines: tuple[str, ...]
    inspection: str | None
    log: str


def engine_from_file(
    onnx_file: Path,
    out: Path,
    options: EngineOptions,
    signature: Signature,
    *,
    progress: Progress | None = None,
) -> BuiltEngine:
    """Build an engine of an ONNX file, dense or packed, as `build_engine` does.

    Args:
        onnx_file: the graph.
        out: the engine to write.
        options: how to build it.
        signature: of the graph.
        progress: called at each step.

    Raises:
        SparseExportError: as `build_engine`.
    """
    return build_engine(dense_from_file(onnx_file), out, options, signature, progress=progress)


def build_engine(
    model: onnx.ModelProto,
    out: Path,
    options: EngineOptions,
    signature: Signature,
    *,
    precision: Precision | None = None,
    timing_cache: bytes | None = None,
    progress: Progress | None = None,
    failure_folder: Path | None = None,
) -> BuiltEngine:
    """Build an engine and write it to `out`. An interruption cancels the build and leaves nothing behind.

    Args:
        model: a dense graph.
        out: the engine to write.
        options: how to build it.
        signature: of the graph; its inputs take the sizes that the profiles of the options allow.
        precision: of the graph, whose products then compute in no float32 unless it is fp32; None for a graph
            of any types.
        timing_cache: of an earlier build.
        progress: called at each step.
        failure_folder: gets the graph, the log and a script that repeats this build when it fails; beside
            `out` by default.

    Raises:
        MissingCapability: the library is missing, or needs a GPU that is not here.
        UsageError: the profiles leave a free size without bounds or do not fit the graph, an input or output
            is of a type that engines do not have, or a product computes in float32 that is not to.
        EngineBuildFailed: the graph cannot be parsed, the builder returned no engine, or the process crashed.
        OutputError: the engine cannot be written.
    """
    require_types(signature)
    profiles = [_shapes(signature, sizes) for sizes in options.bounds(signature)]
    with temporary_folder() as work:
        save_model(model, work / "model.onnx")
        if timing_cache:
            (work / "timing.cache").write_bytes(timing_cache)
        request: dict[str, Any] = {
            **asdict(options),
            "precision": precision,
            "profiles": profiles if signature.free else [],
            "onnx": "model.onnx",
            "engine": "model.engine",
            "timing_cache_in": "timing.cache" if timing_cache else None,
            "timing_cache_out": "new-timing.cache",
        }
        (work / "request.json").write_text(json.dumps(request, indent=2))
        outcome = _run(work, progress)
        if outcome.built is None:
            failed = failure_folder or out.with_name(f"{out.name}.failed")
            raise _error(outcome, options, work, failed)
        move_file(work / request["engine"], out)
        started, built = outcome.started or {}, outcome.built
        cache = work / request["timing_cache_out"]
        return BuiltEngine(
            version=started["version"],
            gpu=started["gpu"],
            architecture=started["architecture"],
            n_layers=built["n_layers"],
            parse_s=built["parse_s"],
            build_s=built["build_s"],
            cache_used=built["cache_used"],
            timing_cache=cache.read_bytes() if cache.is_file() else b"",
            sparsity_lines=tuple(outcome.sparsity_lines),
            inspection=built["inspection"],
            log=_log(work),
        )


def _shapes(signature: Signature, sizes: Mapping[str, Bounds]) -> dict[str, list[list[int]]]:
    """The smallest, the usual and the largest shape of each input."""
    at_each = [{name: bounds[which] for name, bounds in sizes.items()} for which in range(3)]
    return {one.name: [list(one.sizes(known)) for known in at_each] for one in signature.inputs}


@dataclass(kw_only=True)
class _Outcome:
    """What the child process reported, and how it ended."""

    returncode: int
    started: dict[str, Any] | None
    built: dict[str, Any] | None
    failed: dict[str, Any] | None
    sparsity_lines: list[str]


def _run(work: Path, progress: Progress | None) -> _Outcome:
    """Run the worker in a folder, and read its events until it ends."""
    reading, writing = os.pipe()
    try:
        with (work / "build.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-IS", "-c", _AT_FIXED_ADDRESSES, *_WORKER, str(writing)],
                cwd=work,
                env=child.environment(),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(writing,),
                start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the other
            )
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    outcome = _Outcome(returncode=0, started=None, built=None, failed=None, sparsity_lines=[])
    with _ended(process), os.fdopen(reading, encoding="utf-8", errors="replace") as events:
        phases = Phases()
        for line in events:
            _take(line, outcome, phases, progress)
        process.wait()
    outcome.returncode = process.returncode
    if process.returncode:
        outcome.built = None
    return outcome


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End the process when the block ends: cancel it, and kill it if that does not end it in time."""
    try:
        yield
    finally:
        if process.stdin is not None:
            process.stdin.close()  # cancels the build
        try:
            process.wait(_CANCEL_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _take(line: str, outcome: _Outcome, phases: Phases, progress: Progress | None) -> None:
    """Note one event of the worker. A line cut off by a crash is none."""
    try:
        event = json.loads(line)
    except ValueError:
        return
    state = None
    match event["event"]:
        case "started":
            outcome.started = event
        case "built":
            outcome.built = event
        case "failed":
            outcome.failed = event
        case "sparsity":
            outcome.sparsity_lines.append(event["line"])
        case "phase":
            state = phases.start(event["name"], event["parent"], event["n_steps"])
        case "step":
            state = phases.step(event["name"], event["step"])
        case "finished":
            state = phases.finish(event["name"])
    if state is not None and progress is not None:
        progress(state)


def _log(work: Path) -> str:
    """Everything that the library and the process wrote to stderr."""
    return (work / "build.log").read_text(encoding="utf-8", errors="replace")


def _error(outcome: _Outcome, options: EngineOptions, work: Path, folder: Path) -> SparseExportError:
    """The error of a failed build; the files that repeat it are kept in `folder`."""
    failed = outcome.failed
    if failed is not None and failed["kind"] == "missing":
        return MissingCapability(failed["what"], expected=failed["expected"], do=failed["do"])
    if failed is not None and failed["kind"] == "usage":
        return UsageError(failed["what"], expected=failed.get("expected", ""), do=failed.get("do", ""))
    log = _log(work)
    if _lacks_gpu(log):
        return MissingCapability(
            f"{module_name(options.target)} could not build without a GPU: {_last_error(log)}.",
            do="Build on the machine that the engine is for, with a driver that is new enough, or build for "
            "tensorrt-rtx, which needs no GPU.",
        )
    kept = _keep(work, folder)
    tail = "".join(f"\n    {line}" for line in child.last_lines(log, _TAIL_LINES))
    if failed is None:
        what = f"The process that built for {options.target} {child.ending(outcome.returncode)}."
        do = (
            "Report it to NVIDIA with that folder, or build with another --opt-level; "
            f"{install_hint(options.target)}."
        )
    elif failed["kind"] == "graph":
        what = f"{options.target} cannot read the graph: {failed['what']}."
        do = "Export the network without that operator, or build for onnx alone."
    else:
        last = "".join(f": {line}" for line in _errors(log)[-1:])
        what = f"{options.target} built nothing: {failed['what']}{last}."
        do = "Look at the log; a smaller profile or another precision may be built."
    return EngineBuildFailed(
        what,
        expected=f"{kept} The end of the log:{tail or ' it is empty.'}\n",
        do=do,
    )


def _keep(work: Path, folder: Path) -> str:
    """Keep the files that repeat the build, and say where they are."""
    words = [sys.executable, "-IS", "-c", _AT_FIXED_ADDRESSES, *_WORKER]
    script = (
        "#!/bin/sh\n# Repeats this build alone. Events go to stdout, the log to stderr.\n"
        f'cd "$(dirname "$0")" && exec env PYTHONPATH={shlex.quote(child.environment()["PYTHONPATH"])} '
        f"{shlex.join(words)} </dev/null\n"
    )
    try:
        for path in work.iterdir():
            if path.name not in ("model.engine", "new-timing.cache"):
                write_bytes(folder / path.name, path.read_bytes())
        write_bytes(folder / "repeat.sh", script.encode())
        (folder / "repeat.sh").chmod(0o755)
    except (OSError, OutputError) as cause:
        return f"The files that repeat the build could not be kept: {cause}"
    return f"{folder / 'repeat.sh'} repeats this build alone."


_NO_GPU = (
    "no cuda-capable device",
    "cuda driver version is insufficient",
    "cuinit failed",
    "unable to initialize cuda",
    "cuda initialization failure",
)


def _lacks_gpu(log: str) -> bool:
    """Did the build fail for want of a GPU?"""
    text = log.lower()
    return any(sign in text for sign in _NO_GPU)


def _last_error(log: str) -> str:
    """The last error of a log, or its last line."""
    return (_errors(log) or log.strip().splitlines() or ["no reason was given"])[-1].rstrip(".")


def _errors(log: str) -> list[str]:
    """What a log calls errors, without its marks."""
    lines = [line for line in log.splitlines() if line.startswith(("[E]", "[F]"))]
    return [line[3:].strip().rstrip(".") for line in lines]
