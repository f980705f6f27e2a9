"""A model for Triton's Python backend: TensorRT where there is an engine for the GPU, else onnxruntime.

Copied as `model.py` into a model repository, where it runs by itself: it needs numpy and onnxruntime, or
numpy, tensorrt and cuda-python, and uses sparse_export only where packed weights are to be expanded, and only
when it is there.

Beside it lies `model.json`: `inputs` and `outputs` (names), `batched` (samples come first in all of them, so
that requests may be merged), `scalars` (those whose size of 1 is there for the server alone), `threads`,
`model` (an ONNX file), `packed`, and `engines` (file by compute capability), `host_code` (those of them that
bring a runtime of their own along), `sha256` of each file, and, under `serve` alone, `activity`, a folder for
a file that counts executions.

It imports `tensorrt` itself, since `sparse_export.engines.tensorrt_import` is not installed where this file
runs. Its calls are type-checked against the same stubs of TensorRT 10.13 as `runtimes/tensorrt.py`, which
makes the same; TensorRT 11 keeps all of them.

Tensors go in and out by DLPack. The server may have been compiled against numpy 1, and then reads no data at
all from the arrays of numpy 2 that `pb_utils.Tensor` would be given: it answers 200, the right shape, and
zero bytes.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import math
import mmap
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tensorrt as trt

_USED = b"used_dltensor"  # kept: a capsule stores a pointer to its name
_SetName = ctypes.pythonapi.PyCapsule_SetName
_SetName.argtypes = [ctypes.py_object, ctypes.c_char_p]
_SetName.restype = ctypes.c_int


class TritonPythonModel:
    """The class that the backend looks up by name."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the network once. args: strings, from the backend."""
        import triton_python_backend_utils as pb_utils

        self._pb = pb_utils
        folder = Path(args["model_repository"]) / args["model_version"]
        document = json.loads((folder / "model.json").read_text())
        for name in (document["model"], *document["engines"].values()):
            if name not in document["sha256"]:
                raise RuntimeError(f"{folder / 'model.json'} has no SHA-256 of {name}, so it is not used")
        for name, digest in document["sha256"].items():
            if _sha256(folder / name) != digest:
                raise RuntimeError(f"{folder / name} is not the file that was packaged: its SHA-256 differs")
        self._inputs: list[str] = document["inputs"]
        self._batched: bool = document["batched"]
        self._scalars = frozenset(document["scalars"])
        device = int(args["model_instance_device_id"])
        on_gpu = args["model_instance_kind"] == "GPU"
        engine = document["engines"].get(_capability(device)) if on_gpu and document["engines"] else None
        self._network: Any
        if engine is not None:
            self._network = _Engine(
                folder / engine, device, self._inputs, document["outputs"], engine in document["host_code"]
            )
        else:
            self._network = _Onnxruntime(
                folder / document["model"], document["threads"], on_gpu, device, document
            )
        self._activity = _Activity(document.get("activity"), f"{args['model_instance_name']}-{os.getpid()}")
        pb_utils.Logger.log_info(
            f"{args['model_instance_name']}: {self._network.name}, numpy {np.__version__}"
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests, merged into batches; the backend has checked names, types and shapes."""
        self._activity.begin()
        try:
            return self._answer(requests)
        finally:
            self._activity.end()

    def _answer(self, requests: list[Any]) -> list[Any]:
        feeds = [{name: self._array(request, name) for name in self._inputs} for request in requests]
        answers: dict[int, Any] = {}
        for group in _mergeable(feeds, self._batched):
            parts = [feeds[at] for at in group]
            try:
                outputs = self._network.run(parts[0] if len(parts) == 1 else _joined(parts))
            except Exception as cause:  # noqa: BLE001 - a runtime may raise anything; it is the answer
                error = self._pb.TritonError(f"{self._network.name}: {cause}")
                answers |= {at: self._pb.InferenceResponse(error=error) for at in group}
                continue
            start = 0
            for at, part in zip(group, parts, strict=True):
                own = outputs
                if len(parts) > 1:
                    stop = start + len(part[self._inputs[0]])
                    own = {name: array[start:stop] for name, array in outputs.items()}
                    start = stop
                tensors = [self._tensor(name, array) for name, array in own.items()]
                answers[at] = self._pb.InferenceResponse(tensors)
        return [answers[at] for at in range(len(requests))]

    def _array(self, request: Any, name: str) -> np.ndarray:
        array: np.ndarray = np.from_dlpack(self._pb.get_input_tensor_by_name(request, name))
        return array[..., 0] if name in self._scalars else array

    def _tensor(self, name: str, array: np.ndarray) -> Any:
        capsule = (array[..., np.newaxis] if name in self._scalars else array).__dlpack__()
        tensor = self._pb.Tensor.from_dlpack(name, capsule)
        # The backend marks the capsule as used by a name that numpy does not know, and numpy would complain
        # on stderr at every request. This is the name that the DLPack protocol specifies.
        _SetName(capsule, _USED)
        return tensor

    def finalize(self) -> None:
        """Release all resources."""
        self._network.close()
        self._activity.close()


def _mergeable(feeds: list[dict[str, np.ndarray]], batched: bool) -> list[list[int]]:
    """Numbers of the requests that are one execution: those of one size, where samples come first."""
    groups: dict[object, list[int]] = {}
    for at, arrays in enumerate(feeds):
        key: object = tuple(array.shape[1:] for array in arrays.values()) if batched else at
        groups.setdefault(key, []).append(at)
    return list(groups.values())


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class _Activity:
    """Counts executions begun and ended in a file, two uint64, that `serve` reads while it drains."""

    def __init__(self, folder: str | None, name: str) -> None:
        self._map: mmap.mmap | None = None
        self._begun = self._ended = 0
        if folder is None:
            return
        with (Path(folder) / name).open("w+b") as stream:
            stream.truncate(16)
            self._map = mmap.mmap(stream.fileno(), 16)

    def begin(self) -> None:
        self._begun += 1
        if self._map is not None:
            struct.pack_into("<Q", self._map, 0, self._begun)

    def end(self) -> None:
        self._ended += 1
        if self._map is not None:
            struct.pack_into("<Q", self._map, 8, self._ended)

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None


class _Onnxruntime:
    """An ONNX file under onnxruntime."""

    def __init__(self, path: Path, threads: int, on_gpu: bool, device: int, document: dict[str, Any]) -> None:
        # As sparse_export.telemetry, which is not installed here. Set before the import; the user's own value
        # stays.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        gpu = on_gpu and "CUDAExecutionProvider" in ort.get_available_providers()
        providers: list[Any] = (
            [("CUDAExecutionProvider", {"device_id": device})] if gpu else ["CPUExecutionProvider"]
        )
        self._session = ort.InferenceSession(_dense(path, document["packed"]), options, providers=providers)
        self._outputs: list[str] = document["outputs"]
        self.name = f"onnxruntime {ort.__version__} {self._session.get_providers()[0]}"

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))

    def close(self) -> None:
        self._session = None


def _dense(path: Path, packed: bool) -> str | bytes:
    """What to load: the graph with packed 2:4 weights expanded and checked, where sparse_export is installed.

    Without it onnxruntime unpacks them itself, with the same result.
    """
    if not packed:
        return str(path)
    try:
        from sparse_export.graph.dense_file import dense_from_file
    except ImportError:
        return str(path)
    from google.protobuf.message import EncodeError  # type: ignore[import-untyped]

    try:
        content: bytes = dense_from_file(path).SerializeToString()
    except EncodeError:  # more than protobuf holds; the packing was checked
        return str(path)
    return content


def _capability(device: int) -> str:
    """Compute capability of a GPU, as in `9.0`."""
    from cuda.bindings import runtime

    status, properties = runtime.cudaGetDeviceProperties(device)
    _require(status)
    return f"{properties.major}.{properties.minor}"


def _require(status: Any) -> None:
    """Raise RuntimeError for a failed call of CUDA."""
    if int(status) != 0:
        raise RuntimeError(f"CUDA returned {status}")


_Shapes = list[tuple[int, ...]]
"""Of an input in a profile: the smallest, the one it is tuned for, and the largest."""


def _shapes(dims: Any) -> _Shapes:
    return [tuple(int(one[at]) for at in range(len(one))) for one in dims]


def _distance(ends: list[tuple[tuple[int, ...], _Shapes]]) -> float:
    """How far shapes are from those that a profile is tuned for; infinite where it does not take them."""
    total = 0.0
    for shape, (least, usual, most) in ends:
        if len(shape) != len(usual):
            return math.inf
        for found, low, tuned, high in zip(shape, least, usual, most, strict=True):
            if not low <= found <= high:
                return math.inf
            total += abs(tuned - found) / max(found, 1)
    return total


class _Engine:
    """A TensorRT engine, one execution at a time; its buffers grow with the batches.

    host_code: it is version compatible, and may run the code that it holds; whoever packaged it had to trust
    it.
    """

    def __init__(
        self, path: Path, device: int, inputs: list[str], outputs: list[str], host_code: bool
    ) -> None:
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = importlib.import_module("tensorrt")
        from cuda.bindings import runtime

        self._cuda = runtime
        _require(runtime.cudaSetDevice(device)[0])
        version: str = trt.__version__
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self._runtime.engine_host_code_allowed = host_code  # off by default; then no such engine is loaded
        engine: trt.ICudaEngine | None = self._runtime.deserialize_cuda_engine(path.read_bytes())
        context: trt.IExecutionContext | None = None if engine is None else engine.create_execution_context()
        if engine is None or context is None:
            raise RuntimeError(
                f"TensorRT {version} cannot load {path}: it was built by another version or GPU"
            )
        self._engine, self._context = engine, context
        nptype: Any = trt.nptype  # it is written in Python, without types
        self._dtypes = {name: np.dtype(nptype(engine.get_tensor_dtype(name))) for name in (*inputs, *outputs)}
        self._inputs, self._outputs = inputs, outputs
        self._profiles = [
            {name: _shapes(engine.get_tensor_profile_shape(name, index)) for name in inputs}
            for index in range(engine.num_optimization_profiles)
        ]
        self._profile = 0
        status, self._stream = runtime.cudaStreamCreate()
        _require(status)
        self._buffers: dict[str, tuple[int, int]] = {}
        self.name = f"tensorrt {version}"

    def _select_profile(self, feeds: dict[str, np.ndarray]) -> None:
        """Select, of the profiles that take these shapes, the one that is tuned for the nearest."""
        distances = [
            _distance([(feeds[name].shape, shapes) for name, shapes in profile.items()])
            for profile in self._profiles
        ]
        best = min(range(len(distances)), key=lambda at: distances[at])
        if distances[best] == math.inf:
            given = ", ".join(f"{name} {array.shape}" for name, array in feeds.items())
            taken = "; ".join(
                ", ".join(f"{name} {least} to {most}" for name, (least, _, most) in profile.items())
                for profile in self._profiles
            )
            raise ValueError(f"{given} fits no profile of the engine, which takes {taken}")
        if best != self._profile:
            if not self._context.set_optimization_profile_async(best, int(self._stream)):
                raise RuntimeError(f"TensorRT refused profile {best}")
            self._profile = best

    def _buffer(self, name: str, size: int) -> int:
        """Address of a device buffer of size bytes at least."""
        pointer, room = self._buffers.get(name, (0, 0))
        if room < size:
            if pointer:
                _require(self._cuda.cudaFree(pointer)[0])
            status, pointer = self._cuda.cudaMalloc(size)
            _require(status)
            self._buffers[name] = (pointer, size)
        self._context.set_tensor_address(name, pointer)
        return pointer

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self._select_profile(feeds)
        cuda, kind = self._cuda, self._cuda.cudaMemcpyKind
        up, down = kind.cudaMemcpyHostToDevice, kind.cudaMemcpyDeviceToHost
        arrays = {name: np.asarray(array, order="C") for name, array in feeds.items()}
        for name, array in arrays.items():
            if array.dtype != self._dtypes[name] or not self._context.set_input_shape(name, array.shape):
                raise ValueError(f"the engine takes no {name} of {array.dtype} and shape {array.shape}")
            source = self._buffer(name, array.nbytes)
            _require(cuda.cudaMemcpyAsync(source, array.ctypes.data, array.nbytes, up, self._stream)[0])
        outputs, targets = {}, {}
        for name in self._outputs:
            dims = self._context.get_tensor_shape(name)
            shape = [int(dims[at]) for at in range(len(dims))]
            if -1 in shape:
                raise ValueError(f"how long {name} is depends on the values of the inputs")
            outputs[name] = np.empty(shape, self._dtypes[name])
            targets[name] = self._buffer(name, outputs[name].nbytes)
        if not self._context.execute_async_v3(int(self._stream)):
            raise RuntimeError("the engine did not run")
        for name, array in outputs.items():
            copied = cuda.cudaMemcpyAsync(array.ctypes.data, targets[name], array.nbytes, down, self._stream)
            _require(copied[0])
        _require(cuda.cudaStreamSynchronize(self._stream)[0])
        return outputs

    def close(self) -> None:
        for pointer, _ in self._buffers.values():
            self._cuda.cudaFree(pointer)
        self._buffers.clear()
        del self._context, self._engine, self._runtime  # in this order, as the library wants
        self._cuda.cudaStreamDestroy(self._stream)
