"""ASP, automatic sparsity: train dense, cut to the pattern by magnitude, train again with fixed masks.

Prune: at half of the training, in each group of M the smallest |weight|, down to N. Growth: none, for the cut
is the one update that changes anything: the prune rate is 0. The learning rate runs through its schedule
twice, once before the cut and once after it.

Source: Mishra et al. 2021, "Accelerating sparse deep neural networks", section 3.
"""

from __future__ import annotations

from dataclasses import replace

from sparse_export.train.methods.method import NO_CHOICE, RATE_KEYS, START_KEYS, Accepts
from sparse_export.train.methods.sparse_momentum import SPARSE_MOMENTUM

__all__ = ["ASP", "CUT"]

CUT = 0.5
"""Fraction of the training that is dense."""

ASP = replace(
    SPARSE_MOMENTUM,
    name="asp",
    prune_rate=0.0,
    approach=(CUT, CUT),
    freeze=CUT,
    restart=CUT,
    accepts=Accepts(
        **NO_CHOICE,
        freeze=False,
        no_freeze="sets freeze and approach itself",
        pattern="must",
        products=("dense", "2:4"),
        own_loop=False,
        unread=("decay", *RATE_KEYS, *START_KEYS, "update_every"),
    ),
)
