"""Which layers of a network an N:M pattern is put on, and why not on the others."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from sparse_export.sparsity.caps import Cap
from sparse_export.sparsity.pattern import NMPattern

SMALL_SHARE = 0.01
"""The smallest layers that together hold at most this share of the weights are too small to matter."""

WIDE = 256
"""A layer that gives the outputs stays dense if it has fewer outputs than this."""


def capped_layers(
    shapes: Mapping[str, tuple[int, ...]],
    axes: Mapping[str, int | None],
    pattern: NMPattern,
    *,
    parts: Mapping[str, int] | None = None,
    outputs: Collection[str] = (),
    keep_dense: Collection[str] = (),
    small_share: float = SMALL_SHARE,
) -> tuple[dict[str, Cap], dict[str, str]]:
    """Divide layers into those that get the cap and those that stay as they are, with one reason for each.

    shapes: of the weights, by name.  axes: each weight's reduction axis, None where it has none; never
    guessed from a shape.  parts: into how many parts that axis falls which are summed apart, 1 by default;
    the channel groups of a transposed convolution.  outputs: layers that no other comes after; those with
    fewer than WIDE outputs stay dense.  keep_dense: layers that were named to stay.  small_share: see
    SMALL_SHARE; 0 caps small layers too. Output and small layers stay dense because a cap starves them:
    LeNet-300-100 at density .1 lost a quarter of a point of accuracy when they had one. The last layer of an
    encoder, or of a classifier with many classes, is as large as the others, and gets one. Returns (caps,
    reasons), both in the order of `shapes`; together they name every layer once.
    """
    small = _small(shapes, small_share)
    summed = {
        name: 0 if axis is None else shapes[name][axis] // (parts or {}).get(name, 1)
        for name, axis in axes.items()
    }
    caps: dict[str, Cap] = {}
    reasons: dict[str, str] = {}
    for name, axis in axes.items():
        if axis is None:
            reasons[name] = "it sums over no axis"
        elif name in keep_dense:
            reasons[name] = "it was named to stay dense"
        elif summed[name] == 0 or summed[name] % pattern.m:
            reasons[name] = (
                f"it sums over {summed[name]} {'channel' if summed[name] == 1 else 'channels'}, "
                f"and {pattern} needs a multiple of {pattern.m}"
            )
        elif name in outputs and _n_outputs(shapes[name], axis, (parts or {}).get(name, 1)) < WIDE:
            reasons[name] = "it gives the outputs"
        elif name in small:
            reasons[name] = (
                f"it is among the smallest layers, which together hold at most {small_share:.0%} of the "
                "weights"
            )
        else:
            caps[name] = Cap(pattern=pattern, axis=axis)
    return caps, reasons


def _n_outputs(shape: tuple[int, ...], axis: int, parts: int) -> int:
    """Of a layer that sums over one of the first two axes, in a number of parts along the first one."""
    return shape[0] if axis == 1 else math.prod(shape[1:2]) * parts


def _small(shapes: Mapping[str, tuple[int, ...]], share: float) -> set[str]:
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    left = share * sum(sizes.values())
    small = set()
    for name in sorted(sizes, key=lambda name: sizes[name]):
        left -= sizes[name]
        if left < 0:
            break
        small.add(name)
    return small
