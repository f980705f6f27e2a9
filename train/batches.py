"""Batches of a data set on the training device, from arrays in memory or from decoded pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparse_export import models
from sparse_export.errors import UsageError
from sparse_export.formats.run import DataInfo
from sparse_export.tasks import data
from sparse_export.tasks.data import imagefolder, npz, own
from sparse_export.tasks.data.picture_settings import PictureSettings
from sparse_export.tasks.data.pictures import PictureLoader, decode
from sparse_export.tasks.shipped import Classification, task_named
from sparse_export.train.distributed import World
from sparse_export.train.loader import Batch, BatchLoader, Part, checked_targets, require_croppable, spans
from sparse_export.train.own_loader import OwnLoader
from sparse_export.train.recipe import Recipe

# A part is normalised once where that takes up to so many bytes. Else it stays as it is, uint8 in a quarter
# of them, and each batch is normalised: 0.05 ms for 100 images of MNIST, 0.2 ms for 100 of CIFAR-10 (one
# thread of a Xeon, 2026-12-01).
_NORMALISED_BYTES = 2**24
_DEVICE_BYTES = 2**31  # a part that is normalised batch by batch lies on the training device up to here
_HELD_BYTES = 2**30  # of a part of decoded pictures that is kept
_CROP_RATIO = 0.875  # of the shorter side, as ImageNet is tested: the middle 224 of 256


def batch_loader(
    recipe: Recipe, data_dir: Path | None, download: bool, device: torch.device, world: World
) -> BatchLoader:
    """The batches of a recipe's data.

    Args:
        recipe: its data, workers, augmentation and validation fraction.
        data_dir: where the data sets lie; None for their usual place.
        download: fetch the data set when it is not there.
        device: which the batches lie on.
        world: the processes that share them.

    Raises:
        UsageError: this data cannot have such workers or such an augmentation, or is no such data set.
        DataNotFound: the data set is not there.
    """
    found = _parts_of(recipe, data_dir)
    if found is not None:
        return OwnLoader(recipe, found, device, world)
    listing = data.picture_files(recipe.data, data_dir, recipe.classes)
    if listing is not None and (recipe.workers or recipe.augment != "random-resized-crop"):
        return ImageFolderLoader(recipe, listing, device, world)
    if recipe.workers:
        raise UsageError(
            f"workers is {recipe.workers}, but {recipe.data} is read into memory as a whole.",
            expected="Data imagefolder:DIR were expected, which worker processes decode.",
            do="Leave workers out.",
        )
    if recipe.augment == "random-resized-crop":
        raise UsageError(
            "augment = 'random-resized-crop' cuts pictures while they are decoded.",
            expected="workers was expected to be 1 or more, with data imagefolder:DIR.",
            do="Set workers in the recipe or by --workers, or choose augment = 'crop-flip'.",
        )
    return MemoryLoader(
        recipe,
        data.load(
            recipe.data,
            data_dir,
            download=download,
            classes=isinstance(task_named(recipe.task), Classification),
        ),
        device,
        world,
    )


def _parts_of(recipe: Recipe, data_dir: Path | None) -> own.OwnData | None:
    """Data whose samples are taken as they are: a user's own, and an archive with named inputs."""
    if own.is_own(recipe.data):
        return own.own_data(recipe.data)
    file = data.archive_of(recipe.data, data_dir)
    return None if file is None else npz.named_parts(recipe.data, file)


def has_own_parts(recipe: Recipe, data_dir: Path | None) -> bool:
    """Are the samples of a recipe's data taken as they are: a user's own, or arrays by name?

    Args:
        recipe: which names them.
        data_dir: where a relative `npz:FILE` starts.
    """
    return _parts_of(recipe, data_dir) is not None


def picture_settings(recipe: Recipe) -> PictureSettings:
    """How the pictures of a recipe become inputs."""
    return PictureSettings(
        mean=recipe.mean or imagefolder.MEAN,
        std=recipe.std or imagefolder.STD,
        interpolation=recipe.interpolation,
        resize=recipe.resize,
        classes=recipe.classes,
        workers=recipe.workers,
    )


def image_size(recipe: Recipe) -> tuple[int, int] | None:
    """Height and width that pictures are cut to: the recipe's, else what the network takes, if known."""
    if not recipe.data.startswith("imagefolder:"):
        return None
    if recipe.image_size is not None:
        return recipe.image_size
    shape = models.input_shape(recipe.model)
    return None if shape is None else (shape[1], shape[2])


@dataclass(kw_only=True)
class _Split:
    """Inputs and labels on the training device, the inputs normalised already or not."""

    x: Tensor
    y: Tensor
    info: DataInfo
    ready: bool

    @classmethod
    def load(cls, x: Tensor, y: Tensor, info: DataInfo, device: torch.device) -> _Split:
        ready = 4 * x.numel() <= _NORMALISED_BYTES
        x = x.to(device) if ready or x.nbytes <= _DEVICE_BYTES else x
        x = data.normalise(x, info.mean, info.std) if ready else x
        return cls(x=x, y=y.to(device), info=info, ready=ready)

    def rows(self, rows: Tensor) -> Batch:
        """The samples of these rows; int64, on the inputs' device.

        index_select: 3 times as fast as x[rows].
        """
        return self._normalised(self.x.index_select(0, rows)), self.y.index_select(0, rows.to(self.y.device))

    def span(self, start: int, stop: int) -> Batch:
        return self._normalised(self.x[start:stop]), self.y[start:stop]

    def _normalised(self, x: Tensor) -> Tensor:
        return x if self.ready else data.normalise(x.to(self.y.device), self.info.mean, self.info.std)


class MemoryLoader:
    """A data set in memory, on the training device."""

    def __init__(self, recipe: Recipe, dataset: data.DataSet, device: torch.device, world: World) -> None:
        self.input_shape = dataset.input_shape
        self.n_outputs = _n_outputs(recipe, dataset)
        self.class_names = dataset.class_names
        require_croppable(recipe, self.input_shape)
        train, validation = data.split(dataset, recipe.validation_fraction)
        self.info = DataInfo(
            name=dataset.name,
            mean=dataset.mean,
            std=dataset.std,
            n_train=len(train[1]),
            n_validation=len(validation[1]),
            n_test=len(dataset.y_test),
            test_sha256=data.test_sha256(dataset),
        )
        self._device, self._world = device, world
        self._train = _Split.load(*train, self.info, device)
        self._parts: dict[Part, _Split] = {
            "validation": _Split.load(*validation, self.info, device),
            "test": _Split.load(dataset.x_test, dataset.y_test, self.info, device),
        }

    def sample(self, n: int) -> Tensor:
        return torch.zeros((n, *self.input_shape), device=self._device)

    def ranges(self) -> dict[str, tuple[int, int]]:
        return {}

    def training(self, order: Tensor, batch_size: int, epoch: int, first: int) -> Iterator[Batch]:
        order = order.to(self._train.x.device)
        for step in range(first, len(order) // batch_size):
            yield self._train.rows(self._world.share(order[step * batch_size : (step + 1) * batch_size]))

    def part(self, name: Part, size: int) -> Iterator[Batch]:
        split = self._parts[name]
        for start, stop in spans(len(split.y), size, self._world):
            yield split.span(start, stop)


class ImageFolderLoader:
    """A folder of pictures, decoded while training runs: by worker processes, or by threads.

    Without workers a part is decoded once where it takes up to `_HELD_BYTES`.
    """

    def __init__(
        self, recipe: Recipe, listing: imagefolder.Listing, device: torch.device, world: World
    ) -> None:
        self._size = imagefolder.check_size(image_size(recipe))
        self.input_shape: tuple[int, ...] = (3, *self._size)
        self.class_names = listing.class_names
        self.n_outputs: int | None = listing.n_classes
        if not isinstance(task_named(recipe.task), Classification):
            raise UsageError(
                f"{recipe.data} has a class for each picture, and the task is {recipe.task}.",
                do="Choose the task classification, or other data.",
            )
        require_croppable(recipe, self.input_shape)
        first_validation = data.first_of_validation(
            len(listing.train), recipe.validation_fraction, recipe.data
        )
        random_crop = recipe.augment == "random-resized-crop"
        train = listing.train.part(0, first_validation)
        self._parts: dict[Part, imagefolder.Pictures] = {
            "validation": listing.train.part(first_validation, len(listing.train)),
            "test": listing.test,
        }
        settings = picture_settings(recipe)
        self.info = DataInfo(
            name=recipe.data,
            **settings.record(),
            n_train=len(train),
            n_validation=len(self._parts["validation"]),
            n_test=len(listing.test),
            test_sha256=listing.test.sha256(),
            crop_ratio=settings.crop_ratio(self._size, otherwise=_CROP_RATIO if random_crop else 1.0),
        )
        self._device, self._world, self._train = device, world, train
        self._held: dict[str, Tensor] = {}
        self._loader = (
            None
            if not recipe.workers
            else PictureLoader(
                train,
                self._size,
                n_workers=recipe.workers,
                random_crop=random_crop,
                seed=recipe.seed,
                pinned=device.type == "cuda",
                crop_ratio=self.info.crop_ratio,
                interpolation=self.info.interpolation,
            )
        )

    def sample(self, n: int) -> Tensor:
        return torch.zeros((n, *self.input_shape), device=self._device)

    def ranges(self) -> dict[str, tuple[int, int]]:
        return {}

    def training(self, order: Tensor, batch_size: int, epoch: int, first: int) -> Iterator[Batch]:
        starts = range(first * batch_size, len(order) - batch_size + 1, batch_size)
        rows = [self._world.share(order[start : start + batch_size]).tolist() for start in starts]
        if self._loader is None:
            for batch in rows:
                x = self._decoded("train", self._train, batch)
                yield self._ready(x), self._train.labels[batch].to(self._device)
            return
        for x, y in self._loader.batches([[(index, epoch) for index in batch] for batch in rows]):
            yield self._ready(x), y.to(self._device, non_blocking=True)

    def part(self, name: Part, size: int) -> Iterator[Batch]:
        pictures = self._parts[name]
        for start, stop in spans(len(pictures), size, self._world):
            rows = list(range(start, stop))
            yield (
                self._ready(self._decoded(name, pictures, rows)),
                pictures.labels[start:stop].to(self._device),
            )

    def _decoded(self, name: str, pictures: imagefolder.Pictures, rows: list[int]) -> Tensor:
        """uint8 (N, 3, H, W) of some pictures of a part."""
        how = self._size, self.info.crop_ratio, self.info.interpolation
        is_small = len(pictures) * 3 * self._size[0] * self._size[1] <= _HELD_BYTES
        if self._loader is not None or not is_small:
            return decode(pictures.take(rows), *how)
        if name not in self._held:
            self._held[name] = decode(pictures, *how)
        return self._held[name][rows]

    def _ready(self, x: Tensor) -> Tensor:
        return data.normalise(x.to(self._device, non_blocking=True), self.info.mean, self.info.std)


def _n_outputs(recipe: Recipe, dataset: data.DataSet) -> int | None:
    """What a network for a data set gives. Raises UsageError for targets that do not fit the task."""
    if dataset.n_classes is not None and isinstance(task_named(recipe.task), Classification):
        return dataset.n_classes
    for y in (dataset.y_train, dataset.y_test):
        checked_targets(recipe, y.numpy())
    return task_named(recipe.task).n_outputs(dataset.y_train)


def whole_batch(recipe: Recipe, loader: BatchLoader, world: World) -> int:
    """Samples of a step over all processes.

    Args:
        recipe: its batch size.
        loader: of its data.
        world: the processes.

    Raises:
        UsageError: a process would get none, or the training set has fewer.
    """
    size, n_train = recipe.batch_size, loader.info.n_train
    if size > n_train:
        raise UsageError(
            f"batch_size is {size:,}, and the training set has {n_train:,} samples.",
            do=f"Lower it to {n_train:,} or less.",
        )
    if size < world.size:
        raise UsageError(
            f"A batch of {size} samples is to be shared by {world.size} processes.",
            expected="At least one sample for each was expected.",
            do="Start fewer processes, or raise batch_size, which is that of all of them together.",
        )
    return size
