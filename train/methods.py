"""The methods by name: each a choice of how to prune, redistribute, grow and start, none a loop of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from sparse_export.errors import UnknownNameError, UsageError
from sparse_export.sparsity import Prune, Redistribution

Growth = Literal["momentum", "random", "gradient", "none"]
Start = Literal["random", "sensitivity", "dense"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """What one method decides.

    prune, redistribution: see `sparse_export.sparsity.update_masks`.
    growth: which statistic of an inactive weight speaks for it: its momentum, a random number, the gradient of the
    step before the update; `none`: masks only lose weights, or stand still.
    start: of the masks: `random`; `sensitivity`, the largest |weight * gradient| of one batch; `dense`, everything.
    forgets: a weight that is grown starts without the momentum that it gathered while it was inactive.
    freeze: fraction of the training after which masks stand still, unless another is asked for; 0: they never move.
    final_prune_rate: where a cosine prune schedule ends, unless another is asked for.
    """

    prune: Prune = "magnitude"
    redistribution: Redistribution = "momentum"
    growth: Growth = "momentum"
    start: Start = "random"
    forgets: bool = False
    freeze: float = 1.0
    final_prune_rate: float = 0.005

    @property
    def moves(self) -> bool:
        """Do masks change at all?"""
        return self.growth != "none" or self.is_gradual

    @property
    def is_gradual(self) -> bool:
        """Does it go from dense to sparse, by pruning alone?"""
        return self.start == "dense"

    @property
    def reads_momentum(self) -> bool:
        return self.growth == "momentum" or (self.growth != "none" and self.redistribution == "momentum")


METHODS: dict[str, Method] = {
    "sparse-momentum": Method(),
    "set": Method(redistribution="own", growth="random", forgets=True),
    "rigl": Method(redistribution="own", growth="gradient", forgets=True, freeze=0.75, final_prune_rate=0.0),
    "dsr": Method(prune="threshold", redistribution="survivors", growth="random", forgets=True),
    "static": Method(growth="none", freeze=0.0),
    "snip": Method(growth="none", freeze=0.0, start="sensitivity"),
    "magnitude": Method(prune="global-magnitude", growth="none", start="dense", freeze=0.75),
}
"""Sources: Dettmers & Zettlemoyer 2019; Mocanu et al. 2018 (`set`); Evci et al. 2020 (`rigl`); Mostafa & Wang 2019
(`dsr`); Lee et al. 2019 (`snip`); Zhu & Gupta 2017 (`magnitude`). docs/methods.md tells where ours differ."""


def chosen_method(
    name: str,
    *,
    prune: str | None = None,
    redistribution: str | None = None,
    growth: str | None = None,
) -> Method:
    """A method by name, with one or another of its choices replaced.

    Raises UnknownNameError for a name, UsageError for a choice that is none or that the method does not make.
    """
    if name not in METHODS:
        raise UnknownNameError("method", name, METHODS)
    method = METHODS[name]
    growths = tuple(word for word in get_args(Growth) if word != "none")
    prunes: tuple[str, ...] = get_args(Prune)
    if not method.moves:
        growths = redistributions = prunes = ()
    elif method.is_gradual:
        growths = redistributions = ()
        prunes = ("magnitude", "global-magnitude")
    else:
        redistributions = get_args(Redistribution)
    for key, word, words in (
        ("prune", prune, prunes),
        ("redistribution", redistribution, redistributions),
        ("growth", growth, growths),
    ):
        if word is not None and word not in words:
            raise UsageError(
                f"{key} is {word!r}, and the method is {name!r}.",
                expected=f"One of {', '.join(words)} was expected."
                if words
                else f"No {key} was expected: this method has none.",
                do="" if words else f"Leave out {key}, or choose another method.",
            )
    changes = {"prune": prune, "redistribution": redistribution, "growth": growth}
    return replace(method, **{key: word for key, word in changes.items() if word is not None})  # type: ignore[arg-type]
