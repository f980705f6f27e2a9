"""Sessions that are timed against each other, opened anew together."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, TypedDict, Unpack

import numpy as np

from sparse_export.engines.loadable import engine_of, require_all_genuine
from sparse_export.engines.tensorrt_import import TARGETS
from sparse_export.errors import ArtefactError, MissingCapability, NotTrustedError, UsageError, what_and_do
from sparse_export.evaluate.parity import golden_inputs
from sparse_export.files import temporary_folder
from sparse_export.formats.bundle import MODEL_FILE, Bundle
from sparse_export.graph.dense_file import dense_from_file, may_be_packed
from sparse_export.graph.model import save_model
from sparse_export.instruments.device import CudaStamps
from sparse_export.instruments.interleave import Enough, LatencyResult, measure_interleaved
from sparse_export.runtimes import DeviceSession, Session
from sparse_export.runtimes.choice import candidates, open_runtime
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.signature import Array, Feeds

__all__ = [
    "Opened",
    "TimedSessions",
    "Timing",
    "opened_both",
    "require_cuda_graphs",
    "timed_inputs",
    "timed_sizes",
]

_CALLS_AFTER_OPENING = 3
_LONG_S = 0.25  # of such a call what follows the first differs little


class Timing(TypedDict):
    """How calls are timed, see `measure_interleaved`.

    Attributes:
        batch: samples of a call.
        rounds: the most, where they end before.
        seed: of the inputs and the order.
    """

    batch: int
    rounds: int
    block_s: float
    seed: int
    warmup_limit_s: float


def timed_inputs(bundle: Bundle, batch: int, seed: int) -> dict[str, Array]:
    """Make the inputs that a bundle is timed on: random ones, or its golden ones repeated.

    Args:
        bundle: whose golden inputs are taken where the graph does not tell which integers it takes.
        batch: samples.
        seed: of the random ones.

    Raises:
        UsageError: a network without a batch axis is to be timed on several samples.
    """
    signature = bundle.info.signature
    if signature.batch is None and batch != 1:
        raise UsageError(
            f"The network of {bundle.path} takes one sample a call, and batch {batch} was asked for.",
            do="Ask for --batch 1, or export it with a free batch axis.",
        )
    if not signature.drawable:
        return signature.repeated(golden_inputs(bundle), batch)
    return signature.draw(batch, seed)


def timed_sizes(bundle: Bundle, seed: int) -> dict[str, int]:
    """The free sizes of the inputs that a bundle is timed on, other than the batch, by name.

    Args:
        bundle: that is timed.
        seed: of its random inputs.
    """
    signature = bundle.info.signature
    sizes = signature.sizes_in(timed_inputs(bundle, 1, seed))
    return {name: size for name, size in sizes.items() if name != signature.batch}


def _launch(launchers: Mapping[str, Callable[[], object]], name: str) -> object:
    return launchers[name]()  # looked up at each call: they are renewed with their sessions


class TimedSessions:
    """Owns one open session for each name, and opens them anew in random order.

    openers: by name, each loads its network afresh.  seed: of the order.
    """

    def __init__(self, openers: Mapping[str, Callable[[], Session]], seed: int) -> None:
        self.open: dict[str, Session] = {}
        self._openers = dict(openers)
        self._order = np.random.default_rng(seed)

    def __enter__(self) -> Self:
        try:
            for name, opener in self._openers.items():
                self.open[name] = opener()
        except BaseException:
            self.close()
            raise
        return self

    def run(self, name: str, feeds: Feeds) -> dict[str, Array]:
        return self.open[name].run(feeds)

    def renew(self, feeds: Feeds) -> None:
        """Close all, open all in random order, run each until it has allocated what it needs."""
        # Of 32 A/A intervals, 18 held 1 with sessions kept open, 29 with renewed ones, which are about three
        # times as wide (three 256x256 Gemms, batch 1; two busy cores of an AMD EPYC, onnxruntime 1.31.1,
        # 2026-11-23).
        self.close()
        names = list(self._openers)
        for i in self._order.permutation(len(names)):
            self.open[names[i]] = self._openers[names[i]]()
        for _ in range(_CALLS_AFTER_OPENING):
            began = time.monotonic()
            for session in self.open.values():
                session.run(feeds)
            if time.monotonic() - began > _LONG_S * len(self.open):
                break

    def measure(
        self, feeds: Feeds, enough: Enough | None = None, **timing: Unpack[Timing]
    ) -> dict[str, LatencyResult]:
        """Time a call of every session, all renewed in each round.

        Args:
            feeds: inputs of all of them, see `timed_inputs`.
            enough: ends it before the last round, see `measure_interleaved`.
            timing: see there too.
        """
        return measure_interleaved(
            {name: partial(self.run, name, feeds) for name in self.open},
            **timing,
            before_round=partial(self.renew, feeds),
            enough=enough,
        )

    def measure_on_device(self, feeds: Feeds, **timing: Unpack[Timing]) -> dict[str, LatencyResult]:
        """As `measure`, of the work on the device alone, by CUDA events; nothing where a session cannot say.

        The inputs lie on the device and the outputs stay there; passes are launched one after another without
        a pause, so that the host's time is hidden where a pass takes longer than its launch.
        """
        if not all(isinstance(session, DeviceSession) for session in self.open.values()):
            return {}
        import torch

        launchers: dict[str, Callable[[], object]] = {}

        def renew() -> None:
            self.renew(feeds)
            for name, session in self.open.items():
                if isinstance(session, DeviceSession):
                    launchers[name] = session.launcher(feeds)

        renew()
        with torch.cuda.stream(torch.cuda.Stream()):  # on the default one TensorRT would wait each time
            return measure_interleaved(
                {name: partial(_launch, launchers, name) for name in self.open},
                **timing,
                before_round=renew,
                time_calls=CudaStamps(torch.cuda).time_calls,
            )

    def close(self) -> None:
        for session in self.open.values():
            session.close()
        self.open.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, kw_only=True)
class Opened:
    """Sessions of the runtime that was chosen.

    Attributes:
        sessions: `dense`, `dense again` and `sparse`.
        runtime: as `candidates` names it.
        passed_over: better ones, and why they could not run both.
    """

    sessions: TimedSessions
    runtime: str
    passed_over: dict[str, str]


@contextlib.contextmanager
def opened_both(
    dense: Bundle,
    sparse: Bundle,
    *,
    runtime: str | None,
    n_threads: int,
    trust: Sequence[str],
    seed: int,
    cuda_graphs: bool,
) -> Iterator[Opened]:
    """The dense bundle opened twice and the sparse one once, until the end of the block.

    Args:
        dense: opened twice.
        sparse: opened once.
        runtime: None for the first of `candidates` that opens both.
        n_threads: of onnxruntime.
        trust: SHA-256 of manifests that are vouched for.
        seed: of the order in which they are opened anew.
        cuda_graphs: engines replay their launches.

    Raises:
        UsageError: CUDA graphs were asked for, and the runtime replays none.
        MissingCapability: the runtime that was asked for cannot work here.
        NotTrustedError: nobody vouches for engines of that runtime.
        ArtefactError: a file was changed.
    """
    passed_over: dict[str, str] = {}
    for name in candidates(dense, sparse) if runtime is None else (runtime,):
        try:  # a file that was changed ends it; one that nobody vouches for is like one that cannot run
            if name in TARGETS:
                both = [(side, engine_of(side, name)) for side in (dense, sparse)]
                require_all_genuine(both, trusted=trust)
        except NotTrustedError as cause:
            if runtime is not None:
                raise
            passed_over[name] = what_and_do(cause)
            continue
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(temporary_folder())
            try:
                first, other = (
                    _opener(
                        side, name, folder / of, n_threads=n_threads, trust=trust, cuda_graphs=cuda_graphs
                    )
                    for of, side in (("dense", dense), ("sparse", sparse))
                )
                openers = {"dense": first, "dense again": first, "sparse": other}
                sessions = stack.enter_context(TimedSessions(openers, seed))
            except (MissingCapability, ArtefactError) as cause:
                if runtime is not None or name == "onnxruntime-cpu":
                    raise
                passed_over[name] = what_and_do(cause)
                continue
            if cuda_graphs:
                require_cuda_graphs(name)
            yield Opened(sessions=sessions, runtime=name, passed_over=passed_over)
            return
    raise AssertionError  # the CPU is among the candidates


def _opener(
    bundle: Bundle,
    name: str,
    folder: Path,
    *,
    n_threads: int,
    trust: Sequence[str],
    cuda_graphs: bool,
) -> Callable[[], Session]:
    """What loads a bundle afresh. Packed weights are expanded here, once for all the times that it is called.

    Args:
        bundle: to load.
        name: of the runtime.
        folder: where the expanded file is written.
        n_threads: of onnxruntime.
        trust: as of `open_runtime`, as are cuda_graphs and the errors.
        cuda_graphs: likewise.
    """
    if name in TARGETS or not may_be_packed(bundle.onnx_path):
        return partial(open_runtime, bundle, name, n_threads=n_threads, trust=trust, cuda_graphs=cuda_graphs)
    open_runtime(bundle, name, n_threads=n_threads, trust=trust).close()  # which checks it
    folder.mkdir()
    save_model(dense_from_file(bundle.onnx_path), folder / MODEL_FILE)
    return partial(
        open_session,
        folder / MODEL_FILE,
        signature=bundle.info.signature,
        n_threads=n_threads,
        provider=name.removeprefix("onnxruntime-"),
    )


def require_cuda_graphs(*runtimes: str) -> None:
    """Check that one of the runtimes replays CUDA graphs.

    Raises:
        UsageError: none does.
    """
    if not set(runtimes) & set(TARGETS):
        raise UsageError(
            f"CUDA graphs were asked for, and {', '.join(runtimes)} "
            f"{'replays' if len(runtimes) == 1 else 'replay'} none.",
            expected=f"They were expected to go with {' or '.join(TARGETS)}.",
            do="Leave --cuda-graphs out, or give bundles with engines.",
        )
