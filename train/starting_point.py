"""Where a training run begins that does not begin at fresh weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from sparse_export.formats.run import LayerInfo, RunInfo

STARTED = "sparsify-"
"""What the method of a run begins with that began at given weights."""


@dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """Weights and masks that training goes on from.

    Args:
        weights: the whole state of the network.
        masks: by parameter name, for every weight that `keep_dense` of the recipe does not name.
        n_outputs: of the network, which may have more than the data have classes.
        method: of the run's record, `STARTED` and something.
        patterns: N:M patterns that weights promise, by name.
        why_dense: reasons of those that promise none, by name.
        teacher: the whole state of the network whose outputs are learnt, where the recipe says `distill`.
    """

    weights: Mapping[str, Tensor] = field(repr=False)
    masks: Mapping[str, Tensor] = field(repr=False)
    n_outputs: int | None
    method: str
    patterns: Mapping[str, str]
    why_dense: Mapping[str, str] = field(default_factory=dict)
    teacher: Mapping[str, Tensor] | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Promises:
    """The patterns of a run that began at given weights, whatever its recipe has: see `StartingPoint`."""

    patterns: Mapping[str, str]
    why_dense: Mapping[str, str]

    def said_of(self, facts: Iterable[LayerInfo]) -> tuple[LayerInfo, ...]:
        """The records of layers, with these patterns and reasons in place of their own."""
        return tuple(
            replace(fact, pattern=self.patterns.get(fact.name), why_dense=self.why_dense.get(fact.name))
            for fact in facts
        )


def promises_of(earlier: RunInfo | None, start: StartingPoint | None) -> Promises | None:
    """Of a run that is resumed or begun at given weights; None where those of its recipe hold."""
    if earlier is None:
        return Promises(patterns=start.patterns, why_dense=start.why_dense) if start is not None else None
    if not earlier.method.startswith(STARTED):
        return None
    return Promises(
        patterns={layer.name: layer.pattern for layer in earlier.layers if layer.pattern is not None},
        why_dense={layer.name: layer.why_dense for layer in earlier.layers if layer.why_dense is not None},
    )
