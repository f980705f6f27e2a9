"""The choice among the runtimes that a bundle can run on: always by name, never a silent fall-back."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_export.engines.loadable import engine_of, problem_with
from sparse_export.engines.tensorrt_import import TARGETS, gpu
from sparse_export.errors import MissingCapability, SparseExportError, UnknownNameError, what_and_do
from sparse_export.formats.bundle import Bundle
from sparse_export.runtimes import Session
from sparse_export.trust import TrustedDigests

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
    """Whether a bundle can run on a runtime here.

    Attributes:
        name: one of `RUNTIMES`.
        problem: why it cannot, and what to do; None when it can.
    """

    name: str
    problem: str | None


def runtime_states(bundle: Bundle, *, trust: TrustedDigests = None) -> tuple[RuntimeState, ...]:
    """Check every runtime for a bundle. Nothing is loaded.

    Args:
        bundle: an opened bundle.
        trust: digests passed with --trust.

    Returns:
        One entry for each of `RUNTIMES`, the best first.
    """
    return tuple(RuntimeState(name=name, problem=_problem(bundle, name, trust)) for name in RUNTIMES)


def candidates(*bundles: Bundle) -> tuple[str, ...]:
    """List the runtimes that are expected to run all of some bundles here. Nothing is loaded.

    Engines are expected where all bundles have one, onnxruntime's GPU providers where there is a GPU.

    Args:
        bundles: one at least.

    Returns:
        Names of runtimes, the best first.
    """
    wanted = set.intersection(*({fact.target for fact in bundle.info.engines} for bundle in bundles))
    found: list[str] = [name for name in TARGETS if name in wanted]
    on_card = [name for name, provider in _PROVIDERS.items() if provider != "cpu"]
    if gpu() is not None:
        found += reversed(on_card)
    return (*found, *(name for name in _PROVIDERS if name not in on_card))


def best_runtime(bundle: Bundle, *, trust: TrustedDigests = None) -> str:
    """Choose the best runtime that can run a bundle here.

    Args:
        bundle: an opened bundle.
        trust: digests passed with --trust.

    Raises:
        MissingCapability: there is none.
    """
    states = runtime_states(bundle, trust=trust)
    for state in states:
        if state.problem is None:
            return state.name
    raise MissingCapability(
        f"Nothing here can run {bundle.path}: {'; '.join(f'{one.name}: {one.problem}' for one in states)}.",
        do="Run `sparse-export doctor`.",
    )


def runtime_note(bundle: Bundle, name: str) -> str | None:
    """Say what the user should know about running a bundle on a runtime here.

    Args:
        bundle: an opened bundle.
        name: one of `RUNTIMES`.

    Returns:
        A sentence, or None.
    """
    if name != "onnxruntime-tensorrt":
        return None
    from sparse_export.runtimes.engine_cache import cache_for

    return cache_for(bundle.onnx_path).note


def open_runtime(
    bundle: Bundle,
    name: str | None = None,
    *,
    n_threads: int | None = None,
    trust: TrustedDigests = None,
    cuda_graphs: bool = False,
) -> Session:
    """Load a bundle's ONNX file or engine into a runtime.

    Args:
        bundle: an opened bundle.
        name: one of `RUNTIMES`, None for the best that works here; `session.name` says which it is.
        n_threads: of onnxruntime; None for its own choice.
        trust: SHA-256 of the manifest of a bundle that was built elsewhere. Without it the bundle's engines
            are not loaded, and its ONNX file only after `require_probed`.
        cuda_graphs: let an engine replay its launches; nothing else does.

    Returns:
        The session, to be closed.

    Raises:
        UnknownNameError: no such runtime.
        UsageError: the bundle has no such engine.
        MissingCapability: the runtime or its device is missing.
        ArtefactError: the file was changed, or cannot be loaded.
        NotTrustedError: this user does not vouch for the bundle.
    """
    chosen = best_runtime(bundle, trust=trust) if name is None else name
    if chosen in _PROVIDERS:
        from sparse_export.runtimes.onnxruntime import open_session, require_provider
        from sparse_export.runtimes.probe import require_probed

        require_provider(_PROVIDERS[chosen])
        require_probed(bundle, provider=_PROVIDERS[chosen], trusted=trust)
        return open_session(
            bundle.onnx_path,
            signature=bundle.info.signature,
            n_threads=n_threads,
            provider=_PROVIDERS[chosen],
        )
    if chosen not in TARGETS:
        raise UnknownNameError("runtime", chosen, RUNTIMES)
    from sparse_export.runtimes.tensorrt import open_engine

    return open_engine(bundle, engine_of(bundle, chosen), trust=trust, cuda_graphs=cuda_graphs)


def _problem(bundle: Bundle, name: str, trust: TrustedDigests) -> str | None:
    """Why a runtime cannot run a bundle here, and what to do; None when it can."""
    try:
        if name in TARGETS:
            cause = problem_with(bundle, engine_of(bundle, name), trusted=trust)
            return None if cause is None else what_and_do(cause)
        from sparse_export.runtimes.onnxruntime import require_provider

        require_provider(_PROVIDERS[name])
    except SparseExportError as cause:
        return what_and_do(cause)
    return None
