"""Bundles with engines that hold nothing, and a `tensorrt` and CUDA that pretend to run them.

The stand-in multiplies by two, in the memory of the host, and takes what TensorRT takes: batches of the profile that was
chosen, at addresses that were set.
"""

from __future__ import annotations

import ctypes
import json
import runpy
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sparse_export.artefact import BUNDLE_FILE, EngineFact
from sparse_export.files import sha256_file
from sparse_export.trust import remember

Profiles = Sequence[tuple[int, int, int]]


def with_engines(
    bundle: Path,
    to: Path,
    *names: str,
    tensorrt: str = "10.14.1.48",
    trusted: bool = True,
    profiles: Profiles = ((1, 8, 128),),
    version_compatible: bool = False,
    told: bool = True,
) -> Path:
    """A copy with files that are named as engines, told of in its manifest, which this user vouches for.

    told: else the manifest lists the files and says nothing of the engines.
    """
    shutil.copytree(bundle, to)
    (to / "engines").mkdir()
    manifest = json.loads((to / BUNDLE_FILE).read_text())
    for name in names:
        path = to / "engines" / name
        path.write_bytes(name.encode())
        file = f"engines/{name}"
        manifest["files"][file] = {"size_bytes": len(name), "sha256": sha256_file(path)}
        fact = EngineFact(
            file=file,
            target="tensorrt",
            precision="fp16",
            version=tensorrt,
            gpu="a card",
            architecture=name.rpartition("-")[2].removesuffix(".engine"),
            architectures=(),
            hardware="none",
            version_compatible=version_compatible,
            profiles=tuple(profiles),
            sparse=True,
            parse_s=0.0,
            build_s=0.0,
            onnx_sha256="0" * 64,
        )
        if told:
            manifest["engines"].append(asdict(fact))
    manifest["versions"]["tensorrt-cu13"] = tensorrt
    (to / BUNDLE_FILE).write_text(json.dumps(manifest))
    if trusted:
        remember(sha256_file(to / BUNDLE_FILE))
    return to


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

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        assert name == "input"
        return [(n, *self._card.sample) for n in self._card.profiles[index]]

    def get_tensor_dtype(self, name: str) -> str:
        return "FLOAT"

    def create_execution_context(self) -> _Context:
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
        size = int(np.prod(self._shape))
        x, y = (
            np.ctypeslib.as_array((ctypes.c_float * size).from_address(self._addresses[name]))
            for name in ("input", "logits")
        )
        y[:] = 2 * x
        self._card.executed.append((self._shape[0], self._profile))
        return True


@dataclass
class Card:
    """A GPU that is none. executed: batch and profile of each execution.  host_code_allowed: at each loading."""

    capability: tuple[int, int]
    profiles: Profiles
    sample: tuple[int, ...]
    loads: bool = True
    stream: int = 7
    executed: list[tuple[int, int]] = field(default_factory=list)
    host_code_allowed: list[bool] = field(default_factory=list)
    memory: dict[int, Any] = field(default_factory=dict)

    def tensorrt(self) -> ModuleType:
        module: Any = ModuleType("tensorrt")
        module.__version__ = "11.1.0"
        module.Logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, severity: None})
        module.Runtime = lambda logger: _Runtime(self)
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


class _Tensor:
    """What the backend hands over: an array behind a capsule."""

    def __init__(self, capsule: object) -> None:
        self._capsule = capsule

    def __dlpack__(self, **_: object) -> object:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    @staticmethod
    def from_dlpack(name: str, capsule: object) -> np.ndarray:
        handed_over: Any = _Tensor(capsule)
        array: np.ndarray = np.from_dlpack(handed_over).copy()
        return array


@dataclass
class Response:
    """An answer of the model: tensors, or an error."""

    tensors: Sequence[np.ndarray] = ()
    error: str | None = None


def backend_utils() -> ModuleType:
    """`triton_python_backend_utils`, where a request is the array that it brings."""
    module: Any = ModuleType("triton_python_backend_utils")
    module.get_input_tensor_by_name = lambda request, name: request
    module.Tensor = _Tensor
    module.TritonError = str
    module.InferenceResponse = Response
    module.Logger = SimpleNamespace(log_info=lambda text: None)
    return module  # type: ignore[no-any-return]


def pretend(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what is imported from now on find the card."""
    bindings: Any = ModuleType("cuda.bindings")
    bindings.runtime = card.cuda()
    for name, module in (
        ("tensorrt", card.tensorrt()),
        ("cuda", ModuleType("cuda")),
        ("cuda.bindings", bindings),
        ("triton_python_backend_utils", backend_utils()),
    ):
        monkeypatch.setitem(sys.modules, name, module)


def model_of(folder: Path) -> Iterator[Any]:
    """The model of a repository's folder, as the backend would start it on the first GPU; ended afterwards."""
    names = runpy.run_path(str(folder / "1" / "model.py"))
    model = names["TritonPythonModel"]()
    model.initialize(
        {
            "model_repository": str(folder),
            "model_version": "1",
            "model_instance_device_id": "0",
            "model_instance_kind": "GPU",
            "model_instance_name": "net_0",
        }
    )
    yield model
    model.finalize()
