"""Runs an engine with TensorRT or TensorRT for RTX, on tensors of torch.

Written against the interface of TensorRT 10.13, checked by its stubs; TensorRT 11 keeps all of it (NVIDIA,
"Migrating from TensorRT 10.x to 11.x", Removed Python APIs). Nothing of this has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_export.engines import tensorrt_import
from sparse_export.engines.loadable import require_loadable
from sparse_export.errors import ArtefactError, MissingCapability, UsageError
from sparse_export.formats.bundle import Bundle
from sparse_export.formats.engines import EngineInfo
from sparse_export.formats.listed import bytes_of
from sparse_export.runtimes.session import BaseSession, only_array
from sparse_export.signature import BATCH, Array, Feeds, Signature, class_signature
from sparse_export.trust import TrustedDigests

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["EngineSession", "open_engine", "profiler"]


def open_engine(
    bundle: Bundle, fact: EngineInfo, *, trust: TrustedDigests = None, cuda_graphs: bool = False
) -> EngineSession:
    """Load an engine of a bundle, after `require_loadable` has let it pass.

    trust: SHA-256 of the manifest, needed once for a bundle that was built elsewhere.  cuda_graphs: record
    the launches for each batch size at its first use, and replay them; TensorRT for RTX does that itself.
    Raises as `require_loadable` does, and ArtefactError when the library refuses the engine.
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


class EngineSession(BaseSession):
    """Owns an engine with one context on one stream, and the memory of its inputs and outputs.

    plan: its content, which must be trusted: where `fact` says that it is version compatible, it brings a
    runtime of its own along, code that is run in this process.
    """

    def __init__(
        self, plan: bytes, fact: EngineInfo, signature: Signature | None = None, *, cuda_graphs: bool
    ) -> None:
        import torch

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
        self._input, self._output = self._ends(engine)
        self._sample_shape = _sizes(engine.get_tensor_shape(self._input))[1:]
        own = class_signature(self._sample_shape, 1, names=(self._input, self._output))
        super().__init__(fact.target, signature or own)
        self._profiles = tuple(one[BATCH] for one in fact.profiles)
        self._profile = 0
        self._stream = torch.cuda.Stream()
        self._uses_graphs = cuda_graphs
        self._replays = cuda_graphs and fact.target == "tensorrt"
        self._recorded: dict[int, tuple[Any, Any, Any]] = {}

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

    def _ends(self, engine: trt.ICudaEngine) -> tuple[str, str]:
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        if len(inputs) != 1 or len(outputs) != 1:
            raise ArtefactError(
                f"The engine has the inputs {inputs} and the outputs {outputs}.",
                expected="One of each was expected.",
                do="Export the network with one input and its logits as the only output.",
            )
        return inputs[0], outputs[0]

    @property
    def max_batch(self) -> int:
        """The most samples that one call takes."""
        return max(largest for _, _, largest in self._profiles)

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        """Raises UsageError for a batch that is in no profile of the engine, too."""
        import torch

        x = only_array(feeds, "the caller")
        y = self.run_torch(torch.from_numpy(np.ascontiguousarray(x)).cuda(non_blocking=True))
        return {self._output: y.cpu().numpy()}

    def run_torch(self, x: Any) -> Any:
        """Logits on the GPU, for a contiguous float32 CUDA tensor; ready when this returns.

        What was launched on the current stream of torch before, and may still be writing x, is waited for.
        """
        import torch

        self._require_open()
        n = int(x.shape[0])
        self._select_profile(n)
        caller = torch.cuda.current_stream(x.device)
        if self._replays:
            graph, kept, recorded = self._recording(x)
            self._stream.wait_stream(caller)
            with torch.cuda.stream(self._stream):
                kept.copy_(x)
                graph.replay()
            self._stream.synchronize()
            return recorded.clone()
        y = self._bind(x)  # memory of the caller's stream, which goes on to use it
        self._stream.wait_stream(caller)
        self._launch(self._stream)
        self._stream.synchronize()
        return y

    def launcher(self, feeds: Feeds) -> Callable[[], object]:
        """As `DeviceSession.launcher`; good until the next `run`. Raises UsageError as `run` does."""
        import torch

        self._require_open()
        self.signature.require_feeds(feeds)
        x = only_array(feeds, "the caller")
        self._select_profile(len(x))
        on_device = torch.from_numpy(np.ascontiguousarray(x)).cuda()
        if self._replays:
            replay: Callable[[], object] = self._recording(on_device)[0].replay
            return replay
        self._launched = (on_device, self._bind(on_device))
        self._stream.synchronize()  # the profile is there, whatever stream comes next

        def once() -> None:
            self._require_open()
            self._launch(torch.cuda.current_stream())

        return once

    def profiled_pass(self, n: int) -> Callable[[], list[tuple[str, float]]]:
        """A function that runs n standard normal samples, and gives the name of each layer and its ms on the
        device.

        From now on this session is slower, each layer being timed by itself. Raises UsageError for a batch
        that is in no profile, and for a session with CUDA graphs, which launch no single layers.
        """
        import torch

        self._require_open()
        if self._uses_graphs:
            raise UsageError(
                "This session replays CUDA graphs.",
                expected="One that launches each layer was expected.",
                do="Open the engine without CUDA graphs.",
            )
        told: list[tuple[str, float]] = []
        self._context.profiler = self._profiler = profiler(
            self._trt, lambda name, ms: told.append((name, ms))
        )
        self._context.enqueue_emits_profile = True  # each launch waits, and tells
        generator = torch.Generator("cuda").manual_seed(0)
        x = torch.randn((n, *self._sample_shape), generator=generator, device="cuda")
        self._select_profile(n)
        self._profiled = (x, self._bind(x))

        def once() -> list[tuple[str, float]]:
            self._require_open()
            told.clear()
            self._launch(self._stream)
            self._stream.synchronize()
            return list(told)

        return once

    def _select_profile(self, n: int) -> None:
        fitting = [at for at, (least, _, most) in enumerate(self._profiles) if least <= n <= most]
        if not fitting:
            sizes = ", ".join(f"{least} to {most}" for least, _, most in self._profiles)
            raise UsageError(
                f"A batch of {n} fits no profile of the engine.",
                expected=f"{sizes} samples were expected.",
                do="Split the batch, or build with another --profile.",
            )
        # The one that is tuned for a size nearest to this.
        best = min(fitting, key=lambda at: abs(self._profiles[at][1] - n))
        if best != self._profile:
            if not self._context.set_optimization_profile_async(best, self._stream.cuda_stream):
                raise ArtefactError(
                    f"{self.name} did not take profile {best} of the engine.",
                    expected=f"It was expected to have {len(self._profiles)}, as the manifest tells.",
                    do="Build the engine again.",
                )
            self._profile = best

    def _bind(self, x: Any) -> Any:
        """Give the context its tensors; the output, made here, is returned."""
        import torch

        self._context.set_input_shape(self._input, tuple(x.shape))
        y = torch.empty(
            _sizes(self._context.get_tensor_shape(self._output)), dtype=torch.float32, device=x.device
        )
        self._context.set_tensor_address(self._input, x.data_ptr())
        self._context.set_tensor_address(self._output, y.data_ptr())
        return y

    def _launch(self, stream: Any) -> None:
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise ArtefactError(
                f"{self.name} could not run the engine.",
                expected="An engine that was built for this GPU was expected.",
                do="Look at what the library wrote to stderr; build the engine again here.",
            )

    def _recording(self, x: Any) -> tuple[Any, Any, Any]:
        """The graph for batches of the size of x, with the tensors that it reads and writes; recorded at
        first use.
        """
        import torch

        n = int(x.shape[0])
        if n not in self._recorded:
            kept = x.clone()
            y = self._bind(kept)
            self._stream.wait_stream(torch.cuda.current_stream(x.device))
            for _ in range(2):  # what is set up at the first launches must not be recorded
                self._launch(self._stream)
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                self._launch(self._stream)
            self._recorded[n] = (graph, kept, y)
        return self._recorded[n]

    def _free(self) -> None:
        self._recorded.clear()
        del self._context, self._engine, self._runtime  # in this order, as the library wants
