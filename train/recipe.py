"""The recipe of a training run: a TOML file, checked key by key."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sparse_export.errors import RecipeError, UnknownNameError, UsageError
from sparse_export.formats.recipe_files import recipe_content
from sparse_export.formats.run import Interpolation
from sparse_export.formats.toml import table_from_toml
from sparse_export.models.names import is_factory
from sparse_export.tasks import shipped
from sparse_export.tasks.data import own
from sparse_export.tasks.data.picture_settings import class_numbers
from sparse_export.train.methods.dense import DENSE
from sparse_export.train.sparsity_config import SparsityConfig

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]

CROSS_ENTROPY = "cross-entropy"
"""The loss of a classification, by name."""

CLASSIFICATION = "classification"

_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")  # pydantic's types of that fault

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "reference": {"sparsity": {"start": "uniform", "rescale": False}},
    "best": {
        "learning_rate": {"schedule": "cosine"},
        "sparsity": {"start_density": 0.5, "update_every": 135, "growth": "mean-gradient"},
    },
    "compact": {
        "learning_rate": {"schedule": "cosine"},
        "sparsity": {
            "start_density": 0.5,
            "update_every": 135,
            "growth": "mean-gradient",
            "narrowing": 0.4,
        },
    },
}
"""Changes to a recipe by name. `reference`: the start of the paper's own implementation. `best`: what did
better than the paper's on validation, see docs/results.md; for sparse momentum without a pattern. `compact`:
the same with ever fewer live channels, for `build --compact`."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class OptimizerRecipe(_Table):
    """[optimizer].

    Args:
        name: torch's optimizer of this name, fused.
        lr: learning rate that the schedule starts from, above 0.
        momentum: of sgd, from 0 to below 1.
        nesterov: of sgd.
        betas: of adam and adamw, each from 0 to below 1.
        weight_decay: added to the gradient by sgd and adam, apart from it by adamw; at least 0.
        decay_vectors: does weight_decay also fall on biases and on the weights of norms?
    """

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Positive = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = True
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5e-4
    decay_vectors: bool = True


class LearningRateRecipe(_Table):
    """[learning_rate].

    Args:
        schedule: `step` multiplies by `factor` at each of `drops`; `cosine` goes to 0 along half a cosine.
        drops: fractions of all training steps, 0 to 1.
        factor: above 0.
        warmup: fraction of all steps over which the rate first rises linearly to where its schedule stands;
            from 0 to below 1.
    """

    schedule: Literal["step", "cosine", "constant"] = "step"
    drops: tuple[Fraction, ...] = (0.463, 0.926)
    factor: Positive = 0.1
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Recipe(_Table):
    """A training run.

    Args:
        model: a known name, `timm:NAME` or `package.module:factory`.
        data: a name, see `sparse_export.tasks.data.load`.
        epochs: passes over the training set without its validation part, at least 1.
        batch_size: samples of a step over all processes that train together, at least 1.
        seed: of weights, masks, the order of the samples, crops and dropout; 0 to 2^31 - 1.
        validation_fraction: of the training set, its end, kept for choices; from 0 to below 1.
        threads: torch's, on the CPU; 0 lets the size of the network decide.
        dense: train the dense baseline; `sparsity` is then not read.
        augment: of the training images. `crop-flip`, on the training device, pads by 4 (reflected), crops
            back at random and mirrors every other one; `random-resized-crop`, while pictures are decoded,
            cuts a part of random size and proportions and mirrors every other one, and tests on the middle
            7/8.
        workers: processes that decode the pictures of `imagefolder:DIR` while training runs; 0 decodes all of
            them into memory at the start.
        image_size: height and width of these pictures; None for what the network takes.
        mean: of red, green and blue of these pictures, after scaling to 0..1; None for ImageNet's.
        std: likewise, by which they are divided.
        interpolation: that they are scaled by.
        resize: pixels that their shorter side is scaled to before the middle is cut out; None for just
            covering `image_size`.
        classes: class number of each folder, or a file of them, see
            `sparse_export.tasks.data.picture_settings.class_numbers`; None to number them by their names.
        precision: of the forward and backward pass; `bf16` by autocast, weights and masks stay float32.
        channels_last: memory format of images and convolutions.
        compile: by torch.compile.
        cuda_graph: a step is launched as one CUDA graph, see `CapturedStep`; in one process on CUDA.
        sync_batch_norm: batch statistics over all processes (on CUDA only); else each has its own.
        keep: the state that is tested and saved at the end: that of the last epoch, or of the one with the
            best score on the validation part, of those whose masks are as sparse as at the end.
        ema: decay of an average of the weights, which is what is tested and saved; from 0, for none, to below
            1.
        task: what the network is for: a name of `sparse_export.tasks.TASKS`, or `package.module:task`.
        loss: empty for that of the task, `cross-entropy`, or `package.module:function` of outputs and targets
            that gives the mean over the samples.
        grad_clip: most norm of all gradients together, which larger ones are scaled down to; 0 for none.
        accumulate: parts that a batch is computed in, one after the other; the optimizer steps once a batch.
        label_smoothing: share of the target spread over all classes, from 0 to below 1.
        collate: function that makes a batch of samples of differing shapes, `package.module:function`; empty
            for samples of one shape.
        optimizer, learning_rate, sparsity: the tables of these names.

    Raises:
        ValidationError: a value is of another type or out of its range, or two of them contradict each other.
    """

    model: str
    data: str
    epochs: Count
    batch_size: Count = 100
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    dense: bool = False
    augment: Literal["none", "crop-flip", "random-resized-crop"] = "none"
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    image_size: tuple[Count, Count] | None = None
    mean: tuple[Finite, Finite, Finite] | None = None
    std: tuple[Positive, Positive, Positive] | None = None
    interpolation: Interpolation = "bilinear"
    resize: Count | None = None
    classes: dict[str, Annotated[int, Field(ge=0)]] | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    cuda_graph: bool = False
    sync_batch_norm: bool = False
    keep: Literal["last", "best"] = "last"
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    task: str = CLASSIFICATION
    loss: str = ""
    grad_clip: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    accumulate: Count = 1
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    distill: Literal["", "outputs", "features"] = ""
    collate: str = ""
    optimizer: OptimizerRecipe = OptimizerRecipe()
    learning_rate: LearningRateRecipe = LearningRateRecipe()
    sparsity: SparsityConfig = SparsityConfig()

    @property
    def has_own_loss(self) -> bool:
        """Is the loss a user's function?"""
        return ":" in self.loss

    @property
    def own_code(self) -> tuple[str, ...]:
        """What a training by this recipe imports of a user's: `package.module:name`."""
        return own_code_of(self.model_dump())

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        """Raise ValueError, which pydantic reports, for settings that contradict each other."""
        if self.has_own_loss and self.label_smoothing:
            raise ValueError(f"label_smoothing belongs to the cross-entropy, and loss is {self.loss!r}")
        if self.label_smoothing and self.task != CLASSIFICATION:
            raise ValueError(f"label_smoothing belongs to the cross-entropy, and task is {self.task!r}")
        if not self.has_own_loss and self.loss not in ("", CROSS_ENTROPY):
            raise ValueError(
                f"loss is {self.loss!r}; {CROSS_ENTROPY!r} was expected, or a function of your own as "
                "'package.module:function'"
            )
        if self.distill and self.label_smoothing:
            raise ValueError("distill and label_smoothing exclude each other: labels are not looked at")
        of_pictures = ("mean", "std", "resize", "classes")
        set_ones = [name for name in of_pictures if getattr(self, name) is not None]
        if self.interpolation != "bilinear":
            set_ones.append("interpolation")
        if set_ones and not self.data.startswith("imagefolder:"):
            raise ValueError(f"{set_ones[0]} belongs to the data imagefolder:DIR, and data is {self.data!r}")
        if self.keep == "best" and not self.validation_fraction and not own.is_own(self.data):
            raise ValueError("keep 'best' chooses by the validation part, and validation_fraction is 0")
        if self.collate and not is_factory(self.collate):
            raise ValueError(
                f"collate is {self.collate!r}; a function of your own was expected, 'package.module:function'"
            )
        if self.collate and not own.is_own(self.data):
            raise ValueError(
                f"collate makes batches of the data package.module:data, and data is {self.data!r}"
            )
        if self.collate and self.cuda_graph:
            raise ValueError("collate and cuda_graph exclude each other: every batch may have another shape")
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate is {self.accumulate}, more than the batch_size {self.batch_size}")
        if self.dense:
            return self
        if self.compile and self.sparsity.narrowing:
            raise ValueError("compile and narrowing exclude each other")
        moves_every_step = self.sparsity.rule.moves_every_step
        method, products = self.sparsity.method, self.sparsity.products
        if self.ema and moves_every_step:
            raise ValueError(
                f"ema and method {method!r} exclude each other: an average over moving masks satisfies none"
            )
        if products == "csr":
            others = {
                "ema": self.ema,
                "compile": self.compile,
                "precision 'bf16'": self.precision != "fp32",
                "grad_clip": self.grad_clip,  # gradients of inactive weights are not there in every step
            }
            for name, given in others.items():
                if given:
                    raise ValueError(f"products 'csr' and {name} exclude each other")
        if products == "2:4":
            if self.ema:
                raise ValueError("products '2:4' and ema exclude each other")
            if self.precision != "bf16":
                raise ValueError("products '2:4' need precision 'bf16': there are none in fp32")
        if self.cuda_graph:
            if products != "dense":
                raise ValueError(f"cuda_graph and products {products!r} exclude each other")
            if moves_every_step:
                raise ValueError(f"cuda_graph and method {method!r} exclude each other")
        return self


def own_code_of(recipe: Mapping[str, Any]) -> tuple[str, ...]:
    """What a recipe names of a user's own code.

    Args:
        recipe: as its document has it.
    """
    of_kind = {
        "model": is_factory,
        "loss": is_factory,
        "collate": is_factory,
        "task": shipped.is_own,
        "data": own.is_own,
    }
    named = ((str(recipe.get(key) or ""), is_own) for key, is_own in of_kind.items())
    return tuple(name for name, is_own in named if name and is_own(name))


def load_recipe(
    name: str | Path, *, preset: str = "default", changes: Mapping[str, Any] | None = None
) -> Recipe:
    """A shipped recipe by name, or a TOML file by path, with a preset and then `changes` laid over it.

    Args:
        name: of `recipe_names()`, or the path of a file.
        preset: a name in PRESETS.
        changes: a nested mapping of recipe keys.

    Returns:
        The recipe, with its defaults filled in.

    Raises:
        UnknownNameError: there is neither such a recipe nor such a file, or no such preset.
        UsageError: what is a path by its looks leads to no file.
        RecipeError: it is no TOML, or says what no recipe can say.
    """
    text, content = str(name), recipe_content(name)
    try:
        table = table_from_toml(content)
    except ValueError as cause:
        raise RecipeError(
            f"{name} is not TOML: {cause}.", expected="A recipe in TOML was expected.", do="Mend the file."
        ) from cause
    if preset not in PRESETS:
        raise UnknownNameError("preset", preset, PRESETS)
    return recipe_from_table(merged(merged(table, PRESETS[preset]), changes or {}), source=text)


def recipe_from_table(table: Mapping[str, Any], *, source: str) -> Recipe:
    """Check a nested mapping. sparsity.method = "dense" means dense = true.

    Args:
        table: keys and values as a TOML file has them.
        source: what an error calls it.

    Returns:
        The recipe, with its defaults filled in.

    Raises:
        RecipeError: it says what no recipe can say.
    """
    sparsity = table.get("sparsity")
    if isinstance(sparsity, Mapping) and sparsity.get("method") == DENSE.name:
        table = {**table, "dense": True}
    if isinstance(table.get("classes"), str):
        try:
            table = {**table, "classes": class_numbers(Path(table["classes"]))}
        except UsageError as cause:
            raise RecipeError(
                f"The recipe {source} is not right: {cause.what}", expected=cause.expected, do=cause.do
            ) from cause
    try:
        return Recipe.model_validate_json(json.dumps(table, default=str))
    except ValidationError as cause:
        raise RecipeError(f"The recipe {source} is not right.", expected=_first_fault(cause)) from cause


def merged(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A nested mapping with another laid over it, table by table."""
    result = dict(table)
    for key, value in changes.items():
        below = result.get(key, {})
        both_tables = isinstance(value, Mapping) and isinstance(below, Mapping)
        result[key] = merged(below, value) if both_tables else value
    return result


def _first_fault(error: ValidationError) -> str:
    faults = error.errors()  # an unknown key first: a missing one is often that one, misspelt
    fault = next((one for one in faults if one["type"] in _UNKNOWN_KEY), faults[0])
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] in _UNKNOWN_KEY:
        known = sorted(_keys_of(fault["loc"][:-1]))
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1, cutoff=0.0)[0]
        return (
            f"It has an unknown key {where!r}; the nearest known one is {near!r} (all: {', '.join(known)})."
        )
    if fault["type"] == "missing":
        if fault["loc"] and isinstance(fault["loc"][-1], int):
            return f"{where.rpartition('.')[0]} has too few values."
        return f"It lacks the key {where!r}."
    if fault["type"] == "value_error":  # of our own checks, whose words are whole sentences
        reason = str(fault["ctx"]["error"]).rstrip(".")
        return f"In [{fault['loc'][0]}], {reason}." if fault["loc"] else f"It is refused: {reason}."
    given = fault["input"]
    if isinstance(given, float) and not math.isfinite(given):
        return f"{where} is {given!r}: a finite number was expected."
    shown = "a table" if isinstance(given, Mapping) else repr(given)
    return f"{where} is {shown}: {fault['msg'][0].lower()}{fault['msg'][1:].rstrip('.')}."


def _keys_of(path: Sequence[str | int]) -> Iterable[str]:
    """The keys of the table at this place of a recipe."""
    table: Any = Recipe
    for part in path:
        table = table.model_fields[part].annotation
    return table.model_fields if issubclass(table, BaseModel) else (field.name for field in fields(table))
