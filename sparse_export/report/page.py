"""The report of a comparison: one HTML file that loads nothing."""

from __future__ import annotations

import re
from pathlib import Path

from sparse_export.evaluate.comparison import Comparison
from sparse_export.files import write_bytes
from sparse_export.formats.bundle import Bundle
from sparse_export.graph.eligibility import MEANINGS
from sparse_export.pages.document import document
from sparse_export.pages.escaping import escape
from sparse_export.report import pictures, tables
from sparse_export.report.cards import cards, next_steps
from sparse_export.report.choice import choice_of_layers
from sparse_export.report.side import BundleSide, side_of
from sparse_export.report.verdict import verdict
from sparse_export.version import command_line

_CODE = r"<code>\1</code>"

__all__ = ["figures", "layer_legend", "listed", "page", "write_report"]


def write_report(path: Path, comparison: Comparison, dense: Bundle, sparse: Bundle) -> Path:
    """Write the page of a comparison.

    Returns:
        Its path.

    Raises:
        OutputError: it cannot be written.
        ArtefactError: a bundle cannot be read.
    """
    content = page(comparison, side_of("dense", dense), side_of("sparse", sparse))
    write_bytes(path, content.encode("utf-8", "backslashreplace"))  # a path may hold an odd byte
    return path


def page(comparison: Comparison, dense: BundleSide, sparse: BundleSide) -> str:
    """The whole HTML. Computes only the intervals of single times, from the samples in the comparison."""
    failed = bool(comparison.gate_failed or comparison.speedup_missed)
    name = comparison.sparse.model or "network"
    parts = [
        f'<p class="verdict{" failed" if failed else ""}">{escape(verdict(comparison))}</p>',
        cards(comparison),
        *listed("What to do next", next_steps(comparison, sparse)),
        f"<p>Dense: {escape(comparison.dense.path)}<br>Sparse: {escape(comparison.sparse.path)}</p>",
        "<h2>Score and size</h2>",
        figures(pictures.score(comparison), pictures.sizes(comparison)),
        tables.figures(comparison),
        *tables.recall_per_class([("sparse", comparison)]),
        "<h2>Time of a call</h2>",
        figures(pictures.speed_ups(comparison), pictures.latency(comparison)),
        *(f"<p>{escape(at.verdict)}</p>" for at in comparison.latency),
        "<h2>Throughput against latency</h2>",
        pictures.throughput(comparison),
        tables.latencies(comparison),
        "<h2>Layers of the sparse network</h2>",
        pictures.densities(sparse.inspection.graph),
        tables.layers(sparse),
        layer_legend(sparse),
        *tables.layer_times(sparse),
        *choice_of_layers(sparse.choice, _patterns(sparse)),
        "<h2>Training</h2>",
        *_training((dense, sparse)),
        "<h2>Where it was measured</h2>",
        tables.environment(comparison),
        "<h2>Commands that made it</h2>",
        tables.commands((dense, sparse), command_line()),
    ]
    return document(f"{name}: dense against sparse", [part for part in parts if part])


def listed(title: str, sentences: list[str]) -> list[str]:
    """Sentences below a heading; nothing where there are none."""
    items = "".join(f"<li>{re.sub('`([^`]+)`', _CODE, escape(one))}</li>" for one in sentences)
    return [f"<h2>{escape(title)}</h2><ul>{items}</ul>"] if items else []


def figures(*drawn: str) -> str:
    """Pictures side by side where there is room."""
    return f'<div class="figures">{"".join(drawn)}</div>'


def _patterns(side: BundleSide) -> dict[str, str]:
    """The pattern of each layer of the run that has one."""
    layers = () if side.run is None else side.run.layers
    return {layer.name: layer.pattern for layer in layers if layer.pattern is not None}


def _training(sides: tuple[BundleSide, BundleSide]) -> list[str]:
    drawn = pictures.training(sides)
    missing = [f"<p>{escape(f'{side.name}: {side.missing}')}</p>" for side in sides if side.missing]
    return [*([figures(*drawn)] if drawn else []), *missing]


def layer_legend(side: BundleSide) -> str:
    """What the codes of reasons mean, and what the table does not tell."""
    codes = {reason.code for layer in side.inspection.graph for reason in layer.reasons}
    items = "".join(
        f"<li><b>{escape(code)}</b>: {escape(MEANINGS[code][1])}</li>" for code in MEANINGS if code in codes
    )
    engines = [one for one in side.inspection.engines if one.layers]
    text = "The bundle has no engine, so nothing picked sparse kernels. "
    if engines:
        columns = "columns say" if len(engines) > 1 else "column says"
        text = f"The last {columns} whether the engine runs the layer on a sparse kernel. "
    if not any(engine.times for engine in side.inspection.engines):
        text += (
            "The time of single layers was not measured: a runtime fuses them, and only whole calls are "
            "timed."
        )
    return f"<p>{text}</p>{f'<ul>{items}</ul>' if items else ''}"
