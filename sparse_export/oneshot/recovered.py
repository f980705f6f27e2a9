"""A pruned weight brought back towards what the layer gives in the dense network.

The wanted outputs y of a layer are those of the dense network; its inputs x are those of the pruned one.
Correcting weights towards y in place of W x keeps errors of the layers before from adding up (Frantar and
Alistarh 2023 correct towards W x). Means and standard deviations of single channels follow from the same sums:
no network is run for them.

Legend: o outputs and K columns of one group of channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_export.oneshot.channel_sums import ChannelSums, channel_sums
from sparse_export.oneshot.damping import DAMPING, chosen_damping
from sparse_export.oneshot.layers import Method, pruned_block
from sparse_export.oneshot.paired_sums import PairedStatistics
from sparse_export.oneshot.recovery import Recovery
from sparse_export.oneshot.weights import (
    by_activation,
    by_magnitude,
    columns_from_weight,
    weight_from_columns,
)
from sparse_export.sparsity.caps import Cap
from sparse_export.sparsity.pattern import NMPattern

__all__ = ["RecoveredWeight", "recovered_weight"]

_MOST_SCALE = 2.0  # that a channel is made larger or smaller by, at most


@dataclass(frozen=True, kw_only=True)
class RecoveredWeight:
    """A weight after pruning.

    Attributes:
        weight: (O, I, …), zero where the mask is off.
        mask: bool.
        shift: to be added to each output, float64 (O,); zeros where no bias can take it.
        error: ‖Y - (X W' + shift)‖ / ‖Y‖, Y the wanted outputs.
    """

    weight: Tensor
    mask: Tensor
    shift: Tensor
    error: float


def recovered_weight(
    weight: Tensor,
    cap: Cap,
    method: Method,
    statistics: PairedStatistics,
    check: PairedStatistics | None,
    recovery: Recovery,
    *,
    has_bias: bool,
    allowed: Tensor | None = None,
) -> RecoveredWeight:
    """Bring a weight under its cap, and its outputs close to the wanted ones.

    No row ends further from the wanted outputs than plain magnitude without any of this.

    Args:
        weight: (O, I, …), on the CPU.
        cap: along axis 1.
        method: how weights are chosen.
        statistics: of its inputs and wanted outputs.
        check: of a part of them, on which the damping is chosen; None to choose none.
        recovery: the steps.
        has_bias: a shift can be added to each output.
        allowed: bool, False where a zero must stay.
    """
    n_groups = len(statistics.cross)
    columns = columns_from_weight(weight).chunk(n_groups)
    allowed_in = [None] * n_groups if allowed is None else columns_from_weight(allowed).chunk(n_groups)
    weights, masks, shifts = [], [], []
    error = 0.0
    for group, (block, may) in enumerate(zip(columns, allowed_in, strict=True)):
        sums = channel_sums(statistics, group)
        other = None if check is None else channel_sums(check, group)
        found, mask, shift, errors = _recovered(
            block, cap.pattern, method, sums, other, recovery, may, has_bias
        )
        weights.append(found)
        masks.append(mask)
        shifts.append(shift)
        error += float(errors.sum())
    whole = float(statistics.squares.sum())
    shape = tuple(weight.shape)
    return RecoveredWeight(
        weight=weight_from_columns(torch.cat(weights), shape),
        mask=weight_from_columns(torch.cat(masks), shape),
        shift=torch.cat(shifts),
        error=math.sqrt(error / whole) if whole else 0.0,
    )


def _recovered(
    block: Tensor,
    pattern: NMPattern,
    method: Method,
    raw: ChannelSums,
    check: ChannelSums | None,
    recovery: Recovery,
    allowed: Tensor | None,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, mask, shift and errors of the rows of one group."""
    shifts = recovery.bias and has_bias
    sums = raw.centred() if shifts else raw
    damping, share = DAMPING, 1.0 if recovery.streams else 0.0
    if check is not None and method == "reconstruction" and check.n < raw.n:
        known, other = raw.without(check), check
        if shifts:
            known, other = known.centred(), other.centred()
        some = by_activation(block, raw.gram.diagonal(), pattern, allowed=allowed).mask
        damping, share = chosen_damping(block, some, known, other, streams=recovery.streams)
    cross = None
    if share:
        cross = share * sums.cross + (1 - share) * (block.double() @ sums.gram)
    pruned = pruned_block(
        block, pattern, method, raw.gram.diagonal(), sums.gram, allowed, cross=cross, damping=damping
    )
    plain = by_magnitude(block, pattern, allowed=allowed)
    limit, found = raw.errors(plain.weight), pruned.weight
    if recovery.variance:
        scaled = _with_spread(found, raw.centred())
        found = torch.where((sums.errors(scaled) <= limit)[:, None], scaled, found)
    worse = ~(sums.errors(found) <= limit)  # not `>`: a value that overflows makes the error NaN
    found = torch.where(worse[:, None], plain.weight, found)
    mask = torch.where(worse[:, None], plain.mask, pruned.mask)
    shift = raw.outputs - found.double() @ raw.inputs if shifts else torch.zeros(len(block)).double()
    return found, mask, shift, sums.errors(found)


def _with_spread(weight: Tensor, centred: ChannelSums) -> Tensor:
    """The rows scaled so that their outputs have the standard deviation of the wanted ones."""
    wide = weight.double()
    has = ((wide @ centred.gram) * wide).sum(1).clamp(min=0)
    scale = torch.where(has > 0, (centred.squares / has).sqrt(), 1.0)
    return (wide * scale.clamp(1 / _MOST_SCALE, _MOST_SCALE)[:, None]).to(weight.dtype)
