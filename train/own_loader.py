"""Batches of a user's own data, and of archives with named inputs: samples are taken as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_export import models
from sparse_export.errors import UsageError
from sparse_export.formats.run import DataInfo
from sparse_export.own_code import kind_of
from sparse_export.signature import Array
from sparse_export.tasks import data
from sparse_export.tasks.data import npz, own
from sparse_export.tasks.named_data import arrays_sha256
from sparse_export.train.collate import Collate
from sparse_export.train.distributed import World
from sparse_export.train.inputs import ModelInputs, each, repeated, tensors_of, trained_on
from sparse_export.train.loader import Batch, Part, checked_targets, require_croppable, spans
from sparse_export.train.recipe import Recipe

__all__ = ["OwnLoader"]

_LOOKED_AT = 256  # samples that the ranges of integers begin with


class OwnLoader:
    """Samples that are read one by one, by worker processes where the recipe has some."""

    def __init__(self, recipe: Recipe, found: own.OwnData, device: torch.device, world: World) -> None:
        train = found.part("train")
        self._collate = None if not recipe.collate else Collate(recipe.collate)
        n_train = len(train)
        if "validation" not in found.parts:
            n_train = data.first_of_validation(n_train, recipe.validation_fraction, recipe.data)
        rows = partial(_Rows, of_one_shape=self._collate is None)
        self._train, self._parts = rows(train, 0, n_train), {}
        if "validation" in found.parts:
            self._parts["validation"] = rows(found.parts["validation"], 0, len(found.parts["validation"]))
        else:
            self._parts["validation"] = rows(train, n_train, len(train))
        test = found.parts.get("test")
        self._parts["test"] = rows(train, 0, 0) if test is None else rows(test, 0, len(test))
        first, _ = train.sample(0)
        self._is_named = isinstance(first, Mapping)
        self.input_shape: tuple[int, ...] = () if isinstance(first, Mapping) else tuple(first.shape)
        require_croppable(recipe, self.input_shape)
        if self._collate is not None:
            _require_free_sizes(recipe, train)
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
        rows = [self._train[at] for at in range(min(2, len(self._train)))]
        inputs, _ = torch.utils.data.default_collate(rows) if self._collate is None else self._collate(rows)
        return each(repeated(inputs, n), lambda one: one.to(self._device))

    def ranges(self) -> dict[str, tuple[int, int]]:
        return self._ranges

    def training(self, order: Tensor, batch_size: int, epoch: int, first: int) -> Iterator[Batch]:
        starts = range(first * batch_size, len(order) - batch_size + 1, batch_size)
        rows = [self._world.share(order[start : start + batch_size]).tolist() for start in starts]
        yield from self._batches(self._train, rows)

    def part(self, name: Part, size: int) -> Iterator[Batch]:
        rows = self._parts[name]
        places = spans(len(rows), size, self._world)
        if self._collate is None:
            yield from self._batches(rows, [list(range(start, stop)) for start, stop in places])
            return
        for start, stop in places:  # scored as they are, so that nothing hangs on how they are padded
            for batch in _of_equal_shape(rows[at] for at in range(start, stop)):
                yield self._placed(*torch.utils.data.default_collate(batch))

    def _batches(self, samples: _Rows, rows: list[list[int]]) -> Iterator[Batch]:
        loader = torch.utils.data.DataLoader(
            samples,
            batch_sampler=rows,
            num_workers=self._n_workers,
            collate_fn=self._collate,
            generator=torch.Generator(),  # else it draws from that of the weights
        )
        for x, y in loader:
            yield self._placed(x, y)

    def _placed(self, x: ModelInputs, y: Tensor) -> Batch:
        """A batch on the device, whose integers were looked at."""
        self._note(x)
        return each(x, lambda one: one.to(self._device)), y.to(self._device)

    def _note(self, x: ModelInputs) -> None:
        """Widen the ranges of integers by those of a batch."""
        for name, one in x.items() if isinstance(x, dict) else ():
            if not one.is_floating_point() and one.dtype != torch.bool and one.numel():
                low, high = int(one.min()), int(one.max())
                before = self._ranges.get(name, (low, high))
                self._ranges[name] = (min(low, before[0]), max(high, before[1]))


def _require_free_sizes(recipe: Recipe, train: own.Part) -> None:
    """Raise UsageError for samples whose differing sizes nothing names, as the graph would fix them."""
    looked_at = [inputs for inputs, _ in train.some(_LOOKED_AT)]
    if not isinstance(looked_at[0], Mapping):
        raise UsageError(
            f"The recipe names a collate function, and a sample of {recipe.data} is one array with no name.",
            do="Give inputs as a mapping of arrays by the names that forward has for them.",
        )
    shapes = [_shapes(one) for one in looked_at]
    other = next((one for one in shapes if one != shapes[0]), None)
    beside = models.example_beside(recipe.model) if models.is_factory(recipe.model) else None
    if other is not None and (beside is None or not beside[1]):
        raise UsageError(
            f"Samples of {recipe.data} have inputs of {_text(shapes[0])} and of {_text(other)[6:]}, and "
            f"nothing names the sizes of {recipe.model} that are free.",
            do='Put example_inputs() and free_sizes beside the factory, like {"ids": ("batch", "length")}.',
        )


def _of_equal_shape(samples: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Samples in their order, in lists whose inputs and targets have one shape."""
    held: list[Batch] = []
    shape: Any = None
    for inputs, target in samples:
        found = [tuple(one.shape) for one in (*tensors_of(inputs), target)]
        if held and found != shape:
            yield held
            held = []
        shape = found
        held.append((inputs, target))
    if held:
        yield held


def _digest(test: own.Part) -> str:
    """Of a test part: of whole arrays where it is an archive's, else of the samples that its digest is of."""
    rows = test.samples
    return arrays_sha256({**rows.inputs, "y": rows.targets}) if isinstance(rows, npz.Rows) else test.sha256()


class _Rows(torch.utils.data.Dataset[Batch]):
    """A stretch of a part, as tensors."""

    def __init__(self, part: own.Part, start: int, stop: int, *, of_one_shape: bool = True) -> None:
        self._part, self._start, self._n = part, start, stop - start
        self._shapes = _shapes(part.sample(0)[0])
        self._of_one_shape = of_one_shape

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> Batch:
        at = self._start + index
        inputs, target = self._part.sample(at)
        shapes = _shapes(inputs)
        fits = shapes == self._shapes if self._of_one_shape else shapes.keys() == self._shapes.keys()
        if not fits:
            raise UsageError(
                f"Sample {at} of {self._part.name} has inputs of {_text(shapes)}.",
                expected=f"{_text(self._shapes)} was expected, as of the first sample.",
                do='Pad the samples to one shape, or set collate = "package.module:function" in the recipe: '
                "a function that makes a batch of a list of samples.",
            )
        for one in inputs.values() if isinstance(inputs, Mapping) else (inputs,):
            if one.dtype.kind == "f" and not np.isfinite(one).all():
                raise UsageError(
                    f"Sample {at} of {self._part.name} holds NaN or infinity.", do="Leave out such samples."
                )
        try:
            y = torch.as_tensor(target)
        except (TypeError, ValueError, RuntimeError) as cause:
            raise UsageError(
                f"Sample {at} of {self._part.name} has for a target {kind_of(target)}.",
                expected="A number, or an array of numbers of one shape, was expected.",
                do="Turn words into numbers before they become targets.",
            ) from cause
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
