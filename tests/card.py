"""A `tensorrt` and CUDA that pretend to run an engine.

It multiplies by two, in the memory of the host, and takes what TensorRT takes: batches of the profile that
was chosen, at addresses that were set.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

Profiles = Sequence[tuple[int, int, int]]


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

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._card.profiles)

    @property
    def num_io_tensors(self) -> int:
        return 2

    def get_tensor_name(self, index: int) -> str:
        return ("input", "logits")[index]

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if name == "input" else "OUTPUT"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *self._card.sample)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        assert name == "input"
        return [(n, *self._card.sample) for n in self._card.profiles[index]]

    def get_tensor_dtype(self, name: str) -> str:
        return "FLOAT"

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
        self._shape: tuple[int, ...] = ()
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == self._card.stream
        self._profile, self._shape, self._addresses = index, (), {}
        return 0 <= index < len(self._card.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self._card.profiles[self._profile]
        self._shape = shape if least <= shape[0] <= most else ()
        return bool(self._shape) and shape[1:] == self._card.sample

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if set(self._addresses) != {"input", "logits"} or not self._shape:
            return False
        self._card.last = partial(self._pass, self._shape, self._profile, dict(self._addresses), stream)
        self._card.last()
        return True

    def _pass(self, shape: tuple[int, ...], profile: int, addresses: dict[str, int], stream: int) -> None:
        size = int(np.prod(shape))
        x, y = (
            np.ctypeslib.as_array((ctypes.c_float * size).from_address(addresses[name]))
            for name in ("input", "logits")
        )
        y[:] = 2 * x
        self._card.executed.append((shape[0], profile))
        self._card.streams.append(stream)


@dataclass
class Card:
    """A GPU that is none.

    executed: batch and profile of each execution; streams: where.  host_code_allowed: at each loading.
    strategies: for CUDA graphs, of each context that TensorRT for RTX was to make with one.
    """

    capability: tuple[int, int]
    profiles: Profiles
    sample: tuple[int, ...]
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
        module.nptype = {"FLOAT": np.float32}.__getitem__
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
