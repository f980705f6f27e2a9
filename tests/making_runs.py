"""Makes small run folders without training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparse_export import models
from sparse_export.formats.listed import file_infos
from sparse_export.formats.run import (
    DataInfo,
    LayerInfo,
    ModelInfo,
    Run,
    RunInfo,
    read_run_info,
    save_run_info,
)
from sparse_export.formats.score import Score
from sparse_export.signature import class_signature
from sparse_export.tasks import data
from sparse_export.version import library_versions, now


def stir_batch_norm(module: nn.Module, seed: int = 3) -> None:
    """Give every batch norm statistics that change something, with scales of both signs."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            assert part.running_mean is not None
            assert part.running_var is not None
            with torch.no_grad():
                if part.affine:
                    part.weight.copy_(torch.rand(part.weight.shape, generator=generator) + 0.5)
                    part.weight[::2] *= -1
                    part.bias.copy_(torch.randn(part.bias.shape, generator=generator))
                part.running_mean.copy_(torch.randn(part.running_mean.shape, generator=generator) * 0.1)
                part.running_var.copy_(torch.rand(part.running_var.shape, generator=generator) + 0.5)


def network_and_masks(
    name: str = "digits-cnn", *, density: float = 0.3, seed: int = 5
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A network with random weights and random masks, applied."""
    torch.manual_seed(seed)
    module = models.create(name).eval()
    stir_batch_norm(module)
    masks: dict[str, Tensor] = {}
    for key, parameter in module.named_parameters():
        if parameter.dim() > 1 and density < 1:
            masks[key] = torch.rand(parameter.shape) < density
            with torch.no_grad():
                parameter.mul_(masks[key]).add_(0.0)
    return module, masks


def digits_fact() -> DataInfo:
    """The digits data, as a run describes them."""
    digits = data.load("digits")
    return DataInfo(
        name="digits",
        mean=digits.mean,
        std=digits.std,
        n_train=len(digits.x_train),
        n_validation=0,
        n_test=len(digits.x_test),
        test_sha256=data.test_sha256(digits),
    )


def digits_accuracy(module: nn.Module) -> Score:
    """Of a network on the test set of the digits."""
    digits = data.load("digits")
    with torch.inference_mode():
        logits = module(data.normalise(digits.x_test, digits.mean, digits.std))
    return Score(n_correct=int((logits.argmax(1) == digits.y_test).sum()), n_samples=len(digits.y_test))


def save_run(
    folder: Path,
    module: nn.Module,
    masks: Mapping[str, Tensor],
    *,
    name: str | None = "digits-cnn",
    input_shape: tuple[int, ...] = (1, 8, 8),
    fact: DataInfo | None = None,
    test: Score | None = None,
    **changes: Any,
) -> Run:
    """Write a finished run as training does; `changes` replace fields of its `run.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: value.detach().clone().contiguous() for key, value in module.state_dict().items()},
        folder / "model.safetensors",
    )
    save_file(dict(masks), folder / "masks.safetensors")
    n_masked = sum(mask.numel() for mask in masks.values())
    n_active = sum(int(mask.sum()) for mask in masks.values())
    density = n_active / n_masked if n_masked else 1.0
    info = RunInfo(
        status="complete",
        method="sparse-momentum" if masks else "dense",
        model=ModelInfo(name=name),
        signature=class_signature(input_shape, 10),
        data=fact,
        target_density=density,
        density=density,
        n_active=n_active,
        n_masked=n_masked,
        n_parameters=sum(parameter.numel() for parameter in module.parameters()),
        layers=tuple(
            LayerInfo(
                name=key,
                shape=tuple(parameter.shape),
                n_weights=parameter.numel(),
                n_active=int(masks[key].sum()) if key in masks else parameter.numel(),
                masked=key in masks,
            )
            for key, parameter in module.named_parameters()
            if parameter.dim() > 1
        ),
        validation=None,
        test=test,
        seed=0,
        n_threads=1,
        device="cpu",
        epochs=1,
        n_steps=1,
        seconds=0.0,
        recipe={},
        versions=library_versions(),
        command=("test",),
        created=now(),
        files=file_infos(folder, ("model.safetensors", "masks.safetensors")),
    )
    save_run_info(folder, replace(info, **changes))
    return Run(path=folder, info=read_run_info(folder))


def digits_run(folder: Path, *, density: float = 0.3, seed: int = 5) -> Run:
    """An untrained run on the digits, with the accuracy that it truly has."""
    module, masks = network_and_masks(density=density, seed=seed)
    return save_run(folder, module, masks, fact=digits_fact(), test=digits_accuracy(module))
