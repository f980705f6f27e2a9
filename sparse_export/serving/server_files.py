"""Finds Triton's server on this machine, or installs it into a folder of its own."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sparse_export.errors import MissingCapability, OutputError
from sparse_export.files import staged_folder, temporary_folder
from sparse_export.trust import store_path

__all__ = ["ServerFiles", "find_server", "install_folder", "install_server"]

# The server of this package is Triton 2.51.0 with the Python backend alone; it needs no GPU. It requires
# numpy below 2, and is therefore installed into a folder of its own and not into the environment.
_PACKAGE = "nvidia-pytriton"
_VERSION = "0.7.0"
_SHA256 = "21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df"
_LEAST_GLIBC = (2, 35)
_BACKEND_FILES = ("libtriton_python.so", "triton_python_backend_utils.py")


@dataclass(frozen=True, kw_only=True)
class ServerFiles:
    """An installation of Triton.

    Attributes:
        binary: path of `tritonserver`.
        backends: names of the backends that it has.
        backend_folder: where they are.
        libraries: folders that its loader needs, in order.
        is_wheel: installed by `install_server`; its Python backend is assembled for the running interpreter.
    """

    binary: Path
    backends: frozenset[str]
    backend_folder: Path
    libraries: tuple[Path, ...]
    is_wheel: bool


def install_folder() -> Path:
    """Locate the folder of `install_server`: beside the trust store, in the user's data folder."""
    return store_path().with_name("tritonserver") / f"{_PACKAGE}-{_VERSION}"


def find_server() -> ServerFiles:
    """Find `tritonserver` on PATH, else the one of `install_server`.

    Raises:
        MissingCapability: there is neither.
    """
    found = shutil.which("tritonserver")
    if found is not None:
        binary = Path(found).resolve()
        folder = binary.parent.parent / "backends"
        names = (
            frozenset(path.name for path in folder.iterdir() if path.is_dir())
            if folder.is_dir()
            else frozenset()
        )
        return ServerFiles(
            binary=binary,
            backends=names,
            backend_folder=folder,
            libraries=(binary.parent.parent / "lib",),
            is_wheel=False,
        )
    home = install_folder() / "pytriton" / "tritonserver"
    if not (home / "bin" / "tritonserver").is_file():
        raise MissingCapability(
            f"There is no tritonserver on PATH, and none in {install_folder()}.",
            do="Run `sparse-export serve --install-server`, or run in NVIDIA's container of Triton.",
        )
    return ServerFiles(
        binary=home / "bin" / "tritonserver",
        backends=frozenset({"python"}),
        backend_folder=home / "backends",
        libraries=(install_folder() / "nvidia_pytriton.libs", _python_library().parent),
        is_wheel=True,
    )


def _python_library() -> Path:
    """The shared library of the running Python, which the Python backend is linked with."""
    name = sysconfig.get_config_var("INSTSONAME") or ""
    folders = [
        sysconfig.get_config_var("LIBDIR"),
        Path(sys.base_prefix) / "lib",
        sysconfig.get_config_var("LIBPL"),
    ]
    multiarch = sysconfig.get_config_var("MULTIARCH")
    folders += [f"/usr/lib/{multiarch}"] if multiarch else []
    if ".so" not in name:  # a static build may have the library of the same version beside it
        name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    for folder in folders:
        if folder and (Path(folder) / name).is_file():
            return Path(folder) / name
    raise MissingCapability(
        f"Python {platform.python_version()} in {sys.base_prefix} has no shared library {name}, "
        "which the server needs to run models.",
        do=f"Install it (Debian, Ubuntu: libpython{sys.version_info.major}.{sys.version_info.minor}), "
        "or use a Python that was built with --enable-shared.",
    )


def assemble_python_backend(server: ServerFiles, folder: Path) -> Path:
    """Assemble the Python backend from the wheel's parts for the running Python.

    Args:
        server: an installation of `install_server`.
        folder: to write `python` into.

    Returns:
        The folder, for --backend-directory.

    Raises:
        MissingCapability: the wheel has no part for this Python.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stubs = server.backend_folder.parent / "python_backend_stubs"
    stub = stubs / version / "triton_python_backend_stub"
    if not stub.is_file():
        known = ", ".join(sorted((path.name for path in stubs.iterdir()), key=lambda v: int(v.split(".")[1])))
        raise MissingCapability(
            f"The installed server has no part for Python {version}.",
            do=f"Run sparse-export under one of {known}.",
        )
    target = folder / "python"
    target.mkdir(parents=True)
    for name in _BACKEND_FILES:
        shutil.copyfile(server.backend_folder / "python" / name, target / name)
    shutil.copyfile(stub, target / stub.name)
    (target / stub.name).chmod(0o700)
    return folder


def _require_platform() -> None:
    """Raise MissingCapability where the pinned server does not run."""
    machine = (sys.platform, platform.machine())
    if machine != ("linux", "x86_64"):
        raise MissingCapability(
            f"The server that is installed runs on Linux x86-64, and this is {machine[0]} {machine[1]}.",
            do="Use NVIDIA's container of Triton, see `sparse-export package`.",
        )
    name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    found = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if name != "glibc" or found < _LEAST_GLIBC:
        raise MissingCapability(
            f"The C library here is {name or 'unknown'} {version}; the server needs glibc "
            f"{_LEAST_GLIBC[0]}.{_LEAST_GLIBC[1]} or newer.",
            do="Use NVIDIA's container of Triton, see `sparse-export package`.",
        )


def install_server(on_progress: Callable[[str], None]) -> Path:
    """Install the pinned server by pip, checked against its SHA-256, whole or not at all.

    Nothing is done where it is installed. pip looks for it where the user's configuration of pip says.

    Args:
        on_progress: called with a line for people.

    Returns:
        Its folder.

    Raises:
        MissingCapability: the server does not run on this machine, or pip cannot find it.
        OutputError: the folder cannot be written.
    """
    target = install_folder()
    if (target / "pytriton" / "tritonserver" / "bin" / "tritonserver").is_file():
        return target
    _require_platform()
    on_progress(f"installing {_PACKAGE} {_VERSION} (55 MB, 144 MB unpacked) into {target} ...")
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as cause:
        raise OutputError(f"Cannot make {target.parent}: {cause.strerror}.") from cause
    with staged_folder(target) as stage, temporary_folder() as folder:
        wanted = folder / "server.txt"
        wanted.write_text(f"{_PACKAGE}=={_VERSION} --hash=sha256:{_SHA256}\n")
        words = ["install", "--no-deps", "--require-hashes", "--only-binary=:all:", "--no-compile", "--quiet"]
        words += ["--disable-pip-version-check", "--no-input", "--target", str(stage), "-r", str(wanted)]
        done = subprocess.run(
            [sys.executable, "-m", "pip", *words], check=False, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise MissingCapability(
                f"pip could not install {_PACKAGE} {_VERSION}: {done.stderr.strip() or done.stdout.strip()}",
                do="Look at pip's configuration and the network, or put tritonserver on PATH.",
            )
    return target
