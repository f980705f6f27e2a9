"""The one place that imports TensorRT (10 or 11) or TensorRT for RTX.

The two libraries share their Python interface, TensorRT for RTX lacking some of it and adding a little.
Callers are type-checked against the published stubs of TensorRT 10.13, which is why they write

    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = tensorrt_import.library(target)

None of them uses what TensorRT 11 removed: the precision flags of the builder, calibrators, algorithm
selectors, `platform_has_fast_*` (NVIDIA, "Migrating from TensorRT 10.x to 11.x", Removed Python APIs).
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

from sparse_export.errors import MissingCapability, UnknownNameError, UsageError, how_to_get

__all__ = [
    "LOWEST_VERSION",
    "TARGETS",
    "Gpu",
    "Target",
    "gpu",
    "install_hint",
    "is_installed",
    "library",
    "module_name",
    "require_architectures",
    "rtx_runs_on",
    "rtx_supports",
    "set_architectures",
    "version",
]

Target = Literal["tensorrt", "tensorrt-rtx"]
TARGETS: tuple[Target, ...] = get_args(Target)
_MODULES: dict[str, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_EXTRAS: dict[str, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}
# TensorRT 10 is the first with strong typing, explicit batch as the only kind, and execute_async_v3.
LOWEST_VERSION: dict[str, int] = {"tensorrt": 10, "tensorrt-rtx": 1}
_GUIDES = {"tensorrt": "TensorRT Installation Guide", "tensorrt-rtx": "TensorRT for RTX Installation Guide"}
_SOURCES = {
    "tensorrt": "the libraries come from NVIDIA's own package index",
    "tensorrt-rtx": "the package is tensorrt-rtx-cu13",
}


def module_name(target: str) -> str:
    """Name the Python module of a target.

    Args:
        target: `tensorrt` or `tensorrt-rtx`.

    Raises:
        UnknownNameError: any other.
    """
    if target not in _MODULES:
        raise UnknownNameError("engine target", target, TARGETS)
    return _MODULES[target]


def is_installed(target: str) -> bool:
    """Is the library of a target installed? It is not imported; a folder of type stubs does not count.

    Args:
        target: `tensorrt` or `tensorrt-rtx`.
    """
    found = importlib.util.find_spec(module_name(target))
    return found is not None and found.origin is not None


def library(target: str) -> Any:
    """Import the module that builds and runs engines of a target.

    Args:
        target: `tensorrt` or `tensorrt-rtx`.

    Returns:
        The module; the docstring of this one says how callers are type-checked.

    Raises:
        UnknownNameError: any other target.
        MissingCapability: the library is missing, broken or too old.
    """
    name = module_name(target)
    if not is_installed(target):
        raise _missing(target, f"{name} is not installed")
    try:
        module: ModuleType = importlib.import_module(name)
        found = str(module.__version__)
    except Exception as cause:  # a native library fails in any way it likes
        first = (str(cause).strip().splitlines() or [""])[0]
        raise _missing(target, f"{name} cannot be imported: {type(cause).__name__}: {first}") from cause
    major = found.partition(".")[0]
    if not major.isdigit() or int(major) < LOWEST_VERSION[target]:
        raise _missing(target, f"{name} has version {found}, and {LOWEST_VERSION[target]} is the lowest")
    return module


def version(target: str) -> str:
    """Look up the version of a target's library.

    Args:
        target: `tensorrt` or `tensorrt-rtx`.

    Raises:
        SparseExportError: as `library`.
    """
    return str(library(target).__version__)


def require_architectures(names: Sequence[str]) -> None:
    """Check that TensorRT for RTX builds for some GPUs.

    Args:
        names: as in `sm89`.

    Raises:
        UsageError: this release does not build for one of them.
        MissingCapability: as `library`.
    """
    known = library("tensorrt-rtx").ComputeCapability.__members__
    for name in names:
        if name.upper() not in known:
            offered = ", ".join(sorted(key.lower() for key in known if key.startswith("SM")))
            raise UsageError(
                f"TensorRT for RTX {version('tensorrt-rtx')} does not build for {name}.",
                expected=f"It builds for {offered}.",
                do="Leave that GPU out; data-centre GPUs are for the target tensorrt.",
            )


def set_architectures(config: Any, names: Sequence[str]) -> None:
    """Set the GPUs that TensorRT for RTX, and only it, builds kernels for.

    Args:
        config: its IBuilderConfig, changed in place; the stubs, of TensorRT, lack this.
        names: as in `sm89`; `CURRENT`, the GPU of the machine, is not offered.

    Raises:
        SparseExportError: as `require_architectures`.
    """
    require_architectures(names)
    known = library("tensorrt-rtx").ComputeCapability.__members__
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        config.set_compute_capability(known[name.upper()], index)


class Gpu(NamedTuple):  # not a dataclass: importing those takes the building process as long as all the rest
    """The first CUDA device.

    Attributes:
        name: by the driver.
        architecture: as in `sm90`.
    """

    name: str
    architecture: str


def gpu() -> Gpu | None:
    """Find the GPU that an engine would be built or run on, by the driver itself; None when there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, number = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    text = ctypes.create_string_buffer(256)
    capability = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return None
        capability.append(str(number.value))
    if driver.cuDeviceGetName(text, len(text), device):
        return None
    return Gpu(name=text.value.decode(errors="replace"), architecture=f"sm{''.join(capability)}")


def rtx_runs_on(architecture: str, named: Sequence[str] = ()) -> bool:
    """Does an engine for TensorRT for RTX run on a GPU of this architecture, as in `sm89`?

    Turing, 7.5, is supported where it is named, and only there (NVIDIA, "CPU-Only AOT and TensorRT-RTX
    Engines", Compute Capability). On a GPU of 9.0 version 1.7.1 said: "Supported compute capabilities: 8.0
    8.6 8.9 12.0 12.1 >12.0."

    Args:
        architecture: of the GPU.
        named: those that the engine was built for; none for the library's own choice, 8.0, 8.6, 8.9, 12.0 and
            later.
    """
    number = int(architecture.removeprefix("sm"))
    if named:
        return architecture in named and rtx_supports(architecture)
    return number in (80, 86, 89) or number >= 120


def rtx_supports(architecture: str) -> bool:
    """Can TensorRT for RTX run on a GPU of this architecture, with an engine that is built for it?

    Args:
        architecture: as in `sm89`.
    """
    return architecture == "sm75" or rtx_runs_on(architecture)


def install_hint(target: str) -> str:
    """Say how to install the library of a target, and where that is described.

    Args:
        target: `tensorrt` or `tensorrt-rtx`.
    """
    return f"{how_to_get(_EXTRAS[target])} ({_SOURCES[target]}; see NVIDIA's {_GUIDES[target]!r})"


def _missing(target: str, why: str) -> MissingCapability:
    """The error for a library that cannot be used."""
    return MissingCapability(
        f"The target {target!r} cannot be used here: {why}.",
        do=f"{install_hint(target)}, or leave the target out.",
    )
