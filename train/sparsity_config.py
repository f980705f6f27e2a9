"""The settings of sparse training: what a recipe's [sparsity], the trainer and the command line share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, get_args

from pydantic import ConfigDict, PlainSerializer, PlainValidator

from sparse_export.errors import UsageError
from sparse_export.sparsity import (
    Distribution,
    NMPattern,
    Prune,
    PruneSchedule,
    Redistribution,
    pattern_from_text,
)
from sparse_export.sparsity.channels import MOST_NARROWING
from sparse_export.sparsity.eligible import SMALL_SHARE
from sparse_export.train.arguments import (
    require_flag,
    require_fraction,
    require_number,
    require_one_of,
    require_texts,
    require_whole,
)
from sparse_export.train.methods import Method, MethodName, chosen_method, method_named
from sparse_export.train.methods.method import GrowthName, Products

__all__ = ["DEFAULT_APPROACH", "DEFAULT_DENSITY", "DEFAULT_FREEZE", "SparsityConfig"]

DEFAULT_DENSITY = 0.05
DEFAULT_APPROACH = (0.0, 0.0)
DEFAULT_FREEZE = 0.75

_TWO_FOUR = NMPattern(n=2, m=4)


def _pattern_of(value: object) -> NMPattern | None:
    """A pattern as a recipe has it, or one already. Raises ValueError, which pydantic reports."""
    if value is None or isinstance(value, NMPattern):
        return value
    try:
        return pattern_from_text(str(value))
    except UsageError as cause:
        raise ValueError(f"pattern is {value!r}: {cause.expected or cause.what}") from cause


def _text_of(pattern: NMPattern | None) -> str | None:
    return None if pattern is None else str(pattern)


@dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """What to make sparse, by which method, and when masks move.

    Args:
        method: a key of `sparse_export.train.methods.METHODS`.
        density: kept / total over the masked weights, above 0 and up to 1. None: as much as the pattern
            allows; without a pattern DEFAULT_DENSITY.
        start_density: density at the start, up to 1 and above `density`, from which it falls along the cubic
            schedule of gradual pruning: the smallest magnitudes of all layers together go. Not under a
            pattern. None: as the method has it, most have their density from the start.
        falls_until: fraction of the training, above 0 and up to 1, at which a falling density arrives. None:
            as the method has it, and no later than freeze.
        pattern: at most N of every M weights along a layer's reduction axis. Only layers that can take it are
            masked. Under it the prune rate is also lowered whenever an update changes no fewer mask bits than
            the one before.
        approach: fractions of the training, first <= last, over which the pattern's cap falls from M to N,
            see `sparse_export.sparsity.cap_size`. None: DEFAULT_APPROACH, N from the first step on.
        freeze: fraction of the training, 0 to 1, after which masks stand still; the prune rate has then run
            through its schedule, and gradual pruning has come down to the density. None: DEFAULT_FREEZE under
            a pattern, else as the method has it.
        small_share: under a pattern, the smallest layers that together hold at most this share of the weights
            stay dense, 0 to 1.
        transposable: masks are 2:4 along both axes, in layers that are matrices of tiles of 4 x 4, so that
            the gradient of their inputs can be multiplied sparsely too. Needs the pattern 2:4 and no density.
        decay: of masked weights, at least 0; of `sr-ste` alone.
        start: how the first masks are spread over the layers, see `sparse_export.sparsity.layer_counts`.
        rescale: multiply a layer's start weights by 1 / sqrt(its density), which keeps the variance of its
            outputs.
        prune_rate: fraction of a layer's active weights that the first update prunes, 0 to 1.
        final_prune_rate: where the prune schedule ends, 0 to 1 and at most prune_rate; not for `constant`.
            None: `linear` ends at 0, `cosine` as the method has it.
        prune_schedule: prune rate over time, see `sparse_export.sparsity.prune_rate`; `learning-rate` follows
            the optimizer's.
        prune: which weights die, see `sparse_export.sparsity.update_masks`. None: as the method has it.
        redistribution: how many each layer gets back, see there. None: as the method has it.
        growth: which weights are born: of largest momentum, gradient, or mean gradient since the last update,
            or drawn at random. None: as the method has it.
        history: share of its past in the magnitude that a weight is pruned by, from 0 to below 1, see
            `sparse_export.train.pruning_memory.PruningMemory`.
        narrowing: exponent from 0 to 0.5: at each update only the strongest width * (density then) **
            narrowing channels of each group keep weights, and weights are grown in them alone, see
            `sparse_export.sparsity.channels`. Not under a pattern. 0: all channels may have weights.
        update_every: steps between mask updates, at least 0; 0: as the method has it, and where it has none,
            whoever runs the loop calls for them. A recipe's loop does so after each epoch but the last.
        keep_dense: shell patterns of parameters (`fc3.weight`) or layers (`fc3`, `classifier.*`) that stay
            dense and are not counted.
        products: what weights are multiplied by in training. `csr` leaves inactive weights out of Linear
            layers on the CPU, where a short timing at the start shows that it wins, see `StepCsr`; `2:4` uses
            the card's 2:4 products in the forward pass, see `Step24`.
        window: of products `csr`, steps of dense gradients before each update, at least 1. None:
            ln(100) / (1 - momentum).

    Raises:
        UsageError: a setting is out of its range, or two of them contradict each other.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    method: MethodName = "sparse-momentum"
    density: float | None = None
    start_density: float | None = None
    falls_until: float | None = None
    pattern: Annotated[NMPattern | None, PlainValidator(_pattern_of), PlainSerializer(_text_of)] = None
    approach: tuple[float, float] | None = None
    freeze: float | None = None
    small_share: float = SMALL_SHARE
    transposable: bool = False
    decay: float = 2e-4
    start: Distribution = "erdos-renyi"
    rescale: bool = True
    prune_rate: float = 0.5
    final_prune_rate: float | None = None
    prune_schedule: PruneSchedule = "cosine"
    prune: Prune | None = None
    redistribution: Redistribution | None = None
    growth: GrowthName | None = None
    history: float = 0.0
    narrowing: float = 0.0
    update_every: int = 0
    keep_dense: tuple[str, ...] = ()
    products: Products = "dense"
    window: int | None = None

    def __post_init__(self) -> None:
        """Hold every setting to its range, and all of them to each other."""
        self._require_types()
        method_named(self.method)
        self._require_ranges()
        rule = self.rule  # its words, too, are checked by this
        self._require_pattern(rule)
        self._require_schedule(rule)
        self._require_fall(rule)
        self._require_narrowing(rule)
        self._require_products(rule)

    @property
    def rule(self) -> Method:
        """The method, with the answers that are replaced."""
        return chosen_method(
            self.method, prune=self.prune, redistribution=self.redistribution, growth=self.growth
        )

    @property
    def wanted_density(self) -> float | None:
        """The density at the end of the training; None for as much as the pattern allows."""
        return DEFAULT_DENSITY if self.density is None and self.pattern is None else self.density

    @property
    def wanted_start_density(self) -> float | None:
        """The density at the start where it falls; None where it is that of the end."""
        first = self.rule.start_density if self.start_density is None else self.start_density
        last = self.wanted_density
        return None if first is None or last is None or first <= last else first

    @property
    def wanted_falls_until(self) -> float:
        """The fraction of the training at which a falling density arrives."""
        own = min(self.rule.falls_until, self.wanted_freeze)
        return own if self.falls_until is None else self.falls_until

    @property
    def wanted_freeze(self) -> float:
        """The fraction of the training after which masks stand still."""
        if self.freeze is not None:
            return self.freeze
        rule = method_named(self.method)
        return DEFAULT_FREEZE if self.pattern is not None and rule.accepts.freeze else rule.freeze

    @property
    def wanted_approach(self) -> tuple[float, float]:
        """The fractions of the training over which the pattern's cap falls."""
        return self.approach or method_named(self.method).approach or DEFAULT_APPROACH

    @property
    def first_prune_rate(self) -> float:
        """The prune rate at the start."""
        own = method_named(self.method).prune_rate
        return self.prune_rate if own is None else own

    @property
    def label(self) -> str:
        """The method, the pattern and the density, as a name of a folder has them."""
        parts: list[str] = [] if self.method == SparsityConfig.method else [self.method]
        if self.pattern is not None:
            parts.append(f"{self.pattern.n}of{self.pattern.m}")
        if self.wanted_density is not None:
            parts.append(f"{self.wanted_density:g}")
        return "-".join(parts)

    def _require_types(self) -> None:
        """A recipe's are checked as it is read; from Python anything may come."""
        for name in ("decay", "small_share", "prune_rate"):
            require_number(name, getattr(self, name))
        for name in ("density", "start_density", "falls_until"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name))
        require_number("history", self.history)
        require_number("narrowing", self.narrowing)
        require_whole("update_every", self.update_every)
        if self.window is not None:
            require_whole("window", self.window)
        for name in ("transposable", "rescale"):
            require_flag(name, getattr(self, name))
        require_texts("keep_dense", self.keep_dense)
        if self.pattern is not None and not isinstance(self.pattern, NMPattern):
            raise UsageError(
                f"pattern is {self.pattern!r}.", expected="A text like '2:4', or an NMPattern, was expected."
            )
        if self.approach is not None:
            if not isinstance(self.approach, tuple) or len(self.approach) != 2:
                raise UsageError(
                    f"approach is {self.approach!r}.", expected="Two fractions of the training were expected."
                )
            for value in self.approach:
                require_number("approach", value)

    def _require_ranges(self) -> None:
        if self.density is not None and not 0 < self.density <= 1:
            raise UsageError(
                f"density is {self.density}.", expected="A number above 0 and up to 1 was expected."
            )
        if not 0 <= self.history < 1:
            raise UsageError(f"history is {self.history}.", expected="From 0 to below 1 was expected.")
        for name, value in (
            ("freeze", self.freeze),
            ("small_share", self.small_share),
            ("prune_rate", self.prune_rate),
            ("final_prune_rate", self.final_prune_rate),
        ):
            if value is not None:
                require_fraction(name, value)
        if not 0 <= self.decay < math.inf:
            raise UsageError(f"decay is {self.decay}.", expected="A number of at least 0 was expected.")
        if self.update_every < 0:
            raise UsageError(f"update_every is {self.update_every}.", expected="0 or more was expected.")
        if self.window is not None and self.window < 1:
            raise UsageError(f"window is {self.window}.", expected="1 or more was expected.")
        require_one_of("start", self.start, get_args(Distribution))
        require_one_of("prune_schedule", self.prune_schedule, get_args(PruneSchedule))
        require_one_of("products", self.products, get_args(Products))

    def _require_pattern(self, rule: Method) -> None:
        pattern, accepts = self.pattern, rule.accepts
        if pattern is None:
            if accepts.pattern == "must":
                raise UsageError(f"method {self.method!r} needs a pattern, like '2:4'.")
            if self.approach is not None:
                raise UsageError(
                    f"approach is {self.approach}, and there is no pattern.", do="Give one, like '2:4'."
                )
        else:
            if accepts.pattern == "no":
                raise UsageError(
                    f"method {self.method!r} takes no pattern.",
                    do="Leave it out, or choose another method; asp prunes a dense network to a pattern.",
                )
            if self.density is not None and accepts.pattern == "must":
                raise UsageError(f"method {self.method!r} takes no density: the pattern decides it.")
            if self.density is not None and self.density > pattern.density:
                raise UsageError(
                    f"density is {self.density}, and the pattern {pattern} allows a density of "
                    f"{pattern.density:g} at most."
                )
        if not self.transposable:
            return
        if pattern != _TWO_FOUR or self.density is not None:
            has = "no pattern" if pattern is None else f"the pattern {pattern}"
            has += "" if self.density is None else f" and the density {self.density}"
            raise UsageError(f"transposable is set with {has}; it needs the pattern '2:4' and no density.")
        if not accepts.transposable or rule.prune != "magnitude":
            raise UsageError(
                f"transposable and method {self.method!r} exclude each other: it does not prune the smallest "
                "weights of each layer at updates.",
                do="Choose sparse-momentum, set, rigl, static or asp, with prune 'magnitude'.",
            )

    def _require_schedule(self, rule: Method) -> None:
        if not rule.accepts.freeze and (self.freeze is not None or self.approach is not None):
            raise UsageError(
                f"method {self.method!r} {rule.accepts.no_freeze}: leave out freeze and approach."
            )
        if rule.start_density is not None and self.freeze == 0:
            raise UsageError(
                f"method {self.method!r} goes down in density over the length of the training: it needs a "
                "freeze above 0."
            )
        if self.final_prune_rate is not None and self.prune_schedule == "constant":
            raise UsageError(
                f"final_prune_rate is {self.final_prune_rate}, and the prune schedule is 'constant', which "
                "stays at prune_rate.",
                do="Leave it out, or choose prune_schedule 'cosine' or 'linear'.",
            )
        if self.approach is not None:
            first, last = self.approach
            if not 0 <= first <= last <= self.wanted_freeze:
                raise UsageError(
                    f"approach is {self.approach} and freeze is {self.wanted_freeze:g}.",
                    expected="Two fractions of the training were expected, the first no later than its last, "
                    "and both no later than freeze.",
                )

    def _require_fall(self, rule: Method) -> None:
        given = {"start_density": self.start_density, "falls_until": self.falls_until}
        for name, value in given.items():
            if value is None:
                continue
            if not rule.accepts.falls:
                raise UsageError(
                    f"{name} is {value}, and the density of method {self.method!r} does not fall by it.",
                    do=f"Leave out {name}, or choose another method.",
                )
            if self.pattern is not None:
                raise UsageError(f"{name} is {value}, and there is a pattern, which decides the density.")
            if not 0 < value <= 1:
                raise UsageError(f"{name} is {value}.", expected="A number above 0 and up to 1 was expected.")
        last = self.wanted_density
        if self.start_density is not None and last is not None and self.start_density < last:
            raise UsageError(
                f"start_density is {self.start_density}, below the density {last:g} at the end.",
                expected="A density that falls was expected.",
            )
        if self.falls_until is not None:
            if self.start_density is None and rule.start_density is None:
                raise UsageError(
                    "falls_until is set, and the density does not fall.", do="Give start_density."
                )
            if self.falls_until > self.wanted_freeze:
                raise UsageError(
                    f"falls_until is {self.falls_until} and freeze is {self.wanted_freeze:g}.",
                    expected="A density that arrives before masks stand still was expected.",
                )

    def _require_narrowing(self, rule: Method) -> None:
        if not 0 <= self.narrowing <= MOST_NARROWING:
            raise UsageError(
                f"narrowing is {self.narrowing}.", expected=f"From 0 to {MOST_NARROWING} was expected."
            )
        if not self.narrowing:
            return
        if not rule.accepts.narrows:
            raise UsageError(
                f"narrowing is {self.narrowing}, and method {self.method!r} does not move weights between "
                "channels.",
                do="Leave out narrowing, or choose another method.",
            )
        if self.pattern is not None:
            raise UsageError(
                f"narrowing is {self.narrowing}, and the pattern is {self.pattern}; they exclude each other.",
                do="Leave out narrowing: a pattern gains where hardware leaves its zeros out.",
            )
        if self.products == "csr":
            raise UsageError("products 'csr' and narrowing exclude each other.", do="Leave out one of them.")

    def _require_products(self, rule: Method) -> None:
        if self.window is not None and self.products != "csr":
            raise UsageError("window belongs to products 'csr'.")
        growth = rule.growth
        if self.products == "csr" and growth is not None and growth.reads_gradient_sums:
            raise UsageError(
                f"products 'csr' and growth {growth.name!r} exclude each other: it needs the gradient of "
                "inactive weights in every step."
            )
        if self.products == "csr" and self.start_density is not None:
            raise UsageError(
                "products 'csr' and start_density exclude each other: layers are chosen at the start."
            )
        if self.products == "csr" and (self.pattern is not None or "csr" not in rule.accepts.products):
            under = "" if self.pattern is None else f" with the pattern {self.pattern}"
            raise UsageError(
                "products 'csr' need masks without a pattern that do not start dense, not method "
                f"{self.method!r}{under}."
            )
        if self.products == "2:4" and (self.pattern != _TWO_FOUR or "2:4" not in rule.accepts.products):
            raise UsageError(
                "products '2:4' need the pattern '2:4', and masks that move at updates only, not pattern "
                f"{_text_of(self.pattern)!r} and method {self.method!r}."
            )
