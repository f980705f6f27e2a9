"""The four cards on top of a report, score, size, speed and requirements, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sparse_export.evaluate.comparison import Comparison, LatencyComparison
from sparse_export.evaluate.verdict import times_text
from sparse_export.graph.advice import advice_of
from sparse_export.pages.escaping import escape
from sparse_export.report.side import BundleSide
from sparse_export.tasks.agreement import agreement_text
from sparse_export.tasks.scores import (
    allowed_text,
    better_text,
    capitalized,
    change_text,
    difference_text,
    value_text,
)

__all__ = ["Card", "cards", "cards_of", "drawn_cards", "next_steps"]

Tone = Literal["good", "bad", "plain"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """One of the figures that a reader looks at first.

    Attributes:
        title: what it is of.
        word: the finding, which the colour only repeats.
        tone: the colour.
        figure: in large letters.
        lines: below it, with the interval.
    """

    title: str
    word: str
    tone: Tone
    figure: str
    lines: tuple[str, ...]


def cards_of(comparison: Comparison) -> tuple[Card, ...]:
    """Score, size, speed, and what was required."""
    return _score(comparison), _size(comparison), _speed(comparison), _required(comparison)


def cards(comparison: Comparison) -> str:
    """As HTML."""
    return drawn_cards(cards_of(comparison))


def drawn_cards(cards: Sequence[Card]) -> str:
    """Some cards side by side, as HTML."""
    return f'<div class="cards">{"".join(map(_drawn, cards))}</div>'


def _drawn(card: Card) -> str:
    lines = "".join(f"<p>{escape(line)}</p>" for line in card.lines)
    return (
        f'<section class="card {card.tone}"><h2>{escape(card.title)}</h2>'
        f'<p class="word">{escape(card.word)}</p><p class="figure">{escape(card.figure)}</p>{lines}</section>'
    )


def next_steps(comparison: Comparison, sparse: BundleSide) -> list[str]:
    """What would bring more, or would make the figures surer; sentences, the most useful first."""
    found = []
    if comparison.gate_failed:
        found.append(
            "More was lost than may be. `sparsify --max-drop` keeps layers dense until the score holds; "
            "`sparsify --finetune` trains the weights that are left."
        )
    found += advice_of(sparse.inspection.graph, has_engine=bool(sparse.inspection.engines))
    unsure = [at for at in comparison.latency if at.outcome == "not told apart"]
    if unsure:
        found.append(
            f"The times at {_batches(unsure)} were not told apart within {comparison.budget_s:g} s. A "
            "quieter machine or a larger --budget tells."
        )
    if comparison.score_source != "measured" and comparison.agreement is None:
        found.append("The score was not measured on these files. `compare --data` with targets measures it.")
    return found


def _score(comparison: Comparison) -> Card:
    dense, sparse = comparison.dense.score, comparison.sparse.score
    if comparison.agreement is not None and (dense is None or sparse is None):
        found = comparison.agreement
        return Card(
            title="Agreement with dense",
            word="no labels",
            tone="plain",
            figure=f"{found.percent:.2f} %",
            lines=(agreement_text(found),),
        )
    known = dense or sparse
    if known is None or dense is None or sparse is None:
        return Card(title="Score", word="not measured", tone="plain", figure="-", lines=())
    title = capitalized(known.name)
    against = f"against {value_text(dense)} dense; {better_text(known)}"
    if comparison.difference is None:
        change = change_text(sparse.figure - dense.figure, is_share=known.is_share)
        recorded = f"{change}, as recorded, without an interval"
        return Card(
            title=title,
            word="not measured here",
            tone="plain",
            figure=value_text(sparse),
            lines=(against, recorded),
        )
    change = difference_text(comparison.difference, is_share=known.is_share)
    word, tone = _moved(comparison.difference.low, comparison.difference.high, up=known.higher_is_better)
    return Card(
        title=title,
        word=word,
        tone=tone,
        figure=value_text(sparse),
        lines=(against, f"{change}, 95 % interval"),
    )


def _moved(low: float, high: float, *, up: bool) -> tuple[str, Tone]:
    """What an interval of sparse minus dense says. up: higher is better."""
    if low <= 0 <= high:
        return "not told apart from dense", "plain"
    is_better = (low > 0) == up
    return ("better than dense", "good") if is_better else ("worse than dense", "bad")


def _size(comparison: Comparison) -> Card:
    dense, sparse = comparison.dense, comparison.sparse
    share = sparse.size_bytes / dense.size_bytes if dense.size_bytes else 1.0
    word, tone = _word_of_size(share)
    lines = [f"{sparse.size_bytes:,} bytes against {dense.size_bytes:,}"]
    if dense.n_nonzero:
        lines.append(f"{sparse.n_nonzero / dense.n_nonzero:.2f} of the nonzero parameters")
    if sparse.precision != dense.precision:
        lines.append(f"{sparse.precision} against {dense.precision}")
    return Card(title="Size", word=word, tone=tone, figure=f"{share:.2f} of dense", lines=tuple(lines))


def _word_of_size(share: float) -> tuple[str, Tone]:
    if round(share, 2) == 1:
        return "same size", "plain"
    return ("smaller", "good") if share < 1 else ("larger", "bad")


def _speed(comparison: Comparison) -> Card:
    latency = comparison.latency
    if not latency:
        return Card(title="Speed", word="not measured", tone="plain", figure="-", lines=())
    outcomes = {at.outcome for at in latency}
    words: dict[str, tuple[str, Tone]] = {
        "speed-up": ("faster than dense", "good"),
        "slow-down": ("slower than dense", "bad"),
        "no difference": ("as fast as dense", "plain"),
        "not told apart": ("not told apart from dense", "plain"),
    }
    word, tone = words[next(iter(outcomes))] if len(outcomes) == 1 else ("depends on the batch", "plain")
    lines = [f"batch {at.batch}: {times_text(at.ratio)}" for at in latency]
    best = max(latency, key=lambda at: at.ratio.estimate)
    return Card(
        title="Speed",
        word=word,
        tone=tone,
        figure=f"{best.ratio.estimate:.2f}x at batch {best.batch}",
        lines=(*lines, f"{comparison.runtime}; dense / sparse time, 95 % intervals"),
    )


def _required(comparison: Comparison) -> Card:
    asked = []
    if comparison.max_drop is not None:
        asked.append(allowed_text(comparison.max_drop, comparison.dense.score))
    if comparison.required_speedup is not None:
        asked.append(f"at least {comparison.required_speedup:g}x as fast")
    failed = [clause for clause in (comparison.gate_failed, comparison.speedup_missed) if clause]
    if not asked:
        line = "--max-drop and --require-speedup set limits"
        return Card(title="Required", word="nothing was required", tone="plain", figure="-", lines=(line,))
    word = "failed" if failed else "passed"
    tone: Tone = "bad" if failed else "good"
    kept = f"{len(asked) - len(failed)} of {len(asked)} kept"
    return Card(title="Required", word=word, tone=tone, figure=kept, lines=(*asked, *failed))


def _batches(at: list[LatencyComparison]) -> str:
    return f"batch {' and '.join(str(one.batch) for one in at)}"
