"""Runs an engine with TensorRT or TensorRT for RTX, on tensors of torch.

Written against the interface of TensorRT 10.13, checked by its stubs; TensorRT 11 keeps all of it (NVIDIA,
"Migrating from TensorRT 10.x to 11.x", Removed Python APIs). Nothing of this has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_export.engines import tensorrt_import
from sparse_export.engines.loadable import require_loadable
from sparse_export.errors import ArtefactError, MissingCapability, UsageError
from sparse_export.formats.bundle import Bundle
from sparse_export.formats.engines import EngineInfo
from sparse_export.formats.listed import bytes_of
from sparse_export.runtimes.session import BaseSession
from sparse_export.signature import Array, Feeds, Signature, numpy_dtype
from sparse_export.trust import TrustedDigests

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["EngineSession", "Tensors", "open_engine", "profiler", "to_numpy", "to_torch"]

Tensors = Mapping[str, Any]
"""Tensors of torch, by the names of a network's inputs, or of its outputs."""
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}


def open_engine(
    bundle: Bundle, fact: EngineInfo, *, trust: TrustedDigests = None, cuda_graphs: bool = False
) -> EngineSession:
    """Load an engine of a bundle, after `require_loadable` has let it pass.

    trust: SHA-256 of the manifest, needed once for a bundle that was built elsewhere.  cuda_graphs: record
    the launches for inputs of each size at their first use, and replay them; TensorRT for RTX does that
    itself. Raises as `require_loadable` does, and ArtefactError when the library refuses the engine.
    """
    require_loadable(bundle, fact, trusted=trust)
    import torch

    if not torch.cuda.is_available():
        raise MissingCapability(
            f"torch {torch.__version__} sees no CUDA device, and engines run on its tensors.",
            expected="A torch built for CUDA, and a driver for it, were expected.",
            do="Install that torch, or use the ONNX file with onnxruntime.",
        )
    return EngineSession(bytes_of(bundle, fact.file), fact, bundle.info.signature, cuda_graphs=cuda_graphs)


def profiler(library: Any, tell: Callable[[str, float], None]) -> trt.IProfiler:
    """A profiler of TensorRT that tells the name of each layer and the ms that it took.

    TensorRT 11 keeps its interface: it is in none of the lists of what was removed (NVIDIA, "Migrating from
    TensorRT 10.x to 11.x"); TensorRT for RTX has it too.
    """
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = library

    class LayerTimes(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            tell(layer_name, ms)

    return LayerTimes()


def _sizes(dims: trt.Dims) -> tuple[int, ...]:
    return tuple(int(dims[at]) for at in range(len(dims)))


def _names(engine: trt.ICudaEngine) -> list[str]:
    return [engine.get_tensor_name(at) for at in range(engine.num_io_tensors)]


def to_torch(array: Array) -> Any:
    """The same values as a tensor on the CPU, of any type of a signature that torch has."""
    import torch

    whole = np.asarray(array, order="C")
    if array.dtype == numpy_dtype("bfloat16"):
        return torch.from_numpy(whole.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(whole)


def to_numpy(tensor: Any) -> Array:
    """The same values as an array, for a tensor anywhere."""
    import torch

    on_host = tensor.cpu()
    if on_host.dtype == torch.bfloat16:
        raw: Array = on_host.view(torch.int16).numpy()
        return raw.view(numpy_dtype("bfloat16"))
    found: Array = on_host.numpy()
    return found


class EngineSession(BaseSession):
    """Owns an engine with one context on one stream, and the memory of its inputs and outputs.

    plan: its content, which must be trusted: where `fact` says that it is version compatible, it brings a
    runtime of its own along, code that is run in this process.
    """

    def __init__(self, plan: bytes, fact: EngineInfo, signature: Signature, *, cuda_graphs: bool) -> None:
        import torch

        super().__init__(fact.target, signature)
        library: Any = tensorrt_import.library(fact.target)
        self._trt = library
        self._runtime: trt.Runtime = library.Runtime(library.Logger(library.Logger.ERROR))
        # Off by default, and then no version compatible engine is loaded (NVIDIA's documentation of the
        # attribute, and "Version Compatibility" in the TensorRT documentation).
        self._runtime.engine_host_code_allowed = fact.version_compatible
        engine: trt.ICudaEngine | None = self._runtime.deserialize_cuda_engine(plan)
        context = None if engine is None else self._new_context(engine, fact.target, cuda_graphs)
        if engine is None or context is None:
            raise ArtefactError(
                f"{fact.target} {fact.version} cannot load {fact.file}.",
                expected="An engine for this GPU, built by that version, was expected.",
                do="Build it again here.",
            )
        self._engine, self._context = engine, context
        self._require_ends(engine, fact)
        self._profiles = fact.profiles
        self._profile = 0
        self._stream = torch.cuda.Stream()
        self._uses_graphs = cuda_graphs
        self._replays = cuda_graphs and fact.target == "tensorrt"
        self._recorded: dict[tuple[tuple[int, ...], ...], tuple[Any, Tensors, Tensors]] = {}

    def _new_context(
        self, engine: trt.ICudaEngine, target: str, cuda_graphs: bool
    ) -> trt.IExecutionContext | None:
        if target == "tensorrt" or not cuda_graphs:
            return engine.create_execution_context()
        # TensorRT for RTX compiles kernels for a shape while it runs, and knows by itself from when on a
        # graph can be captured (NVIDIA, "Working with RTX CUDA Graphs").
        rtx: Any = engine  # the stubs, of TensorRT, know nothing of this
        config = rtx.create_runtime_config()
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        context: trt.IExecutionContext | None = rtx.create_execution_context(config)
        return context

    def _require_ends(self, engine: trt.ICudaEngine, fact: EngineInfo) -> None:
        """Raise ArtefactError for an engine of other inputs, outputs and free sizes than its bundle's."""
        for bounds in fact.profiles:
            if set(bounds) != set(self.signature.free):
                raise ArtefactError(
                    f"A profile of {fact.file} bounds {', '.join(bounds) or 'no size'}.",
                    expected=f"The free sizes are {', '.join(self.signature.free) or 'none'}.",
                    do="Build the bundle again.",
                )
        found: dict[str, set[tuple[str, str | None]]] = {"inputs": set(), "outputs": set()}
        for name in _names(engine):
            is_input = engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT
            dtype = _DTYPES.get(engine.get_tensor_dtype(name).name)
            found["inputs" if is_input else "outputs"].add((name, dtype))
        whole = self.signature.whole
        for which, ends in (("inputs", whole.inputs), ("outputs", whole.outputs)):
            if found[which] != {(one.name, one.dtype) for one in ends}:
                raise ArtefactError(
                    f"{fact.file} has the {which} "
                    f"{', '.join(f'{name} {dtype}' for name, dtype in sorted(found[which], key=str))}.",
                    expected=f"{', '.join(map(str, ends))} was expected.",
                    do="Build the bundle again.",
                )

    @property
    def max_batch(self) -> int | None:
        """The most samples that one call takes; None where no size counts them."""
        batch = self.signature.batch
        return max((one[batch][2] for one in self._profiles if batch in one), default=None)

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        """Raises UsageError for sizes that are in no profile of the engine, too."""
        on_device = {name: to_torch(array).cuda(non_blocking=True) for name, array in feeds.items()}
        outputs = self.run_torch(on_device)
        return {name: to_numpy(outputs[name]) for name in self.signature.output_names}

    def run_torch(self, feeds: Tensors) -> Tensors:
        """Outputs on the GPU, for contiguous CUDA tensors of the signature's types; ready when this returns.

        What was launched on the current stream of torch before, and may still be writing the inputs, is
        waited for.
        """
        import torch

        self._require_open()
        self._select_profile(feeds)
        caller = torch.cuda.current_stream(next(iter(feeds.values())).device)
        if self._replays:
            graph, kept, recorded = self._recording(feeds)
            self._stream.wait_stream(caller)
            with torch.cuda.stream(self._stream):
                for name, tensor in kept.items():
                    tensor.copy_(feeds[name])
                graph.replay()
            self._stream.synchronize()
            return {name: one.clone() for name, one in recorded.items()}
        outputs = self._bind(feeds)  # memory of the caller's stream, which goes on to use it
        self._stream.wait_stream(caller)
        self._launch(self._stream)
        self._stream.synchronize()
        return outputs

    def launcher(self, feeds: Feeds) -> Callable[[], object]:
        """As `DeviceSession.launcher`; good until the next `run`. Raises UsageError as `run` does."""
        import torch

        self._require_open()
        self.signature.require_feeds(feeds)
        self._select_profile(feeds)
        on_device = {name: to_torch(array).cuda() for name, array in feeds.items()}
        if self._replays:
            replay: Callable[[], object] = self._recording(on_device)[0].replay
            return replay
        self._launched = (on_device, self._bind(on_device))
        self._stream.synchronize()  # the profile is there, whatever stream comes next

        def once() -> None:
            self._require_open()
            self._launch(torch.cuda.current_stream())

        return once

    def profiled_pass(self, feeds: Feeds) -> Callable[[], list[tuple[str, float]]]:
        """A function that runs some inputs, and gives the name of each layer and its ms on the device.

        From now on this session is slower, each layer being timed by itself. Raises UsageError for sizes
        that are in no profile, and for a session with CUDA graphs, which launch no single layers.
        """
        self._require_open()
        if self._uses_graphs:
            raise UsageError(
                "This session replays CUDA graphs.",
                expected="One that launches each layer was expected.",
                do="Open the engine without CUDA graphs.",
            )
        self.signature.require_feeds(feeds)
        self._select_profile(feeds)
        told: list[tuple[str, float]] = []
        self._context.profiler = self._profiler = profiler(
            self._trt, lambda name, ms: told.append((name, ms))
        )
        self._context.enqueue_emits_profile = True  # each launch waits, and tells
        on_device = {name: to_torch(array).cuda() for name, array in feeds.items()}
        self._profiled = (on_device, self._bind(on_device))

        def once() -> list[tuple[str, float]]:
            self._require_open()
            told.clear()
            self._launch(self._stream)
            self._stream.synchronize()
            return list(told)

        return once

    def _select_profile(self, feeds: Mapping[str, Any]) -> None:
        """Select, of the profiles that take these sizes, the one that is tuned for the nearest."""
        sizes = {
            size: int(found)
            for one in self.signature.inputs
            for size, found in zip(one.shape, feeds[one.name].shape, strict=True)
            if isinstance(size, str)
        }
        fitting = [
            at
            for at, bounds in enumerate(self._profiles)
            if all(least <= sizes[name] <= most for name, (least, _, most) in bounds.items())
        ]
        if not fitting:
            taken = "; ".join(
                ", ".join(f"{name} {least} to {most}" for name, (least, _, most) in bounds.items())
                for bounds in self._profiles
            )
            given = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise UsageError(
                f"{given} fits no profile of the engine.",
                expected=f"It takes {taken}.",
                do="Split the batch, or build with another --profile.",
            )

        def distance(at: int) -> float:
            bounds = self._profiles[at]
            return sum(abs(usual - sizes[name]) / sizes[name] for name, (_, usual, _) in bounds.items())

        best = min(fitting, key=distance)
        if best != self._profile:
            if not self._context.set_optimization_profile_async(best, self._stream.cuda_stream):
                raise ArtefactError(
                    f"{self.name} did not take profile {best} of the engine.",
                    expected=f"It was expected to have {len(self._profiles)}, as the manifest tells.",
                    do="Build the engine again.",
                )
            self._profile = best

    def _bind(self, feeds: Tensors) -> Tensors:
        """Give the context its tensors; the outputs, made here, are returned."""
        import torch

        for name, tensor in feeds.items():
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                raise UsageError(
                    f"The engine takes no {name} of shape {tuple(tensor.shape)}.",
                    do="Give the inputs as the network's signature has them.",
                )
            self._context.set_tensor_address(name, tensor.data_ptr())
        outputs = {}
        for one in self.signature.whole.outputs:
            shape = _sizes(self._context.get_tensor_shape(one.name))
            if -1 in shape:
                raise UsageError(
                    f"How long {one.name} is depends on the values of the inputs, and engines are not run so "
                    "here.",
                    do="Run the ONNX file with onnxruntime, or cut the graph before that output.",
                )
            device = next(iter(feeds.values())).device
            outputs[one.name] = torch.empty(shape, dtype=getattr(torch, one.dtype), device=device)
            self._context.set_tensor_address(one.name, outputs[one.name].data_ptr())
        return outputs

    def _launch(self, stream: Any) -> None:
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise ArtefactError(
                f"{self.name} could not run the engine.",
                expected="An engine that was built for this GPU was expected.",
                do="Look at what the library wrote to stderr; build the engine again here.",
            )

    def _recording(self, feeds: Tensors) -> tuple[Any, Tensors, Tensors]:
        """The graph for inputs of these sizes, with the tensors that it reads and writes; recorded at first
        use.
        """
        import torch

        key = tuple(tuple(feeds[name].shape) for name in self.signature.input_names)
        if key not in self._recorded:
            kept = {name: tensor.clone() for name, tensor in feeds.items()}
            outputs = self._bind(kept)
            self._stream.wait_stream(torch.cuda.current_stream(next(iter(feeds.values())).device))
            for _ in range(2):  # what is set up at the first launches must not be recorded
                self._launch(self._stream)
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                self._launch(self._stream)
            self._recorded[key] = (graph, kept, outputs)
        return self._recorded[key]

    def _free(self) -> None:
        self._recorded.clear()
        del self._context, self._engine, self._runtime  # in this order, as the library wants
