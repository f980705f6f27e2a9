"""Time one mask update against the plain form with two full sorts of every layer.

    python -m benchmarks.bench_mask_update [--network vgg-d|lenet300-100|resnet50-like]
                                           [--rounds N] [--threads N] [--json FILE] [--pattern N:M]

The plain form is what sparse_learning does: sort all |weight| of a layer and clear the mask at the first
indices, sort all |momentum| and set the mask at the last. Shares, prune rates and budgets are the same in
both, so both must come to the same number of weights in every layer. In each round both run once, in
alternating order. One thread unless told otherwise: with as many threads as processors, every other process
on the machine makes both forms wait for their slowest thread. With a pattern, the update under it is timed
against the update without, on layers that can take it and masks that obey it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from sparse_export.instruments.machine import machine_facts
from sparse_export.sparsity import (
    Cap,
    NMPattern,
    capped_layers,
    layer_counts,
    pattern_from_text,
    random_masks,
    update_masks,
)
from sparse_export.sparsity.caps import capacity
from sparse_export.sparsity.prune import layer_prune_rates, prune_counts
from sparse_export.sparsity.redistribute import growth_budgets, shares_from_statistic
from sparse_export.version import library_versions, now

Shapes = dict[str, tuple[int, ...]]

DENSITY = 0.05
PRUNE_RATE = 0.5


def vgg_d() -> Shapes:
    """The 16 masked weights of the reference's VGG-D for CIFAR-10: 15,239,872 entries."""
    channels = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    convolutions = {
        f"conv{n}": (n_out, n_in, 3, 3)
        for n, (n_in, n_out) in enumerate(itertools.pairwise(channels), start=1)
    }
    return convolutions | {"fc1": (512, 512), "fc2": (512, 512), "fc3": (10, 512)}


def lenet_300_100() -> Shapes:
    """The 3 weights of LeNet-300-100: 266,200 entries."""
    return {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}


def resnet50_like() -> Shapes:
    """The 54 convolution and classifier weights of torchvision's ResNet-50: 25,502,912 entries."""
    with torch.device("meta"):
        network = torchvision.models.resnet50()
    return {name: tuple(p.shape) for name, p in network.named_parameters() if p.ndim > 1}


NETWORKS: dict[str, Callable[[], Shapes]] = {
    "vgg-d": vgg_d,
    "lenet300-100": lenet_300_100,
    "resnet50-like": resnet50_like,
}


@dataclass(frozen=True, kw_only=True)
class Layers:
    """What an update is given, by layer name; the weights of inactive positions are 0."""

    weights: dict[str, Tensor]
    scores: dict[str, Tensor]
    masks: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Seconds of every round, in order; entries of one index belong to one round."""

    network: str
    n_weights: int
    density: float
    prune_rate: float
    update_s: list[float]
    two_sorts_s: list[float]

    @property
    def ratios(self) -> list[float]:
        """How many times faster the update is than the two sorts, by round."""
        return [plain / ours for plain, ours in zip(self.two_sorts_s, self.update_s, strict=True)]


def random_layers(shapes: Shapes, seed: int = 0) -> Layers:
    generator = torch.Generator().manual_seed(seed)
    masks = random_masks(shapes, layer_counts(shapes, DENSITY), generator)
    return Layers(
        weights={
            name: torch.randn(shape, generator=generator) * masks[name] for name, shape in shapes.items()
        },
        scores={name: torch.randn(shape, generator=generator) for name, shape in shapes.items()},
        masks=masks,
    )


def two_sorts_update(layers: Layers, rate: float) -> dict[str, Tensor]:
    """The masks after an update in its plain form."""
    names = list(layers.masks)
    n_active = torch.stack([mask.sum() for mask in layers.masks.values()])
    n_weights = torch.tensor([mask.numel() for mask in layers.masks.values()])
    statistic = torch.stack([layers.scores[name][layers.masks[name]].abs().double().mean() for name in names])
    shares = shares_from_statistic(statistic, n_active)
    n_removed = prune_counts(layer_prune_rates(shares, n_active, n_weights, rate), n_active)
    n_inactive = n_weights - n_active + n_removed
    n_grown = growth_budgets(shares, n_removed.sum(), n_inactive)

    updated = {}
    for name, dead, born in zip(names, n_inactive.tolist(), n_grown.tolist(), strict=True):
        mask = layers.masks[name].clone()
        flat = mask.view(-1)
        _, smallest_first = torch.sort(layers.weights[name].abs().flatten())
        flat[smallest_first[:dead]] = False
        _, largest_first = torch.sort((layers.scores[name].abs() * ~mask).flatten(), descending=True)
        flat[largest_first[:born]] = True
        updated[name] = mask
    return updated


def our_update(layers: Layers, rate: float) -> dict[str, Tensor]:
    """The masks after `update_masks`."""
    return update_masks(layers.weights, layers.scores, layers.masks, prune_rate=rate).masks


def counts(masks: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


def measure(network: str, n_rounds: int, *, clock: Callable[[], float] = time.perf_counter) -> Samples:
    """Run both forms `n_rounds` times, after one round that warms up and compares their results.

    clock: seconds of any origin.
    Raises RuntimeError when the two give a layer different numbers of weights.
    """
    layers = random_layers(NETWORKS[network]())
    ours, plain = counts(our_update(layers, PRUNE_RATE)), counts(two_sorts_update(layers, PRUNE_RATE))
    if ours != plain:
        raise RuntimeError(f"The two forms disagree: {ours} and {plain} active weights.")

    def seconds(update: Callable[[Layers, float], dict[str, Tensor]]) -> float:
        start = clock()
        update(layers, PRUNE_RATE)
        return clock() - start

    update_s, two_sorts_s = [], []
    for n in range(n_rounds):
        if n % 2:
            two_sorts_s.append(seconds(two_sorts_update))
            update_s.append(seconds(our_update))
        else:
            update_s.append(seconds(our_update))
            two_sorts_s.append(seconds(two_sorts_update))
    return Samples(
        network=network,
        n_weights=sum(mask.numel() for mask in layers.masks.values()),
        density=DENSITY,
        prune_rate=PRUNE_RATE,
        update_s=update_s,
        two_sorts_s=two_sorts_s,
    )


@dataclass(frozen=True, kw_only=True)
class CappedSamples:
    """Seconds of every round for the same layers, with the cap and without."""

    network: str
    pattern: str
    n_weights: int
    density: float
    prune_rate: float
    capped_s: list[float]
    uncapped_s: list[float]

    @property
    def ratios(self) -> list[float]:
        """How many times longer the update takes under the cap, by round."""
        return [capped / plain for capped, plain in zip(self.capped_s, self.uncapped_s, strict=True)]


def measure_capped(
    network: str, pattern: NMPattern, n_rounds: int, *, clock: Callable[[], float] = time.perf_counter
) -> CappedSamples:
    """Run the update with and without caps `n_rounds` times each, after one round that warms up."""
    shapes = NETWORKS[network]()
    caps, _ = capped_layers(shapes, dict.fromkeys(shapes, 1), pattern, outputs=[list(shapes)[-1]])
    shapes = {name: shape for name, shape in shapes.items() if name in caps}
    generator = torch.Generator().manual_seed(0)
    limits = {name: capacity(shapes[name], cap) for name, cap in caps.items()}
    masks = random_masks(shapes, layer_counts(shapes, DENSITY, limits=limits), generator, caps=caps)
    weights = {name: torch.randn(shape, generator=generator) * masks[name] for name, shape in shapes.items()}
    scores = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    def seconds(given: Mapping[str, Cap] | None) -> float:
        start = clock()
        update_masks(weights, scores, masks, prune_rate=PRUNE_RATE, caps=given)
        return clock() - start

    samples: tuple[list[float], list[float]] = ([], [])
    for n in range(-1, n_rounds):
        for which in (0, 1) if n % 2 else (1, 0):
            taken = seconds(caps if which == 0 else None)
            if n >= 0:
                samples[which].append(taken)
    return CappedSamples(
        network=network,
        pattern=str(pattern),
        n_weights=sum(mask.numel() for mask in masks.values()),
        density=DENSITY,
        prune_rate=PRUNE_RATE,
        capped_s=samples[0],
        uncapped_s=samples[1],
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Time one mask update against two full sorts of every layer."
    )
    parser.add_argument("--network", choices=sorted(NETWORKS), default="vgg-d")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="at least 1 (default: 7)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (default: 1)")
    parser.add_argument(
        "--pattern", type=pattern_from_text, metavar="N:M", help="time the update under this cap"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples and the machine's facts")
    options = parser.parse_args(arguments)
    for name, value in (("--rounds", options.rounds), ("--threads", options.threads)):
        if value < 1:
            parser.error(f"{name} is {value}; at least 1 was expected.")
    torch.set_num_threads(options.threads)

    facts = {
        "date": now(),
        "machine": machine_facts(),
        "n_threads": torch.get_num_threads(),
        "versions": library_versions(),
    }
    if options.pattern is not None:
        capped = measure_capped(options.network, options.pattern, options.rounds)
        print(
            f"{capped.network}: {capped.n_weights:,} weights under {capped.pattern}, density "
            f"{capped.density}\n"
            f"with the cap  {statistics.median(capped.capped_s) * 1e3:9.1f} ms (median of {options.rounds})\n"
            f"without       {statistics.median(capped.uncapped_s) * 1e3:9.1f} ms\n"
            f"ratio         {statistics.median(capped.ratios):9.1f} (median of pairs; "
            f"{min(capped.ratios):.1f} to {max(capped.ratios):.1f})"
        )
        _write(options.json, asdict(capped) | {"ratios": capped.ratios} | facts)
        return
    samples = measure(options.network, options.rounds)
    ratios = samples.ratios
    print(
        f"{samples.network}: {samples.n_weights:,} weights, density {samples.density}, rate "
        f"{samples.prune_rate}"
    )
    print(f"update_masks  {statistics.median(samples.update_s) * 1e3:9.1f} ms (median of {options.rounds})")
    print(f"two sorts     {statistics.median(samples.two_sorts_s) * 1e3:9.1f} ms")
    print(
        f"ratio         {statistics.median(ratios):9.1f} (median of pairs; {min(ratios):.1f} to "
        f"{max(ratios):.1f})"
    )
    _write(options.json, asdict(samples) | {"ratios": ratios} | facts)


def _write(file: Path | None, document: dict[str, Any]) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(document, indent=2) + "\n")
        print(file)


if __name__ == "__main__":
    main()
