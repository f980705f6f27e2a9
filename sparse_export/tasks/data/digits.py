"""The 8x8 handwritten digits that come with scikit-learn: the data set that needs no download.

They are the 1,797 test scans of the UCI set "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak,
1998), each pixel the number of black points, 0..16, in a 4x4 square of the scan.
"""

from __future__ import annotations

import hashlib

import torch
from sklearn.datasets import load_digits

from sparse_export.tasks.data.dataset import UINT8_MAX, DataSet, channel_statistics

N_TRAIN = 1397
N_LEVELS = 16


def load() -> DataSet:
    """Load 1,397 training and 400 test images, uint8 (N, 1, 8, 8), in a fixed shuffled order.

    A pixel value v of 0..16 becomes round(255 v / 16), from which v can be recovered.
    """
    source = load_digits()
    order = _shuffled(len(source.target))
    scaled = torch.from_numpy(source.images).mul(UINT8_MAX / N_LEVELS).round().to(torch.uint8)
    x = scaled.unsqueeze(1)[order]
    y = torch.from_numpy(source.target).to(torch.int64)[order]
    mean, std = channel_statistics(x[:N_TRAIN])
    return DataSet(
        name="digits",
        x_train=x[:N_TRAIN],
        y_train=y[:N_TRAIN],
        x_test=x[N_TRAIN:],
        y_test=y[N_TRAIN:],
        mean=mean,
        std=std,
        n_classes=10,
        class_names=tuple("0123456789"),
    )


def _shuffled(n: int) -> torch.Tensor:
    """The numbers 0..n-1 ordered by a hash of each: no library's generator can change the split."""
    return torch.tensor(
        sorted(range(n), key=lambda index: hashlib.sha256(f"digits {index}".encode()).digest())
    )
