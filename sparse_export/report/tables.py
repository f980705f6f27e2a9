"""The tables of a comparison: figures, layers, where it was measured, and how it was made."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from sparse_export.evaluate.comparison import Comparison
from sparse_export.formats.layers import EngineLayer, GraphLayer
from sparse_export.pages.document import table
from sparse_export.pages.escaping import escape
from sparse_export.report.side import BundleSide
from sparse_export.tables import count_text, ms_text, shape_text
from sparse_export.tasks.scores import better_text, change_text, difference_text, value_text

__all__ = [
    "commands",
    "environment",
    "figures",
    "latencies",
    "layer_times",
    "layers",
    "recall_per_class",
]

MOST_CLASSES = 40


def figures(comparison: Comparison) -> str:
    """Score, size and work of both, with sparse by dense."""
    dense, sparse = comparison.dense, comparison.sparse
    scores = [value_text(side.score) for side in (dense, sparse)]
    known = dense.score or sparse.score
    change = ""
    if dense.score is not None and sparse.score is not None:
        change = change_text(sparse.score.figure - dense.score.figure, is_share=sparse.score.is_share)
    elif comparison.drop is not None:
        change = change_text(0.0 - comparison.drop)
    title = f"{known.name} ({better_text(known)})" if known else "score"
    rows = [
        [f"{title}, {comparison.score_source or 'not measured'}", *scores, change],
        ["density of masked layers", f"{dense.density:.4f}", f"{sparse.density:.4f}", ""],
        ["precision", dense.precision, sparse.precision, ""],
    ]
    for label, a, b in (
        ("model.onnx, bytes", dense.size_bytes, sparse.size_bytes),
        ("parameters", dense.n_parameters, sparse.n_parameters),
        ("of them not zero", dense.n_nonzero, sparse.n_nonzero),
        ("multiply-adds a sample", dense.macs, sparse.macs),
        ("by a weight not zero", dense.nonzero_macs, sparse.nonzero_macs),
    ):
        share = f"{b / a:.4f}" if a and b is not None else ""
        rows.append([label, count_text(a), count_text(b), share])
    return table(["", "dense", "sparse", "sparse / dense"], rows, wrap=True)


def latencies(comparison: Comparison) -> str:
    """Percentiles of all calls, at each batch, of both."""
    rows = []
    for at in comparison.latency:
        for name, result in (("dense", at.dense), ("dense again", at.dense_again), ("sparse", at.sparse)):
            ms = (result.median_ms, result.mean_ms, result.p90_ms, result.p99_ms)
            texts = map(ms_text, ms)
            rate = f"{1e3 * at.batch / result.mean_ms:,.0f}"
            rows.append([f"batch {at.batch}, {name}", *texts, rate, f"{result.n_calls:,}"])
    head = ["", "median ms", "mean ms", "90 % ms", "99 % ms", "samples/s", "calls"]
    return table(head, rows)


def recall_per_class(pairs: Sequence[tuple[str, Comparison]]) -> list[str]:
    """Recall of each class, of dense and of each sparse network; the largest losses first.

    Args:
        pairs: name and comparison of each sparse network, all with the same dense one and samples.
    """
    by_class = {name: {one.number: one for one in comparison.classes} for name, comparison in pairs}
    numbers = {number for classes in by_class.values() for number in classes}
    if not numbers:
        return []
    worst = {
        number: min(classes[number].difference.amount for classes in by_class.values() if number in classes)
        for number in numbers
    }
    order = sorted(numbers, key=lambda number: (worst[number], number))
    first = next(iter(by_class.values()))
    rows = []
    for number in order[:MOST_CLASSES]:
        one = first[number]
        row = [one.name, f"{one.n_samples:,}", f"{one.dense_percent:.2f} %"]
        for classes in by_class.values():
            sparse = classes[number]
            row += [f"{sparse.sparse_percent:.2f} %", difference_text(sparse.difference, is_share=True)]
        rows.append(row)
    head = ["class", "samples", "dense"]
    head += [word for name, _ in pairs for word in (name, f"{name} minus dense")]
    left = f" The other {len(order) - MOST_CLASSES} classes are in the JSON." * (len(order) > MOST_CLASSES)
    text = (
        "Recall: the share of a class's samples that a network gets right. The largest losses come first. "
        "Each 95 % interval is of its class alone: of 100 classes that lost nothing, about 5 have one "
        f"without 0.{left}"
    )
    return ["<h2>Score by class</h2>", f"<p>{escape(text)}</p>", table(head, rows, text_columns=(0,))]


def layers(side: BundleSide) -> str:
    """Every layer of a graph: density, pattern, whether its zeros can be used, its state in each engine."""
    promised = {layer.name: layer.pattern for layer in side.info.layers if layer.pattern}
    engines = [one for one in side.inspection.engines if one.layers]
    picked = {one.fact.file: {row.node: row for row in one.layers} for one in engines}
    head = ["layer", "op", "shape", "density", "promised", "2:4", "eligible", "why not"]
    head += [one.fact.target for one in engines]
    rows = [
        [*_layer(layer, promised.get(layer.weight, "-")), *(_state(rows, layer) for rows in picked.values())]
        for layer in side.inspection.graph
    ]
    return table(head, rows, text_columns=(0, 1, 2, 7))


def _layer(layer: GraphLayer, promised: str) -> list[str]:
    density = f"{layer.n_nonzero / layer.n_weights:.4f}" if layer.n_weights else "-"
    holds = "-" if layer.pattern_holds is None else "yes" if layer.pattern_holds else "no"
    why = ", ".join(dict.fromkeys(reason.code for reason in layer.reasons)) or "-"
    shape = shape_text(layer.shape) or "-"
    return [layer.weight or layer.node, layer.op_type, shape, density, promised, holds, layer.eligible, why]


def _state(rows: dict[str, EngineLayer], layer: GraphLayer) -> str:
    return rows[layer.node].state if layer.node in rows else "-"


def layer_times(side: BundleSide) -> list[str]:
    """What the engines' layers take, with and without sparse kernels; nothing where that was not measured."""
    parts = []
    for engine in side.inspection.engines:
        for times in engine.times:
            parts.append(
                f"<p>{escape(engine.fact.file)}, {escape(times.sizes_text)}. {escape(times.note)}</p>"
            )
            rows = [
                [
                    ", ".join(row.nodes) or "a layer of the engine's own",
                    "" if row.dense_ms is None else f"{row.dense_ms:.4g}",
                    "" if row.sparse_ms is None else f"{row.sparse_ms:.4g}",
                    "" if row.ratio is None else f"{row.ratio:.3f} [{row.low:.3f}, {row.high:.3f}]",
                    row.verdict,
                ]
                for row in times.rows
            ]
            head = ["layer", "dense ms", "sparse ms", "dense / sparse", "verdict"]
            parts += [table(head, rows, text_columns=(0, 4))] if rows else []
    return parts


def _rounds(comparison: Comparison) -> str:
    """How many there were, by batch size where they differ."""
    counts = {at.batch: at.ratio.n_rounds for at in comparison.latency}
    if len(set(counts.values())) == 1:
        return str(next(iter(counts.values())))
    return ", ".join(f"{n} (batch {batch})" for batch, n in counts.items()) or "no"


def environment(comparison: Comparison) -> str:
    """Machine, libraries and settings."""
    cores = ", ".join(map(str, comparison.cores)) or "every usable one"
    rows = [
        ["measured", comparison.created],
        *([f"passed over: {name}", why] for name, why in comparison.passed_over.items()),
        ["runtime", f"{comparison.runtime}, threads: {comparison.n_threads}, on cores: {cores}"],
        [
            "timing",
            (
                f"{_rounds(comparison)} interleaved rounds of blocks of {1e3 * comparison.block_s:g} ms, "
                f"seed {comparison.seed}; all intervals are 95 %"
            ),
        ],
        *([["clock held down", ", ".join(comparison.cards.throttled)]] if comparison.cards.throttled else []),
        *(
            [name.replace("_", " "), _value_text(value)]
            for name, value in comparison.machine.items()
            if value and name not in comparison.versions
        ),
        *([name, version] for name, version in comparison.versions.items()),
    ]
    return table(["", ""], rows, text_columns=(0, 1), wrap=True)


def _value_text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "; ".join(map(_value_text, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value_text(one)}" for key, one in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def commands(sides: Sequence[BundleSide], own: Sequence[str]) -> str:
    """The commands that trained, built and compared, as they were given."""
    made: dict[str, list[str]] = {}
    for side in sides:
        if side.run is not None:
            made.setdefault(shlex.join(side.run.command), []).append(
                f"{side.name} trained {side.run.created}"
            )
        made.setdefault(shlex.join(side.info.command), []).append(f"{side.name} built {side.info.created}")
    made.setdefault(shlex.join(own), []).append("compared, and this page written")
    lines = [f"# {'; '.join(what)}\n{command}" for command, what in made.items()]
    return f"<pre>{escape(chr(10).join(lines))}</pre>"
