"""The methods of sparse training by name, each readable in its own module."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from sparse_export.errors import UnknownNameError, UsageError
from sparse_export.train.methods.asp import ASP
from sparse_export.train.methods.dense import DENSE
from sparse_export.train.methods.dsr import DSR
from sparse_export.train.methods.granet import GRANET
from sparse_export.train.methods.magnitude import MAGNITUDE
from sparse_export.train.methods.mean_gradient import MEAN_GRADIENT
from sparse_export.train.methods.method import Growth, Method
from sparse_export.train.methods.rigl import GRADIENT, RIGL
from sparse_export.train.methods.rigl_itop import RIGL_ITOP
from sparse_export.train.methods.snip import SNIP
from sparse_export.train.methods.sparse_evolution import RANDOM, SET
from sparse_export.train.methods.sparse_momentum import MOMENTUM, SPARSE_MOMENTUM
from sparse_export.train.methods.sr_ste import SR_STE
from sparse_export.train.methods.static import STATIC

__all__ = [
    "GROWTHS",
    "METHODS",
    "METHODS_WITHOUT_MOMENTUM",
    "OWN_LOOP_METHODS",
    "Method",
    "MethodName",
    "chosen_method",
    "method_named",
]

MethodName = Literal[
    "sparse-momentum",
    "set",
    "rigl",
    "rigl-itop",
    "granet",
    "dsr",
    "static",
    "snip",
    "magnitude",
    "dense",
    "sr-ste",
    "asp",
]

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        SPARSE_MOMENTUM,
        SET,
        RIGL,
        RIGL_ITOP,
        GRANET,
        DSR,
        STATIC,
        SNIP,
        MAGNITUDE,
        DENSE,
        SR_STE,
        ASP,
    )
}

OWN_LOOP_METHODS = tuple(name for name, method in METHODS.items() if method.accepts.own_loop)
"""Those that `SparseTraining` runs in any loop; the others need a recipe's loop, or a class of their own."""

METHODS_WITHOUT_MOMENTUM = tuple(name for name in OWN_LOOP_METHODS if not METHODS[name].reads_momentum)
"""Those of them that read no momentum of an optimizer."""

GROWTHS: dict[str, Growth] = {growth.name: growth for growth in (MOMENTUM, RANDOM, GRADIENT, MEAN_GRADIENT)}


def method_named(name: str) -> Method:
    """A method by name. Raises UnknownNameError."""
    if not isinstance(name, str):
        raise UsageError(f"method is {name!r}.", expected=f"One of {', '.join(METHODS)} was expected.")
    if name not in METHODS:
        raise UnknownNameError("method", name, METHODS)
    return METHODS[name]


def chosen_method(
    name: str,
    *,
    prune: str | None = None,
    redistribution: str | None = None,
    growth: str | None = None,
) -> Method:
    """A method with one or another of its answers replaced.

    Args:
        name: a key of METHODS.
        prune, redistribution, growth: words, see `Method`; None for the method's own.

    Raises:
        UnknownNameError: there is no such method.
        UsageError: a word is unknown, or the method does not take it.
    """
    method = method_named(name)
    for key, word, words in (
        ("prune", prune, method.accepts.prunes),
        ("redistribution", redistribution, method.accepts.redistributions),
        ("growth", growth, method.accepts.growths),
    ):
        if word is not None and word not in words:
            raise UsageError(
                f"{key} is {word!r}, and the method is {name!r}.",
                expected=f"One of {', '.join(words)} was expected."
                if words
                else f"No {key} was expected: this method has none.",
                do="" if words else f"Leave out {key}, or choose another method.",
            )
    changes = {
        "prune": prune,
        "redistribution": redistribution,
        "growth": None if growth is None else GROWTHS[growth],
    }
    given: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
    return replace(method, **given)
