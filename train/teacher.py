"""A network that another one learns from: its outputs, and layers within, stand in place of targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from sparse_export.errors import ArtefactError, UsageError
from sparse_export.files import write_bytes
from sparse_export.models.weights import load_unversioned
from sparse_export.tasks.shipped import Classification
from sparse_export.tasks.task import Task
from sparse_export.train.checkpoint import state_path
from sparse_export.train.inputs import ModelInputs, called
from sparse_export.train.user_run import tensors_in

__all__ = [
    "FEATURES",
    "OUTPUTS",
    "Teacher",
    "layers_learnt",
    "read_teacher",
    "relative_distance",
    "save_teacher",
    "weights_of",
]

OUTPUTS = "outputs"
"""What can be learnt of the dense network."""
FEATURES = "features"
"""What can be learnt of it beside its outputs: those of the sparse layers."""

_TEMPERATURE = 2.0
_LAYERS_WEIGHT = 10.0  # of the mean over the layers, beside the loss of the outputs
_TINY = 1e-12


class Teacher:
    """Owns the network that is learnt from. It stays in eval mode, and as it is."""

    def __init__(
        self,
        network: nn.Module,
        task: Task,
        layers: Sequence[str] = (),
        *,
        layers_weight: float = _LAYERS_WEIGHT,
    ) -> None:
        """Take a network.

        Args:
            network: of the same kind as the one that learns, with the weights to learn from.
            task: what the networks are for.
            layers: names of the modules whose outputs are learnt beside those of the network; none as the
                default.
            layers_weight: of the mean over these, beside the loss of the outputs.
        """
        self._layers_weight = layers_weight
        self._network = network.eval().requires_grad_(False)
        self._is_classifier = isinstance(task, Classification)
        self._layers = tuple(layers)

    def loss(self, x: ModelInputs, forward: Callable[..., Any], model: nn.Module) -> Tensor:
        """The mean distance of the outputs from the teacher's, a scalar, with that of the layers.

        Of classes it is the KL divergence of the softened probabilities, times the square of the
        temperature, which is 2 (Hinton et al. 2015), of other outputs the mean of their squared differences
        by the variance. That of a layer is the mean squared difference by the variance too, and
        `layers_weight` times the mean over the layers is added.

        Args:
            x: inputs of a batch.
            forward: the network that learns, as it is called in training.
            model: the same, with layers of the teacher's names.

        Raises:
            UsageError: the networks give no floats.
        """
        with _outputs_within(self._network, self._layers) as wanted_within, torch.no_grad():
            wanted = called(self._network, x)
        with _outputs_within(model, self._layers) as found_within:
            outputs = called(forward, x)
        loss = self._outputs_loss(outputs, wanted)
        pairs = [
            pair
            for name in self._layers
            for pair in zip(found_within[name], wanted_within[name], strict=True)
            if pair[0].shape == pair[1].shape
        ]
        return loss + self._layers_weight * relative_distance(pairs) if pairs else loss

    def _outputs_loss(self, outputs: Any, wanted: Any) -> Tensor:
        if self._is_classifier and isinstance(outputs, Tensor):
            found, soft = (torch.log_softmax(one.float() / _TEMPERATURE, 1) for one in (outputs, wanted))
            divergence = nn.functional.kl_div(found, soft, reduction="batchmean", log_target=True)
            return _TEMPERATURE**2 * divergence
        both = zip(tensors_in(outputs), tensors_in(wanted), strict=True)
        pairs = [pair for pair in both if pair[0].is_floating_point()]
        if not pairs:
            raise UsageError(
                "The network gives no output of floats, and a dense network's outputs were to be learnt.",
                do="Leave --distill out.",
            )
        return relative_distance(pairs)


def relative_distance(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The mean squared difference of each pair by the variance of the second, then the mean of these.

    Args:
        pairs: floats of the same shape, what was found and what was wanted.

    Returns:
        A scalar.
    """
    return torch.stack(
        [
            (found.float() - wanted.float()).square().mean() / wanted.float().var().clamp(min=_TINY)
            for found, wanted in pairs
        ]
    ).mean()


@contextmanager
def _outputs_within(network: nn.Module, layers: Sequence[str]) -> Iterator[Mapping[str, Sequence[Tensor]]]:
    """What layers give while the network is called here, one tensor for each of their calls."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found[name].extend(one for one in tensors_in(output) if one.is_floating_point())

        return hook

    handles = [network.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def layers_learnt(distill: str, masked: Iterable[str]) -> tuple[str, ...]:
    """The modules whose outputs are learnt.

    Args:
        distill: what is learnt, as in the recipe.
        masked: names of the sparse weights.

    Returns:
        The modules that hold these, each once; none unless features are learnt.
    """
    if distill != FEATURES:
        return ()
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in masked))


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """A copy of a network's whole state, to be learnt from.

    Args:
        network: as it is now.
    """
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def read_teacher(network: nn.Module, run: Path) -> nn.Module:
    """Give a network the weights that `save_teacher` left.

    Args:
        network: of the same kind as the one that learns; its weights are replaced.
        run: folder of the run.

    Returns:
        The network.

    Raises:
        ArtefactError: the weights cannot be read, or are of another network.
    """
    path = _path(run)
    try:
        load_unversioned(network, load_file(path))
    except (OSError, SafetensorError, UsageError) as cause:
        raise ArtefactError(
            f"{path} cannot be read: {cause}.",
            expected="The weights of the dense network that is learnt from were expected.",
            do="Start the run again in another folder.",
        ) from cause
    return network


def save_teacher(run: Path, weights: Mapping[str, Tensor]) -> None:
    """Leave the weights of the network that is learnt from in a run's folder, for a resumed training too.

    Args:
        run: its folder.
        weights: its whole state.

    Raises:
        OutputError: they cannot be written.
    """
    plain = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in weights.items()
    }
    write_bytes(_path(run), save(plain))


def _path(run: Path) -> Path:
    return state_path(run).with_name("teacher.safetensors")
