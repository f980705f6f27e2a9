"""On an accelerator the host never waits for the update, and its masks are those of the CPU.

A tensor on `meta` has no values, so whatever needs one on the host raises there: a test of this without a
GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from sparse_export.sparsity import Redistribution, update_masks
from sparse_export.sparsity.redistribute import growth_budgets, shares_from_statistic
from tests.sparsity.strategies import DTYPES, REDISTRIBUTIONS

SHAPES = {
    "conv": (8, 3, 3, 3),
    "fc": (40, 64),
    "head": (10, 40),
    "empty": (5, 5),
    "full": (4, 4),
    "scalar": (),
}
DENSITY = {"conv": 0.9, "fc": 0.1, "head": 0.3, "empty": 0.0, "full": 1.0, "scalar": 1.0}

Layers = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


def layers(dtype: torch.dtype) -> Layers:
    """Multiples of 1/8 up to 4: many ties, and sums that are exact in any order."""
    generator = torch.Generator().manual_seed(11)

    def values(shape: tuple[int, ...]) -> Tensor:
        return (torch.randint(-32, 33, shape, generator=generator) / 8).to(dtype)

    return (
        {name: values(shape) for name, shape in SHAPES.items()},
        {name: values(shape) for name, shape in SHAPES.items()},
        {name: torch.rand(shape, generator=generator) < DENSITY[name] for name, shape in SHAPES.items()},
    )


def moved(inputs: Layers, device: str) -> Layers:
    def move(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    return move(inputs[0]), move(inputs[1]), move(inputs[2])


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("redistribution", REDISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_update_needs_no_value_on_the_host(
    dtype: torch.dtype, redistribution: Redistribution, rate: float
) -> None:
    result = update_masks(*moved(layers(dtype), "meta"), prune_rate=rate, redistribution=redistribution)
    for name, shape in SHAPES.items():
        assert result.masks[name].device.type == "meta"
        assert result.masks[name].shape == shape
        assert result.n_grown[name].device.type == "meta"


@pytest.mark.parametrize(
    "read",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: bool(tensor.any()),
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor.cpu(),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: tensor.nonzero(),
    ],
    ids=["item", "bool", "tolist", "cpu", "masked-index", "nonzero"],
)
def test_control_reading_a_value_of_a_meta_tensor_raises(read: Callable[[Tensor], object]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.zeros(3, device="meta"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("redistribution", REDISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_cuda_the_host_never_waits_and_the_masks_are_the_cpus(
    dtype: torch.dtype, redistribution: Redistribution, rate: float
) -> None:
    inputs = layers(dtype)
    expected = update_masks(*inputs, prune_rate=rate, redistribution=redistribution)
    on_device = moved(inputs, "cuda")
    update_masks(*on_device, prune_rate=rate, redistribution=redistribution)  # loads the kernels
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = update_masks(*on_device, prune_rate=rate, redistribution=redistribution)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    for name in SHAPES:
        assert torch.equal(result.pruned[name].cpu(), expected.pruned[name]), name
        assert torch.equal(result.masks[name].cpu(), expected.masks[name]), name
        assert int(result.n_grown[name]) == int(expected.n_grown[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_control_the_debug_mode_notices_a_wait() -> None:
    value = torch.ones(1, device="cuda")
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            value.item()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_not_finite_statistics_on_a_device_leave_the_shares_to_the_active_counts() -> None:
    n_active = torch.tensor([30, 10])
    for statistic in ([float("nan"), 1.0], [float("inf"), 1.0], [0.0, 0.0]):
        shares = shares_from_statistic(torch.tensor(statistic, dtype=torch.float64), n_active)
        assert shares.tolist() == [0.75, 0.25]
        assert growth_budgets(shares, torch.tensor(20), torch.tensor([100, 100])).tolist() == [15, 5]
