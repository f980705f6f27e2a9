"""The one place that imports TensorRT (10 or 11) or TensorRT for RTX.

The two libraries share their Python interface, TensorRT for RTX lacking some of it and adding a little. Callers
are type-checked against the published stubs of TensorRT 10.13, which is why they write

    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = door.library(target)

What TensorRT 11 took away is not touched by any of them: the precision flags of the builder, calibrators,
algorithm selectors, `platform_has_fast_*` (NVIDIA, "Migrating from TensorRT 10.x to 11.x", Removed Python APIs).
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
# Of TensorRT the release that has strong typing, explicit batch as the only kind, and execute_async_v3.
LOWEST_VERSION: dict[str, int] = {"tensorrt": 10, "tensorrt-rtx": 1}
_GUIDES = {"tensorrt": "TensorRT Installation Guide", "tensorrt-rtx": "TensorRT for RTX Installation Guide"}
_SOURCES = {
    "tensorrt": "the libraries come from NVIDIA's own package index",
    "tensorrt-rtx": "the package is tensorrt-rtx-cu13",
}


def module_name(target: str) -> str:
    """The Python module of a target. Raises UnknownNameError."""
    if target not in _MODULES:
        raise UnknownNameError("engine target", target, TARGETS)
    return _MODULES[target]


def is_installed(target: str) -> bool:
    """Is there a module of that name? It is not imported. A folder that only holds type stubs does not count."""
    found = importlib.util.find_spec(module_name(target))
    return found is not None and found.origin is not None


def library(target: str) -> Any:
    """The module that builds and runs engines of a target.

    Any: see the module's docstring for how callers are type-checked.
    Raises UnknownNameError, or MissingCapability when it is absent, broken or too old.
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
    """The version of a target's library. Raises as `library` does."""
    return str(library(target).__version__)


def require_architectures(names: Sequence[str]) -> None:
    """Raise UsageError for a GPU that this release of TensorRT for RTX does not build for; else as `library` does."""
    known = library("tensorrt-rtx").ComputeCapability.__members__
    for name in names:
        if name.upper() not in known:
            offered = ", ".join(sorted(key.lower() for key in known if key.startswith("SM")))
            raise UsageError(
                f"TensorRT for RTX {version('tensorrt-rtx')} does not build for {name}.",
                expected=f"Some of {offered} were expected.",
                do="Leave that GPU out; data-centre GPUs are for the target tensorrt.",
            )


def set_architectures(config: Any, names: Sequence[str]) -> None:
    """Tell TensorRT for RTX, and only it, which GPUs to make kernels for; `CURRENT`, of the machine, is not asked.

    config: its IBuilderConfig; the stubs, of TensorRT, know nothing of this. Raises as `require_architectures` does.
    """
    require_architectures(names)
    known = library("tensorrt-rtx").ComputeCapability.__members__
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        config.set_compute_capability(known[name.upper()], index)


class Gpu(NamedTuple):  # not a dataclass: importing those takes the building process as long as all the rest
    """The first CUDA device. architecture: as in `sm90`."""

    name: str
    architecture: str


def gpu() -> Gpu | None:
    """The GPU that an engine would be built on or run on, by the driver itself; None when there is none."""
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

    named: those that it was built for, none for the library's own choice: 8.0, 8.6, 8.9, 12.0 and later. Turing, 7.5, is
    supported where it is named, and only there (NVIDIA, "CPU-Only AOT and TensorRT-RTX Engines", Compute Capability).
    On a GPU of 9.0 version 1.7.1 said: "Supported compute capabilities: 8.0 8.6 8.9 12.0 12.1 >12.0."
    """
    number = int(architecture.removeprefix("sm"))
    if named:
        return architecture in named and rtx_supports(architecture)
    return number in (80, 86, 89) or number >= 120


def rtx_supports(architecture: str) -> bool:
    """Does TensorRT for RTX run on such a GPU at all, by an engine that is built for it?"""
    return architecture == "sm75" or rtx_runs_on(architecture)


def install_hint(target: str) -> str:
    """What to type, and where it is described."""
    return f"{how_to_get(_EXTRAS[target])} ({_SOURCES[target]}; see NVIDIA's {_GUIDES[target]!r})"


def _missing(target: str, why: str) -> MissingCapability:
    return MissingCapability(
        f"The target {target!r} cannot be used here: {why}.",
        expected=f"A working {module_name(target)}, version {LOWEST_VERSION[target]} or later, was expected.",
        do=f"{install_hint(target)}, or leave the target out.",
    )
