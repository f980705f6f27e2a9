"""Setting the inactive weights to zero: on the CPU, by one launch for all layers, in other memory orders."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparse_export as se
from sparse_export.train.mask_pass import MaskPass

CHECKOUT = Path(__file__).resolve().parents[2]
SHAPES = {"conv": (8, 6, 3, 3), "fc": (70, 130), "tiny": (1, 3)}


def layers(
    dtype: torch.dtype = torch.float32, device: str = "cpu", channels_last: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    weights, masks = {}, {}
    for name, shape in SHAPES.items():
        weight = torch.randn(shape, generator=generator).to(device, dtype)
        if channels_last and weight.ndim == 4:
            weight = weight.contiguous(memory_format=torch.channels_last)
        weights[name] = weight
        masks[name] = torch.rand(shape, generator=generator) < 0.3
    return weights, masks


@pytest.mark.parametrize("channels_last", [False, True])
def test_kept_weights_keep_their_bits_and_the_others_are_zero(channels_last: bool) -> None:
    weights, masks = layers(channels_last=channels_last)
    before = {name: weight.clone() for name, weight in weights.items()}
    applied = MaskPass(weights, masks)
    applied.apply()
    for name, weight in weights.items():
        assert torch.equal(weight[masks[name]], before[name][masks[name]])
        assert not weight[~masks[name]].any()
        assert torch.equal(applied.masks[name], masks[name])
        assert applied.masks[name].stride() == weight.stride()


def test_masks_are_overwritten_where_they_lie() -> None:
    weights, masks = layers()
    applied = MaskPass(weights, masks)
    places = {name: mask.data_ptr() for name, mask in applied.masks.items()}
    turned = {name: ~mask for name, mask in masks.items()}
    applied.set(turned)
    applied.apply()
    assert {name: mask.data_ptr() for name, mask in applied.masks.items()} == places
    assert all(not weights[name][~turned[name]].any() for name in SHAPES)


def test_a_compiler_takes_the_pass_in_one_graph() -> None:
    weights, masks = layers()
    applied = MaskPass(weights, masks)
    torch.compile(applied.apply, backend="eager", fullgraph=True)()
    assert all(not weights[name][~masks[name]].any() for name in SHAPES)


INTERPRETED = """
import torch
from sparse_export.train.mask_kernel import BLOCK, ZeroInactive

generator = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
    shapes = [(3, BLOCK), (7,), (BLOCK + 1,), (4, 6, 3, 3), (1,)]
    weights = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    weights[3] = weights[3].contiguous(memory_format=torch.channels_last)
    weights[0][0, 0] = float("nan")
    masks = [torch.empty_like(w, dtype=torch.bool).copy_(torch.rand(w.shape, generator=generator) < .4) for w in weights]
    masks[0][0, 0] = False
    wanted = [torch.where(mask, weight, 0) for weight, mask in zip(weights, masks)]
    room = torch.full((shapes[1][0] + 9,), 5.0, dtype=dtype)
    weights[1] = room[4:-5].copy_(weights[1])  # what lies around a weight is not touched
    launch = ZeroInactive(weights, masks)
    assert launch.fits(weights, masks)
    assert not launch.fits(wanted, masks)
    launch()
    for weight, want in zip(weights, wanted):
        assert torch.equal(weight, want), (dtype, weight.shape)
    masks[1].fill_(False)
    launch()  # masks are read anew at every launch
    assert not weights[1].any()
    assert (room[:4] == 5).all() and (room[-5:] == 5).all()
print("same", BLOCK)
"""


def test_the_one_launch_for_all_layers_computes_the_same_in_tritons_interpreter() -> None:
    """The kernel itself, run on the CPU by triton's own interpreter: for one layer of each shape and
    dtype.
    """
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        check=False,
        cwd=CHECKOUT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "same 4096\n", done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_cuda_one_launch_does_it_and_the_host_never_waits(dtype: torch.dtype, channels_last: bool) -> None:
    weights, masks = layers(dtype, "cuda", channels_last)
    before = {name: weight.clone() for name, weight in weights.items()}
    applied = MaskPass(weights, masks)
    applied.apply()  # compiles the kernel
    for name, weight in weights.items():
        weight.copy_(before[name])
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        applied.apply()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    for name, weight in weights.items():
        assert torch.equal(weight.cpu(), torch.where(masks[name], before[name].cpu(), 0)), name
    assert applied._kernel is not None


@pytest.mark.gpu
def test_on_cuda_the_masks_cost_one_byte_a_weight() -> None:
    weight = torch.randn(4096, 4096, device="cuda")
    mask = torch.rand(4096, 4096) < 0.1
    before = torch.cuda.memory_allocated()
    applied = MaskPass({"w": weight}, {"w": mask})
    applied.apply()
    assert torch.cuda.memory_allocated() - before < 1.1 * weight.numel()


@pytest.mark.gpu
def test_a_replayed_cuda_graph_follows_the_masks_as_they_move() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    trainer = se.SparseTraining(model, optimizer, density=0.2, update_every=5, total_steps=60)
    x = torch.randn(32, 64, device="cuda")
    y = torch.randint(8, (32,), device="cuda")

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        trainer.apply_masks()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    first = {name: mask.clone() for name, mask in trainer.masks.items()}
    for _ in range(40):
        graph.replay()
        trainer.advance()
        for name, weight in model.named_parameters():
            if name in trainer.masks:
                assert not weight[~trainer.masks[name]].any()
    assert trainer.n_updates == 8
    assert any(not torch.equal(first[name], mask) for name, mask in trainer.masks.items())


@pytest.mark.parametrize("resting", [(), ("a",), ("a", "b")])
def test_weights_that_rest_are_left_as_they_are(resting: tuple[str, ...]) -> None:
    weights = {"a": torch.ones(4), "b": torch.ones(3)}
    applied = MaskPass(weights, {name: torch.zeros_like(value).bool() for name, value in weights.items()})
    applied.rest(("b",))
    applied.rest(resting)
    applied.apply()
    assert {name for name, value in weights.items() if value.any()} == set(resting)
