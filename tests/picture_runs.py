"""A run of a small network on a folder of pictures, without training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sparse_export.formats.run import DataInfo, Run, TaskInfo
from sparse_export.tasks.data import imagefolder
from sparse_export.tasks.data.dataset import normalise
from sparse_export.tasks.data.pictures import decode
from tests.making_runs import save_run

KINDS = tuple(f"kind {letter}" for letter in "abcdefghij")
SIZE = (20, 16)


def picture_folder(root: Path, *, n: int = 2) -> Path:
    """An ImageFolder of ten classes, n + n pictures each, of many sizes, proportions and file types."""
    rng = np.random.default_rng(7)
    for part in ("train", "val"):
        for number, kind in enumerate(KINDS):
            (root / part / kind).mkdir(parents=True)
            for index in range(n):
                cells = rng.integers(0, 256, (rng.integers(2, 9), rng.integers(2, 9), 3), dtype=np.uint8)
                width, height = (int(one) for one in rng.integers(9, 90, 2))
                picture = Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
                suffix = ("png", "jpg", "webp", "bmp")[(number + index) % 4]
                picture.save(root / part / kind / f"{index}.{suffix}")
    return root


class Small(nn.Module):
    """A network of random weights whose answers differ from picture to picture."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 8, 5, stride=2, padding=2), nn.ReLU()),
            *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, len(KINDS))),
        )
        self.register_buffer("middle", torch.zeros(len(KINDS)))
        self.register_buffer("spread", torch.ones(len(KINDS)))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = (self.features(x) - self.middle) / self.spread
        return scores


def picture_run(
    folder: Path, pictures: Path, *, crop_ratio: float = 0.875, size: tuple[int, int] = SIZE
) -> Run:
    """A finished run of such a network on a folder of pictures, which only this process can build."""
    torch.manual_seed(3)
    module = Small().eval()
    listing = imagefolder.list_pictures("pictures", pictures)
    inputs = normalise(decode(listing.test, size, crop_ratio), imagefolder.MEAN, imagefolder.STD)
    with torch.inference_mode():
        scores = module(inputs)
    module.middle, module.spread = scores.mean(0).clone(), scores.std(0).clone()
    fact = DataInfo(
        name=f"imagefolder:{pictures}",
        mean=imagefolder.MEAN,
        std=imagefolder.STD,
        n_train=len(listing.train),
        n_validation=0,
        n_test=len(listing.test),
        test_sha256=listing.test.sha256(),
        crop_ratio=crop_ratio,
    )
    task = TaskInfo(name="classification", labels=listing.class_names)
    run = save_run(folder, module, {}, name=None, input_shape=(3, *size), fact=fact, task=task)
    return replace(run, module=module)
