"""Batches of a data set on the training device, from arrays in memory or from decoded pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from sparse_export import models
from sparse_export.errors import UsageError
from sparse_export.formats.run import DataInfo
from sparse_export.tasks import data
from sparse_export.tasks.data import imagefolder, own
from sparse_export.tasks.data.pictures import PictureLoader, decode
from sparse_export.tasks.shipped import Classification, task_named
from sparse_export.train.augment import PADDING
from sparse_export.train.distributed import World
from sparse_export.train.recipe import Recipe

_FLOAT_LIMIT_BYTES = 2 * 1024**3  # inputs are kept normalised in memory up to here, else normalised per batch
_CROP_RATIO = 0.875  # of the shorter side, as ImageNet is tested: the middle 224 of 256

Part = Literal["validation", "test"]
Batch = tuple[Tensor, Tensor]


class BatchLoader(Protocol):
    """Batches of a data set. A process gets its own share of everything.

    Attributes:
        info: which data.
        input_shape: of one sample.
        n_outputs: that a network for the targets has; None where they do not tell.
        class_names: name of each class; empty where they have none.
    """

    info: DataInfo
    input_shape: tuple[int, ...]
    n_outputs: int | None
    class_names: tuple[str, ...]

    def training(self, order: Tensor, batch_size: int, epoch: int, first: int) -> Iterator[Batch]:
        """Inputs and labels of the batches of one epoch.

        Args:
            order: int64, places in the training part.
            batch_size: over all processes; a last, smaller batch is left out.
            epoch: from 0.
            first: number of the first batch.
        """
        ...

    def part(self, name: Part, size: int) -> Iterator[Batch]:
        """All samples of another part in order, `size` at a time."""
        ...


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
    if own.is_own(recipe.data):
        return OwnLoader(recipe, own.own_data(recipe.data), device, world)
    if recipe.workers:
        listing = data.picture_files(recipe.data, data_dir)
        if listing is None:
            raise UsageError(
                f"workers is {recipe.workers}, but {recipe.data} is read into memory as a whole.",
                expected="Data imagefolder:DIR were expected, which worker processes decode.",
                do="Leave workers out.",
            )
        return ImageFolderLoader(recipe, listing, device, world)
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
            image_size=image_size(recipe),
            download=download,
            classes=isinstance(task_named(recipe.task), Classification),
        ),
        device,
        world,
    )


def image_size(recipe: Recipe) -> tuple[int, int] | None:
    """Height and width that pictures are cut to: the recipe's, else what the network takes, if known."""
    if not recipe.data.startswith("imagefolder:"):
        return None
    if recipe.image_size is not None:
        return recipe.image_size
    shape = models.input_shape(recipe.model)
    return None if shape is None else (shape[1], shape[2])


def _require_croppable(recipe: Recipe, shape: tuple[int, ...]) -> None:
    if recipe.augment == "crop-flip" and (len(shape) != 3 or min(shape[1:]) <= PADDING):
        raise UsageError(
            f"augment = 'crop-flip' cannot be done to inputs of shape {shape} from {recipe.data}.",
            expected=f"Images (C, H, W) higher and wider than {PADDING} were expected.",
            do="Leave augment out of the recipe.",
        )


@dataclass(kw_only=True)
class _Split:
    """Inputs and labels on the training device, the inputs normalised already or not."""

    x: Tensor
    y: Tensor
    info: DataInfo
    ready: bool

    @classmethod
    def load(cls, x: Tensor, y: Tensor, info: DataInfo, device: torch.device) -> _Split:
        ready = 4 * x.numel() <= _FLOAT_LIMIT_BYTES
        x = data.normalise(x.to(device), info.mean, info.std) if ready else x
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
        _require_croppable(recipe, self.input_shape)
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
        self._world = world
        self._train = _Split.load(*train, self.info, device)
        self._parts: dict[Part, _Split] = {
            "validation": _Split.load(*validation, self.info, device),
            "test": _Split.load(dataset.x_test, dataset.y_test, self.info, device),
        }

    def training(self, order: Tensor, batch_size: int, epoch: int, first: int) -> Iterator[Batch]:
        order = order.to(self._train.x.device)
        for step in range(first, len(order) // batch_size):
            yield self._train.rows(self._world.share(order[step * batch_size : (step + 1) * batch_size]))

    def part(self, name: Part, size: int) -> Iterator[Batch]:
        split = self._parts[name]
        for start, stop in _spans(len(split.y), size, self._world):
            yield split.span(start, stop)


class ImageFolderLoader:
    """A folder of pictures, decoded by worker processes while training runs."""

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
        _require_croppable(recipe, self.input_shape)
        first_validation = data.first_of_validation(
            len(listing.train), recipe.validation_fraction, recipe.data
        )
        random_crop = recipe.augment == "random-resized-crop"
        train = listing.train.part(0, first_validation)
        self._parts: dict[Part, imagefolder.Pictures] = {
            "validation": listing.train.part(first_validation, len(listing.train)),
            "test": listing.test,
        }
        self.info = DataInfo(
            name=recipe.data,
            mean=imagefolder.MEAN,
            std=imagefolder.STD,
            n_train=len(train),
            n_validation=len(self._parts["validation"]),
            n_test=len(listing.test),
            test_sha256=listing.test.sha256(),
            crop_ratio=_CROP_RATIO if random_crop else 1.0,
        )
        self._device, self._world = device, world
        self._loader = PictureLoader(
            train,
            self._size,
            n_workers=recipe.workers,
            random_crop=random_crop,
            seed=recipe.seed,
            pinned=device.type == "cuda",
        )

    def training(self, order: Tensor, batch_size: int, epoch: int, first: int) -> Iterator[Batch]:
        starts = range(first * batch_size, len(order) - batch_size + 1, batch_size)
        rows = [self._world.share(order[start : start + batch_size]).tolist() for start in starts]
        for x, y in self._loader.batches([[(index, epoch) for index in batch] for batch in rows]):
            yield self._ready(x), y.to(self._device, non_blocking=True)

    def part(self, name: Part, size: int) -> Iterator[Batch]:
        pictures = self._parts[name]
        for start, stop in _spans(len(pictures), size, self._world):
            some = pictures.part(start, stop)
            x = decode(some, self._size, self.info.crop_ratio)
            yield self._ready(x), some.labels.to(self._device)

    def _ready(self, x: Tensor) -> Tensor:
        return data.normalise(x.to(self._device, non_blocking=True), self.info.mean, self.info.std)


class OwnLoader:
    """A user's own data, read sample by sample, by worker processes where the recipe has some."""

    def __init__(self, recipe: Recipe, found: own.OwnData, device: torch.device, world: World) -> None:
        train = found.part("train")
        n_train = len(train)
        if "validation" not in found.parts:
            n_train = data.first_of_validation(n_train, recipe.validation_fraction, recipe.data)
        self._train, self._parts = _Rows(train, 0, n_train), {}
        if "validation" in found.parts:
            self._parts["validation"] = _Rows(found.parts["validation"], 0, len(found.parts["validation"]))
        else:
            self._parts["validation"] = _Rows(train, n_train, len(train))
        test = found.parts.get("test")
        self._parts["test"] = _Rows(train, 0, 0) if test is None else _Rows(test, 0, len(test))
        inputs, _ = train.sample(0)
        if isinstance(inputs, Mapping):
            raise UsageError(
                f"The samples of {recipe.data} have the inputs {', '.join(inputs)}.",
                expected="One array a sample was expected.",
                do="Train such a network in a loop of your own, with sparse_export.train.SparseTraining.",
            )
        self.input_shape = tuple(inputs.shape)
        _require_croppable(recipe, self.input_shape)
        self.n_outputs = _checked_targets(recipe, train.targets())
        self.class_names: tuple[str, ...] = ()
        self.info = DataInfo(
            name=recipe.data,
            mean=(),
            std=(),
            n_train=n_train,
            n_validation=len(self._parts["validation"]),
            n_test=len(self._parts["test"]),
            test_sha256="" if test is None else test.sha256(),
        )
        self._device, self._world, self._n_workers = device, world, recipe.workers

    def training(self, order: Tensor, batch_size: int, epoch: int, first: int) -> Iterator[Batch]:
        starts = range(first * batch_size, len(order) - batch_size + 1, batch_size)
        rows = [self._world.share(order[start : start + batch_size]).tolist() for start in starts]
        yield from self._batches(self._train, rows)

    def part(self, name: Part, size: int) -> Iterator[Batch]:
        rows = self._parts[name]
        spans = _spans(len(rows), size, self._world)
        yield from self._batches(rows, [list(range(start, stop)) for start, stop in spans])

    def _batches(self, samples: _Rows, rows: list[list[int]]) -> Iterator[Batch]:
        loader = torch.utils.data.DataLoader(
            samples,
            batch_sampler=rows,
            num_workers=self._n_workers,
            generator=torch.Generator(),  # else it draws from that of the weights
        )
        for x, y in loader:
            yield x.to(self._device), y.to(self._device)


class _Rows(torch.utils.data.Dataset[Batch]):
    """A stretch of a part, as tensors."""

    def __init__(self, part: own.Part, start: int, stop: int) -> None:
        self._part, self._start, self._n = part, start, stop - start
        self._shape = part.sample(0)[0].shape

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> Batch:
        at = self._start + index
        inputs, target = self._part.sample(at)
        if inputs.shape != self._shape:
            raise UsageError(
                f"Sample {at} of {self._part.name} has inputs of shape {inputs.shape}.",
                expected=f"{self._shape} was expected, as of the first sample.",
            )
        if inputs.dtype.kind == "f" and not np.isfinite(inputs).all():
            raise UsageError(
                f"Sample {at} of {self._part.name} holds NaN or infinity.", do="Leave out such samples."
            )
        y = torch.as_tensor(target)
        if y.dtype == torch.float64:
            y = y.float()
        return torch.as_tensor(inputs, dtype=torch.float32), y


def _n_outputs(recipe: Recipe, dataset: data.DataSet) -> int | None:
    """What a network for a data set gives. Raises UsageError for targets that do not fit the task."""
    if dataset.n_classes is not None and isinstance(task_named(recipe.task), Classification):
        return dataset.n_classes
    for y in (dataset.y_train, dataset.y_test):
        _checked_targets(recipe, y.numpy())
    return task_named(recipe.task).n_outputs(dataset.y_train)


def _checked_targets(recipe: Recipe, targets: Any) -> int | None:
    """The number of outputs that targets tell. Raises UsageError where they do not fit the task."""
    task = task_named(recipe.task)
    if not isinstance(targets, np.ndarray):
        return None
    problem = task.problem(targets, None)
    if problem is not None:
        raise UsageError(
            f"The targets of {recipe.data} {problem}.",
            do=f"Give targets of the task {recipe.task}, or name another task.",
        )
    return task.n_outputs(torch.from_numpy(targets))


def _spans(n: int, size: int, world: World) -> Iterator[tuple[int, int]]:
    """This process's share of 0 .. n in stretches of at most `size`."""
    first, last = n * world.rank // world.size, n * (world.rank + 1) // world.size
    for start in range(first, last, size):
        yield start, min(start + size, last)
