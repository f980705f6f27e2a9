"""The runtimes that a bundle can run on, and the choice among them: always by name, never a silent fall-back."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_export.engines.loadable import engine_of, problem_with
from sparse_export.engines.tensorrt_import import TARGETS, gpu
from sparse_export.errors import MissingCapability, SparseExportError, UnknownNameError, what_and_do
from sparse_export.formats.bundle import Bundle
from sparse_export.runtimes import Session
from sparse_export.trust import Given

__all__ = [
    "KNOW_TWO_FOUR",
    "RUNTIMES",
    "RuntimeState",
    "best_runtime",
    "candidates",
    "open_runtime",
    "runtime_note",
    "runtime_states",
]

_PROVIDERS = {
    "onnxruntime-cpu": "cpu",
    "onnxruntime-cuda": "cuda",
    "onnxruntime-tensorrt": "tensorrt",
}
RUNTIMES: tuple[str, ...] = (*TARGETS, *reversed(_PROVIDERS))
"""The best first."""
KNOW_TWO_FOUR: tuple[str, ...] = (*TARGETS, "onnxruntime-tensorrt")
"""Those with kernels that skip the zeros of 2:4 weights."""


@dataclass(frozen=True, kw_only=True)
class RuntimeState:
    """A runtime and whether a bundle can run on it here. problem: why not and what to do, None when it can."""

    name: str
    problem: str | None


def runtime_states(bundle: Bundle, *, trust: Given = None) -> tuple[RuntimeState, ...]:
    """Every runtime, the best first; nothing is loaded. trust: as of `open_runtime`."""
    return tuple(RuntimeState(name=name, problem=_problem(bundle, name, trust)) for name in RUNTIMES)


def candidates(*bundles: Bundle) -> tuple[str, ...]:
    """The runtimes that one would expect to run all of these here, the best first; nothing is loaded.

    Engines are expected of bundles that have them, onnxruntime's GPU providers of a machine with a card.
    """
    wanted = set.intersection(*({fact.target for fact in bundle.info.engines} for bundle in bundles))
    found: list[str] = [name for name in TARGETS if name in wanted]
    on_card = [name for name, provider in _PROVIDERS.items() if provider != "cpu"]
    if gpu() is not None:
        found += reversed(on_card)
    return (*found, *(name for name in _PROVIDERS if name not in on_card))


def best_runtime(bundle: Bundle, *, trust: Given = None) -> str:
    """The first runtime that can run the bundle here. Raises MissingCapability when there is none."""
    states = runtime_states(bundle, trust=trust)
    for state in states:
        if state.problem is None:
            return state.name
    raise MissingCapability(
        f"Nothing here can run {bundle.path}: {'; '.join(f'{one.name}: {one.problem}' for one in states)}.",
        expected="One runtime at least was expected.",
        do="Run `sparse-export doctor`.",
    )


def runtime_note(bundle: Bundle, name: str) -> str | None:
    """What there is to know of running a bundle on a runtime here, None where nothing is."""
    if name != "onnxruntime-tensorrt":
        return None
    from sparse_export.runtimes.engine_cache import cache_for

    return cache_for(bundle.onnx_path).note


def open_runtime(
    bundle: Bundle,
    name: str | None = None,
    *,
    n_threads: int | None = None,
    trust: Given = None,
    cuda_graphs: bool = False,
) -> Session:
    """Load a bundle's ONNX file or engine into a runtime; `session.name` says which it is.

    name: one of `RUNTIMES`, None for the best that works here.  n_threads: of onnxruntime.  trust: SHA-256 of the
    manifest of a bundle that was built elsewhere; its engines are not loaded without, and its ONNX file only after
    `require_tried`.  cuda_graphs: let an engine replay its launches; nothing else does.
    Raises UnknownNameError, UsageError (no such engine in the bundle), MissingCapability, ArtefactError,
    NotTrustedError.
    """
    chosen = best_runtime(bundle, trust=trust) if name is None else name
    if chosen in _PROVIDERS:
        from sparse_export.runtimes.onnxruntime import open_session, require_provider
        from sparse_export.runtimes.probe import require_tried

        require_provider(_PROVIDERS[chosen])
        require_tried(bundle, provider=_PROVIDERS[chosen], given=trust)
        return open_session(bundle.onnx_path, n_threads=n_threads, provider=_PROVIDERS[chosen])
    if chosen not in TARGETS:
        raise UnknownNameError("runtime", chosen, RUNTIMES)
    from sparse_export.runtimes.tensorrt import open_engine

    return open_engine(bundle, engine_of(bundle, chosen), trust=trust, cuda_graphs=cuda_graphs)


def _problem(bundle: Bundle, name: str, trust: Given) -> str | None:
    try:
        if name in TARGETS:
            cause = problem_with(bundle, engine_of(bundle, name), given=trust)
            return None if cause is None else what_and_do(cause)
        from sparse_export.runtimes.onnxruntime import require_provider

        require_provider(_PROVIDERS[name])
    except SparseExportError as cause:
        return what_and_do(cause)
    return None
