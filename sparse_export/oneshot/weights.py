"""Which weights of a trained layer an N:M pattern keeps, and what values they then have.

A layer is a matrix here, its groups consecutive columns: `columns_from_weight` makes it so. Calibration data
come as their Gram matrix, the sum of x xᵀ over all inputs x (K,) that the layer met.

Legend: O outputs, K columns (of a convolution kernel position times input channel), n kept columns of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_export.sparsity.pattern import NMPattern, largest_per_group

_BLOCK = 128  # columns of a sweep whose later neighbours are corrected at once
_ITERATIONS = 80  # of conjugate gradients
_FEWEST_ITERATIONS = 5
_EXACT_COST = 8  # of a multiplication for Cholesky factors in float64, in those of conjugate gradients
_GRADIENTS_WORK = 2e12  # multiplications in float32 of all iterations for one layer
_CONVERGED = 1e-4  # of the first residual
_TINY = 1e-30
_CHUNK = 1 << 22  # numbers in the systems of equations that are solved together: 32 MB


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """A layer after pruning. weight: zero where the mask is off.  mask: bool, of the same shape."""

    weight: Tensor
    mask: Tensor


def columns_from_weight(weight: Tensor) -> Tensor:
    """A weight (O, I, …) as (O, K), input channels last, so that groups of them are consecutive columns."""
    return weight.movedim(1, -1).reshape(weight.shape[0], -1)


def weight_from_columns(columns_OK: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `columns_from_weight`: a contiguous tensor of `shape`."""
    return columns_OK.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()


def by_magnitude(weight_OK: Tensor, pattern: NMPattern, *, allowed: Tensor | None = None) -> Pruned:
    """Keep the N largest |w| of each group; values stay. allowed: bool (O, K), False where zero must stay."""
    return _kept(weight_OK, _mask(weight_OK, pattern, allowed))


def by_activation(
    weight_OK: Tensor, squares_K: Tensor, pattern: NMPattern, *, allowed: Tensor | None = None
) -> Pruned:
    """Keep the N largest |w| · ‖x‖ of each group; values stay.

    squares_K: sum of the squares of each input over the calibration data.  Source: Sun et al. 2024 (Wanda),
    with the group of the pattern as what is compared.
    """
    scores = weight_OK.abs().double() * squares_K.double().sqrt()
    # Inputs that were never on leave their weights at 0, all alike: then the larger weight is kept.
    tie = torch.finfo(torch.float64).tiny  # 0 in float32, so that the weight has to be float64 first
    return _kept(weight_OK, _mask(scores + tie * weight_OK.abs().double(), pattern, allowed))


def by_reconstruction(
    weight_OK: Tensor,
    gram_KK: Tensor,
    pattern: NMPattern,
    *,
    allowed: Tensor | None = None,
    damping: float = 0.01,
    cross: Tensor | None = None,
) -> Pruned:
    """Choose and correct weights so that the layer's outputs on the calibration data change little.

    Columns are visited in order. At the head of each group those N are kept whose removal would cost most;
    the error of every removed weight is passed on to the columns to come (Frantar & Alistarh 2023,
    SparseGPT). Then the kept weights are brought to their least-squares optimum: by Cholesky factors where
    that takes less time than conjugate gradients, else near it by those. A row for which this ends worse than
    plain magnitude is given back to magnitude, so no row's error on the calibration data is above that.

    gram_KK: float64, positive semi-definite.  damping: added to its diagonal, in units of the diagonal's
    mean.  cross: float64 (O, K), the sum of wanted outputs times inputs; None to want what the whole weight
    gives. The dense weight that comes closest to the wanted outputs then takes the weight's place, drawn
    towards it by the damping. Computed in float64; returns the weight's own type.
    """
    original = weight_OK.double()
    allowed = torch.ones_like(weight_OK, dtype=torch.bool) if allowed is None else allowed
    damped = _damped(gram_KK, damping)
    if cross is not None:
        original = towards(original, gram_KK, damped, cross)
    swept = _sweep(torch.where(allowed, original, 0), damped, pattern, allowed)
    if _is_solved_exactly(weight_OK.shape[1], pattern):
        swept = Pruned(weight=least_squares(original, swept.mask, damped), mask=swept.mask)
    else:
        swept = Pruned(weight=by_gradients(original, swept, damped), mask=swept.mask)
    rounded = swept.weight.to(weight_OK.dtype)
    plain = by_magnitude(weight_OK, pattern, allowed=allowed)

    def errors(found: Tensor) -> Tensor:
        if cross is None:
            return row_errors(original, found.double(), gram_KK)
        return ((found.double() @ gram_KK - 2 * cross) * found.double()).sum(
            1
        )  # but for what no weight changes

    # Not `>`: a value that overflows the weight's type makes the error NaN.
    worse = ~(errors(rounded) <= errors(plain.weight))
    return Pruned(
        weight=torch.where(worse[:, None], plain.weight, rounded),
        mask=torch.where(worse[:, None], plain.mask, swept.mask),
    )


def towards(weight_OK: Tensor, gram_KK: Tensor, damped_KK: Tensor, cross_OK: Tensor) -> Tensor:
    """The dense weight whose outputs come closest to the wanted ones, float64 (O, K).

    It minimises the squared distance, plus that from `weight_OK` by what the damping adds to the diagonal.
    """
    added = damped_KK.diagonal() - gram_KK.diagonal()
    factor = torch.linalg.cholesky(damped_KK)
    return torch.cholesky_solve((cross_OK + weight_OK * added).mT, factor).mT


def _is_solved_exactly(n_columns: int, pattern: NMPattern) -> bool:
    return _EXACT_COST * (n_columns * pattern.density) ** 3 / 3 <= _ITERATIONS * n_columns**2


def solving_cost(n_outputs: int, n_columns: int, pattern: NMPattern) -> float:
    """Work that `by_reconstruction` corrects the kept weights with, in multiply-adds of conjugate gradients."""
    if _is_solved_exactly(n_columns, pattern):
        return _EXACT_COST * n_outputs * (n_columns * pattern.density) ** 3 / 3
    return min(_ITERATIONS * n_outputs * n_columns**2, _GRADIENTS_WORK)


def least_squares(weight_OK: Tensor, mask_OK: Tensor, gram_KK: Tensor) -> Tensor:
    """The values of the kept weights that bring each row's outputs closest to those of the whole row.

    gram_KK: float64, positive definite.  Returns float64 (O, K), zero where the mask is off: of each row the
    w' that minimises (w - w')ᵀ G (w - w'). Solved by Cholesky factors, in chunks of rows of about 32 MB.
    """
    weight_OK = weight_OK.double()
    n_kept = int(mask_OK.sum(1).max()) if mask_OK.numel() else 0
    result = torch.zeros_like(weight_OK)
    if n_kept == 0:
        return result
    # Kept columns first; rows that keep fewer are filled up with columns whose equation is w' = 0.
    order = mask_OK.int().argsort(dim=1, descending=True, stable=True)[:, :n_kept]
    target = weight_OK @ gram_KK
    for rows in torch.arange(len(weight_OK)).split(max(1, _CHUNK // n_kept**2)):
        index, real = order[rows], mask_OK[rows].gather(1, order[rows])
        system = gram_KK[index[:, :, None], index[:, None, :]]
        wanted = torch.where(real, target[rows].gather(1, index), 0)
        if not bool(real.all()):
            system = torch.where(real[:, :, None] & real[:, None, :], system, 0)
            system += torch.diag_embed((~real).double())
        solved = torch.cholesky_solve(wanted[:, :, None], torch.linalg.cholesky(system))[:, :, 0]
        result[rows] = result[rows].scatter(1, index, torch.where(real, solved, 0))
    return result


def by_gradients(weight_OK: Tensor, start: Pruned, gram_KK: Tensor) -> Tensor:
    """As `least_squares`, by conjugate gradients for all rows at once, from values that are there.

    Hestenes and Stiefel 1952, preconditioned by the diagonal, in float32, at most 80 iterations. A row that
    did not get better keeps its values.

    Args:
        weight_OK: the whole rows.
        start: of the rows, with the masks.
        gram_KK: float64, positive definite.

    Returns:
        float64 (O, K), zero where the mask is off.
    """
    most = min(_ITERATIONS, int(_GRADIENTS_WORK / max(1, weight_OK.shape[0] * weight_OK.shape[1] ** 2)))
    if most < _FEWEST_ITERATIONS:
        return start.weight.double()
    gram, mask = gram_KK.float(), start.mask
    inverse_K = 1.0 / gram.diagonal()
    solved = start.weight.float()
    residual = torch.where(mask, (weight_OK.float() - solved) @ gram, 0)
    preconditioned = residual * inverse_K
    direction = preconditioned.clone()
    size = (residual * preconditioned).sum(1, keepdim=True)
    first = size.clone()
    for _ in range(most):
        along = torch.where(mask, direction @ gram, 0)
        step = size / (direction * along).sum(1, keepdim=True).clamp(min=_TINY)
        solved += step * direction
        residual -= step * along
        preconditioned = residual * inverse_K
        last, size = size, (residual * preconditioned).sum(1, keepdim=True)
        if bool((size <= _CONVERGED**2 * first).all()):
            break
        direction = preconditioned + size / last.clamp(min=_TINY) * direction
    found = torch.where(mask, solved, 0).double()
    better = row_errors(weight_OK, found, gram_KK) < row_errors(weight_OK, start.weight.double(), gram_KK)
    return torch.where(better[:, None], found, start.weight.double())


def row_errors(weight_OK: Tensor, other_OK: Tensor, gram_KK: Tensor) -> Tensor:
    """Of each row the sum over the calibration data of the squared difference of both outputs, float64
    (O,).
    """
    difference = (weight_OK - other_OK).double()
    return ((difference @ gram_KK) * difference).sum(1).clamp(min=0)


def relative_error(weight_OK: Tensor, other_OK: Tensor, gram_KK: Tensor) -> float:
    """‖X (W - W')‖ / ‖X W‖ in the Frobenius norm, 0 for a layer that gives nothing either way."""
    error = float(row_errors(weight_OK, other_OK, gram_KK).sum())
    whole = float(row_errors(weight_OK, torch.zeros_like(weight_OK), gram_KK).sum())
    return math.sqrt(error / whole) if whole else 0.0


def kept_share(weight: Tensor, mask: Tensor) -> float:
    """Share of the sum of |w| that lies where the mask is on; 1 when all is zero."""
    magnitude = weight.double().abs()
    total = float(magnitude.sum())
    return float(magnitude[mask].sum()) / total if total else 1.0


def _mask(scores_OK: Tensor, pattern: NMPattern, allowed: Tensor | None) -> Tensor:
    if allowed is None:
        return largest_per_group(scores_OK, 1, pattern)
    return largest_per_group(torch.where(allowed, scores_OK, 0), 1, pattern) & allowed


def _kept(weight_OK: Tensor, mask_OK: Tensor) -> Pruned:
    return Pruned(weight=torch.where(mask_OK, weight_OK, 0), mask=mask_OK)


def _damped(gram_KK: Tensor, damping: float) -> Tensor:
    damped = gram_KK.clone()
    damped.diagonal().add_(damping * float(gram_KK.diagonal().mean()) or 1.0)
    return damped


def _factor_of_inverse(gram_KK: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of a symmetric matrix, in the memory of one matrix beside it."""
    # Each step writes where it reads, in the order of columns that LAPACK wants.
    work = gram_KK.clone(memory_format=torch.contiguous_format).mT
    torch.linalg.cholesky(work, out=work)
    torch.cholesky_inverse(work, out=work)
    torch.linalg.cholesky(work, upper=True, out=work)
    return work


def _sweep(weight_OK: Tensor, gram_KK: Tensor, pattern: NMPattern, allowed_OK: Tensor) -> Pruned:
    """The column sweep. weight_OK: float64, zero where not allowed.  gram_KK: positive definite."""
    # Row j holds what the error of column j does to the columns after it, once those before are settled.
    upper = _factor_of_inverse(gram_KK)
    diagonal = upper.diagonal()
    weight, mask = weight_OK.clone(), torch.zeros_like(weight_OK, dtype=torch.bool)
    width = max(1, _BLOCK // pattern.m) * pattern.m
    for start in range(0, weight.shape[1], width):
        stop = min(start + width, weight.shape[1])
        errors = torch.zeros(len(weight), stop - start, dtype=torch.float64)
        for j in range(start, stop):
            if j % pattern.m == 0:
                group = slice(j, j + pattern.m)
                cost = torch.where(allowed_OK[:, group], weight[:, group] / diagonal[group], 0)
                mask[:, group] = largest_per_group(cost, 1, pattern) & allowed_OK[:, group]
            kept = torch.where(mask[:, j], weight[:, j], 0)
            errors[:, j - start] = (weight[:, j] - kept) / diagonal[j]
            weight[:, j] = kept
            weight[:, j + 1 : stop] -= errors[:, j - start, None] * upper[j, j + 1 : stop]
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return Pruned(weight=torch.where(mask, weight, 0), mask=mask)
