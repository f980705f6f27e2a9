"""Runs an ONNX file with onnxruntime, on exactly the device that was named."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto

from sparse_export.engines.tensorrt_import import gpu
from sparse_export.errors import (
    ArtefactError,
    MissingCapability,
    OutputError,
    SparseExportError,
    UnknownNameError,
    UsageError,
)
from sparse_export.graph.passes.float16 import value_types, with_bfloat16_emulated
from sparse_export.graph.passes.pack24 import dense_from_file, may_be_packed
from sparse_export.onnxruntime_import import load_onnxruntime
from sparse_export.runtimes import Session
from sparse_export.runtimes.engine_cache import EngineCache, open_cache
from sparse_export.runtimes.session import BaseSession

__all__ = ["open_session", "require_provider"]

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
_ONLY_FATAL = 4
_NO_MEMORY = ("bad_alloc", "failed to allocate", "out of memory")


def open_session(model_path: Path, *, n_threads: int | None = None, provider: str = "cpu") -> Session:
    """Load an ONNX file with one input and one output. Packed 2:4 weights are expanded, and checked, in
    memory.

    n_threads: threads inside an operator; None leaves the choice to onnxruntime (one for each core).
    Operators run one after the other.  provider: `cpu`, `cuda` or `tensorrt`; no other device takes its place
    when it is absent. Raises UsageError (no such file, n_threads below 1), UnknownNameError (provider),
    MissingCapability (this machine cannot run the provider) or ArtefactError (not a usable ONNX file, or
    packed weights that are damaged).
    """
    require_provider(provider)
    if n_threads is not None and n_threads < 1:
        raise UsageError(
            f"{n_threads} threads were asked for.",
            expected="At least 1 was expected.",
            do="Leave the number out to use every core.",
        )
    if not model_path.is_file():
        raise UsageError(f"{model_path} is not a file.", expected="An ONNX file was expected.")
    return _OnnxruntimeSession(model_path, n_threads, provider)


def require_provider(provider: str) -> None:
    """Raise UnknownNameError, or MissingCapability for a provider that cannot work here."""
    if provider not in _PROVIDERS:
        raise UnknownNameError("onnxruntime provider", provider, _PROVIDERS)
    offered = load_onnxruntime().get_available_providers()
    if _PROVIDERS[provider] not in offered:
        raise _missing(provider, f"it offers {', '.join(offered)}")
    if provider != "cpu" and gpu() is None:
        raise _missing(provider, "there is no CUDA device")


def _load_cuda_libraries() -> None:
    """Make onnxruntime find the CUDA libraries that came with torch, which has the same major versions."""
    importlib.import_module("torch")
    load_onnxruntime().preload_dlls()


def _provider(provider: str, cache: EngineCache | None) -> str | tuple[str, dict[str, str]]:
    """The provider with its options."""
    wanted = _PROVIDERS[provider]
    if cache is None:
        return wanted
    options = {
        "trt_sparsity_enable": "1",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache.path),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache.path),
    }
    return wanted, options


def _types(model_path: Path) -> frozenset[int]:
    """Types of the values in an ONNX file; empty for a file that is none, which onnxruntime will say."""
    try:
        return value_types(onnx.load(model_path, load_external_data=False))
    except (DecodeError, OSError, ValueError):
        return frozenset()


def _content(model_path: Path, emulated: bool) -> Path | bytes:
    """What to load: the file itself, or the dense form of a packed one.

    onnxruntime unpacks too, to the same result, but checks nothing, and is not faster.
    """
    if not emulated and not may_be_packed(model_path):
        return model_path
    model = dense_from_file(model_path)
    if emulated:
        model = with_bfloat16_emulated(model)
    if model.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF:  # cannot be handed over; checked all the same
        return model_path
    content: bytes = model.SerializeToString()
    return content


def _missing(provider: str, why: str) -> MissingCapability:
    return MissingCapability(
        f"onnxruntime {load_onnxruntime().__version__} cannot run on {provider!r} here: {why}.",
        expected=f"{_PROVIDERS[provider]} was expected to work.",
        do="Install an onnxruntime with it, and the libraries that it needs, or use the provider 'cpu'.",
    )


def _not_run(model_path: Path, name: str, x: np.ndarray, cause: Exception) -> SparseExportError:
    """The error to raise where a session that was open did not run a batch that fits it."""
    what = (
        f"onnxruntime {load_onnxruntime().__version__} cannot run {model_path} on {len(x)} samples: {cause}."
    )
    if any(sign in str(cause).lower() for sign in _NO_MEMORY):
        return MissingCapability(
            what,
            expected=f"Enough memory for {name} was expected.",
            do="Take a smaller batch, or a machine with more.",
        )
    return ArtefactError(
        what,
        expected="A file that can be run on every input of its declared shape was expected.",
        do="Build the bundle again from its run.",
    )


@dataclass(frozen=True, kw_only=True)
class _Ends:
    """The one input of a session and its one output. shape: a name or None where a size is free."""

    input: str
    shape: tuple[int | str | None, ...]
    dtype: np.dtype[Any]
    output: str


def _ends(session: Any, model_path: Path) -> _Ends:
    """Read from a session. Raises ArtefactError for others than one input and one output, both of floats."""
    try:
        inputs = [(one.name, one.type, tuple(one.shape)) for one in session.get_inputs()]
        outputs = [(one.name, one.type) for one in session.get_outputs()]
    except (UnicodeDecodeError, RuntimeError) as cause:
        raise ArtefactError(
            f"{model_path} names its inputs or outputs by what is no text: {cause}.",
            expected="Names in UTF-8 were expected.",
            do="Build the bundle again.",
        ) from cause
    if (
        len(inputs) != 1
        or len(outputs) != 1
        or inputs[0][1] not in _DTYPES
        or outputs[0][1] not in (*_DTYPES, "tensor(bfloat16)")
    ):
        raise ArtefactError(
            f"{model_path} has inputs {[(name, kind) for name, kind, _ in inputs]} and {len(outputs)} "
            "outputs, "
            f"{outputs}.",
            expected="One floating point input and one output, floating point too, were expected.",
            do="Export the network with one input and its logits as the only output.",
        )
    name, kind, shape = inputs[0]
    return _Ends(input=name, shape=shape, dtype=np.dtype(_DTYPES[kind]), output=outputs[0][0])


class _OnnxruntimeSession(BaseSession):
    """Owns one onnxruntime session."""

    def __init__(self, model_path: Path, n_threads: int | None, provider: str) -> None:
        ort = load_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = _ONLY_FATAL
        options.intra_op_num_threads = n_threads or 0
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        wanted = _PROVIDERS[provider]
        types = _types(model_path)
        # onnxruntime computes in bfloat16 on no CPU: there every value is rounded to it instead, and the name
        # says so.
        emulated = provider == "cpu" and TensorProto.BFLOAT16 in types
        if TensorProto.FLOAT8E4M3FN in types:
            # onnxruntime 1.31.1 takes the Relu before an fp8 QuantizeLinear away, as it may for uint8: wrong
            # results.
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        content = _content(model_path, emulated)
        self._cache: EngineCache | None = None
        try:
            if provider != "cpu":
                _load_cuda_libraries()
                self._cache = open_cache(model_path) if provider == "tensorrt" else None
            chosen = _provider(provider, self._cache)
            session = ort.InferenceSession(content, options, providers=[chosen], enable_fallback=False)
        except OutputError:
            raise
        except Exception as cause:  # onnxruntime's errors have no common base
            if provider != "cpu" and "load model" not in str(cause).lower():
                raise _missing(provider, str(cause)) from cause
            raise ArtefactError(
                f"onnxruntime {ort.__version__} cannot load {model_path}: {cause}.",
                expected="A whole ONNX file, of operators that this onnxruntime knows, was expected.",
                do="Build the bundle again, or install a newer onnxruntime.",
            ) from cause
        if session.get_providers()[0] != wanted:
            raise _missing(provider, f"the session came up on {session.get_providers()[0]}")
        ends = _ends(session, model_path)
        name = f"onnxruntime-{provider}{'-emulating-bfloat16' if emulated else ''}"
        super().__init__(name, ends.dtype, ends.shape)
        self._session: Any = session
        self._path = model_path
        self._input = ends.input
        self._outputs = [ends.output]

    def _run(self, x: np.ndarray) -> np.ndarray:
        try:
            y: np.ndarray = self._session.run(self._outputs, {self._input: x})[0]
        except Exception as cause:  # as above
            raise _not_run(self._path, self.name, x, cause) from cause
        if y.ndim < 2 or len(y) != len(x):
            raise ArtefactError(
                f"{self._path} answers {len(x)} samples by an output of shape {y.shape}.",
                expected=f"One row of logits for each was expected, ({len(x)}, classes).",
                do="Export the network with the batch as the first axis of its output.",
            )
        return y

    def _free(self) -> None:
        self._session = None  # which writes the timing cache
        if self._cache is not None:
            self._cache.keep()
