"""Does a graph keep the patterns that its layers were promised to have?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import onnx

from sparse_export.errors import ArtefactError, GateFailed, UsageError
from sparse_export.formats.run import LayerInfo
from sparse_export.graph.collection import without_collection
from sparse_export.graph.layer_uses import LayerUse, OtherLayer, counted_of, layer_uses
from sparse_export.graph.weight_counts import count_groups_over

if TYPE_CHECKING:  # it loads torch, which reading a graph does not need
    from sparse_export.sparsity.pattern import NMPattern

__all__ = ["broken_patterns", "not_kept", "note_promise", "promised_patterns", "require_patterns"]


def require_patterns(model: onnx.ModelProto, promised: Mapping[str, NMPattern]) -> None:
    """Hold a graph to the patterns that were promised, by name of the stored weight.

    Raises GateFailed that names the first weights that break theirs, are not in the graph, or cannot be
    checked; ArtefactError for an invalid graph.
    """
    broken = broken_patterns(model, promised)
    if broken:
        more = f"; and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise GateFailed(
            f"{len(broken)} of {len(promised)} weights do not keep their pattern in the graph: "
            f"{'; '.join(broken[:5])}{more}.",
            expected="At most N nonzeros in every M along the reduction axis were promised.",
            do="Run `sparse-export inspect` on the graph to see every layer.",
        )


@without_collection()
def broken_patterns(model: onnx.ModelProto, promised: Mapping[str, NMPattern]) -> tuple[str, ...]:
    """A clause for each promise that a graph does not keep, in the order of the promises.

    See `require_patterns`.
    """
    if not promised:
        return ()
    found: dict[str, list[str]] = {}
    for use in layer_uses(model):
        note_promise(use, promised, found)
    return not_kept(promised, found)


def note_promise(
    use: LayerUse | OtherLayer, promised: Mapping[str, NMPattern], found: dict[str, list[str]]
) -> None:
    """Note under the name of a weight how a layer breaks its promise, or "" where it keeps it."""
    name = use.stored if isinstance(use, LayerUse) else use.name
    if name in promised:
        why = _broken(use, promised[name]) if isinstance(use, LayerUse) else "its values are not known"
        found.setdefault(name, []).append(f"{why}, in {use.where}" if why else "")


def not_kept(promised: Mapping[str, NMPattern], found: Mapping[str, list[str]]) -> tuple[str, ...]:
    clauses = []
    for name, pattern in promised.items():
        whys = found.get(name, ["it is not the weight of a layer there"])
        why = next(filter(None, whys), "")
        if why:
            clauses.append(f"{name}, promised {pattern}: {why}")
    return tuple(clauses)


def _broken(use: LayerUse, pattern: NMPattern) -> str:
    if counted_of(use).most.get(pattern.m, pattern.m) <= pattern.n < pattern.m:
        return ""
    over = count_groups_over(use.weight.values, use.axis, use.n_reduced, n=pattern.n, m=pattern.m)
    if over is None:
        return f"{pattern.m} does not divide the {use.n_reduced} entries along its reduction axis"
    return f"{over[0]:,} of {over[1]:,} groups have more than {pattern.n} nonzeros" if over[0] else ""


def promised_patterns(layers: Iterable[LayerInfo]) -> dict[str, NMPattern]:
    """The patterns that layers promise, by name. Raises ArtefactError for text that is no pattern."""
    promised = {layer.name: layer.pattern for layer in layers if layer.pattern is not None}
    if not promised:
        return {}
    from sparse_export.sparsity.pattern import pattern_from_text

    try:
        return {name: pattern_from_text(text) for name, text in promised.items()}
    except UsageError as cause:
        raise ArtefactError(f"The promised pattern of a layer is invalid. {cause}") from cause
