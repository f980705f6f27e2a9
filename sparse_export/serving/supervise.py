"""Serves bundles on this machine: starts the server, checks its outputs, watches, reloads and drains it."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from sparse_export.errors import (
    GateFailed,
    MissingCapability,
    ServerFailed,
    SparseExportError,
    UsageError,
)
from sparse_export.serving.exposure import require_loopback, shortages
from sparse_export.serving.health import Readiness, health_endpoint
from sparse_export.serving.picture_models import picture_identity, picture_models
from sparse_export.serving.picture_probe import require_pictures
from sparse_export.serving.probe import is_ready, read_counters, require_golden, require_own_answers
from sparse_export.serving.process import Ports, Process, WorkFolder, free_ports, start, work_folder
from sparse_export.serving.repository import (
    golden_batch,
    open_served,
    require_distinct,
    require_distinct_models,
    require_trusted_engines,
    write_config,
    write_version,
)
from sparse_export.serving.serve_options import ServeOptions
from sparse_export.serving.server_files import ServerFiles, find_server
from sparse_export.serving.slot import (
    Loaded,
    Slot,
    choose_runtime,
    emptied,
    require_files_probed,
    write_model,
    write_models_around,
)
from sparse_export.serving.stop_signals import ReceivedSignals, received_signals

__all__ = ["Loaded", "ServeOptions", "serve"]

_TICK_S = 0.1
_POLL_S = 1  # how often the server looks at its repository, in whole seconds
_QUIET_S = 1.0  # without a request begun or ended, before a drained server counts as idle
_GRACE_S = 2.0  # after readiness fails, for probes to notice
_RESTART_WINDOW_S = 300.0
_LONGEST_PAUSE_S = 5.0  # before a server that died again and again after it was ready is started again
_LOOK_S = 0.5  # how often the processes of models are looked for
_EXIT_TIMEOUT_S = 5
_IDLE_CONNECTIONS = (
    f", as it does when clients keep HTTP connections open, idle or not, for {_EXIT_TIMEOUT_S} s more"
)


def serve(
    bundles: Sequence[Path],
    names: Sequence[str | None],
    options: ServeOptions,
    *,
    say: Callable[[str], None],
    on_ready: Callable[[Ports, int, tuple[Loaded, ...]], None],
) -> int:
    """Serve bundles until SIGTERM or SIGINT. Call this from the main thread.

    SIGHUP reads the bundles again, and those that changed become a new version.

    Args:
        bundles: folders.
        names: of the models; None for a name from the bundle.
        options: how to serve.
        say: called with each line of the log.
        on_ready: called once with the ports, the server's process id and the models, when every golden output
            is right.

    Returns:
        The server's exit code; 128 + N when signal N ended it.

    Raises:
        UsageError: names are equal, a port or an option is invalid, or this is not the main thread.
        ArtefactError: a bundle is damaged.
        NotTrustedError: this user does not vouch for a bundle with engines.
        MissingCapability: there is no server, no such backend, or a port is in use.
        GateFailed: a golden output is wrong.
        ServerFailed: the server ended, or was not ready in time.
    """
    if sys.platform != "linux":
        raise MissingCapability(
            f"`serve` runs on Linux, and this is {sys.platform}.",
            do="Serve from a container, see `sparse-export package`.",
        )
    require_loopback(options.host, exposed=options.expose_unpatched_server)
    for warning in shortages():
        say(f"Warning: {warning}")
    served = [open_served(path, name) for path, name in zip(bundles, names, strict=True)]
    require_distinct(served)
    server = find_server()
    runtimes = [choose_runtime(one, server, options.runtime) for one in served]
    pairs = list(zip(served, runtimes, strict=True))
    require_trusted_engines([one for one, runtime in pairs if runtime != "onnxruntime"], options.trust)
    for one, runtime in pairs:
        require_files_probed(one, runtime, options)
        for reason in one.left_out:
            say(f"{one.name}: left out {reason}")
    slots = [
        Slot(
            path=path,
            served=one,
            runtime=runtime,
            pictures=picture_models(one, one.name, runs_python="python" in server.backends),
        )
        for path, one, runtime in zip(bundles, served, runtimes, strict=True)
    ]
    require_distinct_models([name for slot in slots for name in slot.model_names])
    ports = free_ports(
        options.host,
        http=options.http_port,
        grpc=options.grpc_port,
        metrics=options.metrics_port,
        health=options.health_port,
    )
    readiness = Readiness()
    with (
        received_signals() as signals,
        work_folder() as folder,
        health_endpoint(ports.host, ports.health, readiness),
    ):
        for slot in slots:
            write_model(folder, folder.repository / slot.name, slot, options, version=1)
            write_models_around(folder, slot, server, options)
        supervisor = _Supervisor(server, folder, ports, readiness, slots, options, signals, say, on_ready)
        return supervisor.run()


class _Stopped(Exception):  # noqa: N818 - control flow, never shown
    """A signal to stop came while something else was waited for."""


class _Supervisor:
    """Starts, checks, watches, reloads and ends the server's process."""

    def __init__(
        self,
        server: ServerFiles,
        folder: WorkFolder,
        ports: Ports,
        readiness: Readiness,
        slots: list[Slot],
        options: ServeOptions,
        signals: ReceivedSignals,
        say: Callable[[str], None],
        on_ready: Callable[[Ports, int, tuple[Loaded, ...]], None],
    ) -> None:
        self._server = server
        self._folder = folder
        self._ports = ports
        self._readiness = readiness
        self._slots = slots
        self._options = options
        self._signals = signals
        self._say = say
        self._on_ready = on_ready
        self._announced = False

    def run(self) -> int:
        """Run the server, with restarts, until it is to stop; its exit code."""
        failed: list[float] = []
        died: list[float] = []
        while True:
            was_ready = False
            process = start(
                self._server,
                self._folder,
                self._ports,
                poll_s=_POLL_S,
                exit_timeout_s=_EXIT_TIMEOUT_S,
                max_body_mb=self._options.max_body_mb,
                host_code=any(slot.needs_host_code for slot in self._slots),
            )
            try:
                try:
                    loaded = self._bring_up(process)
                    was_ready = True
                    self._readiness.state = "ready"
                    self._announce(process, loaded)
                    self._watch(process)
                except _Stopped:
                    return self._stop(process)
                except ServerFailed as error:
                    if not self._announced:
                        raise
                    self._say(f"Error: {error}")
            finally:
                self._readiness.state = "restarting"
                code = process.end()
            moments = died if was_ready else failed
            now = time.monotonic()
            moments[:] = [moment for moment in (*moments, now) if now - moment < _RESTART_WINDOW_S]
            if was_ready:  # by a request, mostly, which anybody may send again
                self._say(f"tritonserver {_ending(code)}: started again, time {len(died)} in five minutes")
                self._pause(min(len(died) - 1, _LONGEST_PAUSE_S))
            elif len(failed) > self._options.restarts:
                self._say(
                    f"tritonserver {_ending(code)}, {len(failed)} starts in five minutes failed: giving up"
                )
                return _exit_code(code) or 1
            else:
                self._say(f"tritonserver {_ending(code)}: start {len(failed)} of {self._options.restarts}")

    def _pause(self, seconds: float) -> None:
        """Wait, but not for a signal to stop."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._signals.n_stops:
            time.sleep(_TICK_S)

    def _bring_up(self, process: Process) -> tuple[Loaded, ...]:
        """Wait until the server is ready, then check the golden output of every model."""
        host, port = self._ports.probe_host, self._ports.http
        if not self._wait_until(process, lambda: is_ready(host, port)):
            raise ServerFailed(
                f"tritonserver was not ready after {self._options.start_timeout_s:g} s.",
                do="Look at its log, above; --start-timeout gives it longer.",
            )
        return tuple(
            loaded
            for slot in self._slots
            for loaded in (self._check_golden(slot, slot.name, slot.version), *self._check_pictures(slot))
        )

    def _check_pictures(self, slot: Slot) -> tuple[Loaded, ...]:
        """Check what the models around a network make of raw samples. Raises GateFailed."""
        models = slot.pictures
        if models is None:
            return ()
        host, port, limit_s = self._ports.probe_host, self._ports.http, self._options.start_timeout_s
        largest = require_pictures(host, port, slot.served, models, timeout_s=limit_s)
        return tuple(
            Loaded(
                name=name,
                version=1,
                runtime="ensemble",
                manifest_sha256=slot.served.manifest_sha256,
                largest_difference=largest,
                compared=slot.served.signature.output_names,
            )
            for name in (models.raw, models.file)
            if name is not None
        )

    def _check_golden(self, slot: Slot, model: str, version: int) -> Loaded:
        """Check the golden output of a model, and that requests may be merged. Raises GateFailed."""
        settings, timeout_s = self._options.settings, self._options.start_timeout_s
        host, port = self._ports.probe_host, self._ports.http
        largest = require_golden(
            host,
            port,
            slot.served,
            model=model,
            version=version,
            max_batch=golden_batch(slot.served, slot.runtime, settings),
            timeout_s=timeout_s,
        )
        if slot.served.interface.batched and settings.batching:
            require_own_answers(host, port, slot.served, model=model, version=version, timeout_s=timeout_s)
        return Loaded(
            name=model,
            version=version,
            runtime=slot.runtime,
            manifest_sha256=slot.served.manifest_sha256,
            largest_difference=largest,
            compared=tuple(slot.served.golden_outputs),
        )

    def _wait_until(self, process: Process, reached: Callable[[], bool]) -> bool:
        """Wait; False after too long. Raises ServerFailed when the server ends, _Stopped on a signal."""
        deadline = time.monotonic() + self._options.start_timeout_s
        while not reached():
            code = process.exit_code()
            if code is not None:
                raise ServerFailed(
                    f"tritonserver {_ending(code)} before it was ready.",
                    do="Look at its log, above.",
                )
            if self._signals.n_stops:
                raise _Stopped
            if time.monotonic() > deadline:
                return False
            time.sleep(_TICK_S)
        return True

    def _announce(self, process: Process, loaded: tuple[Loaded, ...]) -> None:
        """Log the models; the first time also call on_ready."""
        for one in loaded:
            self._say(str(one))
        if not self._announced:
            self._announced = True
            self._on_ready(self._ports, process.pid, loaded)
        else:
            self._say(f"ready again, process {process.pid}")

    def _watch(self, process: Process) -> None:
        """Reload on SIGHUP until the server ends, or a model lost a process. Raises _Stopped on a signal to
        stop.
        """
        expected, looked = self._model_processes(process), time.monotonic()
        while process.exit_code() is None:
            if self._signals.n_stops:
                raise _Stopped
            if time.monotonic() - looked > _LOOK_S:
                found, looked = self._model_processes(process), time.monotonic()
                lost = [name for name, n in expected.items() if found[name] < n]
                if lost and process.exit_code() is None:
                    self._say(f"{lost[0]}: a process of the model ended; the server is ended too")
                    return
            if self._signals.reload:
                self._signals.reload = False
                for slot in self._slots:
                    self._reload(process, slot)
                expected, looked = self._model_processes(process), time.monotonic()
            time.sleep(_TICK_S)

    def _model_processes(self, process: Process) -> Counter[str]:
        """How many processes of the Python backend run the present version of each model."""
        lines = process.model_processes()
        return Counter(
            {
                slot.name: sum(f"/{slot.name}/{slot.version}/" in line for line in lines)
                for slot in self._slots
            }
        )

    def _reload(self, process: Process, slot: Slot) -> None:
        """Make a changed bundle the next version; the present one stays when anything is wrong with it."""
        try:
            served = open_served(slot.path, slot.name)
            if served.manifest_sha256 == slot.served.manifest_sha256:
                self._say(f"{slot.name}: unchanged")
                return
            if served.interface != slot.served.interface:
                raise UsageError(
                    f"The new {slot.path} takes and gives {served.interface}, where clients expect "
                    f"{slot.served.interface}.",
                    do="Serve it under another name.",
                )
            taken = [one.bundle.info.folded and one.bundle.info.folded.taken for one in (served, slot.served)]
            if taken[0] != taken[1]:
                raise UsageError(
                    f"The new {slot.path} takes {taken[0] or 'normalized samples'}, where clients send "
                    f"{taken[1] or 'normalized samples'}.",
                    do="Serve it under another name.",
                )
            if slot.pictures is not None and picture_identity(served) != picture_identity(slot.served):
                raise UsageError(
                    f"The new {slot.path} prepares pictures otherwise, or has other names of classes.",
                    do="Start `serve` again with this bundle.",
                )
            runtime = choose_runtime(served, self._server, self._options.runtime)
            if runtime != "onnxruntime":
                require_trusted_engines([served], self._options.trust)
            require_files_probed(served, runtime, self._options)
            new = replace(slot, served=served, runtime=runtime, version=slot.version + 1)
            if new.needs_host_code and not any(one.needs_host_code for one in self._slots):
                raise UsageError(
                    f"The new {slot.path} has a version compatible engine, which holds code for the host, "
                    "and the server was started for engines without such code.",
                    do="Start `serve` again with this bundle.",
                )
            loaded = self._promote(process, slot, new)
        except (SparseExportError, OSError) as error:  # OSError: a file that went away, or may not be read
            if process.exit_code() is not None:
                return  # the server ended, which _watch reports
            self._say(f"Error: {slot.name}: version {slot.version} stays. {error}")
            return
        slot.served, slot.runtime, slot.version = new.served, new.runtime, new.version
        self._say(str(loaded))

    def _promote(self, process: Process, slot: Slot, new: Slot) -> Loaded:
        """Check a version under another name, then make it the next one. On an error all stays as before."""
        host, port = self._ports.probe_host, self._ports.http
        candidate = self._folder.repository / f"{slot.name}.candidate"
        write_model(self._folder, candidate, new, self._options, version=1)
        try:
            if not self._wait_until(process, lambda: is_ready(host, port, candidate.name)):
                raise ServerFailed(f"{candidate.name} was not loaded.", do="Look at the server's log, above.")
            self._check_golden(new, candidate.name, 1)
        finally:
            self._remove(candidate)
        model = self._folder.repository / slot.name
        for old in model.iterdir():
            if old.name.isdigit() and int(old.name) < slot.version:
                self._remove(old)
        stage, version = emptied(self._folder.staging / "version"), model / str(new.version)
        write_version(stage, new.served, new.runtime, self._options.settings, str(self._folder.activity))
        try:
            stage.rename(version)
            write_config(model, slot.name, new.served, new.runtime, self._options.settings)
            if not self._wait_until(process, lambda: is_ready(host, port, slot.name, new.version)):
                raise ServerFailed(
                    f"Version {new.version} was not loaded.", do="Look at the server's log, above."
                )
            return self._check_golden(new, slot.name, new.version)
        except (ServerFailed, GateFailed):
            self._remove(version)
            write_config(model, slot.name, slot.served, slot.runtime, self._options.settings)
            raise

    def _remove(self, path: Path) -> None:
        """Move a folder out of the repository in one step, then delete it."""
        aside = emptied(self._folder.staging / f"old-{path.name}")
        path.rename(aside)
        shutil.rmtree(aside)

    def _stop(self, process: Process) -> int:
        """Drain, end the server and pass its exit code on. A second signal ends it at once."""
        if self._readiness.state == "ready":
            self._readiness.state = "draining"
            self._drain(process)
        self._readiness.state = "draining"
        process.terminate()
        deadline = time.monotonic() + _EXIT_TIMEOUT_S + 5
        while process.exit_code() is None and self._signals.n_stops < 2 and time.monotonic() < deadline:
            time.sleep(_TICK_S)
        if process.exit_code() is None:
            self._say("tritonserver did not end in time: killed")
        code = process.end()
        self._say(f"tritonserver {_ending(code)}{_IDLE_CONNECTIONS if code == 1 else ''}")
        return _exit_code(code)

    def _drain(self, process: Process) -> None:
        """Wait until nothing is in flight, the limit is over or a second signal comes."""
        begin = time.monotonic()
        self._say(f"draining: not ready any more, in-flight requests get up to {self._options.drain_s:g} s")
        n_done, quiet_since = -1, begin
        while (now := time.monotonic()) - begin < self._options.drain_s:
            if process.exit_code() is not None or self._signals.n_stops > 1:
                return
            found = read_counters(self._ports.probe_host, self._ports.metrics)
            n_executing = self._folder.n_executing()
            if found is None or found.n_pending or n_executing or found.n_done != n_done:
                n_done = found.n_done if found is not None else -1
                quiet_since = now
            if now - quiet_since >= _QUIET_S and now - begin >= min(_GRACE_S, self._options.drain_s):
                self._say(f"drained after {now - begin:.1f} s")
                return
            time.sleep(_TICK_S)
        self._say(f"the drain limit of {self._options.drain_s:g} s is over: what is still in flight is lost")


def _ending(code: int) -> str:
    """The end of a process in words."""
    if code >= 0:
        return f"ended with {code}"
    return f"was ended by {signal.Signals(-code).name}"


def _exit_code(code: int) -> int:
    """As a shell has it: 128 + N for signal N."""
    return code if code >= 0 else 128 - code
