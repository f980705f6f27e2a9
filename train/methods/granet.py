"""GraNet: the density falls from one half to the target, and each update also grows what it prunes anew.

An update has two parts. Gradual pruning: the smallest |weight| of all layers together go, so many that the
density falls as final + (0.5 - final) * (1 - progress)^3 and arrives at 110 of 160 epochs. Zero-cost
neuroregeneration: of what is left, each layer loses its smallest |weight| by the prune rate, from 0.5 along a
cosine to 0.005, and gets as many where the gradient of the step before is largest; this goes on to the end.
Schedule: an update in every 1,000 of the 62,560 steps that its authors train on CIFAR-10, here the same share
of any training. The masks start as the recipe says, by default Erdős-Rényi as theirs.

Source: Liu et al. 2021, "Sparse training via boosting pruning plasticity with neuroregeneration",
algorithm 1, and the settings of its authors' code. On purpose different: the number of active weights is
exact.
"""

from __future__ import annotations

from dataclasses import replace

from sparse_export.train.methods.method import Accepts
from sparse_export.train.methods.rigl import RIGL

__all__ = ["GRANET"]

GRANET = replace(
    RIGL,
    name="granet",
    start_density=0.5,
    falls_until=110 / 160,
    freeze=1.0,
    final_prune_rate=0.005,
    update_share=1000 / 62_560,  # 160 epochs of 391 batches of 128
    accepts=Accepts(pattern="no", transposable=False, products=("dense",)),
)
