"""Runs an ONNX file with onnxruntime, on exactly the device that was named."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from sparse_export.files import temporary_folder
from sparse_export.graph import saved
from sparse_export.graph.dense_file import dense_from_file, names_packing
from sparse_export.graph.passes.float16 import value_types, with_bfloat16_emulated
from sparse_export.graph.protobuf import parsed_without_large_data
from sparse_export.graph.saved import save_model, weight_bytes
from sparse_export.onnxruntime_import import load_onnxruntime
from sparse_export.runtimes import Session
from sparse_export.runtimes.engine_cache import EngineCache, open_cache
from sparse_export.runtimes.session import BaseSession
from sparse_export.signature import DTYPES, Array, Feeds, Signature, TensorInfo

__all__ = ["open_session", "provider_of", "require_provider"]

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_DTYPES = {f"tensor({name})": name for name in DTYPES} | {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
}
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
_EXACT_INT8 = "session.x64quantprecision"  # else int8 sums saturate at 16 bits on a CPU without VNNI
_QDQ_AS_WRITTEN = "session.disable_quant_qdq"
_ONLY_FATAL = 4
_NO_MEMORY = ("bad_alloc", "failed to allocate", "out of memory")


def open_session(
    model_path: Path,
    *,
    signature: Signature | None = None,
    inner: Sequence[str] = (),
    n_threads: int | None = None,
    provider: str = "cpu",
) -> Session:
    """Load an ONNX file. Packed 2:4 weights are expanded, and checked, in memory.

    signature: of the file, for the names of its free sizes; None for the file's own.  inner: names of values
    inside the graph, or of appended outputs, that are given as outputs too, behind the others.  n_threads:
    threads inside an operator; None leaves the choice to onnxruntime (one for each core). Operators run one
    after the other.  provider: `cpu`, `cuda` or `tensorrt`; no other device takes its place when it is
    absent. Raises UsageError (no such file, n_threads below 1), UnknownNameError (provider),
    MissingCapability (this machine cannot run the provider) or ArtefactError (not a usable ONNX file, of
    another signature, or packed weights that are damaged).
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
    return _OnnxruntimeSession(model_path, signature, inner, n_threads, provider)


def require_provider(provider: str) -> None:
    """Raise UnknownNameError, or MissingCapability for a provider that cannot work here."""
    if provider not in _PROVIDERS:
        raise UnknownNameError("onnxruntime provider", provider, _PROVIDERS)
    offered = load_onnxruntime().get_available_providers()
    if _PROVIDERS[provider] not in offered:
        raise _missing(provider, f"it offers {', '.join(offered)}")
    if provider != "cpu" and gpu() is None:
        raise _missing(provider, "there is no CUDA device")


def provider_of(provider: str) -> str:
    """Look up onnxruntime's name of a provider, with the libraries that it needs loaded.

    provider: one that `require_provider` has let pass.
    """
    if provider != "cpu":
        _load_cuda_libraries()
    return _PROVIDERS[provider]


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


def _looked_at(model_path: Path) -> tuple[frozenset[int], bool]:
    """Types of the values in an ONNX file, and whether it names the packed format; weights are not read.

    Nothing for a file that is none, which onnxruntime will say.
    """
    try:
        bare = parsed_without_large_data(model_path)
    except (DecodeError, OSError, ValueError):
        return frozenset(), False
    return value_types(bare), names_packing(bare.SerializeToString())


@contextlib.contextmanager
def _content(model_path: Path, emulated: bool, packed: bool, inner: Sequence[str]) -> Iterator[Path | bytes]:
    """What to load: the file itself, the dense form of a packed one, or one with more outputs.

    onnxruntime unpacks too, to the same result, but checks nothing, and is not faster.

    Args:
        model_path: of the file.
        emulated: bfloat16 is.
        packed: it names the packed format.
        inner: names of values that become outputs.

    Yields:
        A form in memory, or a file; one that is written for a form that is too large is gone in the end, and
        onnxruntime keeps what it mapped of it.
    """
    if not emulated and not packed and not inner:
        yield model_path
        return
    if emulated or packed:
        model = dense_from_file(model_path)
    else:
        model = onnx.load(model_path, load_external_data=False)
    _give_out(model.graph, inner)
    if emulated:
        model = with_bfloat16_emulated(model)
    if weight_bytes(model) <= saved.MAX_WEIGHT_BYTES:
        yield model.SerializeToString()
        return
    with temporary_folder("session") as folder:
        save_model(model, folder / model_path.name)
        del model
        yield folder / model_path.name


def _give_out(graph: onnx.GraphProto, inner: Sequence[str]) -> None:
    """Make values of a graph outputs too, in place. onnxruntime knows their types by itself."""
    told = {value.name: value for value in graph.value_info}
    given = {value.name for value in graph.output}
    graph.output.extend(told.get(name, onnx.ValueInfoProto(name=name)) for name in inner if name not in given)


def _missing(provider: str, why: str) -> MissingCapability:
    return MissingCapability(
        f"onnxruntime {load_onnxruntime().__version__} cannot run on {provider!r} here: {why}.",
        expected=f"{_PROVIDERS[provider]} was expected to work.",
        do="Install an onnxruntime with it, and the libraries that it needs, or use the provider 'cpu'.",
    )


def _not_run(model_path: Path, name: str, feeds: Feeds, cause: Exception) -> SparseExportError:
    """The error to raise where a session that was open did not run inputs that fit it."""
    shapes = ", ".join(f"{name} {array.shape}" for name, array in feeds.items())
    what = f"onnxruntime {load_onnxruntime().__version__} cannot run {model_path} on {shapes}: {cause}."
    if any(sign in str(cause).lower() for sign in _NO_MEMORY):
        return MissingCapability(
            what,
            expected=f"Enough memory for {name} was expected.",
            do="Take a smaller batch, or a machine with more.",
        )
    return ArtefactError(
        what,
        expected="A file that can be run on every input of its declared shape was expected.",
        do="Build a bundle again from its run; of a file, give inputs that it was made for by --inputs, and "
        "name axes that belong together by --axes.",
    )


def _signature(session: Any, model_path: Path) -> Signature:
    """Read from a session. Raises ArtefactError for inputs or outputs that are no arrays of numbers."""
    try:
        ends = [
            [(one.name, one.type, tuple(one.shape)) for one in some]
            for some in (session.get_inputs(), session.get_outputs())
        ]
    except (UnicodeDecodeError, RuntimeError) as cause:
        raise ArtefactError(
            f"{model_path} names its inputs or outputs by what is no text: {cause}.",
            expected="Names in UTF-8 were expected.",
            do="Build the bundle again.",
        ) from cause
    found: list[tuple[TensorInfo, ...]] = []
    for some in ends:
        for name, kind, _ in some:
            if kind not in _DTYPES:
                raise ArtefactError(
                    f"{model_path} has {name}, of type {kind}, among its inputs and outputs.",
                    expected="Arrays of numbers were expected.",
                    do="Take what makes it out of the graph, to where the network is called.",
                )
        found.append(
            tuple(
                TensorInfo(name=name, dtype=_DTYPES[kind], shape=_sizes(name, shape))
                for name, kind, shape in some
            )
        )
    inputs, outputs = found
    first = next((one.shape[0] for one in inputs if one.shape and isinstance(one.shape[0], str)), None)
    return Signature(inputs=inputs, outputs=outputs, batch=first if isinstance(first, str) else None)


def _sizes(name: str, shape: tuple[int | str | None, ...]) -> tuple[int | str, ...]:
    """With a name for each free size that has none."""
    return tuple(
        size if isinstance(size, int) or size else f"{name}_{axis}" for axis, size in enumerate(shape)
    )


def _require_ends(found: Signature, wanted: Signature, model_path: Path) -> None:
    """Raise ArtefactError where a file is not of the signature that is told of it.

    Free sizes may have other names, and an output that is free in the file may be told to be fixed.
    """
    for what, ours, theirs in (
        ("inputs", found.inputs, wanted.inputs),
        ("outputs", found.outputs, wanted.outputs),
    ):
        same = [(one.name, one.dtype, len(one.shape)) for one in ours] == [
            (one.name, one.dtype, len(one.shape)) for one in theirs
        ] and all(
            a == b or not (isinstance(a, int) and isinstance(b, int))
            for one, other in zip(ours, theirs, strict=True)
            for a, b in zip(one.shape, other.shape, strict=True)
        )
        if not same:
            raise ArtefactError(
                f"{model_path} has the {what} {', '.join(map(str, ours))}.",
                expected=f"{', '.join(map(str, theirs))} was expected, as its description says.",
                do="Build the bundle again.",
            )


def _inside(found: Signature, wanted: Signature, inner: Sequence[str]) -> tuple[TensorInfo, ...]:
    """Values inside the graph, with the names that the wanted signature gives to the file's free sizes."""
    names = {
        own: told
        for one, other in zip(found.inputs, wanted.inputs, strict=True)
        for own, told in zip(one.shape, other.shape, strict=True)
        if isinstance(own, str)
    }
    return tuple(
        replace(
            one, shape=tuple(names.get(size, size) if isinstance(size, str) else size for size in one.shape)
        )
        for one in found.outputs
        if one.name in inner
    )


class _OnnxruntimeSession(BaseSession):
    """Owns one onnxruntime session."""

    def __init__(
        self,
        model_path: Path,
        signature: Signature | None,
        inner: Sequence[str],
        n_threads: int | None,
        provider: str,
    ) -> None:
        ort = load_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = _ONLY_FATAL
        options.intra_op_num_threads = n_threads or 0
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        wanted = _PROVIDERS[provider]
        types, packed = _looked_at(model_path)
        # onnxruntime computes in bfloat16 on no CPU: there every value is rounded to it instead, and the name
        # says so.
        emulated = provider == "cpu" and TensorProto.BFLOAT16 in types
        if TensorProto.FLOAT8E4M3FN in types:
            # onnxruntime 1.31.1 takes the Relu before an fp8 QuantizeLinear away, as it may for uint8: wrong
            # results.
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if TensorProto.FLOAT16 in types and TensorProto.INT8 in types:
            # As above, of int8 between float16: ResNet-18 was 0.33 of the spread off instead of 0.027.
            options.add_session_config_entry(_QDQ_AS_WRITTEN, "1")
        options.add_session_config_entry(_EXACT_INT8, "1")
        self._cache: EngineCache | None = None
        try:
            if provider != "cpu":
                _load_cuda_libraries()
                self._cache = open_cache(model_path) if provider == "tensorrt" else None
            chosen = _provider(provider, self._cache)
            with _content(model_path, emulated, packed, inner) as content:
                # Where a model is handed over in memory, its data lie beside the file all the same.
                beside = content if isinstance(content, Path) else model_path
                options.add_session_config_entry(_DATA_FOLDER, str(beside.absolute().parent))
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
        found = _signature(session, model_path)
        if signature is not None:
            file, told = (
                replace(one, outputs=tuple(end for end in one.outputs if end.name not in inner))
                for one in (found, signature.whole)
            )
            _require_ends(file, told, model_path)
            signature = replace(signature, outputs=(*signature.outputs, *_inside(found, signature, inner)))
        name = f"onnxruntime-{provider}{'-emulating-bfloat16' if emulated else ''}"
        super().__init__(name, signature or found)
        self._session: Any = session
        self._path = model_path

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        names = list(self.signature.output_names)
        try:
            arrays = self._session.run(names, dict(feeds))
        except Exception as cause:  # as above
            if outside := self.signature.outside(feeds):
                raise UsageError(f"{outside}.", do="Give inputs that were made for this network.") from cause
            raise _not_run(self._path, self.name, feeds, cause) from cause
        outputs: dict[str, Array] = dict(zip(names, arrays, strict=True))
        n = self.signature.n_samples(feeds)
        for one in self.signature.outputs:
            axis = one.axis(self.signature.batch)
            if axis is not None and outputs[one.name].shape[axis : axis + 1] != (n,):
                raise ArtefactError(
                    f"{self._path} answers {n} samples by {one.name} of shape {outputs[one.name].shape}.",
                    expected=f"{one} was expected, with as many samples as went in.",
                    do="Export the network so that its outputs have a batch axis.",
                )
        return outputs

    def _free(self) -> None:
        self._session = None  # which writes the timing cache
        if self._cache is not None:
            self._cache.keep()
