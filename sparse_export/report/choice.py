"""How a sparse network's layers were chosen: the score against how much of the work is sparse."""

from __future__ import annotations

from collections.abc import Mapping

from sparse_export.oneshot.choice import Choice
from sparse_export.pages.charts import Point, Series, line_chart
from sparse_export.pages.document import figure
from sparse_export.tasks.scores import allowed_text, difference_text, value_text

__all__ = ["choice_of_layers"]

_SAME = 1e-9  # of shares


def choice_of_layers(choice: Choice | None, patterns: Mapping[str, str]) -> list[str]:
    """The picture of a choice with a caption, and nothing where no choice was made.

    Args:
        choice: by `sparsify --max-drop`.
        patterns: of the layers that have one, by name.
    """
    if choice is None:
        return []
    name, of = choice.dense.name, "weights" if choice.saving == "weights" else "multiply-adds"
    unit = ", %" if choice.dense.is_share else ""
    pattern = next(iter(patterns.values()), "sparse")
    first = [Point(x=100 * one.share, y=one.score) for one in choice.curve if one.in_order]
    sets = [one for one in choice.curve if abs(one.share - choice.share) < _SAME]
    chosen = [Point(x=100 * one.share, y=one.score) for one in sets]
    series = [
        Series(name="layers in order, those first that save most for what they change", points=first),
        Series(name="chosen", points=chosen[:1]),
    ]
    dense = next(one.score for one in choice.curve if not one.n_layers)
    worst = dense + choice.allowed * (-1 if choice.dense.higher_is_better else 1)
    told = "; ".join(f"{100 * one.share:.1f} % {one.score:.4g}" for one in choice.curve)
    drawing = line_chart(
        series,
        title=f"{name} against the share of {of} that is {pattern}",
        x_label=f"share of {of} that is {pattern}, of those that could be, %",
        y_label=f"{name}{unit}",
        level=Series(name="may be lost down to here", points=[Point(x=0.0, y=worst)]),
        alt=f"{name} of sets of layers by their share of {of}: {told}.",
    )
    caption = (
        f"Sets of layers that were scored on {choice.n_searched:,} {choice.held_back}; "
        f"{allowed_text(choice.max_drop, choice.dense)}. Chosen: {100 * choice.share:.1f} %, {name} "
        f"{value_text(choice.sparse)} against {value_text(choice.dense)} dense on "
        f"{choice.dense.n_samples:,} others."
    )
    if choice.test is not None:
        text = difference_text(choice.test, is_share=choice.test_is_share)
        caption += f" On {choice.test.n_samples:,} test samples that nothing was chosen by: {text}."
    return ["<h2>How its layers were chosen</h2>", figure(drawing, caption)]
