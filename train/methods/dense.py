"""No method at all: the dense baseline, by the name that stands where the methods are named."""

from __future__ import annotations

from sparse_export.train.methods.method import NO_CHOICE, Accepts, Method

__all__ = ["DENSE"]

DENSE = Method(
    name="dense",
    accepts=Accepts(**NO_CHOICE, transposable=False, products=("dense",), own_loop=False),
)
