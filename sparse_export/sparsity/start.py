"""The masks that training starts from: how many weights each layer gets, and which."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from sparse_export.sparsity.caps import Cap, growth_candidates
from sparse_export.sparsity.select import largest_on_cpu

Distribution = Literal["uniform", "erdos-renyi"]


def layer_counts(
    shapes: Mapping[str, tuple[int, ...]],
    density: float,
    distribution: Distribution = "uniform",
    *,
    limits: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Active weights of each layer at the start; they sum to exactly round(density * all weights).

    shapes: weight shapes in layer order, none empty.  density: 0 to 1.
    uniform: every layer gets `density`.  erdos-renyi: a layer's density is proportional to
    sum(shape) / prod(shape), which gives thin layers more (Mocanu et al. 2018; with kernel sizes in the sum,
    as Evci et al. 2020); a layer that would be over full is full, and the rest shares what is left.  limits:
    most active weights of a layer, by name; by default all of them. Whole numbers by largest remainder.
    Raises ValueError for another density or distribution, and for a density that the limits have no room for.
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density is {density}; a number from 0 to 1 was expected.")
    if distribution not in get_args(Distribution):
        raise ValueError(
            f"distribution is {distribution!r}; one of {', '.join(get_args(Distribution))} was expected."
        )
    weights = {name: math.prod(shape) for name, shape in shapes.items()}
    total = round(density * sum(weights.values()))
    sizes = {name: min(size, (limits or {}).get(name, size)) for name, size in weights.items()}
    if total > sum(sizes.values()):
        raise ValueError(
            f"Density {density} asks for {total} active weights; at most {sum(sizes.values())} are allowed."
        )
    attraction = {
        name: float(weights[name] if distribution == "uniform" else sum(shape))
        for name, shape in shapes.items()
    }
    quota: dict[str, float] = {}
    open_layers = list(shapes)
    while open_layers:
        left = total - sum(quota.values())
        scale = left / sum(attraction[name] for name in open_layers)
        full = [name for name in open_layers if scale * attraction[name] >= sizes[name]]
        if not full:
            quota |= {name: scale * attraction[name] for name in open_layers}
            break
        quota |= {name: float(sizes[name]) for name in full}
        open_layers = [name for name in open_layers if name not in full]
    counts = {name: min(math.floor(quota[name]), sizes[name]) for name in shapes}
    by_remainder = sorted(
        (name for name in shapes if counts[name] < sizes[name]), key=lambda name: counts[name] - quota[name]
    )
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def random_masks(
    shapes: Mapping[str, tuple[int, ...]],
    counts: Mapping[str, int],
    generator: torch.Generator,
    *,
    caps: Mapping[str, Cap] | None = None,
) -> dict[str, Tensor]:
    """Masks with exactly `counts` active positions a layer, every choice equally likely.

    caps: by the names of layers that must obey one, counts within it. There every position is equally likely:
    each group first draws N members, and of all that were drawn `counts` are drawn again.  generator: of the
    CPU, so that a seed gives the same masks on every device. Returns bool tensors on the CPU.
    """
    masks = {}
    caps = caps or {}
    for name, shape in shapes.items():
        if name in caps:
            draws = 1 + torch.rand(
                shape, generator=generator, dtype=torch.float64
            )  # 0 would be no draw at all
            drawn = growth_candidates(draws, torch.zeros(shape, dtype=torch.bool), caps[name])
            masks[name] = largest_on_cpu(draws, drawn, counts[name])
            continue
        mask = torch.zeros(math.prod(shape), dtype=torch.bool)
        mask[torch.randperm(mask.numel(), generator=generator)[: counts[name]]] = True
        masks[name] = mask.view(shape)
    return masks
