"""The best state of a training so far, by the score on its validation part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sparse_export.errors import ArtefactError
from sparse_export.files import write_bytes
from sparse_export.formats.score import Score
from sparse_export.graph.passes.permute import reduction_axis
from sparse_export.models.weights import load_unversioned
from sparse_export.sparsity.pattern import obeys, pattern_from_text
from sparse_export.train.checkpoint import state_path
from sparse_export.train.sparsifier import Sparsifier

__all__ = ["BestState", "is_as_sparse_as_wanted"]


class BestState:
    """Owns `resume/best.safetensors`: weights and masks of the best epoch.

    Attributes:
        epoch: whose state it is, from 1; None before the first.
        score: of that epoch on the validation part.

    Args:
        run: folder of the run.
        resumed: the run goes on, so that a file that is there is its own.

    Raises:
        ArtefactError: the file cannot be read.
    """

    def __init__(self, run: Path, *, resumed: bool) -> None:
        self._path = state_path(run).with_name("best.safetensors")
        self.epoch: int | None = None
        self.score: Score | None = None
        if resumed and self._path.is_file():
            header, _ = self._read()
            self.epoch = int(header["epoch"])
            self.score = Score(**json.loads(header["score"]))

    def is_beaten_by(self, score: Score) -> bool:
        """Is a score better than the best so far? An equal one is not."""
        return self.score is None or self.score.worse_by(score) > 0

    def keep(
        self, model: nn.Module, masks: Mapping[str, Tensor], score: Score, epoch: int, *, write: bool
    ) -> None:
        """Take a state for the best one.

        Args:
            model: whose weights are written.
            masks: likewise, by parameter name.
            score: on the validation part.
            epoch: from 1.
            write: is this the process that writes?

        Raises:
            OutputError: it cannot be written.
        """
        self.epoch, self.score = epoch, score
        if not write:
            return
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        tensors |= {f"mask.{name}": mask for name, mask in masks.items()}
        plain = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in tensors.items()
        }
        header = {"epoch": str(epoch), "score": json.dumps(asdict(score))}
        write_bytes(self._path, save(plain, header))

    def put_back(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        """Give a network and its masks the best state, in place.

        Raises:
            ArtefactError: the file cannot be read, or is another network's.
        """
        _, tensors = self._read()
        try:
            load_unversioned(
                model,
                {
                    name.removeprefix("model."): value
                    for name, value in tensors.items()
                    if name.startswith("model.")
                },
            )
            for name, mask in masks.items():
                mask.copy_(tensors[f"mask.{name}"])
        except (RuntimeError, KeyError) as cause:
            raise self._damaged(f"does not belong to this network: {cause}") from cause

    def _read(self) -> tuple[dict[str, str], dict[str, Tensor]]:
        try:
            with safe_open(self._path, framework="pt") as file:
                header = file.metadata() or {}
                return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        except (OSError, SafetensorError) as cause:
            raise self._damaged(f"cannot be read: {cause}") from cause

    def _damaged(self, why: str) -> ArtefactError:
        return ArtefactError(
            f"{self._path} {why}.",
            expected="The best state that this run saved was expected.",
            do="Start the run again in another folder.",
        )


def is_as_sparse_as_wanted(model: nn.Module, sparse: Sparsifier | None) -> bool:
    """Do masks have the density and the patterns that the training ends with?

    Args:
        model: the network.
        sparse: what holds its masks; None for a dense training.
    """
    if sparse is None:
        return True
    if sum(int(mask.sum()) for mask in sparse.masks.values()) > sparse.n_active:
        return False
    for layer in sparse.layer_facts():
        if layer.pattern is not None and layer.name in sparse.masks:
            axis = reduction_axis(model, layer.name) or 0
            if not obeys(sparse.masks[layer.name], axis, pattern_from_text(layer.pattern)):
                return False
    return True
