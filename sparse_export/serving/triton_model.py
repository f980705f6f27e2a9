"""A model for Triton's Python backend: TensorRT where there is an engine for the GPU, else onnxruntime.

Copied as `model.py` into a model repository, where it runs by itself: it needs numpy and onnxruntime, or
numpy, tensorrt and cuda-python, and uses sparse_export only where packed weights are to be expanded, and only
when it is there.

Beside it lies `model.json`: `input`, `output`, `threads`, `model` (an ONNX file) and `engines` (file by
compute capability), `host_code` (those of them that bring a runtime of their own along), `sha256` of each
file, and, under `serve` alone, `activity`, a folder for a file that counts executions.

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
        self._input: str = document["input"]
        self._output: str = document["output"]
        device = int(args["model_instance_device_id"])
        on_gpu = args["model_instance_kind"] == "GPU"
        engine = document["engines"].get(_capability(device)) if on_gpu and document["engines"] else None
        self._network: Any
        if engine is not None:
            self._network = _Engine(
                folder / engine, device, self._input, self._output, engine in document["host_code"]
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
        """Answer requests, merged into one batch; the backend has checked names, types and shapes."""
        self._activity.begin()
        try:
            return self._answer(requests)
        finally:
            self._activity.end()

    def _answer(self, requests: list[Any]) -> list[Any]:
        pb = self._pb
        arrays = [np.from_dlpack(pb.get_input_tensor_by_name(r, self._input)) for r in requests]
        try:
            logits = self._network.run(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))
        except Exception as cause:  # noqa: BLE001 - a runtime may raise anything; it is the answer
            error = pb.TritonError(f"{self._network.name}: {cause}")
            return [pb.InferenceResponse(error=error) for _ in requests]
        responses, start = [], 0
        for array in arrays:
            part = logits[start : start + len(array)]
            start += len(array)
            responses.append(pb.InferenceResponse([self._tensor(part)]))
        return responses

    def _tensor(self, array: np.ndarray) -> Any:
        capsule = array.__dlpack__()
        tensor = self._pb.Tensor.from_dlpack(self._output, capsule)
        # The backend marks the capsule as used by a name that numpy does not know, and numpy would complain
        # on stderr at every request. This is the name that the DLPack protocol specifies.
        _SetName(capsule, _USED)
        return tensor

    def finalize(self) -> None:
        """Release all resources."""
        self._network.close()
        self._activity.close()


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
        self._outputs = [document["output"]]
        self._input = document["input"]
        self.name = f"onnxruntime {ort.__version__} {self._session.get_providers()[0]}"

    def run(self, batch: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._session.run(self._outputs, {self._input: batch})[0]
        return found

    def close(self) -> None:
        self._session = None


def _dense(path: Path, packed: bool) -> str | bytes:
    """What to load: the graph with packed 2:4 weights expanded and checked, where sparse_export is installed.

    Without it onnxruntime unpacks them itself, with the same result.
    """
    if not packed:
        return str(path)
    try:
        from sparse_export.graph.passes.pack24 import dense_from_file
    except ImportError:
        return str(path)
    content: bytes = dense_from_file(path).SerializeToString()
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


class _Engine:
    """A TensorRT engine, one execution at a time; its buffers grow with the batches.

    host_code: it is version compatible, and may run the code that it holds; whoever packaged it had to trust
    it.
    """

    def __init__(self, path: Path, device: int, input_name: str, output_name: str, host_code: bool) -> None:
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
        self._input, self._output = input_name, output_name
        self._profiles = [
            tuple(int(dims[0]) for dims in engine.get_tensor_profile_shape(input_name, index))
            for index in range(engine.num_optimization_profiles)
        ]
        self._profile = 0
        nptype: Any = trt.nptype  # it is written in Python, without types
        self._dtype = np.dtype(nptype(engine.get_tensor_dtype(output_name)))
        status, self._stream = runtime.cudaStreamCreate()
        _require(status)
        self._buffers: dict[str, tuple[int, int]] = {}
        self.name = f"tensorrt {version}"

    def _select_profile(self, n: int) -> None:
        """Select the profile whose optimum is nearest to a batch of n."""
        fitting = [at for at, (least, _, most) in enumerate(self._profiles) if least <= n <= most]
        if not fitting:
            sizes = ", ".join(f"{least} to {most}" for least, _, most in self._profiles)
            raise ValueError(f"a batch of {n} fits no profile of the engine, which takes {sizes}")
        best = min(fitting, key=lambda at: abs(self._profiles[at][1] - n))
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

    def run(self, batch: np.ndarray) -> np.ndarray:
        batch = np.ascontiguousarray(batch)
        self._select_profile(len(batch))
        cuda, kind = self._cuda, self._cuda.cudaMemcpyKind
        if not self._context.set_input_shape(self._input, batch.shape):
            raise ValueError(f"the engine takes no inputs of shape {batch.shape}")
        source = self._buffer(self._input, batch.nbytes)
        shape = self._context.get_tensor_shape(self._output)
        logits = np.empty([int(shape[at]) for at in range(len(shape))], self._dtype)
        target = self._buffer(self._output, logits.nbytes)
        up, down = kind.cudaMemcpyHostToDevice, kind.cudaMemcpyDeviceToHost
        _require(cuda.cudaMemcpyAsync(source, batch.ctypes.data, batch.nbytes, up, self._stream)[0])
        if not self._context.execute_async_v3(int(self._stream)):
            raise RuntimeError("the engine did not run")
        _require(cuda.cudaMemcpyAsync(logits.ctypes.data, target, logits.nbytes, down, self._stream)[0])
        _require(cuda.cudaStreamSynchronize(self._stream)[0])
        return logits

    def close(self) -> None:
        for pointer, _ in self._buffers.values():
            self._cuda.cudaFree(pointer)
        self._buffers.clear()
        del self._context, self._engine, self._runtime  # in this order, as the library wants
        self._cuda.cudaStreamDestroy(self._stream)
