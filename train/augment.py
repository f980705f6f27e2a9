"""Random crops and mirror images of a batch, made on the device that holds it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

PADDING = 4


def crop_flip(x_NCHW: Tensor, generator: torch.Generator, padding: int = PADDING) -> Tensor:
    """Each image padded by reflection, cropped back to its size at random, and mirrored with probability 1/2.

    x_NCHW: float, height and width above `padding`.  generator: of the CPU, so that a seed draws the same crops
    on every device.  Returns a new tensor of the same shape. One gather for the whole batch.
    """
    n, _, height, width = x_NCHW.shape
    device = x_NCHW.device
    offsets = torch.randint(0, 2 * padding + 1, (2, n), generator=generator).to(device, non_blocking=True)
    mirrored = torch.randint(0, 2, (n,), generator=generator).to(device, non_blocking=True)
    rows = offsets[0, :, None] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(n, width)
    columns = offsets[1, :, None] + torch.where(mirrored[:, None] > 0, width - 1 - columns, columns)
    padded = functional.pad(x_NCHW, (padding,) * 4, mode="reflect")
    samples = torch.arange(n, device=device)[:, None, None]
    # Indices around the channel axis put it last in the result.
    return padded[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
