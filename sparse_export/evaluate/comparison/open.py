"""Sessions of one runtime that runs both bundles."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from sparse_export.engines.loadable import engine_of, require_genuine
from sparse_export.engines.tensorrt_import import TARGETS
from sparse_export.errors import ArtefactError, MissingCapability, NotTrustedError, UsageError, what_and_do
from sparse_export.evaluate.bench.sessions import TimedSessions
from sparse_export.formats.bundle import Bundle
from sparse_export.runtimes.choice import candidates, open_runtime

__all__ = ["Opened", "opened_both"]


@dataclass(frozen=True, kw_only=True)
class Opened:
    """sessions: `dense`, `dense again` and `sparse`.  runtime: as `candidates` names it.  passed_over: better ones, and
    why they could not run both."""

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

    runtime: None for the first of `candidates` that opens both.  seed: of the order in which they are opened anew.
    Raises what a runtime that was asked for cannot do, NotTrustedError, ArtefactError, or UsageError where CUDA graphs
    were asked for and the runtime replays none.
    """
    passed_over: dict[str, str] = {}
    for name in candidates(dense, sparse) if runtime is None else (runtime,):
        try:  # a file that was changed ends it; one that nobody vouches for is like one that cannot run
            for side in (dense, sparse) if name in TARGETS else ():
                require_genuine(side, engine_of(side, name), given=trust)
        except NotTrustedError as cause:
            if runtime is not None:
                raise
            passed_over[name] = what_and_do(cause)
            continue
        first, other = (
            partial(open_runtime, side, name, n_threads=n_threads, trust=trust, cuda_graphs=cuda_graphs)
            for side in (dense, sparse)
        )
        with contextlib.ExitStack() as stack:
            openers = {"dense": first, "dense again": first, "sparse": other}
            try:
                sessions = stack.enter_context(TimedSessions(openers, seed))
            except (MissingCapability, ArtefactError) as cause:
                if runtime is not None or name == "onnxruntime-cpu":
                    raise
                passed_over[name] = what_and_do(cause)
                continue
            if cuda_graphs:
                _require_replayed(name)
            yield Opened(sessions=sessions, runtime=name, passed_over=passed_over)
            return
    raise AssertionError  # the CPU is among the candidates


def _require_replayed(runtime: str) -> None:
    """Raise UsageError for a runtime that replays no CUDA graphs."""
    if runtime not in TARGETS:
        raise UsageError(
            f"CUDA graphs were asked for, and {runtime} replays none.",
            expected=f"They were expected to go with {' or '.join(TARGETS)}.",
            do="Leave --cuda-graphs out, or compare bundles with engines.",
        )
