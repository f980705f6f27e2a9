"""A choice of layers for a torch network, made on its graph."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from sparse_export.errors import UsageError
from sparse_export.oneshot.choice import Sensitivities
from sparse_export.oneshot.choosing import Again, choose_layers, sensitivities_of
from sparse_export.oneshot.costs import Finished
from sparse_export.oneshot.graph_choice import Bound
from sparse_export.oneshot.graph_pruning import PrunedGraph, sparsify_graph
from sparse_export.oneshot.held_back import HeldBack, held_from, most_held_of
from sparse_export.oneshot.layers import Method
from sparse_export.oneshot.pipeline import CALIBRATION_BATCH, NOT_IN_GRAPH, Work
from sparse_export.oneshot.recovering import kept_of, sparsify_recovering
from sparse_export.signature import Array, Feeds, Signature
from sparse_export.sparsity.caps import Cap
from sparse_export.tasks.samples import BatchSamples

__all__ = ["choose", "sensitivities"]


def choose(
    work: Work, caps: Mapping[str, Cap], method: Method, bound: Bound, observer: Finished | None
) -> tuple[dict[str, Cap], dict[str, str]]:
    """Choose layers by what may be lost; `Work.prune` then takes them as they were pruned here.

    Args:
        work: the network, with data.
        caps: of all layers that could get the pattern.
        method: how weights are chosen.
        bound: of what may be lost.
        observer: told of each layer of a walk.

    Returns:
        The caps of the chosen layers, and why the others stay dense.

    Raises:
        GateFailed: no layer can be sparse within the bound.
    """
    began = time.monotonic()
    model, signature, first, walk = _first_walk(work, caps, method, observer)
    assert bound.max_drop is not None
    chosen = choose_layers(
        model,
        signature,
        first,
        _held_back(work, signature),
        walk,
        max_drop=bound.max_drop,
        began=began,
        timings=bound.timings,
        progress=bound.progress,
    )
    work.take(chosen.choice, chosen.pruned)
    tried = {one.name for one in chosen.choice.layers}
    whys = {one.name: one.reason for one in chosen.choice.layers if not one.sparse}
    whys |= {name: NOT_IN_GRAPH for name in caps if name not in tried}
    return {name: cap for name, cap in caps.items() if name not in whys}, whys


def sensitivities(
    work: Work, caps: Mapping[str, Cap], method: Method, bound: Bound, observer: Finished | None
) -> Sensitivities:
    """Measure what each layer changes if it alone is sparse; as `choose`."""
    model, signature, first, _ = _first_walk(work, caps, method, observer)
    return sensitivities_of(model, signature, first, _held_back(work, signature), timings=bound.timings)


def _first_walk(
    work: Work, caps: Mapping[str, Cap], method: Method, observer: Finished | None
) -> tuple[onnx.ModelProto, Signature, PrunedGraph, Again]:
    """All layers pruned, and what prunes some of them."""
    model, signature, batches = work.exported()
    options: dict[str, Any] = {
        "signature": signature,
        "batches": batches,
        "pattern": next(iter(caps.values())).pattern,
        "method": method,
        "memory_bytes": work.memory_bytes,
        "observer": observer,
    }

    def allowed(only: Collection[str]) -> dict[str, Tensor]:
        return {name: mask for name, mask in work.masks.items() if name in only}

    first = sparsify_recovering(model, recovery=work.recovery, only=caps, allowed=allowed(caps), **options)

    def walk(only: Collection[str]) -> PrunedGraph:
        return sparsify_graph(
            model, only=only, allowed=allowed(only), recovery=kept_of(work.recovery, first), **options
        )

    return model, signature, first, walk


def _held_back(work: Work, signature: Signature) -> HeldBack:
    """The validation part, or samples of the training part that weights are not calibrated on."""
    assert work.loader is not None
    info, (name,) = work.loader.info, signature.input_names
    most = most_held_of(math.prod(work.input_shape))
    if info.n_validation:
        batches, n = work.loader.part("validation", CALIBRATION_BATCH), info.n_validation
        words = f"validation samples of {info.name}"
    else:
        generator = torch.Generator().manual_seed(work.seed)
        order = torch.randperm(info.n_train, generator=generator)[work.n_calibration :][:most]
        size = min(CALIBRATION_BATCH, len(order))
        batches = work.loader.training(order, size, 0, 0) if size else iter(())
        n = len(order) // size * size if size else 0
        words = f"training samples of {info.name} that no weight was calibrated on"
    if not n:
        raise UsageError(
            f"{info.name} has no samples to choose layers on: no validation part, and all "
            f"{info.n_train} training samples are calibrated on.",
            do="Give fewer --calibration-samples.",
        )
    parts: list[Feeds] = []
    targets: list[Array] = []
    at = 0
    for x, y in batches:
        rows = [i for i in range(len(x)) if (at + i) * most // n != (at + i + 1) * most // n or n <= most]
        at += len(x)
        if rows:
            assert isinstance(x, torch.Tensor)  # others are pruned as a graph
            parts.append({name: x.cpu().numpy()[rows]})
            targets.append(y.cpu().numpy()[rows])
    samples = BatchSamples(parts=tuple(parts), signature=signature)
    return held_from(
        samples,
        np.concatenate(targets),
        work.task,
        signature,
        range(len(samples)),
        words=words,
        seed=work.seed,
    )
