"""Weights over tokens go back into a torch network in its own axes, square ones too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sparse_export.oneshot import layer_sensitivities, sparsify
from sparse_export.sparsity.pattern import NMPattern, obeys
from tests.oneshot.tokens import Tokens, tokens

FACTORY = "tests.oneshot.tokens:tokens"
PRUNED = (
    "square.weight",
    "block.self_attn.in_proj_weight",
    "block.self_attn.out_proj.weight",
    "block.linear1.weight",
    "block.linear2.weight",
)


@pytest.mark.parametrize("recover", ["none", "auto"])
@pytest.mark.parametrize("method", ["activation", "reconstruction"])
def test_each_layer_is_pruned_along_its_own_inputs(method: str, recover: str, tmp_path: Path) -> None:
    done = sparsify(
        FACTORY,
        tmp_path / "run",
        data="digits",
        method=method,
        recover=recover,
        calibration_samples=256,
        device="cpu",
    )
    assert [layer.name for layer in done.report.layers if layer.pattern] == list(PRUNED)
    dense, sparse = tokens().state_dict(), load_file(done.run.path / "model.safetensors")
    masks = load_file(done.run.path / "masks.safetensors")
    for layer in done.report.layers:
        if not layer.pattern:
            continue
        mask = masks[layer.name].bool()
        assert obeys(mask, 1, NMPattern(n=2, m=4))
        assert mask.shape == dense[layer.name].shape == sparse[layer.name].shape
        assert bool((sparse[layer.name][~mask] == 0).all())
        # A matrix that came back turned would have nothing to do with the dense one.
        kept, was = sparse[layer.name][mask], dense[layer.name][mask]
        assert float(np.corrcoef(kept.numpy(), was.numpy())[0, 1]) > 0.3
        if method == "activation" and recover == "none":
            assert torch.equal(kept, was)


def test_the_error_that_is_told_is_that_of_the_network(tmp_path: Path) -> None:
    done = sparsify(
        FACTORY,
        tmp_path / "run",
        data="digits",
        method="reconstruction",
        calibration_samples=1_024,
        device="cpu",
    )
    told = next(layer.error for layer in done.report.layers if layer.name == "square.weight")
    network = Tokens().eval()
    dense = tokens().state_dict()["square.weight"]
    network.load_state_dict(load_file(done.run.path / "model.safetensors"))
    assert done.run.info.data is not None
    (mean,), (std,) = done.run.info.data.mean, done.run.info.data.std
    inputs = (_pixels().reshape(-1, 16) - mean) / std
    change = inputs @ (dense - network.square.weight.detach()).T
    assert told == pytest.approx(float(change.norm() / (inputs @ dense.T).norm()), rel=0.05)


def _pixels() -> torch.Tensor:
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images.astype(np.float32) / 16).reshape(-1, 64)


def test_the_sensitivity_of_each_layer_is_measured_in_its_own_axes() -> None:
    found = layer_sensitivities(FACTORY, data="digits", calibration_samples=128, device="cpu")
    assert {layer.name for layer in found.layers} == set(PRUNED)
