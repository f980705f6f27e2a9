"""What a training had to multiply: counted from layers and densities, nothing of it is timed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from sparse_export.formats.run import CostInfo
from sparse_export.train.inputs import ModelInputs, called, tensors_of
from sparse_export.train.methods import Method
from sparse_export.train.sparsifier import Sparsifier
from sparse_export.train.speed import evaluated, input_of, layers_of

__all__ = ["cost_of", "layer_macs", "training_macs"]


def cost_of(
    model: nn.Module,
    x: ModelInputs | None,
    sparse: Sparsifier | None,
    *,
    n_steps: int,
    batch_size: int,
    freeze: float,
) -> CostInfo:
    """What a training cost by its masks.

    Args:
        model: the network.
        x: a batch that shows how often its layers multiply by a weight; None for no count.
        sparse: what kept it sparse; None for a dense training.
        n_steps: optimizer steps of the training.
        batch_size: samples of a step, over all processes.
        freeze: fraction of the training after which masks stand still.
    """
    densities = {} if sparse is None else sparse.mean_densities
    if densities is None:
        return CostInfo(mean_density=None, explored=None, macs=None, dense_macs=None)
    macs = None if x is None else layer_macs(model, x)
    counted = dense = None
    if macs is not None and set(densities) <= set(macs):
        share = (
            0.0 if sparse is None else dense_gradient_share(sparse.rule, sparse.n_updates, n_steps, freeze)
        )
        counted = training_macs(macs, densities, share) * n_steps * batch_size
        dense = training_macs(macs, {}, 0.0) * n_steps * batch_size
    if sparse is None:
        return CostInfo(mean_density=1.0, explored=1.0, macs=counted, dense_macs=dense)
    sizes = {name: mask.numel() for name, mask in sparse.masks.items()}
    mean = sum(densities[name] * size for name, size in sizes.items()) / sum(sizes.values())
    return CostInfo(mean_density=mean, explored=sparse.explored, macs=counted, dense_macs=dense)


def dense_gradient_share(rule: Method, n_updates: int, n_steps: int, freeze: float) -> float:
    """The share of the steps in which gradients of inactive weights are needed, 0 to 1.

    Args:
        rule: the method.
        n_updates: of the masks.
        n_steps: of the training.
        freeze: fraction of the training after which masks stand still.
    """
    if rule.moves_every_step:
        return 1.0
    if rule.growth is None or n_steps == 0:
        return 0.0
    if rule.growth.reads_every_step:
        return freeze
    return n_updates / n_steps if rule.growth.reads_gradient else 0.0


def training_macs(macs: Mapping[str, float], densities: Mapping[str, float], dense_share: float) -> float:
    """Multiply-adds by weights of a training step, for each sample, were zeros left out.

    A layer multiplies three times: forward, for the gradient of its input, and for that of its weight. The
    first two take the active weights. The third takes them too, and all of the weights in those steps whose
    gradient is needed where weights are inactive.

    Args:
        macs: of a dense forward pass, for each sample, by weight.
        densities: mean over the training, by weight; a weight that is not named counts as dense.
        dense_share: of the steps, in which the gradient is needed everywhere, 0 to 1.

    Source: Evci et al. 2020, "Rigging the lottery", appendix H.
    """
    total = 0.0
    for name, forward in macs.items():
        density = densities.get(name, 1.0)
        total += forward * (2 * density + density + (1 - density) * dense_share)
    return total


def layer_macs(model: nn.Module, x: ModelInputs) -> dict[str, float]:
    """Multiply-adds of a dense forward pass for each sample, by weights of linear layers and convolutions.

    Args:
        model: the network, which is run once, in evaluation.
        x: a batch.

    Returns:
        By parameter name, only of what the network calls.
    """
    n_samples = len(tensors_of(x)[0])
    found: dict[str, float] = {}

    def note(
        name: str, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        weight, features = getattr(module, "weight", None), input_of(inputs, named)
        if not (isinstance(weight, Tensor) and isinstance(features, Tensor) and isinstance(output, Tensor)):
            return
        times = _times(module, weight, features, output)
        key = f"{name}.weight" if name else "weight"
        found[key] = found.get(key, 0.0) + weight.numel() * times / n_samples

    with _noted(model, note), evaluated(model):
        called(model, x)
    return found


def _times(module: nn.Module, weight: Tensor, features: Tensor, output: Tensor) -> float:
    """How often a call multiplies by each entry of the weight, over all samples."""
    if not isinstance(module, _ConvNd):
        return output.numel() / max(weight.shape[0], 1)
    places = features if isinstance(module, _ConvTransposeNd) else output
    channels = module.in_channels if isinstance(module, _ConvTransposeNd) else module.out_channels
    return places.numel() / channels


@contextmanager
def _noted(model: nn.Module, note: Any) -> Iterator[None]:
    handles = [
        module.register_forward_hook(
            lambda module, inputs, named, output, name=name: note(name, module, inputs, named, output),
            with_kwargs=True,
        )
        for name, module in layers_of(model).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
