"""Static masks: drawn at random at the start, never moved. What the methods that move masks have to beat."""

from __future__ import annotations

from sparse_export.train.methods.method import NO_CHOICE, RATE_KEYS, Accepts, Method

__all__ = ["STATIC"]

STATIC = Method(
    name="static",
    start="random",
    freeze=0.0,
    accepts=Accepts(**NO_CHOICE, freeze=False, unread=("decay", *RATE_KEYS, "history", "update_every")),
)
