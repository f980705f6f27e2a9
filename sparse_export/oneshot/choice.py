"""Which layers were made sparse under a bound on what may be lost, at what cost, and why not the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparse_export.formats.score import Score
from sparse_export.instruments.paired_scores import ScoreDifference
from sparse_export.tables import Shown, Table
from sparse_export.tasks.scores import change_text, difference_text, value_text

__all__ = ["Choice", "CurvePoint", "LayerChoice", "Sensitivities"]


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """A layer that could take the pattern.

    Attributes:
        name: of the weight.
        saving: what the pattern saves there, in the unit that `Choice.saving` names.
        change: of the outputs, if this layer alone is sparse; see `Choice.change`.
        sparse: it got the pattern; of sensitivities alone None.
        reason: why it stayed dense; empty where it did not.
    """

    name: str
    saving: float
    change: float
    sparse: bool | None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A set of layers that was scored on all held-back samples.

    Attributes:
        share: of the multiply-adds of all layers that could take the pattern, those of this set.
        n_layers: in this set.
        score: as it is shown.
        lost: how much worse that is than the dense network's.
        in_order: the set is the first so many layers of the order.
    """

    share: float
    n_layers: int
    score: float
    lost: float
    in_order: bool


@dataclass(frozen=True, kw_only=True)
class Sensitivities:
    """What each layer changes by itself.

    Attributes:
        held_back: the samples that layers are chosen on, in words.
        n_held: how many.
        n_samples: of them that the changes were measured on.
        change: what is measured of the outputs, in words.
        saving: the unit of what a layer saves.
        layers: those that save most for what they change first.
        notes: what else is to be known.
    """

    held_back: str
    n_held: int
    n_samples: int
    change: str
    saving: str
    layers: tuple[LayerChoice, ...]
    notes: tuple[str, ...] = ()

    def shown(self) -> Shown:
        """The layers in their order."""
        whole = sum(one.saving for one in self.layers) or 1.0
        rows = [
            (str(at), one.name, f"{100 * one.saving / whole:.1f} %", f"{one.change:.3g}", one.reason)
            for at, one in enumerate(self.layers, 1)
        ]
        head = ("order", "layer", f"share of {self.saving}", "change if sparse alone", "note")
        told = f"Change: {self.change}, on {self.n_samples} of {self.n_held} {self.held_back}."
        return Shown([Table(head=head, rows=rows, right=(0, 2, 3)), *_paragraphs([told, *self.notes])])

    def __str__(self) -> str:
        return self.shown().draw()


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a network was divided into sparse and dense layers.

    Attributes:
        max_drop: what might be lost, as it was given.
        allowed: the same in the unit of the score.
        held_back: the samples that it was chosen on, in words.
        n_searched: samples of them that the search saw; the curve is of these.
        dense: score of the dense network on the others, by which the choice was confirmed.
        sparse: score of the sparse network on these.
        weights: whose they are: `last walk`, in which the chosen layers were calibrated on what is really
            before them, or `first walk`, in which all were sparse.
        saving: the unit of what a layer saves: `multiply-adds`, `weights` where these are not known, or
            `ms` of a timings file.
        share: of the multiply-adds of all layers that could take the pattern, those that have it; of the
            weights where multiply-adds are not known.
        share_of_all: the same of all layers; None where it is not known.
        n_samples: as of `Sensitivities`.
        change: likewise.
        layers: likewise.
        curve: every set that was scored on all samples, by its share.
        n_scores: scores that this took, each over all held-back samples.
        seconds: that the choice took, with all walks.
        test: difference to the dense network on test samples that were not held back, with its interval.
        test_is_share: of its score.
        notes: what else is to be known.
    """

    max_drop: str
    allowed: float
    held_back: str
    n_searched: int
    dense: Score
    sparse: Score
    weights: str
    saving: str
    share: float
    share_of_all: float | None
    n_samples: int
    change: str
    layers: tuple[LayerChoice, ...]
    curve: tuple[CurvePoint, ...]
    n_scores: float
    seconds: float
    test: ScoreDifference | None = None
    test_is_share: bool = True
    notes: tuple[str, ...] = ()

    def shown(self) -> Shown:
        """The curve, and what came of it."""
        name = self.dense.name
        rows = [
            (
                f"{100 * point.share:.1f} %",
                str(point.n_layers),
                _figure(point.score, self.dense),
                change_text(
                    -point.lost if self.dense.higher_is_better and point.lost else point.lost,
                    is_share=self.dense.is_share,
                ),
                "passes" if point.lost <= self.allowed + 1e-9 else "",
            )
            for point in self.curve
        ]
        head = (f"{self._of} sparse", "layers", name, "to the dense network", "")
        n_sparse = sum(bool(one.sparse) for one in self.layers)
        on = f"chosen on {self.n_searched} {self.held_back}; confirmed on {self.dense.n_samples} others"
        lines = [
            f"{n_sparse} of {len(self.layers)} layers that could be are sparse: {100 * self.share:.1f} % of "
            f"their {self._of}"
            + ("" if self.share_of_all is None else f", {100 * self.share_of_all:.1f} % of all"),
            f"{on}: {name} {value_text(self.dense)} dense, {value_text(self.sparse)} sparse; "
            + f"{self.max_drop} might be lost",
        ]
        if self.test is not None:
            text = difference_text(self.test, is_share=self.test_is_share)
            lines.append(f"on {self.test.n_samples} test samples that nothing was chosen by: {text}")
            lost = -self.test.amount if self.dense.higher_is_better else self.test.amount
            if lost > self.allowed:
                lines.append(
                    f"Beware: that is more than {self.max_drop}. The choice was confirmed on "
                    f"{self.dense.n_samples} samples alone: give more, or allow less."
                )
        return Shown([Table(head=head, rows=rows, right=(0, 1)), *_paragraphs([*lines, *self.notes])])

    @property
    def _of(self) -> str:
        return "weights" if self.saving == "weights" else "multiply-adds"


def _figure(figure: float, score: Score) -> str:
    return f"{figure:.2f} %" if score.is_share else f"{figure:.4g}"


def _paragraphs(lines: Sequence[str]) -> list[str]:
    return ["\n".join(lines)] if lines else []
