"""Pictures decoded when they are needed: by worker processes for training, by threads for testing."""

from __future__ import annotations

import hashlib
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparse_export.errors import ArtefactError, SparseExportError
from sparse_export.formats.preparation import RawType
from sparse_export.formats.run import Interpolation
from sparse_export.signature import Array
from sparse_export.tasks.data.dataset import as_inputs
from sparse_export.tasks.data.imagefolder import (
    Pictures,
    center_crop,
    decode_files,
    open_picture,
    pixels,
)

_PREFETCHED = 4  # batches that each worker keeps ready
_SIGNAL_S = 2.0  # torch's signal may come that long after a worker's connection broke

PictureRequest = tuple[int, int]  # index of a picture in its split, and the epoch


class Inputs:
    """The inputs that pictures make, (N, 3, H, W), normalised float32 or raw, decoded when they are needed.

    Args:
        pictures: the pictures.
        size: (H, W) of the crops.
        crop_ratio: as of `center_crop`.
        mean: of each channel.
        std: likewise.
        interpolation: as of `center_crop`.
        n_workers: processes that decode what `batches` gives; 0 for threads.
        raw: the type that pixels are given in as they are; None to normalize them.
    """

    def __init__(
        self,
        pictures: Pictures,
        size: tuple[int, int],
        crop_ratio: float,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: Interpolation = "bilinear",
        n_workers: int = 0,
        raw: RawType | None = None,
    ) -> None:
        self._pictures, self._size, self._crop_ratio = pictures, size, crop_ratio
        self._mean, self._std, self._interpolation = mean, std, interpolation
        self._n_workers, self._raw = n_workers, raw

    def __len__(self) -> int:
        return len(self._pictures)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, 3, H, W)."""
        return (len(self), 3, *self._size)

    def __getitem__(self, rows: slice) -> Array:
        part = self._pictures.part(*rows.indices(len(self))[:2])
        x = decode(part, self._size, self._crop_ratio, self._interpolation)
        return as_inputs(x, self._mean, self._std, self._raw)

    def batches(self, most: int) -> Iterator[Array]:
        """All of them in order, at most so many at a time.

        Raises:
            ArtefactError: a picture cannot be decoded.
            SparseExportError: a worker process ended.
        """
        starts = range(0, len(self), most)
        if not self._n_workers:
            yield from (self[start : start + most] for start in starts)
            return
        loader = PictureLoader(
            self._pictures,
            self._size,
            n_workers=self._n_workers,
            random_crop=False,
            seed=0,
            pinned=False,
            crop_ratio=self._crop_ratio,
            interpolation=self._interpolation,
        )
        ends = [min(start + most, len(self)) for start in starts]
        requests = [[(at, 0) for at in range(start, end)] for start, end in zip(starts, ends, strict=True)]
        with workers_watched():
            for x, _ in loader.batches(requests):
                yield as_inputs(x, self._mean, self._std, self._raw)


def decode(
    pictures: Pictures,
    size: tuple[int, int],
    crop_ratio: float,
    interpolation: Interpolation = "bilinear",
) -> Tensor:
    """Crop the centres of pictures, by one thread a core.

    Args:
        pictures: the pictures.
        size: (H, W) of the crops.
        crop_ratio: as of `center_crop`.
        interpolation: likewise.

    Returns:
        uint8 (N, 3, H, W).

    Raises:
        ArtefactError: a picture cannot be decoded.
    """
    return decode_files(pictures.files, size, crop_ratio, interpolation)


class PictureLoader:
    """The worker processes that decode pictures for training.

    What is drawn at random follows from seed, epoch and index alone, so that it is the same for any number of
    workers or processes.

    Args:
        pictures: of the training split.
        size: (H, W) of the crops.
        n_workers: number of processes.
        random_crop: crop a part of random size (8 to 100 % of the area) and proportions (3:4 to 4:3), scaled
            to `size` and mirrored half the time; else the centre.
        seed: of the random crops.
        pinned: batches lie in page-locked memory.
        crop_ratio: of the centre, as of `center_crop`.
        interpolation: likewise, of random crops too.
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
        crop_ratio: float = 1.0,
        interpolation: Interpolation = "bilinear",
    ) -> None:
        self._batches: list[list[PictureRequest]] = []
        self._loader = DataLoader(
            _Decoding(pictures, size, seed if random_crop else None, crop_ratio, interpolation),
            batch_sampler=_Batches(self._batches),
            num_workers=n_workers,
            collate_fn=_stack,
            pin_memory=pinned,
            worker_init_fn=_ignore_interrupts,
            persistent_workers=True,
            prefetch_factor=_PREFETCHED,
            generator=torch.Generator(),
        )

    def batches(self, requests: Sequence[list[PictureRequest]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the inputs and labels of each list, in order.

        Args:
            requests: one list for each batch.

        Yields:
            uint8 (N, 3, H, W) and int64 (N,).

        Raises:
            ArtefactError: a picture cannot be decoded.
        """
        self._batches[:] = requests
        for batch in self._loader:
            if isinstance(batch, ArtefactError):
                raise batch
            yield batch


@contextmanager
def workers_watched() -> Iterator[None]:
    """Report the end of a worker process, at which torch interrupts any code by a signal.

    Raises:
        SparseExportError: a worker ended.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as cause:
        try:
            if not isinstance(cause, RuntimeError):
                _await_signal()
            error = _worker_error(cause)
        except RuntimeError as late:
            error = _worker_error(late)  # says more than the connection that broke before
        if error is None:
            raise
        raise error from cause


def _await_signal() -> None:
    """Wait for torch's signal, which would otherwise raise its RuntimeError anywhere in the program."""
    deadline = time.monotonic() + _SIGNAL_S
    while time.monotonic() < deadline:
        time.sleep(0.01)


def _worker_error(cause: Exception) -> SparseExportError | None:
    """The error where a worker has ended, else None."""
    if not _is_from_worker(cause):
        return None
    return SparseExportError(
        f"A process that reads pictures ended: {str(cause).rstrip('. ') or type(cause).__name__}.",
        do="Use fewer workers if memory ran out, then go on with --resume.",
    )


def _is_from_worker(cause: Exception) -> bool:
    """Is it torch's own error, or a connection that broke while it passed the memory of a batch?"""
    if isinstance(cause, RuntimeError):
        return "DataLoader worker" in str(cause)
    return any(frame.name == "rebuild_storage_fd" for frame in traceback.extract_tb(cause.__traceback__))


class _Batches:
    """A batch sampler that yields what the list holds at the time."""

    def __init__(self, batches: list[list[PictureRequest]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[PictureRequest]]:
        return iter(list(self._batches))

    def __len__(self) -> int:
        return len(self._batches)


class _Decoding(Dataset[Any]):
    """Decodes one picture in a worker; a bad one is returned as its error, which keeps its message."""

    def __init__(
        self,
        pictures: Pictures,
        size: tuple[int, int],
        seed: int | None,
        crop_ratio: float,
        interpolation: Interpolation,
    ) -> None:
        self._pictures, self._size = pictures, size
        self._seed = seed  # of random crops; None for the centre
        self._crop_ratio, self._interpolation = crop_ratio, interpolation

    def __getitem__(self, request: PictureRequest) -> tuple[Tensor, Tensor] | ArtefactError:
        index, epoch = request
        file, label = self._pictures.files[index], self._pictures.labels[index]
        try:
            if self._seed is None:
                return center_crop(file, self._size, self._crop_ratio, self._interpolation), label
            from torchvision.transforms import InterpolationMode, RandomHorizontalFlip, RandomResizedCrop

            picture = open_picture(file)
        except ArtefactError as error:
            return error
        key = hashlib.sha256(f"{self._seed} {epoch} {index}".encode()).digest()
        torch.default_generator.manual_seed(int.from_bytes(key[:7], "big"))  # the transforms draw from it
        mode = InterpolationMode(self._interpolation)
        crop = RandomResizedCrop(self._size, interpolation=mode)(picture)
        return pixels(RandomHorizontalFlip()(crop)), label


def _stack(items: list[tuple[Tensor, Tensor] | ArtefactError]) -> tuple[Tensor, Tensor] | ArtefactError:
    """A batch, or the error of its first bad picture."""
    good = []
    for item in items:
        if isinstance(item, ArtefactError):
            return item
        good.append(item)
    return torch.stack([x for x, _ in good]), torch.stack([y for _, y in good])


def _ignore_interrupts(worker: int) -> None:
    """Ignore Ctrl-C, which reaches all processes of a terminal: the training ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
