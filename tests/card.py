"""A `tensorrt` and CUDA that pretend to run an engine.

It computes with NumPy, in the memory of the host, and takes what TensorRT takes: shapes within the profile
that was chosen, at addresses that were set.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sparse_export.signature import Array, Signature, TensorInfo, numpy_dtype

Profiles = Sequence[Mapping[str, tuple[int, int, int]]]
Function = Callable[[dict[str, Array]], dict[str, Array]]
_TYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
    "bool": "BOOL",
}


def batches(*bounds: tuple[int, int, int]) -> Profiles:
    """Profiles of a network that has a free batch alone."""
    return tuple({"batch": one} for one in bounds)


def vectors(*sample: int) -> Signature:
    """One input and one output of the same size."""
    return Signature(
        inputs=(TensorInfo(name="input", dtype="float32", shape=("batch", *sample)),),
        outputs=(TensorInfo(name="logits", dtype="float32", shape=("batch", *sample)),),
    )


def twice(feeds: dict[str, Array]) -> dict[str, Array]:
    return {"logits": 2 * feeds["input"]}


class _Runtime:
    def __init__(self, card: Card) -> None:
        self.engine_host_code_allowed = False
        self._card = card

    def deserialize_cuda_engine(self, plan: bytes) -> _Engine | None:
        self._card.host_code_allowed.append(self.engine_host_code_allowed)
        return _Engine(self._card) if self._card.loads else None


class _Engine:
    def __init__(self, card: Card) -> None:
        self._card = card
        self._ends = {one.name: one for one in (*card.signature.outputs, *card.signature.inputs)}

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._card.profiles)

    @property
    def num_io_tensors(self) -> int:
        return len(self._ends)

    def get_tensor_name(self, index: int) -> str:
        return list(self._ends)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if name in self._card.signature.input_names else "OUTPUT"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(one if isinstance(one, int) else -1 for one in self._ends[name].shape)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        assert self.get_tensor_mode(name) == "INPUT"
        profile = self._card.profiles[index]
        return [
            tuple(profile[size][which] if isinstance(size, str) else size for size in self._ends[name].shape)
            for which in range(3)
        ]

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=_TYPES[self._ends[name].dtype])

    def create_runtime_config(self) -> SimpleNamespace:
        return SimpleNamespace(cuda_graph_strategy="DISABLED")

    def create_execution_context(self, config: SimpleNamespace | None = None) -> _Context:
        if config is not None:
            self._card.strategies.append(config.cuda_graph_strategy)
        return _Context(self._card)


class _Context:
    def __init__(self, card: Card) -> None:
        self._card = card
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == self._card.stream
        self._profile, self._shapes, self._addresses = index, {}, {}
        return 0 <= index < len(self._card.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        profile = self._card.profiles[self._profile]
        (one,) = (one for one in self._card.signature.inputs if one.name == name)
        fits = len(shape) == len(one.shape) and all(
            found == size if isinstance(size, int) else profile[size][0] <= found <= profile[size][2]
            for found, size in zip(shape, one.shape, strict=True)
        )
        if fits:
            self._shapes[name] = tuple(shape)
        return fits

    def _sizes(self) -> dict[str, int]:
        return {
            size: found
            for one in self._card.signature.inputs
            for found, size in zip(self._shapes[one.name], one.shape, strict=True)
            if isinstance(size, str)
        }

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        (one,) = (one for one in self._card.signature.outputs if one.name == name)
        known = self._sizes()
        return tuple(size if isinstance(size, int) else known.get(size, -1) for size in one.shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        card = self._card
        wanted = {*card.signature.input_names, *card.signature.output_names}
        if set(self._addresses) != wanted or set(self._shapes) != set(card.signature.input_names):
            return False
        shapes = {
            **self._shapes,
            **{name: self.get_tensor_shape(name) for name in card.signature.output_names},
        }
        card.last = partial(self._pass, shapes, self._profile, dict(self._addresses), stream)
        card.last()
        return True

    def _pass(
        self, shapes: dict[str, tuple[int, ...]], profile: int, addresses: dict[str, int], stream: int
    ) -> None:
        card = self._card

        def at(one: TensorInfo) -> Array:
            dtype = numpy_dtype(one.dtype)
            n_bytes = int(np.prod(shapes[one.name])) * dtype.itemsize
            raw = np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(addresses[one.name]))
            return raw.view(dtype).reshape(shapes[one.name])

        feeds = {one.name: at(one) for one in card.signature.inputs}
        found = card.function(feeds)
        for one in card.signature.outputs:
            at(one)[...] = found[one.name]
        card.executed.append((card.signature.n_samples(feeds), profile))
        card.streams.append(stream)


@dataclass
class Card:
    """A GPU that is none.

    executed: batch and profile of each execution; streams: where.  host_code_allowed: at each loading.
    strategies: for CUDA graphs, of each context that TensorRT for RTX was to make with one.
    """

    capability: tuple[int, int]
    profiles: Profiles = ()
    signature: Signature = field(default_factory=vectors)
    function: Function = twice
    loads: bool = True
    stream: int = 7
    executed: list[tuple[int, int]] = field(default_factory=list)
    host_code_allowed: list[bool] = field(default_factory=list)
    memory: dict[int, Any] = field(default_factory=dict)
    streams: list[int] = field(default_factory=list)
    strategies: list[str] = field(default_factory=list)
    last: Callable[[], object] = bool

    def tensorrt(self) -> ModuleType:
        module: Any = ModuleType("tensorrt")
        module.__version__ = "11.1.0"
        module.Logger = type(
            "Logger", (), {"WARNING": 1, "ERROR": 2, "__init__": lambda self, severity: None}
        )
        module.Runtime = lambda logger: _Runtime(self)
        module.TensorIOMode = SimpleNamespace(INPUT="INPUT")
        module.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="WHOLE_GRAPH_CAPTURE")
        module.nptype = lambda dtype: {"FLOAT": np.float32, "INT64": np.int64}[dtype.name]
        return module  # type: ignore[no-any-return]

    def cuda(self) -> SimpleNamespace:
        def malloc(size: int) -> tuple[int, int]:
            buffer = ctypes.create_string_buffer(size)
            self.memory[ctypes.addressof(buffer)] = buffer
            return 0, ctypes.addressof(buffer)

        def copy(to: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:
            ctypes.memmove(to, source, size)
            return (0,)

        major, minor = self.capability
        return SimpleNamespace(
            cudaGetDeviceProperties=lambda device: (0, SimpleNamespace(major=major, minor=minor)),
            cudaSetDevice=lambda device: (0,),
            cudaStreamCreate=lambda: (0, self.stream),
            cudaStreamDestroy=lambda stream: (0,),
            cudaStreamSynchronize=lambda stream: (0,),
            cudaMalloc=malloc,
            cudaFree=lambda pointer: (0 if self.memory.pop(pointer) else 1,),
            cudaMemcpyAsync=copy,
            cudaMemcpyKind=SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2),
        )


class Stream:
    """A CUDA stream that keeps order by doing everything at once. done: what was asked of it, by name."""

    def __init__(self, cuda_stream: int = 7) -> None:
        self.cuda_stream = cuda_stream
        self.done: list[str] = []

    def wait_stream(self, other: Stream) -> None:
        self.done.append(f"wait for {other.cuda_stream}")

    def synchronize(self) -> None:
        self.done.append("synchronize")


class Event:
    """A CUDA event, whose work is done by the time it is recorded."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self._at = 0.0

    def record(self) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, last: Event) -> float:
        return 1e3 * (last._at - self._at)


class Graph:
    """A CUDA graph that replays the one launch that was recorded."""

    def __init__(self) -> None:
        self.replay: Callable[[], object] = bool


def pretend_torch_cuda(monkeypatch: pytest.MonkeyPatch, current: Stream, card: Card) -> list[Stream]:
    """Let torch have the card with CUDA streams, of which `current` is in use; gives those that are made
    later on.
    """
    made: list[Stream] = []

    def make() -> Stream:
        made.append(Stream())
        return made[-1]

    @contextlib.contextmanager
    def recording(graph: Graph, *, stream: Stream) -> Iterator[None]:
        yield
        graph.replay = card.last

    for name, instead in (
        ("CUDAGraph", Graph),
        ("graph", recording),
        ("is_available", lambda: True),
        ("Stream", make),
        ("stream", contextlib.nullcontext),
        ("current_stream", lambda device=None: current),
        ("default_stream", lambda device=None: Stream(0)),
        ("Event", Event),
        ("synchronize", lambda device=None: None),
    ):
        monkeypatch.setattr(torch.cuda, name, instead)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, **_: self)
    return made
