"""Looks at what this machine has, and says how to get what it lacks."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from sparse_export.engines import tensorrt_import
from sparse_export.errors import SparseExportError, how_to_get
from sparse_export.instruments.machine import machine_facts
from sparse_export.onnxruntime_import import load_onnxruntime
from sparse_export.tables import Shown, Table
from sparse_export.trust import store_path

__all__ = ["Examination", "Finding", "examine"]

_GIB = 1024**3
_MARKS = {"ok": " ", "missing": "-", "broken": "!"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked for.

    Attributes:
        state: `missing` is no fault, only something that cannot be used here; `broken` is there and does not
            work.
        hint: what to do about it, empty when nothing need be done.
    """

    group: str
    name: str
    state: Literal["ok", "missing", "broken"]
    value: str
    hint: str = ""


@dataclass(frozen=True, kw_only=True)
class Examination:
    """All findings, in the order to read them; `str()` gives the table for people."""

    findings: tuple[Finding, ...]

    def shown(self) -> Shown:
        """A table for each group of findings, with marks for what is missing or broken, and hints."""
        parts: list[str | Table] = []
        for group, findings in groupby(self.findings, key=lambda found: found.group):
            rows = [(_MARKS[found.state], found.name, _value(found)) for found in findings]
            parts.append(Table(title=group, rows=rows))
        return Shown([*parts, "- not here; only what needs it cannot be used    ! here, but does not work"])

    def __str__(self) -> str:
        return self.shown().draw()


def _value(found: Finding) -> str:
    return f"{found.value}\n> {found.hint}" if found.hint else found.value


def examine() -> Examination:
    """Look at the machine, the runtimes, the libraries and the user's folders.

    Imports torch, onnxruntime and TensorRT where they are installed; one that cannot be imported is a
    finding, whatever it raises. Changes nothing.
    """
    facts = machine_facts()
    has_gpu = bool(facts["gpus"])
    return Examination(
        findings=(
            *_machine(facts),
            *_gpus(facts),
            _torch(has_gpu),
            _onnxruntime(has_gpu),
            *(_tensorrt(target, has_gpu) for target in tensorrt_import.TARGETS),
            *_libraries(),
            *_folders(),
        )
    )


def _machine(facts: dict[str, object]) -> Iterator[Finding]:
    group = "Machine"
    yield Finding(
        group=group, name="Python", state="ok", value=f"{platform.python_version()}, {sys.executable}"
    )
    yield Finding(group=group, name="system", state="ok", value=str(facts["platform"]))
    quota = facts["cpu_quota_cores"]
    cores = f"{facts['n_cores_usable']} of {facts['n_cores']} cores usable"
    held = f", held to {quota:g} by the container" if isinstance(quota, float) else ""
    yield Finding(
        group=group, name="CPU", state="ok", value=f"{facts['cpu_model'] or 'unknown'}, {cores}{held}"
    )
    total, free = facts["memory_bytes"], facts["memory_available_bytes"]
    if isinstance(total, int) and isinstance(free, int):
        yield Finding(
            group=group,
            name="memory",
            state="ok",
            value=f"{total / _GIB:.1f} GiB, {free / _GIB:.1f} GiB free",
        )


def _gpus(facts: dict[str, object]) -> Iterator[Finding]:
    gpus = facts["gpus"]
    if not isinstance(gpus, list) or not gpus:
        yield Finding(
            group="Machine",
            name="GPU",
            state="missing",
            value="none that nvidia-smi shows",
            hint="Everything that is here runs on the CPU. For an NVIDIA GPU, install its driver.",
        )
        return
    for gpu in gpus:
        driver = f", driver {gpu['driver']}" if "driver" in gpu else ""
        yield Finding(group="Machine", name="GPU", state="ok", value=f"{gpu['name']}{driver}")


def _broken(group: str, name: str, cause: BaseException, hint: str) -> Finding:
    first = (str(cause).strip().splitlines() or [""])[0]
    return Finding(
        group=group, name=name, state="broken", value=f"{type(cause).__name__}: {first}", hint=hint
    )


def _torch(has_gpu: bool) -> Finding:
    try:
        torch = importlib.import_module("torch")
        cuda = torch.cuda.is_available()
    except Exception as cause:  # noqa: BLE001 - whatever is wrong with it is what was asked
        return _broken("Runtimes", "torch", cause, "pip install --force-reinstall torch")
    built = torch.version.cuda
    if cuda:
        value = f"{torch.__version__}, CUDA {built}, {torch.cuda.get_device_name(0)}"
        return Finding(group="Runtimes", name="torch", state="ok", value=value)
    return Finding(
        group="Runtimes",
        name="torch",
        state="ok",
        value=f"{torch.__version__}, CPU{f' (built for CUDA {built}, no device)' if built else ' only'}",
        hint="The GPU is not visible to torch: update the driver or install a torch built for it."
        if has_gpu
        else "",
    )


def _onnxruntime(has_gpu: bool) -> Finding:
    try:
        ort = load_onnxruntime()
        providers = [name.removesuffix("ExecutionProvider") for name in ort.get_available_providers()]
    except Exception as cause:  # noqa: BLE001 - whatever is wrong with it is what was asked
        return _broken("Runtimes", "onnxruntime", cause, "pip install --force-reinstall onnxruntime-gpu")
    return Finding(
        group="Runtimes",
        name="onnxruntime",
        state="ok",
        value=f"{ort.__version__}, built with {', '.join(providers)}",
        hint="pip install onnxruntime-gpu to use the GPU." if has_gpu and "CUDA" not in providers else "",
    )


def _tensorrt(target: tensorrt_import.Target, has_gpu: bool) -> Finding:
    name = tensorrt_import.module_name(target)
    if not tensorrt_import.is_installed(target):
        gpu = "" if has_gpu else "; its engines run on an NVIDIA GPU"
        hint = f"{tensorrt_import.install_hint(target)}{gpu}."
        return Finding(group="Runtimes", name=name, state="missing", value="not installed", hint=hint)
    try:
        version = tensorrt_import.version(target)
    except SparseExportError as cause:
        return Finding(group="Runtimes", name=name, state="broken", value=cause.what, hint=cause.do)
    builds = {
        "tensorrt": "builds and runs engines"
        if has_gpu
        else "without a GPU it neither builds nor runs engines",
        "tensorrt-rtx": "builds and runs engines" if has_gpu else "builds engines; to run them takes a GPU",
    }
    card = tensorrt_import.gpu() if has_gpu and target == "tensorrt-rtx" else None
    if card is not None and not tensorrt_import.rtx_supports(card.architecture):
        builds[target] = f"builds engines; it does not run on this GPU ({card.architecture})"
    return Finding(group="Runtimes", name=name, state="ok", value=f"{version}, {builds[target]}")


# distribution, what it is for, how it is had
_LIBRARIES = (
    ("torchvision", "the MNIST, CIFAR-10 and image folder data sets", "pip install torchvision"),
    ("onnx", "the export", "pip install onnx"),
    ("onnxscript", "the export", "pip install onnxscript"),
    ("scikit-learn", "the digits data set", "pip install scikit-learn"),
    ("rich-click", "coloured help", "pip install rich-click"),
    ("tensorboard", "TensorBoard events of a training run", how_to_get("tensorboard")),
)


def _libraries() -> Iterator[Finding]:
    for name, purpose, source in _LIBRARIES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(
                group="Libraries",
                name=name,
                state="missing",
                value=f"not installed, for {purpose}",
                hint=source,
            )
        else:
            yield Finding(group="Libraries", name=name, state="ok", value=version)


def _folders() -> Iterator[Finding]:
    yield _data_folder()
    yield _trust_store()


def _data_folder() -> Finding:
    try:
        from sparse_export.tasks.data import default_data_dir

        data = default_data_dir()
    except SparseExportError as cause:
        return _broken("Folders", "data", cause, cause.do)
    except Exception as cause:  # noqa: BLE001 - it loads torch, and must not take the other findings along
        return _broken("Folders", "data", cause, "Mend the library that it names.")
    try:
        held = sorted(entry.name for entry in data.iterdir()) if data.is_dir() else None
    except OSError as cause:
        return _broken("Folders", "data", cause, "Give it back to yourself, or set SPARSE_EXPORT_DATA.")
    if held is not None:
        return Finding(
            group="Folders", name="data", state="ok", value=f"{data}: {', '.join(held) or 'empty'}"
        )
    return Finding(
        group="Folders",
        name="data",
        state="missing",
        value=f"{data} does not exist",
        hint=(
            "The digits come along. For others set SPARSE_EXPORT_DATA, give --data-dir, or train with "
            "--download."
        ),
    )


def _trust_store() -> Finding:
    hint = "Give it back to yourself, or delete it."
    try:
        path = store_path()
        there = path.exists()
    except SparseExportError as cause:
        return _broken("Folders", "trust store", cause, cause.do)
    except OSError as cause:
        return _broken("Folders", "trust store", cause, hint)
    if not there:
        return Finding(group="Folders", name="trust store", state="ok", value=f"{path}, not made yet")
    usable = os.access(path, os.R_OK | os.W_OK)
    return Finding(
        group="Folders",
        name="trust store",
        state="ok" if usable else "broken",
        value=str(path) if usable else f"{path} cannot be read and written",
        hint="" if usable else hint,
    )
