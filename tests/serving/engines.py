"""Bundles with engines that hold nothing, and the Python backend of Triton without its server."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sparse_export.files import sha256_file
from sparse_export.formats.bundle import BUNDLE_FILE
from sparse_export.formats.engines import EngineInfo
from sparse_export.trust import remember
from tests.card import Card, Profiles
from tests.sealing import write_sealed


def with_engines(
    bundle: Path,
    to: Path,
    *names: str,
    tensorrt: str = "10.14.1.48",
    trusted: bool = True,
    profiles: Profiles = ({"batch": (1, 8, 128)},),
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
        fact = EngineInfo(
            file=file,
            target="tensorrt",
            precision="fp16",
            version=tensorrt,
            gpu="a card",
            architecture=name.rpartition("-")[2].removesuffix(".engine"),
            architectures=(),
            hardware="none",
            version_compatible=version_compatible,
            profiles=tuple(dict(one) for one in profiles),
            sparse=True,
            parse_s=0.0,
            build_s=0.0,
            onnx_sha256="0" * 64,
        )
        if told:
            manifest["engines"].append(asdict(fact))
    manifest["versions"]["tensorrt-cu13"] = tensorrt
    write_sealed(to / BUNDLE_FILE, manifest)
    if trusted:
        remember(sha256_file(to / BUNDLE_FILE))
    return to


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
    """`triton_python_backend_utils`, where a request is the arrays that it brings, by name."""
    module: Any = ModuleType("triton_python_backend_utils")
    module.get_input_tensor_by_name = lambda request, name: request[name]
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
    """The model of a repository's folder, as the backend would start it on the first GPU; ended
    afterwards.
    """
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
