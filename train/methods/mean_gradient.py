"""Growth by the mean gradient since the last update: what a weight missed counts the same however long ago.

The momentum of an inactive weight forgets: at 0.9 all but a hundredth of it comes from the last 44 steps. The
mean over all steps of an update interval has less noise, and weighs each of them alike.
"""

from __future__ import annotations

from torch import Tensor

from sparse_export.train.methods.method import Growth, Moment

__all__ = ["MEAN_GRADIENT"]


def _scores(at: Moment) -> dict[str, Tensor]:
    return dict(at.gradient_sums)


MEAN_GRADIENT = Growth(name="mean-gradient", scores=_scores, reads_gradient_sums=True)
