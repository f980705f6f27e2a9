"""The paper's two estimates of what sparse training could save: counts, not times of anything sparse."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from sparse_export.formats.run import SpeedInfo
from sparse_export.graph.attention import attention_in_parts
from sparse_export.models.modes import modes_kept
from sparse_export.train.inputs import ModelInputs, called, tensors_of

_TIMED_FOR_S = 0.5
_MIN_TIMED, _MAX_TIMED = 3, 30


@dataclass(frozen=True, kw_only=True)
class LayerUse:
    """What a layer had to do in one batch, as shares from 0 to 1.

    Args:
        empty_inputs: input channels of its weight that are all zero.
        empty_features: input channels that are zero for the whole batch.
        activation_density, weight_density: nonzero entries of its input, and of its weight.
    """

    empty_inputs: float
    empty_features: float
    activation_density: float
    weight_density: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Dense time / estimated time.

    Args:
        channels: had empty channels been left out.
        macs: had every multiplication by zero been left out, of weights and of activations.
    """

    channels: float
    macs: float


def estimate(
    times_ms: Mapping[str, float], uses: Iterable[Mapping[str, LayerUse]], layers: Iterable[str]
) -> Estimate | None:
    """The two estimates, over `layers` and all of the training that `uses` was taken in.

    Args:
        times_ms: dense forward time of each layer.
        uses: of the layers at moments spread evenly over the training.
        layers: their names.

    Returns:
        None where there is nothing to estimate by, or where nothing would be left to do.

    Source: the reference implementation's SparseSpeedupBench: with t a layer's dense time, sum of t over the
    sum of t * (1 - empty_inputs) * (1 - empty_features), and over the sum of t * activation_density *
    weight_density.
    """
    names = list(layers)
    dense = channels = macs = 0.0
    for moment in uses:
        for name in names:
            if name not in moment or name not in times_ms:
                continue
            use, time_ms = moment[name], times_ms[name]
            dense += time_ms
            channels += time_ms * (1 - use.empty_inputs) * (1 - use.empty_features)
            macs += time_ms * use.activation_density * use.weight_density
    if min(dense, channels, macs) <= 0:
        return None
    return Estimate(channels=dense / channels, macs=dense / macs)


def speed_of(model: nn.Module, x: ModelInputs | None, lines: Sequence[Mapping[str, Any]]) -> SpeedInfo | None:
    """The measured time of a step and, apart from it, the estimates, over all epochs.

    Args:
        model: the network.
        x: a batch to time the layers with; None for no estimates.
        lines: of `metrics.jsonl`; what cannot be read in one of them is left out.

    Returns:
        None where no step was timed.
    """
    steps_ms = [ms for ms in map(_step_ms, lines) if ms is not None]
    if not steps_ms:
        return None
    times_ms = {} if x is None else layer_times_ms(model, x)
    uses = [use for use in map(_uses, lines) if use]
    convolutions = estimate(times_ms, uses, convolutions_of(model))
    every = estimate(times_ms, uses, layers_of(model))
    return SpeedInfo(
        step_ms=median(steps_ms),
        estimate_channels=convolutions.channels if convolutions else None,
        estimate_macs=convolutions.macs if convolutions else None,
        all_layers_estimate_channels=every.channels if every else None,
        all_layers_estimate_macs=every.macs if every else None,
        n_moments=len(uses),
        left_out={} if x is None else look(model, x).left_out,
    )


def _step_ms(line: Mapping[str, Any]) -> float | None:
    """Wall time of a step in one epoch, its part of the update that is made once an epoch included; None
    where no step was timed.
    """
    ms, update_ms = _number(line.get("step_ms")), _number(line.get("update_ms"))
    if ms is None or ms <= 0 or update_ms is None:
        return ms if ms is not None and ms > 0 else None
    step, epoch = _number(line.get("step")), _number(line.get("epoch"))
    if not step or not epoch or step < 0 or epoch < 0:
        return None
    return ms + update_ms * epoch / step  # all epochs have as many steps, and both are counted from the start


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _uses(line: Mapping[str, Any]) -> dict[str, LayerUse]:
    """What layers had to do by one line; without those whose shares are not all there."""
    found: dict[str, LayerUse] = {}
    uses = line.get("layer_use")
    for name, shares in uses.items() if isinstance(uses, Mapping) else ():
        if isinstance(shares, Mapping):
            numbers = [_number(shares.get(share.name)) for share in fields(LayerUse)]
            if all(number is not None and 0 <= number <= 1 for number in numbers):
                found[name] = LayerUse(**{share.name: shares[share.name] for share in fields(LayerUse)})
    return found


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers and convolutions by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | _ConvNd)}


def convolutions_of(model: nn.Module) -> list[str]:
    """The convolutions by name, which are all that the paper's estimates look at."""
    return [name for name, module in layers_of(model).items() if isinstance(module, _ConvNd)]


@dataclass(frozen=True, kw_only=True)
class Look:
    """What layers do with a batch.

    Args:
        uses: by the layer's name.
        left_out: of the other layers, why that is not known.
    """

    uses: dict[str, LayerUse]
    left_out: dict[str, str]


def look(model: nn.Module, x: ModelInputs) -> Look:
    """Look at what the layers do with a batch.

    The network is run once, in evaluation; nothing of it changes.
    """
    uses: dict[str, LayerUse] = {}
    layers = layers_of(model)
    left_out = dict.fromkeys(layers, "the network does not call it")

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        weight, features = getattr(module, "weight", None), input_of(inputs, named)
        reason = _why_not(weight, "weight") or _why_not(features, "input")
        if isinstance(weight, Tensor) and isinstance(features, Tensor) and reason is None:
            uses[name] = _use(module, weight.detach(), features.detach())
            left_out.pop(name, None)
        elif name not in uses:
            left_out[name] = str(reason)

    handles = [
        module.register_forward_hook(
            lambda module, inputs, named, _output, name=name: note(name, module, inputs, named),
            with_kwargs=True,
        )
        for name, module in layers.items()
    ]
    try:
        with evaluated(model):
            called(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return Look(uses=uses, left_out=left_out)


def layer_uses(model: nn.Module, x: ModelInputs) -> dict[str, LayerUse]:
    """What the layers do with a batch, by name, without those that cannot be looked at: see `look`."""
    return look(model, x).uses


def input_of(inputs: tuple[Any, ...], named: Mapping[str, Any]) -> object:
    """What a layer was called with, by place or by keyword: `input`, which is the name that torch's layers
    have for it, else the first; None where it was called with nothing.
    """
    return inputs[0] if inputs else named.get("input", next(iter(named.values()), None))


def _why_not(values: object, what: str) -> str | None:
    """Why entries cannot be counted; None where they can."""
    if not isinstance(values, Tensor):
        return f"its {what} is no tensor"
    if values.layout is not torch.strided or values.is_nested or values.is_quantized:
        return f"its {what} is no plain tensor"
    return None if values.ndim > 0 and values.numel() > 0 else f"its {what} is empty"


def layer_times_ms(model: nn.Module, x: ModelInputs) -> dict[str, float]:
    """Median forward time of each layer in ms, dense, as it runs on this device; of a layer called twice, the
    sum.
    """
    times: dict[str, list[float]] = {name: [] for name in layers_of(model)}
    begun: dict[str, float] = {}
    now: dict[str, float] = {}

    def begin(name: str) -> None:
        begun[name] = _clock(x)

    def end(name: str) -> None:
        now[name] = now.get(name, 0.0) + 1000 * (_clock(x) - begun[name])

    handles: list[Any] = []
    for name, module in layers_of(model).items():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: begin(name)))
        handles.append(module.register_forward_hook(lambda *_, name=name: end(name)))
    started = time.monotonic()
    try:
        with evaluated(model):
            for n in range(_MAX_TIMED):
                now.clear()
                called(model, x)
                if n > 0:  # the first call warms up
                    for name, value in now.items():
                        times[name].append(value)
                if n >= _MIN_TIMED and time.monotonic() - started > _TIMED_FOR_S:
                    break
    finally:
        for handle in handles:
            handle.remove()
    return {name: median(values) for name, values in times.items() if values}


def _clock(x: ModelInputs) -> float:
    device = tensors_of(x)[0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _use(module: nn.Module, weight: Tensor, features: Tensor) -> LayerUse:
    axis = 0 if isinstance(module, _ConvTransposeNd) else 1
    channel_axis = 1 if isinstance(module, _ConvNd) else features.ndim - 1
    if isinstance(module, _ConvNd) and features.ndim == weight.ndim - 1:
        channel_axis = 0  # a convolution takes one sample without the batch axis too
    return LayerUse(
        empty_inputs=_empty_share(weight, axis),
        empty_features=_empty_share(features, channel_axis),
        activation_density=_density(features),
        weight_density=_density(weight),
    )


def _density(values: Tensor) -> float:
    return int(torch.count_nonzero(values)) / max(values.numel(), 1)


def _empty_share(values: Tensor, axis: int) -> float:
    rest = [n for n in range(values.ndim) if n != axis]
    is_used = (values != 0).sum(dim=rest) > 0 if rest else values != 0
    return 1 - int(is_used.sum()) / is_used.numel()


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """The network in evaluation, each of its layers called by itself, without gradients."""
    with torch.no_grad(), modes_kept(model), attention_in_parts():
        model.eval()
        yield
