"""One process of Triton's server: started, watched and ended so that nothing of it is left over."""

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
from sparse_export.serving.server_files import ServerFiles, python_backend
from sparse_export.serving.settings import HOST_CODE
from sparse_export.telemetry import telemetry_environment

__all__ = ["Ports", "Process", "WorkFolder", "free_ports", "start", "work_folder"]

_LAUNCH = Path(__file__).with_name("launch.py")
_SHARED_MEMORY = Path("/dev/shm")
_BODY_LIMIT = "--http-max-input-size"
_PREFIX = "sparse-export-serve-"
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_./-]+")
# Calls that change the server or make it open files. Clients get none of them: the key that they would have to send
# holds a line break, which neither an HTTP header nor gRPC metadata can carry.
_CLOSED = "model-repository,shared-memory,trace,logging"
# Of the user's environment the server gets what its libraries and the driver look at, what the user says of telemetry,
# and nothing else.
_KEPT = re.compile(r"(PATH|LANG|LC_\w+|TZ|TMPDIR|CUDA_\w+|NVIDIA_\w+|OMP_\w+|LD_LIBRARY_PATH)")


@dataclass(frozen=True, kw_only=True)
class Ports:
    """Where the server listens. host: the address that all of it is bound to."""

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
    """The private folder of one `serve`: what the server reads lies here, and nobody else writes here."""

    path: Path

    @property
    def repository(self) -> Path:
        return self.path / "repository"

    @property
    def staging(self) -> Path:
        """On the same file system as the repository, so that a rename moves a version in at once."""
        return self.path / "staging"

    @property
    def activity(self) -> Path:
        return self.path / "activity"

    def n_executing(self) -> int:
        """Executions that models have begun and not ended, as far as they count them."""
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
    """Make the private folder, mode 0700, and remove it at the end. Raises OutputError."""
    _sweep()
    for base in (tempfile.gettempdir(), "/tmp"):
        # The Python backend puts paths into the words of a shell without quoting them.
        if _PLAIN_PATH.fullmatch(os.path.realpath(base)):
            break
    else:
        raise OutputError(
            f"{tempfile.gettempdir()} has characters in its name that the server's shell would take apart.",
            expected="A temporary folder named with A-Z, a-z, 0-9, _, ., - and / was expected.",
            do="Set TMPDIR to another folder.",
        )
    with temporary_folder(f"serve-{os.getpid()}", Path(os.path.realpath(base))) as path:
        folder = WorkFolder(path=path)
        try:
            for part in (folder.repository, folder.staging, folder.activity):
                part.mkdir()
            yield folder
        finally:
            _remove_shared_memory(os.getpid())


def _sweep() -> None:
    """Remove what an earlier `serve` of this user left that was killed before it could.

    A folder whose lock is held belongs to one that lives, though its process may not be seen from this container.
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
    for path in _SHARED_MEMORY.glob(f"{_PREFIX}{pid}-*"):
        with contextlib.suppress(OSError):
            path.unlink()


def free_ports(host: str, *, http: int, grpc: int, metrics: int, health: int) -> Ports:
    """Settle the four ports, 0 being any free one. Raises UsageError, or MissingCapability for one in use."""
    asked = {"--http-port": http, "--grpc-port": grpc, "--metrics-port": metrics, "--health-port": health}
    given = [port for port in asked.values() if port]
    if len(set(given)) < len(given):
        raise UsageError(
            f"The ports are {', '.join(map(str, given))}.", expected="Four different ones were expected."
        )
    with contextlib.ExitStack() as stack:
        found = [_settled(stack, host, option, port) for option, port in asked.items()]
    return Ports(host=host, http=found[0], grpc=found[1], metrics=found[2], health=found[3])


def _settled(stack: contextlib.ExitStack, host: str, option: str, port: int) -> int:
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
            f"Port {port} on {host} cannot be had: {cause.strerror}.",
            expected="A free port was expected.",
            do=f"End what listens there, or give another one with {option} (0 takes any that is free).",
        ) from cause
    number: int = place.getsockname()[1]
    return number


class Process:
    """Owns the server's process, and every process that it started."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child
        self.pid = child.pid

    def exit_code(self) -> int | None:
        """None while it runs; -N when signal N ended it."""
        return self._child.poll()

    def wait(self, timeout_s: float) -> int | None:
        """Its exit code, or None when it still runs after that time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._child.wait(timeout_s)
        return None

    def ask_to_end(self) -> None:
        """SIGTERM to the server, which ends its own."""
        with contextlib.suppress(ProcessLookupError):
            self._child.terminate()

    def end(self) -> int:
        """Kill what is left of it, its own processes included; its exit code."""
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
    """Start the server on the folder's repository; it logs to our stderr. Call it from the main thread.

    host_code: its TensorRT backend may load version compatible engines, which hold code for the host.
    It is the first of a process group of its own, so that Ctrl-C on a terminal reaches us alone, and is killed by
    the kernel when we end in whatever way.
    """
    words = _words(server, folder, ports, poll_s=poll_s, exit_timeout_s=exit_timeout_s)
    if host_code:
        words.append(HOST_CODE)
    if _can_limit_bodies(server):
        words.append(f"{_BODY_LIMIT}={max_body_mb << 20}")
    for file in folder.activity.iterdir():  # of a server that was killed
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
    """Newer servers can refuse a large HTTP body; the installed one cannot."""
    if server.is_wheel:
        return False
    done = subprocess.run([server.binary, "--help"], check=False, capture_output=True, text=True, timeout=60)
    return _BODY_LIMIT in done.stdout + done.stderr


def _words(
    server: ServerFiles, folder: WorkFolder, ports: Ports, *, poll_s: int, exit_timeout_s: int
) -> list[str]:
    backends = folder.path / "backends"
    if server.is_wheel and not backends.exists():
        python_backend(server, backends)
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
    kept = {name: value for name, value in os.environ.items() if _KEPT.fullmatch(name)}
    # The Python inside the server finds its packages by the first python3 on PATH, not by PYTHONPATH.
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    libraries = [str(path) for path in server.libraries if path.is_dir()]
    kept["LD_LIBRARY_PATH"] = os.pathsep.join([*libraries, *filter(None, [kept.get("LD_LIBRARY_PATH")])])
    kept["PYTHONDONTWRITEBYTECODE"] = "1"
    return kept | telemetry_environment()
