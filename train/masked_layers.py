"""Which weights of a network are masked, and how many of them are to be active."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sparse_export.errors import UsageError
from sparse_export.sparsity import Cap
from sparse_export.train.layers import masked_parameters
from sparse_export.train.pattern_plan import PatternPlan, plan_pattern
from sparse_export.train.sparsity_config import SparsityConfig
from sparse_export.train.transposable import transposable_weights

__all__ = ["MaskedLayers", "masked_layers"]


@dataclass(frozen=True, kw_only=True)
class MaskedLayers:
    """The masked weights, and how many may be active.

    In the methods n stands for the pattern's cap at some moment, n of every M; 0 where there is no pattern.

    Args:
        parameters: by name.
        plan: of the pattern that they are under; None without one.
        transposable: those whose masks are 2:4 along both axes.
        n_wanted: active weights that are wanted; None for as many as the pattern allows.
    """

    parameters: dict[str, nn.Parameter]
    plan: PatternPlan | None
    transposable: tuple[str, ...]
    n_wanted: int | None

    @property
    def n_weights(self) -> int:
        return sum(value.numel() for value in self.parameters.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self.parameters.items()}

    def weights(self) -> dict[str, Tensor]:
        """Their values, detached."""
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
    config: SparsityConfig,
    *,
    masks: Mapping[str, Tensor] | None,
    output_layers: Sequence[str] | None,
    total_steps: int | None,
    unfit: Mapping[str, str] | None = None,
) -> MaskedLayers:
    """Choose the weights that are masked.

    Args:
        model: the network.
        config: its density, pattern, keep_dense, small_share, approach and transposable.
        masks: to start with, which then decide the density; None for the configuration's.
        output_layers: weights that give the outputs; None for those of the layer registered last.
        total_steps: length of the training; None where it is not known.
        unfit: weights that no pattern can hold in, each with the reason.

    Raises:
        UsageError: no layer can be masked so, or not as many weights can be active.
    """
    pattern = config.pattern
    plan: PatternPlan | None = None
    if pattern is None:
        parameters = masked_parameters(model, config.keep_dense)
    else:
        plan = plan_pattern(
            pattern,
            model,
            keep_dense=config.keep_dense,
            outputs=output_layers,
            small_share=config.small_share,
            approach=config.wanted_approach,
            total_steps=total_steps,
            unfit=unfit,
        )
        parameters = {name: model.get_parameter(name) for name in plan.caps}
    n_weights = sum(value.numel() for value in parameters.values())
    return MaskedLayers(
        parameters=parameters,
        plan=plan,
        transposable=transposable_weights(parameters) if config.transposable else (),
        n_wanted=_n_of_density(config.wanted_density, n_weights) if masks is None else _n_of(masks, plan),
    )


def _n_of(masks: Mapping[str, Tensor], plan: PatternPlan | None) -> int:
    """Active weights of masks that were given. Raises UsageError for more than the pattern allows."""
    n_active = sum(int(mask.sum()) for mask in masks.values())
    if plan is not None and n_active > (room := plan.capacity_with(plan.pattern.n)):
        raise UsageError(
            f"The masks keep {n_active} weights, and the pattern {plan.pattern} has room for {room}.",
            expected="Masks of no more weights than that were expected.",
            do="Leave out of them the layers that stay dense, or give masks='magnitude'.",
        )
    return n_active


def _n_of_density(density: float | None, n_weights: int) -> int | None:
    """Active weights that a density asks for. Raises UsageError for none at all."""
    if density is None:
        return None
    n_active = round(density * n_weights)
    if n_active == 0:
        raise UsageError(
            f"Density {density} of {n_weights} weights is none at all.",
            expected=f"At least {1 / n_weights:.2g} was expected.",
        )
    return n_active
