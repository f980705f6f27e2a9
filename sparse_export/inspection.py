"""What `inspect` found: the value that is written and shown, and what ends the command with an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, get_args

from sparse_export.engines.options import profile_text
from sparse_export.errors import ArtefactError, GateFailed
from sparse_export.formats.engines import EngineInfo
from sparse_export.formats.layers import EngineLayer, EngineState, EngineTimes, LayerTiming
from sparse_export.formats.run import SpeedInfo
from sparse_export.formats.score import Score
from sparse_export.graph.advice import advice_of
from sparse_export.graph.eligibility import MEANINGS
from sparse_export.graph.if_pruned import IfPruned, LayerIfPruned
from sparse_export.tables import Shown, Table, shape_text
from sparse_export.tasks.scores import score_text

if TYPE_CHECKING:  # it loads onnx, which showing the result does not need
    from sparse_export.graph.quantized_ends import QuantizedEnds

__all__ = [
    "ForeignEngine",
    "InspectedEngine",
    "InspectedLayer",
    "Inspection",
    "require_promises",
    "require_unchanged",
    "told_speed",
]

_NAMES_SHOWN = 5
_LAYERS_SHOWN = 500  # in the table; drawing one of thousands takes longer than reading the file


@dataclass(frozen=True, kw_only=True)
class InspectedLayer:
    """One weight.

    Attributes:
        n_nonzero: entries that are not zero; of a run or a bundle, those that the mask keeps.
        pattern: the N:M that a run or a bundle promises for it, or None.
    """

    name: str
    shape: tuple[int, ...]
    n_weights: int
    n_nonzero: int
    pattern: str | None = None

    @property
    def density(self) -> float:
        return self.n_nonzero / self.n_weights if self.n_weights else 0.0


@dataclass(frozen=True, kw_only=True)
class InspectedEngine:
    """An engine as its bundle tells of it, and what became of each layer.

    Attributes:
        times: of layers against an engine without sparse kernels, where they were measured.
    """

    fact: EngineInfo
    layers: tuple[EngineLayer, ...]
    times: tuple[EngineTimes, ...] = ()

    def shown(self) -> Shown:
        """What the engine is, what became of each layer, and their times."""
        fact = self.fact
        gpus = ", ".join(fact.architectures) or fact.architecture or "the library's own choice of GPUs"
        profiles = " and ".join(profile_text(one) for one in fact.profiles if one) or "of fixed sizes"
        title = f"{fact.file}  {fact.target} {fact.version}, {fact.precision}, for {gpus}, {profiles}"
        if not self.layers:
            return Shown([title])
        told, layers = _engine_parts(self.layers)
        return Shown([f"{title}\n{told}", layers, *chain(*map(_times_parts, self.times))])


@dataclass(frozen=True, kw_only=True)
class ForeignEngine:
    """An engine that was built elsewhere, by the log of its build or the inspector's JSON.

    Attributes:
        sources: the files that were read.
        layers: what became of each layer of the graph.
        notes: on the build as a whole.
    """

    sources: tuple[str, ...]
    layers: tuple[EngineLayer, ...]
    notes: tuple[str, ...]

    def shown(self) -> Shown:
        """What the files report of the engine, and what became of each layer."""
        title = "\n".join((f"engine built elsewhere, by {' and '.join(self.sources)}", *self.notes))
        if not self.layers:
            return Shown([title])
        told, layers = _engine_parts(self.layers)
        return Shown([f"{title}\n{told}", layers])


def _engine_parts(layers: Sequence[EngineLayer]) -> tuple[str, Table]:
    """How many layers run on sparse kernels, in words, and a row for each."""
    counts = Counter(row.state for row in layers)
    told = ", ".join(f"{counts[state]} {state}" for state in get_args(EngineState) if counts[state])
    rows = [(row.weight or row.node, row.state, row.text) for row in layers]
    return f"Sparse kernels: {told}.", Table(head=("layer", "sparse kernel", "why"), rows=rows)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was found.

    Attributes:
        kind: `run`, `unfinished run`, `bundle`, `onnx` or `engine`.
        n_parameters: over the whole network.
        n_weights, n_nonzero, density: over `layers`.
        n_files: how many files are listed with a hash.
        problem: the first that is not what was written, or that has to be listed and is not, None when there
            is none.
        unlisted: files in the folder of a bundle that its manifest does not list; nothing uses them.
        facts: the rest, in words.
        graph: the layers of a bundle's or a file's graph as they are now, whatever was recorded of them.
        broken: a clause for each promised pattern that the graph does not keep.
        unchecked: why the promises could not be looked at, None when they were or there are none.
        speed: of a run's training, where it was timed.
        if_pruned: what making the layers of the graph 2:4 would come to, where there is a graph.
        quantized: what each product of a quantized graph reads and writes; of a bundle of the graph that
            engines are built of. None where nothing is quantized.
        foreign: an engine of this graph that was built elsewhere, where its log or JSON was given.
    """

    path: str
    kind: str
    layers: tuple[InspectedLayer, ...]
    n_parameters: int
    n_weights: int
    n_nonzero: int
    density: float
    score: Score | None
    n_files: int
    problem: str | None
    facts: dict[str, str]
    graph: tuple[LayerIfPruned, ...] = ()
    engines: tuple[InspectedEngine, ...] = ()
    broken: tuple[str, ...] = ()
    unchecked: str | None = None
    speed: SpeedInfo | None = None
    unlisted: tuple[str, ...] = ()
    if_pruned: IfPruned | None = None
    foreign: ForeignEngine | None = None
    quantized: tuple[QuantizedEnds, ...] = ()

    def shown(self) -> Shown:
        """Facts, layers with a legend of the reasons, and engines."""
        rows = [("path", self.path), ("kind", self.kind), *self.facts.items()]
        if self.score is not None:
            rows.append(self._score_row(self.score))
        rows += told_speed(self.speed, is_dense=self.facts.get("method") == "dense").items()
        if self.kind != "engine":
            rows.append(("parameters", f"{self.n_parameters:,}"))
        if self.problem is not None:
            rows.append(("files", f"NOT verified: {self.problem}"))
        elif self.n_files:
            rows.append(("files", f"{self.n_files} verified by SHA-256"))
        if self.unlisted:
            rows.append(("not listed", _unlisted_text(self.unlisted)))
        layers = _graph_parts(self) if self.graph else [_layer_table(self)] if self.layers else []
        layers += _quantized_parts(self)
        engines = [part for engine in self.engines for part in engine.shown().parts]
        foreign = self.foreign.shown().parts if self.foreign is not None else ()
        advice = advice_of(self.graph, has_engine=bool(self.engines)) if self.foreign is None else []
        steps = [f"Next: {step}" for step in advice]
        return Shown([Table(rows=rows), *layers, *engines, *foreign, *steps])

    def _score_row(self, score: Score) -> tuple[str, str]:
        """The score on record; of a bundle that is its run's, which precision does not change."""
        precision = self.facts.get("precision", "fp32")
        if self.kind != "bundle" or precision == "fp32":
            return f"test {score.name}", score_text(score)
        note = f"before {precision}; `sparse-export validate` measures this file"
        return f"its run's test {score.name}", f"{score_text(score)}, {note}"

    def __str__(self) -> str:
        return self.shown().draw()


def _quantized_parts(found: Inspection) -> list[str | Table]:
    """Which products read and write quantized values, and what breaks it for the others."""
    if not found.quantized:
        return []
    names = {layer.node: layer.weight for layer in found.graph if layer.constant and layer.weight}
    word = {True: "yes", False: "no"}
    rows = [
        (names.get(one.node, one.node), word[one.reads], word[one.writes], one.broken_by or "-")
        for one in found.quantized[:_LAYERS_SHOWN]
    ]
    n_all = len(found.quantized)
    left = (
        [f"{n_all - len(rows):,} more products are not shown; --json has all."] if n_all > len(rows) else []
    )
    n_holding = sum(one.reads and one.writes for one in found.quantized)
    told = (
        f"{n_holding} of {n_all} products read and write quantized values, as TensorRT's sparse kernels for "
        f"{found.facts.get('precision', '8 bits')} need. Whether it then picks one is not measured."
    )
    table = Table(head=("layer", "reads quantized", "writes quantized", "broken by"), rows=rows)
    return [told, table, *left]


def _layer_table(found: Inspection) -> Table:
    """What is recorded of the layers, with the promised patterns where there are any."""
    rows = [
        (layer.name, shape_text(layer.shape), *_counts(layer), layer.pattern or "-") for layer in found.layers
    ]
    rows.append(("total", "", *_counts(found), ""))
    head = ("layer", "shape", "weights", "non-zero", "density", "promised")
    n_columns = len(head) if any(layer.pattern for layer in found.layers) else len(head) - 1
    return Table(head=head[:n_columns], rows=[row[:n_columns] for row in rows], right=(2, 3, 4))


def _counts(of: InspectedLayer | Inspection) -> tuple[str, str, str]:
    return f"{of.n_weights:,}", f"{of.n_nonzero:,}", f"{of.density:.4f}"


def _graph_parts(found: Inspection) -> list[str | Table]:
    """The layers of the graph, how many zeros can be used, and what the reasons mean."""
    promised = {layer.name: layer.pattern for layer in found.layers if layer.pattern}
    shown = found.graph[:_LAYERS_SHOWN]
    rows = [_graph_row(layer, promised.get(layer.weight, "-")) for layer in shown]
    head = ("layer", "op", "shape", "density", "2:4", "eligible", "why not", "promised", "2:4 would keep")
    would_keep = [8] if _could_be_pruned(found) else []
    order = [0, 1, 2, 3, *([7] if promised else []), 4, *would_keep, 5, 6]
    right = [3, *(order.index(at) for at in would_keep)]
    table = Table(
        head=[head[at] for at in order], rows=[[row[at] for at in order] for row in rows], right=right
    )
    codes = {reason.code for layer in shown for reason in layer.reasons}
    legend = [(code, MEANINGS[code][1]) for code in MEANINGS if code in codes]
    n_left = len(found.graph) - len(shown)
    left = [f"{n_left:,} more layers are not shown; --json has all {len(found.graph):,}."] if n_left else []
    return [table, *left, _graph_summary(found), *([Table(rows=legend)] if legend else [])]


def _graph_row(layer: LayerIfPruned, promised: str) -> tuple[str, ...]:
    return (
        layer.weight if layer.constant and layer.weight else layer.node,
        layer.op_type,
        shape_text(layer.shape) or "-",
        f"{layer.n_nonzero / layer.n_weights:.4f}" if layer.n_weights else "-",
        _two_four(layer),
        layer.eligible,
        ", ".join(dict.fromkeys(reason.code for reason in layer.reasons)) or "-",
        promised,
        "-" if layer.would_keep is None else _percent(layer.would_keep),
    )


def _graph_summary(found: Inspection) -> str:
    eligible = [layer.eligible for layer in found.graph]
    holds = sum(layer.pattern_holds is True for layer in found.graph)
    text = (
        f"{holds} of {len(eligible)} layers hold 2:4; hardware can use {eligible.count('yes')}, "
        f"perhaps {eligible.count('unproven')} more. Density {found.density:.4f}, "
        f"{found.n_nonzero:,} of {found.n_weights:,} weights."
    )
    pruned = [_pruned_text(found.if_pruned, len(eligible))] if _could_be_pruned(found) else []
    return "\n".join((text, *pruned, *(f"BROKEN PROMISE: {clause}." for clause in found.broken)))


def _could_be_pruned(found: Inspection) -> bool:
    """Is it a file in which four divides a layer that is not 2:4? A bundle is what its maker chose."""
    return found.kind == "onnx" and any(
        layer.would_keep is not None and not layer.pattern_holds for layer in found.graph
    )


def _pruned_text(totals: IfPruned | None, n_layers: int) -> str:
    """What making the layers 2:4 would come to, in one line."""
    if totals is None or totals.would_keep is None:
        return f"0 of {n_layers} layers could be 2:4 in a way that hardware can use."
    if totals.macs_share is not None:
        share = f"{_percent(totals.macs_share)} of the multiply-adds"
    else:
        share = f"{_percent(totals.weights_share or 0.0)} of the weights (multiply-adds are not known)"
    could = f"{totals.n_layers} of {n_layers} layers could be 2:4"
    parts = [f"{could}: they hold {share} and would keep {_percent(totals.would_keep)} of |w|"]
    if totals.missing:
        parts.append(f"missing: {', '.join(totals.missing)}")
    if totals.n_unproven:
        parts.append(f"of {totals.n_unproven} it is unproven whether hardware could use it")
    if totals.n_small:
        have = "has" if totals.n_small == 1 else "have"
        parts.append(
            f"{totals.n_small} {have} fewer than 256 inputs or outputs, where sparse kernels seldom win"
        )
    return f"{'; '.join(parts)}."


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _unlisted_text(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"{shown}{more}: in the folder, not in the manifest, and not used"


def _times_parts(times: EngineTimes) -> list[str | Table]:
    """A row for each piece of work, in the engine's order, and one for all of them."""
    title = f"B{times.sizes_text[1:]}, layer by layer, against the same graph built without sparse kernels"
    if not times.rows:
        return [f"{title}: {times.note}"]
    head = ("layer", "dense ms", "sparse ms", "dense/sparse [95 %]", "outcome", "kernel", "verdict")
    rows = [_times_row(row) for row in (*times.rows, *([times.whole] if times.whole else []))]
    table = Table(title=f"{title}, {times.rounds} interleaved rounds", head=head, rows=rows, right=(1, 2))
    unsteady = "Times had not settled when warm-up ended; repeat on a quiet machine."
    return [table] if times.steady else [table, unsteady]


def _times_row(row: LayerTiming) -> list[str]:
    own = (*row.sparse_layers, *row.dense_layers)
    name = ", ".join(row.weights) or ", ".join(row.nodes) or (own[0] if len(own) <= 2 else "all layers")
    ms = ["-" if one is None else f"{one:.4f}" for one in (row.dense_ms, row.sparse_ms)]
    known = row.ratio is not None and row.low is not None and row.high is not None
    ratio = f"{row.ratio:.3f} [{row.low:.3f}, {row.high:.3f}]" if known else "-"
    return [name, *ms, ratio, row.outcome, ", ".join(row.sparse_kernels) or "-", row.verdict]


def _two_four(layer: LayerIfPruned) -> str:
    if layer.pattern_holds is None:
        return "-"
    if layer.n_groups is None:
        return "not divisible"
    return "yes" if layer.pattern_holds else f"{layer.n_groups_over:,} of {layer.n_groups:,} over"


def told_speed(speed: SpeedInfo | None, *, is_dense: bool = False) -> dict[str, str]:
    """What was measured of a training's speed, and apart from it what is only estimated, in words.

    Args:
        speed: of the training; None where nothing was measured.
        is_dense: it trained no masks: zeros that it met are none of its making, and nothing is estimated.
    """
    if speed is None:
        return {}
    told = {
        "time of a step": f"{speed.step_ms:.4g} ms, measured{'' if is_dense else ', mask updates included'}"
    }
    if is_dense:
        return told
    of, channels, macs = "convolutions", speed.estimate_channels, speed.estimate_macs
    if channels is None or macs is None:
        of = "all layers, there being no convolution"
        channels, macs = speed.all_layers_estimate_channels, speed.all_layers_estimate_macs
    if channels is not None and macs is not None:
        told["estimates"] = (
            f"{channels:.3g}x without empty channels, {macs:.3g}x without multiplications by zero, of {of}; "
            "counted as the paper does, not measured"
        )
    return told


def require_unchanged(found: Inspection) -> None:
    """Check that every file is the one that was written.

    Raises:
        ArtefactError: one is not.
    """
    if found.problem is not None:
        raise ArtefactError(
            f"The {found.kind} {found.path} is not what was written: {found.problem.rstrip('.')}.",
            expected="Every file was expected as it was listed with its size and SHA-256.",
            do="Copy it again, or make it again.",
        )


def require_promises(found: Inspection) -> None:
    """Check the graph against the patterns that are promised.

    Raises:
        GateFailed: the graph breaks one.
        ArtefactError: the graph could not be read.
    """
    if found.broken:
        more = f"; and {len(found.broken) - 5} more" if len(found.broken) > 5 else ""
        raise GateFailed(
            f"The graph of {found.path} does not keep what its manifest promises: "
            f"{'; '.join(found.broken[:5])}{more}.",
            expected="At most N nonzeros in every M along the reduction axis were promised.",
            do="Build it again from its run.",
        )
    if found.unchecked is not None:
        raise ArtefactError(
            f"The patterns that {found.path} promises cannot be checked: {found.unchecked}",
            expected="A graph that can be read was expected.",
            do="Copy the folder again, or rebuild it.",
        )
