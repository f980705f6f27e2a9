"""Batches of a user's own data, and of archives with named inputs: samples are taken as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from sparse_export.errors import UsageError
from sparse_export.formats.run import DataInfo
from sparse_export.signature import Array
from sparse_export.tasks import data
from sparse_export.tasks.data import npz, own
from sparse_export.tasks.named_data import arrays_sha256
from sparse_export.train.distributed import World
from sparse_export.train.inputs import ModelInputs, each, repeated, trained_on
from sparse_export.train.loader import Batch, Part, checked_targets, require_croppable, spans
from sparse_export.train.recipe import Recipe

__all__ = ["OwnLoader"]

_LOOKED_AT = 256  # samples that the ranges of integers begin with


class OwnLoader:
    """Samples that are read one by one, by worker processes where the recipe has some."""

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
        first, _ = train.sample(0)
        self._is_named = isinstance(first, Mapping)
        self.input_shape: tuple[int, ...] = () if isinstance(first, Mapping) else tuple(first.shape)
        require_croppable(recipe, self.input_shape)
        self.n_outputs = checked_targets(recipe, train.targets())
        self.class_names: tuple[str, ...] = ()
        self.info = DataInfo(
            name=recipe.data,
            mean=(),
            std=(),
            n_train=n_train,
            n_validation=len(self._parts["validation"]),
            n_test=len(self._parts["test"]),
            test_sha256="" if test is None else _digest(test),
        )
        self._device, self._world, self._n_workers = device, world, recipe.workers
        self._ranges: dict[str, tuple[int, int]] = {}
        for inputs, _ in train.some(_LOOKED_AT) if self._is_named else ():
            self._note(trained_on(inputs))

    def sample(self, n: int) -> ModelInputs:
        if not self._is_named:
            return torch.zeros((n, *self.input_shape), device=self._device)
        rows = [self._train[at][0] for at in range(min(2, len(self._train)))]
        return each(repeated(torch.utils.data.default_collate(rows), n), lambda one: one.to(self._device))

    def ranges(self) -> dict[str, tuple[int, int]]:
        return self._ranges

    def training(self, order: Tensor, batch_size: int, epoch: int, first: int) -> Iterator[Batch]:
        starts = range(first * batch_size, len(order) - batch_size + 1, batch_size)
        rows = [self._world.share(order[start : start + batch_size]).tolist() for start in starts]
        yield from self._batches(self._train, rows)

    def part(self, name: Part, size: int) -> Iterator[Batch]:
        rows = self._parts[name]
        places = spans(len(rows), size, self._world)
        yield from self._batches(rows, [list(range(start, stop)) for start, stop in places])

    def _batches(self, samples: _Rows, rows: list[list[int]]) -> Iterator[Batch]:
        loader = torch.utils.data.DataLoader(
            samples,
            batch_sampler=rows,
            num_workers=self._n_workers,
            generator=torch.Generator(),  # else it draws from that of the weights
        )
        for x, y in loader:
            self._note(x)
            yield each(x, lambda one: one.to(self._device)), y.to(self._device)

    def _note(self, x: ModelInputs) -> None:
        """Widen the ranges of integers by those of a batch."""
        for name, one in x.items() if isinstance(x, dict) else ():
            if not one.is_floating_point() and one.dtype != torch.bool and one.numel():
                low, high = int(one.min()), int(one.max())
                before = self._ranges.get(name, (low, high))
                self._ranges[name] = (min(low, before[0]), max(high, before[1]))


def _digest(test: own.Part) -> str:
    """Of a test part: of whole arrays where it is an archive's, else of the samples that its digest is of."""
    rows = test.samples
    return arrays_sha256({**rows.inputs, "y": rows.targets}) if isinstance(rows, npz.Rows) else test.sha256()


class _Rows(torch.utils.data.Dataset[Batch]):
    """A stretch of a part, as tensors."""

    def __init__(self, part: own.Part, start: int, stop: int) -> None:
        self._part, self._start, self._n = part, start, stop - start
        self._shapes = _shapes(part.sample(0)[0])

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> Batch:
        at = self._start + index
        inputs, target = self._part.sample(at)
        shapes = _shapes(inputs)
        if shapes != self._shapes:
            raise UsageError(
                f"Sample {at} of {self._part.name} has inputs of {_text(shapes)}.",
                expected=f"{_text(self._shapes)} was expected, as of the first sample.",
            )
        for one in inputs.values() if isinstance(inputs, Mapping) else (inputs,):
            if one.dtype.kind == "f" and not np.isfinite(one).all():
                raise UsageError(
                    f"Sample {at} of {self._part.name} holds NaN or infinity.", do="Leave out such samples."
                )
        y = torch.as_tensor(target)
        if y.dtype == torch.float64:
            y = y.float()
        return trained_on(inputs), y


def _shapes(inputs: Array | Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    """By name; of one input without a name by an empty one."""
    if isinstance(inputs, Mapping):
        return {name: one.shape for name, one in inputs.items()}
    return {"": inputs.shape}


def _text(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return "shape " + ", ".join(f"{name} {shape}".strip() for name, shape in shapes.items())
