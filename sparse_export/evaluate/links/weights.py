"""Do the stored weights keep the patterns and masks that were promised? Counted in the files themselves."""

from __future__ import annotations

from collections.abc import Iterable

from sparse_export.engines.precision import CALIBRATED
from sparse_export.errors import GateFailed, SparseExportError
from sparse_export.evaluate.links.case import Case
from sparse_export.evaluate.links.chain import Figure, Finding
from sparse_export.evaluate.references import run_of_bundle
from sparse_export.evaluate.vouching import code_of_bundle, require_vouched
from sparse_export.graph.layers import count_parameters
from sparse_export.graph.passes.permute import reduction_axis
from sparse_export.graph.promises import broken_patterns, promised_patterns
from sparse_export.models.run_network import masks_of_run, network_of_run
from sparse_export.oneshot.graph_run import graph_of_run
from sparse_export.sparsity.pattern import fits, groups_over

__all__ = ["weights_keep_their_pattern"]

_SHOWN = 5


def weights_keep_their_pattern(case: Case) -> Finding:
    """The weights stored in `model.onnx`, and those of the run where it is there.

    Of the manifest and `run.json` only the promises are believed. A layer that promises N:M has to obey it
    along the axis that it is reduced over; a masked one has to have no more nonzeros than its mask keeps.
    """
    info = case.bundle.info
    promised = promised_patterns(info.layers)
    stored = {layer.weight: layer for layer in case.layers if layer.shape}
    here = {name: pattern for name, pattern in promised.items() if name in stored}
    masked = [layer for layer in info.layers if layer.masked and layer.name in stored]
    wrong = [*broken_patterns(case.graph, here)]
    wrong += [
        f"{layer.name}: {stored[layer.name].n_nonzero:,} weights are not zero, and its mask keeps "
        f"{layer.n_active:,}"
        for layer in masked
        if stored[layer.name].n_nonzero > layer.n_active
    ]
    calibrated = info.precision in CALIBRATED  # whose weights are no floats, and whose scales are
    n_nonzero = (
        sum(layer.n_nonzero for layer in stored.values()) if calibrated else count_parameters(case.graph)[1]
    )
    if n_nonzero > info.n_nonzero:
        wrong.append(
            f"{n_nonzero:,} parameters in all are not zero, {info.n_nonzero:,} when the bundle was built"
        )
    patterns = ", ".join(sorted({str(pattern) for pattern in here.values()}))
    told = [f"{len(here)} stored weights hold {patterns}"] if here and not wrong else []
    if masked and not wrong:
        told.append(f"{len(masked)} have no more nonzeros than their masks keep")
    told.append(f"{n_nonzero:,} {'weights' if calibrated else 'parameters'} of model.onnx are not zero")
    figures: dict[str, Figure] = {
        "n_promised_patterns": len(promised),
        "n_masked": len(masked),
        "n_nonzero": n_nonzero,
    }
    wrong_in_run, told_of_run = _of_run(case)
    told += told_of_run
    problem = _problem([*wrong, *wrong_in_run], str(case.bundle.path))
    return Finding(
        told=tuple(told),
        figures=figures,
        problem=problem,
        checked=problem is not None or bool(promised or masked),
    )


def _of_run(case: Case) -> tuple[list[str], list[str]]:
    """What is wrong with the weights as they were trained, and what to tell of them."""
    run = run_of_bundle(case.bundle, case.run)
    if run is None:
        return [], [f"the run {case.bundle.info.run.path} is not here, so its own weights were not looked at"]
    if run.info.model.form == "onnx":
        wrong = list(broken_patterns(graph_of_run(run), promised_patterns(run.info.layers)))
        n_promised = len(promised_patterns(run.info.layers))
        return wrong, [f"of the run's own weights {n_promised} were looked at for their pattern"]
    if run.info.model.name is None:
        return [], [f"the run {run.path} does not say how its network is made"]
    brought = code_of_bundle(case.bundle, engines=True, task=case.task, data=case.data)
    require_vouched(brought, run, case.trust)
    network = network_of_run(run, trusted=case.trust)
    masks = masks_of_run(run, network)  # raises where a weight is not zero that its mask leaves out
    promised = promised_patterns(run.info.layers)
    parameters = dict(network.named_parameters(remove_duplicate=False))
    wrong = []
    for name, pattern in promised.items():
        axis = reduction_axis(network, name)
        if name not in parameters or axis is None or not fits(tuple(parameters[name].shape), axis, pattern):
            wrong.append(f"{name} of the run cannot hold {pattern}, which it promises")
        elif n_over := int(groups_over(parameters[name].detach(), axis, pattern)):
            wrong.append(f"{name} of the run, promised {pattern}: {n_over:,} groups have more nonzeros")
    holds = f"{len(promised)} keep their pattern, " if promised else ""
    return wrong, [f"of the run's own weights {holds}{len(masks)} are zero outside their masks"]


def _problem(wrong: Iterable[str], path: str) -> SparseExportError | None:
    clauses = list(wrong)
    if not clauses:
        return None
    more = f"; and {len(clauses) - _SHOWN} more" if len(clauses) > _SHOWN else ""
    return GateFailed(
        f"Weights of {path} do not keep what was promised: {'; '.join(clauses[:_SHOWN])}{more}.",
        expected="The patterns and masks that they were trained with were expected.",
        do="Build it again from its run, and find out who changed the file.",
    )
