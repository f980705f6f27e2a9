"""Random crops and mirror images of a batch, made on the device that holds it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

PADDING = 4


def draw_crops(n: int, generator: torch.Generator, padding: int = PADDING) -> Tensor:
    """Draw where n images are cropped, and which of them are mirrored.

    Args:
        n: images of a whole batch, of which a process takes its share.
        generator: of the CPU, so that a seed draws the same crops on every device.
        padding: on each side.

    Returns:
        int64 (3, n), with the rows row, column, mirrored.
    """
    offsets = torch.randint(0, 2 * padding + 1, (2, n), generator=generator)
    return torch.cat((offsets, torch.randint(0, 2, (1, n), generator=generator)))


def crop_flip(x_NCHW: Tensor, crops_3N: Tensor, padding: int = PADDING) -> Tensor:
    """Pad each image by reflection, crop it back to its size where it was drawn, and mirror it or not.

    Args:
        x_NCHW: float, height and width above `padding`.
        crops_3N: of `draw_crops`, on any device.
        padding: on each side.

    Returns:
        A new tensor of the same shape, made by one gather for the whole batch.
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
