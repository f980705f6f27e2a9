"""What a method of sparse training decides: a value of data and small functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_export.sparsity import Cap, Distribution, MaskUpdate, NMPattern, Prune, Redistribution

__all__ = [
    "RATE_KEYS",
    "START_KEYS",
    "Accepts",
    "Growth",
    "GrowthName",
    "Method",
    "Moment",
    "Products",
    "Start",
]

GrowthName = Literal["momentum", "random", "gradient", "mean-gradient"]
Start = Literal["random", "sensitivity"]
Products = Literal["dense", "csr", "2:4"]

RATE_KEYS = ("prune_rate", "final_prune_rate", "prune_schedule")
START_KEYS = ("start", "rescale")


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where a training stands when its masks are updated.

    Args:
        parameters: the masked weights, by parameter name.
        masks: bool, of the same names and shapes; True = kept.
        momentum: gives the momentum of the parameters, by name, see
            `sparse_export.train.optimizer_state.OptimizerState.momentum`.
        prune_rate: fraction of its active weights that a layer loses, 0 to 1.
        n_wanted: active weights that are wanted after the update, over all layers: of a pattern at its cap of
            this moment, else those of the density, which may be falling.
        n_before: active weights before the update, over all layers.
        magnitudes: |weight|, or its average over past updates; pruning goes by them.
        gradient_sums: of the steps since the update before, where growth reads them.
        caps: of the layers that are under a pattern, as it is now.
        transposable: the layers whose masks are 2:4 along both axes now.
        is_cut: has the pattern's cap just become smaller?
        threshold: float64, shape (), of the update before, where pruning goes by one; None before the first.
        seed: of random growth.
        step: optimizer steps done.
        start: how the first masks were spread over the layers.
        places: bool, by name: where weights may be, see `sparse_export.train.narrowing.Narrowing`; None for
            everywhere.
    """

    parameters: Mapping[str, nn.Parameter]
    masks: Mapping[str, Tensor]
    momentum: Callable[[], dict[str, Tensor]]
    prune_rate: float
    n_wanted: int
    n_before: int
    magnitudes: Mapping[str, Tensor]
    gradient_sums: Mapping[str, Tensor]
    caps: Mapping[str, Cap]
    transposable: Sequence[str]
    is_cut: bool
    threshold: Tensor | None
    seed: int
    step: int
    start: Distribution
    places: Mapping[str, Tensor] | None = None

    @property
    def n_weights(self) -> int:
        """Active or not, over all layers."""
        return sum(value.numel() for value in self.parameters.values())


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What speaks for an inactive weight: the largest magnitudes are grown.

    Args:
        name: as `growth` of a recipe has it.
        scores: float, by parameter name, in the weights' shapes.
        reads_momentum: are the scores the optimizer's momentum?
        reads_gradient: are the scores the gradient of the step before the update?
        reads_gradient_sums: are they the sum of the gradients of all steps since the update before?
    """

    name: GrowthName
    scores: Callable[[Moment], dict[str, Tensor]]
    reads_momentum: bool = False
    reads_gradient: bool = False
    reads_gradient_sums: bool = False

    @property
    def reads_every_step(self) -> bool:
        """Are gradients of inactive weights needed in every step?"""
        return self.reads_momentum or self.reads_gradient_sums


@dataclass(frozen=True, kw_only=True)
class Accepts:
    """Which settings a method takes beside it.

    Args:
        prunes, redistributions, growths: the words that may be chosen in place of the method's own.
        freeze: may `freeze` and `approach` be set?
        no_freeze: why not.
        falls: may `start_density` be set, from which the density falls?
        narrows: may `narrowing` be set, by which whole channels are left empty?
        pattern: does it take no N:M pattern, may it have one, or does it need one, which then decides its
            density?
        transposable: can its masks be 2:4 along both axes, where it prunes each layer by itself?
        products: what it can be multiplied by in training.
        own_loop: can `SparseTraining` run it in any loop?
        unread: keys of the settings that make no difference to it.
    """

    prunes: tuple[Prune, ...] = get_args(Prune)
    redistributions: tuple[Redistribution, ...] = get_args(Redistribution)
    growths: tuple[GrowthName, ...] = get_args(GrowthName)
    freeze: bool = True
    no_freeze: str = "never moves its masks"
    falls: bool = True
    narrows: bool = True
    pattern: Literal["no", "may", "must"] = "may"
    transposable: bool = True
    products: tuple[Products, ...] = get_args(Products)
    own_loop: bool = True
    unread: tuple[str, ...] = ("decay",)


NO_CHOICE: dict[str, Any] = {
    "prunes": (),
    "redistributions": (),
    "growths": (),
    "falls": False,
    "narrows": False,
}
"""For methods without words to choose."""


class FirstMasks(Protocol):
    """Draws the masks that a training starts with from the loss of its first batch."""

    def __call__(
        self,
        model: nn.Module,
        loss: Callable[[], Tensor],
        *,
        density: float,
        keep_dense: Sequence[str],
        combine: Callable[[Tensor], object] | None,
    ) -> dict[str, Tensor]: ...


class MakeSparsifier(Protocol):
    """Makes the trainer of a method that has one of its own kind."""

    def __call__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        pattern: NMPattern,
        decay: float,
        keep_dense: Sequence[str],
        output_layers: Sequence[str] | None,
        small_share: float,
        unfit: Mapping[str, str] | None,
    ) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method of sparse training.

    Args:
        name: as `method` of a recipe has it.
        update: one update of the masks; None: `SparseTraining` never moves them.
        prune: which weights die, see `sparse_export.sparsity.update_masks`.
        redistribution: how many each layer gets, see there.
        growth: which weights are born; None: none.
        forgets: does a weight that is grown start without the momentum that it gathered while it was
            inactive?
        start: of the masks: `random`, or `sensitivity`, given from outside, see `first_masks`.
        start_density: density at the start, from which it falls, unless another is set; None: that of the
            end.
        falls_until: fraction of the training at which a falling density arrives, unless another is set.
        update_share: fraction of the training between two updates, unless `update_every` is set; None: once
            an epoch.
        first_masks: draws the masks of `sensitivity`.
        freeze: fraction of the training after which masks stand still, unless another is set.
        final_prune_rate: where a cosine prune schedule ends, unless another is set.
        prune_rate: at the start, in place of the setting; None: as set.
        approach: of a pattern's cap, in place of the setting, see `sparse_export.sparsity.cap_size`; None: as
            set.
        restart: fraction of the training at which the learning rate's schedule begins anew; None: never.
        sparsifier: what trains by this method; None: `SparseTraining`.
        moves_every_step: do masks move in every step, rather than at updates?
        accepts: the settings that it takes.
    """

    name: str
    update: Callable[[Method, Moment], MaskUpdate] | None = None
    prune: Prune = "magnitude"
    redistribution: Redistribution = "momentum"
    growth: Growth | None = None
    forgets: bool = False
    start: Start = "random"
    start_density: float | None = None
    falls_until: float = 0.75
    update_share: float | None = None
    first_masks: FirstMasks | None = None
    freeze: float = 1.0
    final_prune_rate: float = 0.005
    prune_rate: float | None = None
    approach: tuple[float, float] | None = None
    restart: float | None = None
    sparsifier: MakeSparsifier | None = None
    moves_every_step: bool = False
    accepts: Accepts = field(default_factory=Accepts)

    @property
    def moves(self) -> bool:
        """Do updates change the masks?"""
        return self.update is not None

    @property
    def reads_gradient_sums(self) -> bool:
        """Does an update need the sum of the gradients since the last one?"""
        return self.growth is not None and self.growth.reads_gradient_sums

    @property
    def reads_momentum(self) -> bool:
        """Does an update need the optimizer's momentum?"""
        if self.growth is None:
            return False
        return self.growth.reads_momentum or self.redistribution == "momentum"
