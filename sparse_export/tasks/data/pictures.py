"""Pictures decoded when they are needed: by worker processes for training, by threads for testing."""

from __future__ import annotations

import hashlib
import os
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparse_export.errors import ArtefactError, SparseExportError
from sparse_export.tasks.data.dataset import normalise
from sparse_export.tasks.data.imagefolder import Pictures, middle, opened, pixels

_PREFETCHED = 4  # batches that each worker keeps ready
_SIGNAL_S = 2.0  # between the end of a worker's connection and the signal of its end

Wanted = tuple[int, int]  # a picture's place in its split, and the epoch that it is wanted for


class Inputs:
    """The normalised inputs of pictures, float32, decoded slice by slice as an array would be sliced."""

    def __init__(
        self,
        pictures: Pictures,
        size: tuple[int, int],
        crop_ratio: float,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self._pictures, self._size, self._crop_ratio = pictures, size, crop_ratio
        self._mean, self._std = mean, std

    def __len__(self) -> int:
        return len(self._pictures)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, 3, H, W)."""
        return (len(self), 3, *self._size)

    def __getitem__(self, rows: slice) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        part = self._pictures.part(*rows.indices(len(self))[:2])
        return normalise(decoded(part, self._size, self._crop_ratio), self._mean, self._std).numpy()


def decoded(pictures: Pictures, size: tuple[int, int], crop_ratio: float) -> Tensor:
    """The middles of the pictures, uint8 (N, 3, H, W), by one thread a core. Raises ArtefactError."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(lambda file: middle(file, size, crop_ratio), pictures.files))
    return torch.stack(parts) if parts else torch.empty((0, 3, *size), dtype=torch.uint8)


class PictureLoader:
    """Owns the worker processes that decode pictures for training. Use as a context, or close it.

    random_crop: a part of random size (8 to 100 % of the area) and proportions (3:4 to 4:3), scaled to `size`, and
    mirrored half the time; else the middle. What is drawn follows from seed, epoch and place alone, so it is the
    same whatever number of workers or processes share the work.  pinned: batches lie in page-locked memory.
    """

    def __init__(
        self,
        pictures: Pictures,
        size: tuple[int, int],
        *,
        n_workers: int,
        random_crop: bool,
        seed: int,
        pinned: bool,
    ) -> None:
        self._batches: list[list[Wanted]] = []
        self._loader = DataLoader(
            _Decoding(pictures, size, random_crop, seed),
            batch_sampler=_Following(self._batches),
            num_workers=n_workers,
            collate_fn=_stacked,
            pin_memory=pinned,
            worker_init_fn=_ignore_interrupts,
            persistent_workers=True,
            prefetch_factor=_PREFETCHED,
            generator=torch.Generator(),
        )

    def batches(self, wanted: Sequence[list[Wanted]]) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 (N, 3, H, W) and int64 (N,) for each list, in order. Raises ArtefactError for a bad picture."""
        self._batches[:] = wanted
        for batch in self._loader:
            if isinstance(batch, ArtefactError):
                raise batch
            yield batch


@contextmanager
def workers_watched() -> Iterator[None]:
    """Say what happened when a worker process ends: torch interrupts whatever is under way then, by a signal.

    Raises SparseExportError.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as cause:
        try:
            if not isinstance(cause, RuntimeError):
                _await_signal()
            error = _ended(cause)
        except RuntimeError as late:
            error = _ended(late)  # the signal tells more than the connection that broke before it came
        if error is None:
            raise
        raise error from cause


def _await_signal() -> None:
    """Give torch's signal the time to come. It would else raise its RuntimeError wherever the program is by then."""
    deadline = time.monotonic() + _SIGNAL_S
    while time.monotonic() < deadline:
        time.sleep(0.01)


def _ended(cause: Exception) -> SparseExportError | None:
    """What to say where a worker has ended, else None."""
    if not _tells_of_a_worker(cause):
        return None
    return SparseExportError(
        f"A process that reads pictures ended: {str(cause).rstrip('. ') or type(cause).__name__}.",
        expected="It was expected to live as long as the training.",
        do="Use fewer workers if memory ran out, then go on with --resume.",
    )


def _tells_of_a_worker(cause: Exception) -> bool:
    """Is it torch's own word, or a connection that broke while the memory of a ready batch was handed over?"""
    if isinstance(cause, RuntimeError):
        return "DataLoader worker" in str(cause)
    return any(frame.name == "rebuild_storage_fd" for frame in traceback.extract_tb(cause.__traceback__))


class _Following:
    """A batch sampler that gives what the list holds when it is asked."""

    def __init__(self, batches: list[list[Wanted]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[Wanted]]:
        return iter(list(self._batches))

    def __len__(self) -> int:
        return len(self._batches)


class _Decoding(Dataset[Any]):
    """What a worker does for one picture. A bad one is handed over as its error, which keeps its words."""

    def __init__(self, pictures: Pictures, size: tuple[int, int], random_crop: bool, seed: int) -> None:
        self._pictures, self._size, self._random_crop, self._seed = pictures, size, random_crop, seed

    def __getitem__(self, wanted: Wanted) -> tuple[Tensor, Tensor] | ArtefactError:
        index, epoch = wanted
        file, label = self._pictures.files[index], self._pictures.labels[index]
        try:
            if not self._random_crop:
                return middle(file, self._size), label
            from torchvision.transforms import InterpolationMode, RandomHorizontalFlip, RandomResizedCrop

            picture = opened(file)
        except ArtefactError as error:
            return error
        key = hashlib.sha256(f"{self._seed} {epoch} {index}".encode()).digest()
        torch.default_generator.manual_seed(int.from_bytes(key[:7], "big"))  # the transforms draw from it
        cut = RandomResizedCrop(self._size, interpolation=InterpolationMode.BILINEAR)(picture)
        return pixels(RandomHorizontalFlip()(cut)), label


def _stacked(items: list[tuple[Tensor, Tensor] | ArtefactError]) -> tuple[Tensor, Tensor] | ArtefactError:
    good = []
    for item in items:
        if isinstance(item, ArtefactError):
            return item
        good.append(item)
    return torch.stack([x for x, _ in good]), torch.stack([y for _, y in good])


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal: the training answers it, and ends its workers then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
