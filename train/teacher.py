"""A network that another one learns from: its outputs stand in place of targets."""

from __future__ import annotations

from collections.abc import Mapping
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

__all__ = ["Teacher", "save_teacher"]

_TEMPERATURE = 2.0
_TINY = 1e-12


class Teacher:
    """Owns the network that is learnt from. It stays in eval mode, and as it is."""

    def __init__(self, network: nn.Module, run: Path, task: Task) -> None:
        """Read its weights.

        Args:
            network: of the same kind as the one that learns; its weights are replaced.
            run: folder of the run, where `save_teacher` left them.
            task: what the networks are for.

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
        self._network = network.eval().requires_grad_(False)
        self._is_classifier = isinstance(task, Classification)

    def loss(self, x: ModelInputs, outputs: Any) -> Tensor:
        """The mean distance of outputs from the teacher's, a scalar.

        Of classes it is the KL divergence of the softened probabilities, times the square of the
        temperature, which is 2 (Hinton et al. 2015), of other outputs the mean of their squared differences
        by the variance.

        Args:
            x: inputs of a batch.
            outputs: of the network that learns, for these.

        Raises:
            UsageError: the networks give no floats.
        """
        with torch.no_grad():
            wanted = called(self._network, x)
        if self._is_classifier and isinstance(outputs, Tensor):
            found, soft = (torch.log_softmax(one.float() / _TEMPERATURE, 1) for one in (outputs, wanted))
            divergence = nn.functional.kl_div(found, soft, reduction="batchmean", log_target=True)
            return _TEMPERATURE**2 * divergence
        pairs = [
            (one.float(), other.float())
            for one, other in zip(tensors_in(outputs), tensors_in(wanted), strict=True)
            if one.is_floating_point()
        ]
        if not pairs:
            raise UsageError(
                "The network gives no output of floats, and a dense network's outputs were to be learnt.",
                do="Leave --distill out.",
            )
        parts = [(one - other).square().mean() / other.var().clamp(min=_TINY) for one, other in pairs]
        return torch.stack(parts).mean()


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
