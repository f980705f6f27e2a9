"""Random crops and mirror images of a batch, made on the device that holds it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

PADDING = 4


def draw_crops(n: int, generator: torch.Generator, padding: int = PADDING) -> Tensor:
    """Where n images are cropped, and which of them are mirrored: int64 (3, n), rows row, column, mirrored.

    generator: of the CPU, so that a seed draws the same crops on every device. Drawn for a whole batch, of which
    a process takes its share.
    """
    offsets = torch.randint(0, 2 * padding + 1, (2, n), generator=generator)
    return torch.cat((offsets, torch.randint(0, 2, (1, n), generator=generator)))


def crop_flip(x_NCHW: Tensor, crops_3N: Tensor, padding: int = PADDING) -> Tensor:
    """Each image padded by reflection, cropped back to its size at the place drawn for it, and mirrored or not.

    x_NCHW: float, height and width above `padding`.  crops_3N: of `draw_crops`, on any device.
    Returns a new tensor of the same shape. One gather for the whole batch.
    """
    n, _, height, width = x_NCHW.shape
    device = x_NCHW.device
    top, left, mirrored = crops_3N.to(device, non_blocking=True)
    rows = top[:, None] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(n, width)
    columns = left[:, None] + torch.where(mirrored[:, None] > 0, width - 1 - columns, columns)
    padded = functional.pad(x_NCHW, (padding,) * 4, mode="reflect")
    samples = torch.arange(n, device=device)[:, None, None]
    # Indices around the channel axis put it last in the result.
    return padded[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
