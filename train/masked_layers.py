"""Which weights of a network are masked, and how many of them are to be active."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sparse_export.errors import UsageError
from sparse_export.sparsity import Cap, NMPattern
from sparse_export.train.arguments import require_fraction
from sparse_export.train.layers import masked_parameters
from sparse_export.train.methods import Method
from sparse_export.train.pattern_plan import PatternPlan, plan_pattern
from sparse_export.train.transposable import weights_both_ways

__all__ = ["MaskedLayers", "masked_layers"]


@dataclass(frozen=True, kw_only=True)
class MaskedLayers:
    """The masked weights by parameter name, and how many may be active.

    plan: of the pattern that they are under, if any.  both_ways: those whose masks are 2:4 along both axes.
    n_wanted: active weights that were asked for; None for as many as the pattern allows.
    n in the methods stands for the pattern's cap at some moment, n of every M; 0 where there is no pattern.
    """

    parameters: dict[str, nn.Parameter]
    plan: PatternPlan | None
    both_ways: tuple[str, ...]
    n_wanted: int | None

    @property
    def n_weights(self) -> int:
        return sum(value.numel() for value in self.parameters.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self.parameters.items()}

    def weights(self) -> dict[str, Tensor]:
        """Their values, which nothing is to learn from."""
        return {name: value.detach() for name, value in self.parameters.items()}

    def n_at(self, step: int) -> int:
        """The cap after so many steps."""
        return self.plan.n_at(step) if self.plan is not None else 0

    @property
    def n_last(self) -> int:
        """The cap at the end."""
        return self.plan.pattern.n if self.plan is not None else 0

    def is_down(self, n: int) -> bool:
        """Has the cap of a pattern come down?"""
        return self.plan is not None and n == self.plan.pattern.n

    def caps(self, n: int) -> dict[str, Cap]:
        return self.plan.caps_with(n) if self.plan is not None else {}

    def limits(self, n: int) -> dict[str, int]:
        """Most active weights of each layer under a pattern."""
        return self.plan.limits_with(n) if self.plan is not None else {}

    def n_active(self, n: int) -> int:
        """Active weights of all layers together."""
        if self.n_wanted is not None or self.plan is None:
            return self.n_wanted or 0
        return self.plan.capacity_with(n)


def masked_layers(
    model: nn.Module,
    method: Method,
    *,
    density: float | None,
    pattern: NMPattern | None,
    masks: Mapping[str, Tensor] | None,
    keep_dense: Sequence[str],
    output_layers: Sequence[str] | None,
    small_share: float,
    approach: tuple[float, float],
    total_steps: int | None,
    transposable: bool,
) -> MaskedLayers:
    """Choose them as `SparseTraining` was asked to. Raises UsageError for what cannot be meant."""
    if density is None and pattern is None and masks is None:
        raise UsageError("Neither a density nor a pattern was given.", expected="At least one was expected.")
    if density is not None and not 0 < density <= 1:
        raise UsageError(f"density is {density}.", expected="A number above 0 and up to 1 was expected.")
    require_fraction("small_share", small_share)
    plan: PatternPlan | None = None
    if pattern is None:
        parameters = masked_parameters(model, keep_dense)
    else:
        plan = plan_pattern(
            pattern,
            model,
            keep_dense=keep_dense,
            outputs=output_layers,
            small_share=small_share,
            approach=approach,
            total_steps=total_steps,
        )
        parameters = {name: model.get_parameter(name) for name in plan.caps}
    n_weights = sum(value.numel() for value in parameters.values())
    return MaskedLayers(
        parameters=parameters,
        plan=plan,
        both_ways=weights_both_ways(parameters, pattern, density, method) if transposable else (),
        n_wanted=_n_of_density(density, n_weights, plan) if masks is None else _n_of(masks, density, plan),
    )


def _n_of(masks: Mapping[str, Tensor], density: float | None, plan: PatternPlan | None) -> int:
    """Active weights of masks that were given. Raises UsageError for too many, and for a density beside them."""
    if density is not None:
        raise UsageError(
            "Masks and a density were given.",
            expected="One of them was expected: masks have a density.",
        )
    n_active = sum(int(mask.sum()) for mask in masks.values())
    if plan is not None and n_active > (room := plan.capacity_with(plan.pattern.n)):
        raise UsageError(
            f"The masks keep {n_active} weights, and the pattern {plan.pattern} has room for {room}.",
            expected="Masks of no more weights than that were expected.",
            do="Leave out the masks: training then starts with as many as the pattern allows.",
        )
    return n_active


def _n_of_density(density: float | None, n_weights: int, plan: PatternPlan | None) -> int | None:
    """Active weights that a density asks for. Raises UsageError for none, and for more than a pattern allows."""
    if density is None:
        return None
    n_active = round(density * n_weights)
    if n_active == 0:
        raise UsageError(
            f"Density {density} of {n_weights} weights is none at all.",
            expected=f"At least {1 / n_weights:.2g} was expected.",
        )
    if plan is not None and n_active > plan.capacity_with(plan.pattern.n):
        raise UsageError(
            f"Density {density} was asked for under the pattern {plan.pattern}.",
            expected=f"At most {plan.pattern.density:g} was expected, which is all that it allows.",
        )
    return n_active
