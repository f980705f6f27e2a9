"""RigL-ITOP: RigL that explores long enough, so that most weights are tried at some time.

Prune, redistribution, growth: those of RigL, from a prune rate of 0.5. Schedule: a new weight gets long to
prove itself, 4,000 steps of the 97,750 that its authors train on CIFAR-10, here the same share of any
training; masks move to the end, the prune rate falls along a cosine to 0.005. The share of weights that were
ever active is recorded as `explored`, for this method as for all others.

Source: Liu et al. 2021, "Do we actually need dense over-parameterization? In-time over-parameterization in
sparse training", section 4, and the settings of its authors' code.
"""

from __future__ import annotations

from dataclasses import replace

from sparse_export.train.methods.rigl import RIGL

__all__ = ["RIGL_ITOP"]

RIGL_ITOP = replace(
    RIGL,
    name="rigl-itop",
    freeze=1.0,
    final_prune_rate=0.005,
    update_share=4000 / 97_750,  # 250 epochs of 391 batches of 128
)
