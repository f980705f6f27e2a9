"""Where in a network, and when in its training, an N:M pattern holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from sparse_export.errors import UsageError
from sparse_export.graph.passes.permute import reduction_axis, summed_parts
from sparse_export.sparsity import Cap, NMPattern, cap_size, capped_layers
from sparse_export.sparsity.caps import capacity
from sparse_export.sparsity.eligible import SMALL_SHARE
from sparse_export.train.layers import maskable_parameters, named_dense, output_layers


@dataclass(frozen=True, kw_only=True)
class PatternPlan:
    """The layers under a pattern, and the course of its cap.

    In the methods n stands for the cap at some moment: n of every M, from M, which is no cap, down to N.

    Args:
        pattern: as it is at the end.
        caps: by parameter name, as they are at the end.
        why_dense: a reason for each maskable weight without one.
        shapes: of the weights with a cap.
        approach: fractions of the training, see `sparse_export.sparsity.cap_size`.
        total_steps: length of the training; None where it is not known.
    """

    pattern: NMPattern
    caps: dict[str, Cap]
    why_dense: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    approach: tuple[float, float]
    total_steps: int | None

    def n_at(self, step: int) -> int:
        """How many of every M may be active after `step` steps."""
        return cap_size(step, self.total_steps, self.pattern, self.approach)

    def caps_with(self, n: int) -> dict[str, Cap]:
        """The caps while n of M are allowed; none while that is all."""
        if n == self.pattern.m:
            return {}
        pattern = NMPattern(n=n, m=self.pattern.m)
        return {name: Cap(pattern=pattern, axis=cap.axis) for name, cap in self.caps.items()}

    def limits_with(self, n: int) -> dict[str, int]:
        """Most active weights of each layer while n of M are allowed."""
        caps = self.caps_with(n)
        return {
            name: capacity(shape, caps[name]) if name in caps else math.prod(shape)
            for name, shape in self.shapes.items()
        }

    def capacity_with(self, n: int) -> int:
        """Most active weights of all of them together."""
        return sum(self.limits_with(n).values())


def plan_pattern(
    pattern: NMPattern,
    model: nn.Module,
    *,
    keep_dense: Sequence[str] = (),
    outputs: Sequence[str] | None = None,
    small_share: float = SMALL_SHARE,
    approach: tuple[float, float] = (0.0, 0.0),
    total_steps: int | None = None,
    unfit: Mapping[str, str] | None = None,
) -> PatternPlan:
    """Decide which layers of a network get the pattern, and how the training comes to it.

    Args:
        pattern: N:M.
        model: the network.
        keep_dense: shell patterns of layers that stay dense.
        outputs: weights that give the network's outputs; None for those of the layer registered last.
        small_share: see `sparse_export.sparsity.eligible`.
        approach: fractions of the training over which the cap falls, see `sparse_export.sparsity.cap_size`.
        total_steps: length of the training.
        unfit: weights that no pattern can hold in, each with the reason, see `why_no_axis`.

    Raises:
        UsageError: no layer can take the pattern, or an approach comes without total_steps.
    """
    if approach[1] > 0 and total_steps is None:
        raise UsageError(
            f"approach is {approach}, and the length of the training is not known.",
            expected="total_steps was expected with it.",
        )
    shapes = {name: tuple(value.shape) for name, value in maskable_parameters(model).items()}
    named, unfit = named_dense(model, keep_dense), unfit or {}
    caps, why_dense = capped_layers(
        shapes,
        {name: reduction_axis(model, name) for name in shapes},
        pattern,
        parts={name: summed_parts(model, name) for name in shapes},
        outputs=output_layers(model) if outputs is None else outputs,
        keep_dense=named | unfit.keys(),
        small_share=small_share,
    )
    why_dense |= {name: reason for name, reason in unfit.items() if name not in named}
    if not caps:
        listed = "; ".join(f"{name}: {reason}" for name, reason in why_dense.items())
        raise UsageError(
            f"{type(model).__name__} has no layer for the pattern {pattern}: "
            f"{listed or 'it has no layer at all'}.",
            expected="At least one Linear or Conv layer that can take it was expected.",
            do="Choose another pattern, name fewer layers in keep_dense, or train without a pattern.",
        )
    return PatternPlan(
        pattern=pattern,
        caps=caps,
        why_dense=why_dense,
        shapes={name: shapes[name] for name in caps},
        approach=approach,
        total_steps=total_steps,
    )
