"""Which weights have masks that are 2:4 along both axes in training, and what becomes of these masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sparse_export.errors import UsageError
from sparse_export.sparsity import MaskUpdate, NMPattern
from sparse_export.sparsity.transposable import (
    cut_to_transposable,
    is_transposable,
    takes_transposable,
    transposable_mask,
    update_transposable,
)
from sparse_export.train.methods import Method

__all__ = ["drawn_both_ways", "only", "require_both_ways", "swapped_both_ways", "weights_both_ways"]


def weights_both_ways(
    parameters: Mapping[str, nn.Parameter], pattern: NMPattern | None, density: float | None, rule: Method
) -> tuple[str, ...]:
    """The weights that can be 2:4 along both axes. Raises UsageError where that cannot be meant."""
    if pattern is None or (pattern.n, pattern.m) != (2, 4) or density is not None:
        raise UsageError(
            f"transposable masks were asked for with the pattern {pattern} and the density {density}.",
            expected="The pattern 2:4 was expected, and no density: they keep half of the weights.",
            do="Give pattern='2:4' alone.",
        )
    if rule.is_gradual or rule.prune != "magnitude":
        raise UsageError(
            "transposable masks were asked for, and the method prunes over all layers together.",
            expected="A method that prunes the smallest weights of each layer was expected.",
            do="Choose sparse-momentum, set, rigl or static.",
        )
    names = tuple(name for name, value in parameters.items() if takes_transposable(tuple(value.shape)))
    if not names:
        raise UsageError(
            "No layer under the pattern is a matrix of tiles of 4 x 4.",
            expected="At least one with numbers of inputs and outputs that 4 divides was expected.",
            do="Leave out transposable.",
        )
    return names


def require_both_ways(masks: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Raise UsageError where one of these masks has not exactly two of every four along both axes."""
    wrong = [
        name
        for name in names
        if 2 * int(masks[name].sum()) != masks[name].numel() or not is_transposable(masks[name].flatten(1))
    ]
    if wrong:
        raise UsageError(
            f"The masks of {', '.join(wrong)} are not 2:4 along both axes.",
            expected="Exactly two of every four along both axes were expected, from the start on.",
            do="Make them by sparsity.transposable.transposable_mask, or leave out the masks.",
        )


def drawn_both_ways(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A mask drawn at random, on the CPU."""
    return transposable_mask(torch.rand(shape, generator=generator).flatten(1)).view(shape)


def swapped_both_ways(
    weights: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    names: Sequence[str],
    *,
    prune_rate: float,
    is_cut: bool,
) -> MaskUpdate:
    """What is pruned and grown of these weights; see `update_transposable`, or `cut_to_transposable` when is_cut.

    weights, scores, masks: of these weights and perhaps others. is_cut: the masks were not 2:4 before.
    """
    own_weights, own_masks = only(weights, names), only(masks, names)
    if is_cut:
        return cut_to_transposable(own_weights, own_masks)
    return update_transposable(own_weights, only(scores, names), own_masks, prune_rate=prune_rate)


def only(values: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Those of these names, in their order."""
    return {name: values[name] for name in names}
