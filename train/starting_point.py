"""Where a training run begins that does not begin at fresh weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

STARTED = "sparsify-"
"""What the method of a run begins with that began at given weights."""


@dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """Weights and masks that training goes on from.

    weights: the whole state of the network.  masks: by parameter name, for every weight that `keep_dense` of the
    recipe does not name.  n_outputs: of the network, which may have more than the data have classes.
    method: what the run is said to be made by, `STARTED` and something.  patterns: N:M patterns that weights promise, by name.
    why_dense: reasons of those that promise none.
    """

    weights: Mapping[str, Tensor] = field(repr=False)
    masks: Mapping[str, Tensor] = field(repr=False)
    n_outputs: int
    method: str
    patterns: Mapping[str, str]
    why_dense: Mapping[str, str] = field(default_factory=dict)
