"""Random layers for the property tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparse_export.sparsity import MaskUpdate, Redistribution, update_masks
from tests.sparsity.oracle import Layer

REDISTRIBUTIONS: tuple[Redistribution, ...] = get_args(Redistribution)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Few values, each exact in every dtype, so that ties are the rule and sums are exact.
TIED_VALUES = (0.0, -0.0, 0.25, -0.25, 0.5, -0.5, 1.0, -1.0, 3.0)

redistributions = st.sampled_from(REDISTRIBUTIONS)
rates = st.sampled_from((0.0, 0.05, 0.1, 0.3, 0.5, 0.9, 1.0)) | st.floats(0, 1)


@st.composite
def tied_layers(draw: st.DrawFn) -> list[Layer]:
    """One to four small layers, full of ties; some empty, some full, some without any momentum."""
    layers = []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 12))
        values = st.lists(st.sampled_from(TIED_VALUES), min_size=size, max_size=size)
        mask = st.lists(st.booleans(), min_size=size, max_size=size)
        layers.append(
            Layer(
                weight=draw(values),
                score=draw(values | st.just([0.0] * size)),
                mask=draw(mask | st.just([False] * size) | st.just([True] * size)),
            )
        )
    return layers


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What `update_masks` takes, by layer name."""

    weights: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]

    def update(self, rate: float, redistribution: Redistribution = "momentum") -> MaskUpdate:
        return update_masks(
            self.weights, self.scores, self.masks, prune_rate=rate, redistribution=redistribution
        )


def inputs_from_layers(layers: Sequence[Layer], dtype: torch.dtype = torch.float32) -> Inputs:
    return Inputs(
        weights={f"layer{n}": torch.tensor(layer.weight, dtype=dtype) for n, layer in enumerate(layers)},
        scores={f"layer{n}": torch.tensor(layer.score, dtype=dtype) for n, layer in enumerate(layers)},
        masks={f"layer{n}": torch.tensor(layer.mask) for n, layer in enumerate(layers)},
    )


@st.composite
def random_inputs(draw: st.DrawFn) -> Inputs:
    """One to five layers of one to four axes and normally distributed values, in any float dtype."""
    dtype = draw(st.sampled_from(DTYPES))
    shapes = draw(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    weights, scores, masks = {}, {}, {}
    for n, shape in enumerate(shapes):
        density = draw(st.sampled_from((0.0, 0.05, 0.3, 0.9, 1.0)))
        weights[f"layer{n}"] = torch.randn(shape, generator=generator).to(dtype)
        scores[f"layer{n}"] = torch.randn(shape, generator=generator).to(dtype)
        masks[f"layer{n}"] = torch.rand(shape, generator=generator) < density
    return Inputs(weights=weights, scores=scores, masks=masks)
