"""What a training run is told to do: a TOML file, checked key by key."""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sparse_export.errors import RecipeError, UnknownNameError, UsageError
from sparse_export.sparsity import (
    Distribution,
    NMPattern,
    Prune,
    PruneSchedule,
    Redistribution,
    pattern_from_text,
)
from sparse_export.sparsity.eligible import SMALL_SHARE
from sparse_export.train.methods import METHODS, chosen_method

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]

Method = Literal[
    "sparse-momentum", "set", "rigl", "dsr", "static", "snip", "magnitude", "dense", "sr-ste", "asp"
]
_TO_A_PATTERN = ("sr-ste", "asp")  # methods that are nothing without one

DEFAULT_DENSITY = 0.05
DEFAULT_APPROACH = (0.0, 0.0)
DEFAULT_FREEZE = 0.75

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "reference": {"sparsity": {"start": "uniform", "rescale": False}},
}
"""Changes to a recipe by name. `reference`: the start of the paper's own implementation."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class OptimizerRecipe(_Table):
    """[optimizer]: momentum and nesterov are for sgd, betas for adam and adamw.

    decay_vectors: whether weight_decay also falls on biases and on the weights of norms.
    """

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Positive = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = True
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5e-4
    decay_vectors: bool = True


class LearningRateRecipe(_Table):
    """[learning_rate]: `step` multiplies by `factor` at each of `drops`, fractions of all training steps.

    warmup: fraction of all steps over which the rate first rises linearly to where its schedule stands.
    """

    schedule: Literal["step", "cosine", "constant"] = "step"
    drops: tuple[Fraction, ...] = (0.463, 0.926)
    factor: Positive = 0.1
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0


class SparsityRecipe(_Table):
    """[sparsity]: see `sparse_export.train.SparseTraining`. update_every: steps, 0 for once an epoch.

    method: `sparse-momentum`; those of `sparse_export.train.methods` to compare with; `dense`, which is `dense = true`
    of the recipe; and two that need a pattern: `sr-ste`, see `SrSte`, and `asp`, which trains dense for half of the
    steps, cuts to the pattern by magnitude once, and trains again by the same learning rate schedule with the masks
    as they are.
    prune, redistribution, growth: as the method has them, unless another is named.
    final_prune_rate: where the prune schedule ends: cosine by default as the method has it, linear at 0; constant has
    none.
    density: without one, as much as the pattern allows; without a pattern .05.
    approach, freeze: by default, without a pattern none and as the method has it; with one, see DEFAULT_APPROACH and DEFAULT_FREEZE.
    transposable: 2:4 along both axes, where a layer can; with products `2:4` the gradient of its inputs is then
    multiplied sparsely too.
    decay: of masked weights in sr-ste.
    products: `csr` leaves inactive weights out of the products of Linear layers on the CPU, where a short timing at the
    start shows that it wins, see `StepCsr`; `2:4` multiplies by the card's 2:4 products in the forward pass, see `Step24`.
    window: steps of dense gradients before each mask update then; by default
    ln(100) / (1 - momentum).
    """

    method: Method = "sparse-momentum"
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    pattern: str | None = None
    approach: tuple[Fraction, Fraction] | None = None
    freeze: Fraction | None = None
    small_share: Fraction = SMALL_SHARE
    transposable: bool = False
    decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2e-4
    start: Distribution = "erdos-renyi"
    rescale: bool = True
    prune_rate: Fraction = 0.5
    final_prune_rate: Fraction | None = None
    prune_schedule: PruneSchedule = "cosine"
    prune: Prune | None = None
    redistribution: Redistribution | None = None
    growth: Literal["momentum", "random", "gradient"] | None = None
    update_every: Annotated[int, Field(ge=0)] = 0
    keep_dense: tuple[str, ...] = ()
    products: Literal["dense", "csr", "2:4"] = "dense"
    window: Count | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        """Raise ValueError, which pydantic reports, for settings that contradict each other."""
        pattern = self.nm_pattern
        if pattern is None and self.method in _TO_A_PATTERN:
            raise ValueError(f"method {self.method!r} needs a pattern, like '2:4'")
        choices = {"prune": self.prune, "redistribution": self.redistribution, "growth": self.growth}
        if self.method in METHODS:
            method = chosen_method(self.method, **choices)
            if not method.moves and (self.freeze is not None or self.approach is not None):
                raise ValueError(
                    f"method {self.method!r} never moves its masks: leave out freeze and approach"
                )
            if method.is_gradual and self.freeze == 0:
                raise ValueError(f"method {self.method!r} needs a freeze above 0")
            if pattern is not None and method.start != "random":
                raise ValueError(
                    f"method {self.method!r} takes no pattern; asp prunes a dense network to a pattern"
                )
        elif any(choices.values()):
            raise ValueError(f"method {self.method!r} takes no prune, redistribution or growth")
        if pattern is not None and self.density is not None:
            if self.method in _TO_A_PATTERN:
                raise ValueError(f"method {self.method!r} takes no density: the pattern decides it")
            if self.density > pattern.density:
                raise ValueError(f"the pattern {pattern} allows a density of {pattern.density:g} at most")
        if self.final_prune_rate is not None and self.prune_schedule == "constant":
            raise ValueError("final_prune_rate and prune_schedule 'constant' exclude each other")
        first, last = self.approach or (0.0, 0.0)
        if not first <= last <= self.wanted_freeze:
            raise ValueError(
                "approach needs its first fraction no later than its last, and both no later than freeze, which is "
                f"{self.wanted_freeze:g}"
            )
        if self.approach is not None and pattern is None:
            raise ValueError("approach needs a pattern, like '2:4'")
        if self.transposable:
            moved = METHODS.get("sparse-momentum" if self.method == "asp" else self.method)
            if self.pattern != "2:4" or self.density is not None:
                raise ValueError("transposable needs the pattern '2:4' and no density")
            if moved is None or moved.prune != "magnitude" or self.prune not in (None, "magnitude"):
                raise ValueError(f"transposable and method {self.method!r} exclude each other")
        if self.products == "csr" and (
            pattern is not None or self.method not in METHODS or METHODS[self.method].is_gradual
        ):
            raise ValueError(
                f"products 'csr' need masks without a pattern that do not start dense, not method {self.method!r}"
                + (f" with the pattern {pattern}" if pattern is not None else "")
            )
        if self.products == "2:4" and (
            self.pattern != "2:4" or (self.method not in METHODS and self.method != "asp")
        ):
            raise ValueError(
                f"products '2:4' need the pattern '2:4', and masks that move at updates only, not pattern "
                f"{self.pattern!r} and method {self.method!r}"
            )
        if self.window is not None and self.products != "csr":
            raise ValueError("window belongs to products 'csr'")
        if self.method in _TO_A_PATTERN:
            for name, value in (("approach", self.approach), ("freeze", self.freeze)):
                if value is not None:
                    raise ValueError(f"method {self.method!r} has no {name}")
        return self

    @property
    def nm_pattern(self) -> NMPattern | None:
        """The pattern. Raises ValueError for a text that is none."""
        try:
            return None if self.pattern is None else pattern_from_text(self.pattern)
        except UsageError as cause:
            raise ValueError(f"pattern is {self.pattern!r}: {cause.expected or cause.what}") from cause

    @property
    def wanted_density(self) -> float | None:
        """The density that training is asked for; None for as much as the pattern allows."""
        return DEFAULT_DENSITY if self.density is None and self.pattern is None else self.density

    @property
    def wanted_freeze(self) -> float:
        """The fraction of the training after which masks that move under a pattern stand still; 1 without one."""
        if self.freeze is not None:
            return self.freeze
        return DEFAULT_FREEZE if self.pattern is not None else 1.0

    @property
    def label(self) -> str:
        """The pattern and the density, as a name of a folder has them."""
        parts = [] if self.pattern is None else [self.pattern.replace(":", "of")]
        if self.wanted_density is not None:
            parts.append(f"{self.wanted_density:g}")
        return "-".join([*([] if self.method == "sparse-momentum" else [self.method]), *parts])


class Recipe(_Table):
    """A training run. epochs: passes over the training set without its validation part, the last tenth of it.

    batch_size: over all processes that train together.  threads: torch's, on the CPU; 0 lets the size of the
    network decide.
    augment: of the training images. `crop-flip`, on the training device, pads by 4 (reflected), crops back at
    random and mirrors every other one; `random-resized-crop`, while pictures are decoded, cuts a part of random
    size and proportions and mirrors every other one, and tests on the middle 7/8.
    label_smoothing: share of the target spread over all classes.
    workers: processes that decode the pictures of `imagefolder:DIR` while training runs; 0 decodes all of them
    into memory at the start.  image_size: height and width of these pictures; by default what the network takes.
    precision: of the forward and backward pass; `bf16` by autocast, weights and masks stay float32.
    channels_last: memory order of images and convolutions.  compile: by torch.compile.
    cuda_graph: a step is launched as one CUDA graph, see `CapturedStep`; in one process on CUDA.
    sync_batch_norm: batch statistics over all processes (on CUDA only); else each has its own.
    ema: decay of an average of the weights, which is what is tested and saved; 0 for none.
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
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    cuda_graph: bool = False
    sync_batch_norm: bool = False
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    optimizer: OptimizerRecipe = OptimizerRecipe()
    learning_rate: LearningRateRecipe = LearningRateRecipe()
    sparsity: SparsityRecipe = SparsityRecipe()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        """Raise ValueError, which pydantic reports, for settings that contradict each other."""
        if self.ema and not self.dense and self.sparsity.method == "sr-ste":
            raise ValueError(
                "ema and method 'sr-ste' exclude each other: an average over moving masks obeys none"
            )
        if self.sparsity.products == "csr" and not self.dense:
            others = {"ema": self.ema, "compile": self.compile, "precision 'bf16'": self.precision != "fp32"}
            for name, given in others.items():
                if given:
                    raise ValueError(f"products 'csr' and {name} exclude each other")
        if self.sparsity.products == "2:4" and not self.dense:
            if self.ema:
                raise ValueError("products '2:4' and ema exclude each other")
            if self.precision != "bf16":
                raise ValueError("products '2:4' need precision 'bf16': there are none in fp32")
        if self.cuda_graph and not self.dense:
            if self.sparsity.products != "dense":
                raise ValueError(f"cuda_graph and products {self.sparsity.products!r} exclude each other")
            if self.sparsity.method == "sr-ste":
                raise ValueError("cuda_graph and method 'sr-ste' exclude each other")
        return self


def names() -> tuple[str, ...]:
    """The recipes that come with sparse-export."""
    folder = resources.files("sparse_export.train") / "recipes"
    return tuple(sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".toml")))


def load_recipe(
    name: str | Path, *, preset: str = "default", changes: Mapping[str, Any] | None = None
) -> Recipe:
    """A shipped recipe by name, or a TOML file by path, with a preset and then `changes` laid over it.

    preset: a name in PRESETS.  changes: a nested mapping of recipe keys.

    Raises UnknownNameError when there is neither, RecipeError when it says what no recipe can say.
    """
    text = str(name)
    if text in names():
        content = (resources.files("sparse_export.train") / "recipes" / f"{text}.toml").read_bytes()
    elif Path(name).is_file():
        content = Path(name).read_bytes()
    else:
        raise UnknownNameError(
            "recipe", text, names(), do="Name one of these, or give the path of a .toml file."
        )
    try:
        table = tomllib.loads(content.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as cause:
        raise RecipeError(
            f"{name} is not TOML: {cause}.", expected="A recipe in TOML was expected.", do="Mend the file."
        ) from cause
    if preset not in PRESETS:
        raise UnknownNameError("preset", preset, PRESETS)
    return recipe_from_table(merged(merged(table, PRESETS[preset]), changes or {}), source=text)


def recipe_from_table(table: Mapping[str, Any], *, source: str) -> Recipe:
    """Check a nested mapping. source: what an error calls it. Raises RecipeError.

    sparsity.method = "dense" is dense = true, said where the other methods are named.
    """
    sparsity = table.get("sparsity")
    if isinstance(sparsity, Mapping) and sparsity.get("method") == "dense":
        table = {**table, "dense": True}
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
    fault = error.errors()[0]
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        table: Any = Recipe
        for part in fault["loc"][:-1]:
            table = table.model_fields[part].annotation
        known = sorted(table.model_fields)
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
        return f"In [{where}], {reason}." if where else f"It is refused: {reason}."
    given = fault["input"]
    if isinstance(given, float) and not math.isfinite(given):
        return f"{where} is {given!r}: a finite number was expected."
    shown = "a table" if isinstance(given, Mapping) else repr(given)
    return f"{where} is {shown}: {fault['msg'][0].lower()}{fault['msg'][1:].rstrip('.')}."
