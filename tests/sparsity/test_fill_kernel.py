"""Gathering the values of many forms by one launch: in triton's interpreter, and on a card."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

CHECKOUT = Path(__file__).resolve().parents[2]
SIZES = ((300, 130, 5001), (7, 11, 20), (64, 64, 2048))  # more than one block, less than one, exactly one


def forms(device: str, weight_type: torch.dtype, value_type: torch.dtype) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(2)
    made: list[tuple[Tensor, ...]] = []
    for n_out, n_in, n_values in SIZES:
        weight = torch.randn((n_out, n_in), generator=generator)
        places = torch.randint(0, weight.numel(), (n_values,), generator=generator, dtype=torch.int32)
        values = torch.full((n_values,), torch.nan)
        made.append((weight.to(device, weight_type), places.to(device), values.to(device, value_type)))
    return made


def fill_and_compare(device: str, weight_type: torch.dtype, value_type: torch.dtype) -> None:
    from sparse_export.sparsity.fill_kernel import GatherAll

    weights, places, values = (
        list(some) for some in zip(*forms(device, weight_type, value_type), strict=True)
    )
    assert GatherAll.can(weights, places, values)
    gathered = GatherAll(weights, places, values)
    for factor in (1.0, -2.0):
        for weight in weights:
            weight.mul_(factor)
        gathered()
        for weight, place, value in zip(weights, places, values, strict=True):
            assert torch.equal(value, weight.reshape(-1)[place.long()].to(value_type))
    assert gathered.fits(weights, places, values)
    assert not gathered.fits([weight.clone() for weight in weights], places, values)


# bfloat16 is left out here: triton's interpreter cuts off where the hardware rounds.
def test_in_the_interpreter_every_value_is_gathered() -> None:
    pytest.importorskip("triton")
    code = (
        "import torch; from tests.sparsity.test_fill_kernel import fill_and_compare as f; "
        "f('cpu', torch.float32, torch.float16); f('cpu', torch.float32, torch.float32)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=CHECKOUT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_what_one_launch_cannot_take_is_told() -> None:
    pytest.importorskip("triton")
    from sparse_export.sparsity.fill_kernel import GatherAll

    weights, places, values = (
        list(some) for some in zip(*forms("cpu", torch.float32, torch.float16), strict=True)
    )
    assert not GatherAll.can(weights, [place.long() for place in places], values)
    assert not GatherAll.can([weights[0].T, *weights[1:]], places, values)
    assert not GatherAll.can([weights[0].double(), *weights[1:]], places, values)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("value_type", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight_type", [torch.float32, torch.bfloat16])
def test_on_cuda_every_value_is_gathered(weight_type: torch.dtype, value_type: torch.dtype) -> None:
    fill_and_compare("cuda", weight_type, value_type)
