"""Dense and sparse sessions timed against each other at one batch size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from sparse_export.engines.loadable import engine_of
from sparse_export.engines.tensorrt_import import TARGETS
from sparse_export.evaluate.comparison import LatencyComparison
from sparse_export.evaluate.deciding import Deciding, Ended, Round
from sparse_export.evaluate.sessions import Opened, Timing, timed_inputs
from sparse_export.evaluate.verdict import Verdict, times_text, verdict_of
from sparse_export.formats.bundle import Bundle
from sparse_export.formats.layers import LAYERS_FILE, read_engine_layers
from sparse_export.formats.listed import file_of
from sparse_export.instruments.interleave import MIN_ROUNDS, LatencyResult
from sparse_export.instruments.looks import looks_of
from sparse_export.instruments.outcome import Outcome, outcome_of, reaches
from sparse_export.instruments.statistics import Ratio, paired_ratio, resolution
from sparse_export.runtimes.choice import KNOW_TWO_FOUR

__all__ = ["compare_latency", "speedup_missed", "verdict_of_bundles"]


def compare_latency(
    opened: Opened,
    dense: Bundle,
    sparse: Bundle,
    timing: Timing,
    *,
    budget_s: float,
    required: float | None,
    report: Callable[[str], None],
    on_round: Round | None,
) -> LatencyComparison:
    """Time the open sessions at one batch size, and judge the ratio.

    Args:
        opened: the sessions.
        dense: bundle.
        sparse: likewise.
        timing: how; its rounds are the most.
        budget_s: seconds after which it ends without a decision.
        required: speed-up that is required, if any.
        report: called with a line before.
        on_round: told of each round.
    """
    batch = timing["batch"]
    report(f"latency at batch {batch}, at most {timing['rounds']} rounds and {budget_s:g} s")
    feeds = timed_inputs(dense, batch, timing["seed"])
    looks = looks_of(timing["rounds"])
    deciding = Deciding(looks, budget_s=budget_s, required=required, on_round=on_round)
    results = opened.sessions.measure(feeds, enough=deciding, **timing)
    fixed = timing.copy()
    fixed["rounds"] = MIN_ROUNDS
    on_device = opened.sessions.measure_on_device(feeds, **fixed)
    base, again, other = (results[name] for name in ("dense", "dense again", "sparse"))
    ratio, control = deciding.ratios({name: one.samples_ms for name, one in results.items()})
    assert deciding.ended is not None
    verdict = verdict_of_bundles(
        batch=batch,
        ratio=ratio,
        control=control,
        same_shapes=_shapes(dense) == _shapes(sparse),
        share=_compacted_share(dense, sparse),
        has_zeros=sparse.info.n_nonzero < sparse.info.n_parameters,
        steady=base.steady and again.steady and other.steady,
        on_sparse_kernels=_on_sparse_kernels(opened.runtime, sparse),
        precisions=(dense.info.precision, sparse.info.precision),
        ended=deciding.ended,
    )
    return LatencyComparison(
        batch=batch,
        dense=base,
        dense_again=again,
        sparse=other,
        ratio=ratio,
        control=control,
        confidence=looks.confidence,
        ended=deciding.ended,
        floor=verdict.floor,
        outcome=verdict.outcome,
        verdict=verdict.text,
        on_device=on_device,
        device_ratio=_over_dense(on_device, "sparse"),
        device_control=_over_dense(on_device, "dense again"),
    )


def _over_dense(results: Mapping[str, LatencyResult], name: str) -> Ratio | None:
    return paired_ratio(results["dense"].samples_ms, results[name].samples_ms) if results else None


def _on_sparse_kernels(runtime: str, bundle: Bundle) -> str | None:
    """What is known of sparse kernels there, None for a runtime that has none."""
    if runtime not in KNOW_TWO_FOUR:
        return None
    if runtime not in TARGETS:
        return "it does not report which layers it runs on them"
    rows = read_engine_layers(file_of(bundle, LAYERS_FILE), engine_of(bundle, runtime).file)
    counts = Counter(row.state for row in rows)
    states = ", ".join(f"{n} {state}" for state, n in counts.items())
    return f"of its layers {states or 'nothing is known'} (`inspect` says why)"


def _shapes(bundle: Bundle) -> tuple[Any, ...]:
    """What decides the work of a runtime that counts zeros like other weights."""
    return bundle.info.macs, bundle.info.n_parameters, Counter(layer.shape for layer in bundle.info.layers)


def _compacted_share(dense: Bundle, sparse: Bundle) -> float | None:
    """Parameters of a compacted sparse graph / those of the dense one; None when nothing was taken out."""
    a, b = dense.info.n_parameters, sparse.info.n_parameters
    return b / a if sparse.info.compacted is not None and 0 < b < a else None


def verdict_of_bundles(
    *,
    batch: int,
    ratio: Ratio,
    control: Ratio,
    same_shapes: bool,
    has_zeros: bool,
    steady: bool,
    share: float | None = None,
    on_sparse_kernels: str | None = None,
    precisions: tuple[str, str] = ("fp32", "fp32"),
    ended: Ended = "decided",
) -> Verdict:
    """The verdict on two bundles at one batch size, with what their graphs let say of it.

    Args:
        batch: samples of a call.
        ratio: dense / sparse.
        control: dense / the same file again.
        same_shapes: whether both graphs have the same shapes.
        has_zeros: whether the sparse graph has.
        steady: whether times had settled when warm-up ended.
        share: parameters of the sparse graph / those of the dense one where dead channels were taken out,
            else None.
        on_sparse_kernels: of a runtime that has kernels for 2:4, what it reports of them, else None.
        precisions: of the dense and of the sparse graph; where they differ, nothing is said to come from
            sparsity.
        ended: why the measurement did.
    """
    outcome = outcome_of(ratio, resolution(control))
    why = _why(
        outcome,
        same_shapes=same_shapes,
        has_zeros=has_zeros,
        on_sparse_kernels=on_sparse_kernels,
        precisions=precisions,
    )
    reasons = [] if why is None else [why]
    if outcome == "not told apart":
        more = {"budget": "more time by --budget", "rounds": "more rounds by --rounds"}.get(ended)
        reasons.insert(0, f"Give it {more}, or a quieter machine." if more else "Use a quieter machine.")
    if share is not None and not same_shapes:
        reasons.append(
            f"Dead channels were taken out of the sparse graph: it has {share:.3f} of the dense one's "
            "parameters"
            f"{', and zeros among them are still multiplied' if has_zeros else ''}."
        )
    copies = "two copies of the dense file"
    return verdict_of(ratio, control, copies=copies, steady=steady, why=reasons, at=f"Batch {batch}")


def _why(
    outcome: Outcome,
    *,
    same_shapes: bool,
    has_zeros: bool,
    on_sparse_kernels: str | None,
    precisions: tuple[str, str],
) -> str | None:
    """What the graphs say of the outcome; None of a speed-up of other shapes, which needs no reason."""
    if precisions[0] != precisions[1]:
        return (
            f"The dense graph computes in {precisions[0]}, the sparse one in {precisions[1]}: the ratio is "
            "of both changes together, and says nothing of sparsity alone. Build both in one precision to "
            "know."
        )
    if not same_shapes:
        if outcome == "speed-up":
            return None
        if outcome == "not told apart":
            return "The graphs differ in shape; what that gains is within the noise of this measurement."
        return "The graphs differ in shape, yet the difference in work does not show as a gain."
    if on_sparse_kernels is not None:
        return f"Both graphs have the same shapes. The runtime has kernels for 2:4: {on_sparse_kernels}."
    if outcome == "speed-up":
        return "Both graphs have the same shapes, so this does not come from skipped zeros."
    if has_zeros:
        return (
            "Both graphs have the same shapes: onnxruntime multiplies a zero like any other weight, also "
            "where a packed file stores none, so zeros do not make it faster."
        )
    return "Both graphs have the same shapes and hold no zeros to skip."


def speedup_missed(latency: tuple[LatencyComparison, ...], required: float | None) -> str | None:
    """The batches whose speed-up is below the required one, as a sentence; None where there are none."""
    if required is None:
        return None
    missed = [
        f"{times_text(at.ratio)} at batch {at.batch}"
        for at in latency
        if not reaches(at.outcome, at.ratio, required)
    ]
    return f"The speed-up is {', '.join(missed)}." if missed else None
