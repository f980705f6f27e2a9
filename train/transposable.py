"""Which weights have masks that are 2:4 along both axes in training, and what becomes of these masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sparse_export.errors import UsageError
from sparse_export.sparsity import MaskUpdate
from sparse_export.sparsity.transposable import (
    cut_to_transposable,
    is_transposable,
    takes_transposable,
    transposable_mask,
    update_transposable,
)

__all__ = [
    "only",
    "random_transposable",
    "require_transposable",
    "swap_transposable",
    "transposable_weights",
]


def transposable_weights(parameters: Mapping[str, nn.Parameter]) -> tuple[str, ...]:
    """The weights that can be 2:4 along both axes.

    Args:
        parameters: those under the pattern 2:4, by name.

    Returns:
        Their names.

    Raises:
        UsageError: there is none.
    """
    names = tuple(name for name, value in parameters.items() if takes_transposable(tuple(value.shape)))
    if not names:
        raise UsageError(
            "No layer under the pattern is a matrix of tiles of 4 x 4.",
            expected="At least one with numbers of inputs and outputs that 4 divides was expected.",
            do="Leave out transposable.",
        )
    return names


def require_transposable(masks: Mapping[str, Tensor], names: Sequence[str]) -> None:
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


def random_transposable(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A mask drawn at random, on the CPU, 2:4 along both axes."""
    return transposable_mask(torch.rand(shape, generator=generator).flatten(1)).view(shape)


def swap_transposable(
    weights: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    names: Sequence[str],
    *,
    prune_rate: float,
    is_cut: bool,
) -> MaskUpdate:
    """One update of these weights; see `update_transposable`, or `cut_to_transposable` when is_cut.

    Args:
        weights, scores, masks: of these weights and perhaps others, by name.
        names: which of them.
        prune_rate: fraction of its active weights that a layer loses.
        is_cut: were the masks not 2:4 before?
    """
    own_weights, own_masks = only(weights, names), only(masks, names)
    if is_cut:
        return cut_to_transposable(own_weights, own_masks)
    return update_transposable(own_weights, only(scores, names), own_masks, prune_rate=prune_rate)


def only(values: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Those of these names, in their order."""
    return {name: values[name] for name in names}
