"""A network in memory as a finished dense run, without training it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from sparse_export.formats.run import LayerInfo, ModelInfo, Run
from sparse_export.signature import class_signature
from sparse_export.train.record import n_entries, new_run_info
from sparse_export.train.run_folder import finish_run

__all__ = ["dense_run"]


def dense_run(network: nn.Module, input_shape: tuple[int, ...], folder: Path, n_classes: int = 10) -> Run:
    """Write the dense run of a network that gives logits; the network stays in the run.

    Args:
        network: on the CPU.
        input_shape: of one sample.
        folder: of the run.
        n_classes: number of logits.
    """
    layers = tuple(
        LayerInfo(
            name=name,
            shape=tuple(weight.shape),
            n_weights=weight.numel(),
            n_active=weight.numel(),
            masked=False,
        )
        for name, weight in network.named_parameters()
        if weight.dim() > 1
    )
    info = new_run_info(
        n_parameters=n_entries(network),
        method="dense",
        model=ModelInfo(name=None),
        signature=class_signature(input_shape, n_classes),
        data=None,
        layers=layers,
        seed=0,
        n_threads=1,
        device="cpu",
    )
    folder.mkdir(parents=True, exist_ok=True)
    run = finish_run(folder, network, {}, info)
    return replace(run, path=folder)
