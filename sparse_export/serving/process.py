"""Starts, watches and ends one process of Triton's server, so that nothing of it is left over."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sparse_export.errors import FolderInUse, MissingCapability, OutputError, UsageError
from sparse_export.files import temporary_folder
from sparse_export.files.locks import locked
from sparse_export.serving.server_files import ServerFiles, assemble_python_backend
from sparse_export.serving.settings import HOST_CODE
from sparse_export.telemetry import telemetry_environment

__all__ = ["Ports", "Process", "WorkFolder", "free_ports", "start", "work_folder"]

_LAUNCH = Path(__file__).with_name("launch.py")
_SHARED_MEMORY = Path("/dev/shm")
_BODY_LIMIT = "--http-max-input-size"
_PREFIX = "sparse-export-serve-"
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_./-]+")
# Calls that change the server or make it open files. No client can make them: the key that it would have to
# send holds a line break, which neither an HTTP header nor gRPC metadata can carry.
_CLOSED = "model-repository,shared-memory,trace,logging"
# The server gets the variables that its libraries and the driver read, what the user sets about telemetry,
# and nothing else.
_KEPT = re.compile(r"(PATH|LANG|LC_\w+|TZ|TMPDIR|CUDA_\w+|NVIDIA_\w+|OMP_\w+|LD_LIBRARY_PATH)")


@dataclass(frozen=True, kw_only=True)
class Ports:
    """Where the server listens.

    Attributes:
        host: the address that all ports are bound to.
        http: port of the inference protocol over HTTP.
        grpc: port of the inference protocol over gRPC.
        metrics: port of the metrics page.
        health: port of the supervisor's health endpoint.
    """

    host: str
    http: int
    grpc: int
    metrics: int
    health: int

    @property
    def probe_host(self) -> str:
        """The address to reach it at from this machine."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)


@dataclass(frozen=True, kw_only=True)
class WorkFolder:
    """The private folder of one `serve`, with all that the server reads; nobody else can write to it.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def repository(self) -> Path:
        """The server's model repository."""
        return self.path / "repository"

    @property
    def staging(self) -> Path:
        """Where versions are written: on the repository's file system, so that one rename moves them in."""
        return self.path / "staging"

    @property
    def activity(self) -> Path:
        """Where models count their executions."""
        return self.path / "activity"

    def n_executing(self) -> int:
        """Count the executions that models have begun and not ended, as far as they record them."""
        total = 0
        for file in self.activity.iterdir():
            content = file.read_bytes()
            alive = Path(f"/proc/{file.name.rpartition('-')[2]}").exists()
            if len(content) == 16 and alive:
                begun, ended = struct.unpack("<QQ", content)
                total += begun - ended
        return total


@contextmanager
def work_folder() -> Iterator[WorkFolder]:
    """Create the private folder, mode 0700, and remove it at the end.

    Yields:
        The folder.

    Raises:
        OutputError: it cannot be created.
    """
    _remove_leftovers()
    for base in (tempfile.gettempdir(), "/tmp"):
        # The Python backend puts paths into the words of a shell without quoting them.
        if _PLAIN_PATH.fullmatch(os.path.realpath(base)):
            break
    else:
        raise OutputError(
            f"{tempfile.gettempdir()} has characters in its name that the server's shell would split it at.",
            do="Set TMPDIR to a folder named with A-Z, a-z, 0-9, _, ., - and / alone.",
        )
    with temporary_folder(f"serve-{os.getpid()}", Path(os.path.realpath(base))) as path:
        folder = WorkFolder(path=path)
        try:
            for part in (folder.repository, folder.staging, folder.activity):
                part.mkdir()
            yield folder
        finally:
            _remove_shared_memory(os.getpid())


def _remove_leftovers() -> None:
    """Remove what a killed `serve` of this user left.

    A folder whose lock is held belongs to a live one, though this container may not see its process.
    """
    for base in (Path(tempfile.gettempdir()), _SHARED_MEMORY):
        for path in base.glob(f"{_PREFIX}*"):
            match = re.match(rf"{_PREFIX}(\d+)-", path.name)
            with contextlib.suppress(OSError, OutputError, FolderInUse):
                if match and path.stat().st_uid == os.getuid() and not Path(f"/proc/{match[1]}").exists():
                    if path.is_dir():
                        with locked(path, wait_s=0.0):
                            shutil.rmtree(path)
                    else:
                        path.unlink()


def _remove_shared_memory(pid: int) -> None:
    """Remove the shared memory of a `serve`."""
    for path in _SHARED_MEMORY.glob(f"{_PREFIX}{pid}-*"):
        with contextlib.suppress(OSError):
            path.unlink()


def free_ports(host: str, *, http: int, grpc: int, metrics: int, health: int) -> Ports:
    """Choose the four ports.

    Args:
        host: the address to bind to.
        http: a port number, 0 for any free one; likewise `grpc`, `metrics` and `health`.

    Raises:
        UsageError: two ports are equal, or the host is no address of this machine.
        MissingCapability: a port is in use.
    """
    requested = {"--http-port": http, "--grpc-port": grpc, "--metrics-port": metrics, "--health-port": health}
    fixed = [port for port in requested.values() if port]
    if len(set(fixed)) < len(fixed):
        raise UsageError(
            f"The ports {', '.join(map(str, fixed))} are not all different.", do="Give four different ones."
        )
    with contextlib.ExitStack() as stack:
        found = [_bind(stack, host, option, port) for option, port in requested.items()]
    return Ports(host=host, http=found[0], grpc=found[1], metrics=found[2], health=found[3])


def _bind(stack: contextlib.ExitStack, host: str, option: str, port: int) -> int:
    """Bind a port until the stack closes, and return its number."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as cause:
        raise UsageError(
            f"{host!r} is no address of this machine: {cause.strerror}.", do="Give another --host."
        ) from cause
    place = stack.enter_context(socket.socket(family, kind, protocol))
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind(address)
    except OSError as cause:
        raise MissingCapability(
            f"Port {port} on {host} cannot be used: {cause.strerror}.",
            do=f"End what listens there, or give another one with {option} (0 takes any that is free).",
        ) from cause
    number: int = place.getsockname()[1]
    return number


class Process:
    """The server's process, and every process that it started."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child
        self.pid = child.pid

    def exit_code(self) -> int | None:
        """Return the exit code, None while it runs, -N when signal N ended it."""
        return self._child.poll()

    def model_processes(self) -> list[str]:
        """Return the command lines of the processes that the server started and that live, one for each
        instance of a model in its Python backend.
        """
        found = []
        for listed in Path(f"/proc/{self.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                for child in listed.read_text().split():
                    line = Path(f"/proc/{child}/cmdline").read_bytes()  # empty once it ended
                    found.append(line.replace(b"\0", b" ").decode(errors="replace"))
        return found

    def wait(self, timeout_s: float) -> int | None:
        """Wait at most timeout_s seconds, and return the exit code, None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._child.wait(timeout_s)
        return None

    def terminate(self) -> None:
        """Send SIGTERM to the server, which ends its own processes."""
        with contextlib.suppress(ProcessLookupError):
            self._child.terminate()

    def end(self) -> int:
        """Kill what is left of it, its own processes included, and return the exit code."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        code = self._child.wait()
        deadline = time.monotonic() + 5.0
        while _group_lives(self.pid) and time.monotonic() < deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            time.sleep(0.01)
        _remove_shared_memory(os.getpid())
        return code


def _group_lives(group: int) -> bool:
    """Is a process of this group left?"""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def start(
    server: ServerFiles,
    folder: WorkFolder,
    ports: Ports,
    *,
    poll_s: int = 1,
    exit_timeout_s: int = 10,
    max_body_mb: int = 64,
    host_code: bool = False,
) -> Process:
    """Start the server on the folder's repository. Call this from the main thread.

    The server logs to the stderr of this process. It leads a process group of its own, so that Ctrl-C on a
    terminal reaches this process alone, and the kernel kills it when this process ends in any way.

    Args:
        server: the installation.
        folder: with the repository.
        ports: to listen on.
        poll_s: how often the server looks at its repository, in whole seconds.
        exit_timeout_s: how long it waits for requests when it ends, in whole seconds.
        max_body_mb: largest HTTP body in MiB, where the server can limit it.
        host_code: its TensorRT backend may load version compatible engines, which hold code for the host.
    """
    words = _command(server, folder, ports, poll_s=poll_s, exit_timeout_s=exit_timeout_s)
    if host_code:
        words.append(HOST_CODE)
    if _can_limit_bodies(server):
        words.append(f"{_BODY_LIMIT}={max_body_mb << 20}")
    for file in folder.activity.iterdir():  # of an earlier server
        file.unlink()
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_LAUNCH), str(os.getpid()), *words],
        stdin=subprocess.DEVNULL,
        stdout=sys.__stderr__.fileno() if sys.__stderr__ is not None else subprocess.DEVNULL,
        env=_environment(server),
        start_new_session=True,
    )
    return Process(child)


def _can_limit_bodies(server: ServerFiles) -> bool:
    """Can this server refuse a large HTTP body? Newer ones can; the one of `install_server` cannot."""
    if server.is_wheel:
        return False
    done = subprocess.run([server.binary, "--help"], check=False, capture_output=True, text=True, timeout=60)
    return _BODY_LIMIT in done.stdout + done.stderr


def _command(
    server: ServerFiles, folder: WorkFolder, ports: Ports, *, poll_s: int, exit_timeout_s: int
) -> list[str]:
    """The server's command line."""
    backends = folder.path / "backends"
    if server.is_wheel and not backends.exists():
        assemble_python_backend(server, backends)
    key = f"{_CLOSED}:sparse-export={secrets.token_hex(16)}\n"
    shared = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}-"
    return [
        str(server.binary),
        f"--model-repository={folder.repository}",
        f"--backend-directory={backends if server.is_wheel else server.backend_folder}",
        f"--backend-config=python,shm-region-prefix-name={shared}",
        "--model-control-mode=poll",
        f"--repository-poll-secs={poll_s}",
        "--disable-auto-complete-config",
        "--allow-sagemaker=false",
        "--allow-vertex-ai=false",
        f"--http-address={ports.host}",
        f"--http-port={ports.http}",
        f"--grpc-address={ports.host}",
        f"--grpc-port={ports.grpc}",
        f"--metrics-address={ports.host}",
        f"--metrics-port={ports.metrics}",
        f"--http-restricted-api={key}",
        f"--grpc-restricted-protocol={key}",
        f"--exit-timeout-secs={exit_timeout_s}",
    ]


def _environment(server: ServerFiles) -> dict[str, str]:
    """The server's environment variables."""
    kept = {name: value for name, value in os.environ.items() if _KEPT.fullmatch(name)}
    # The Python inside the server finds its packages by the first python3 on PATH, not by PYTHONPATH.
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    libraries = [str(path) for path in server.libraries if path.is_dir()]
    kept["LD_LIBRARY_PATH"] = os.pathsep.join([*libraries, *filter(None, [kept.get("LD_LIBRARY_PATH")])])
    kept["PYTHONDONTWRITEBYTECODE"] = "1"
    return kept | telemetry_environment()
