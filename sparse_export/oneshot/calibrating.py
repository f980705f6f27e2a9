"""Runs one segment of a walk, and prunes the weights whose inputs it makes; the dense network may run beside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from sparse_export.oneshot.graph_statistics import Factor, inputs_of
from sparse_export.oneshot.graph_weights import GraphWeight
from sparse_export.oneshot.graph_work import GraphWork, too_large
from sparse_export.oneshot.links import Link, wanted_of
from sparse_export.oneshot.norms import Norm, NormSums
from sparse_export.oneshot.paired_sums import PairedStatistics, PairedSums, with_more
from sparse_export.oneshot.parted import Parted
from sparse_export.oneshot.segments import Segment, Stop, plan_following
from sparse_export.oneshot.unfolding import InputStatistics, InputSums, joined
from sparse_export.oneshot.walk import Values, Walk
from sparse_export.oneshot.wiring import Wiring
from sparse_export.signature import Array

__all__ = ["DenseWalk", "calibrate", "dense_segments", "statistics_of_weight", "stop_of", "sums_of"]

_CHECKED = 5  # one in so many inputs is kept apart


@dataclass(frozen=True, kw_only=True)
class DenseWalk:
    """The dense network on its way beside the pruned one.

    Attributes:
        walk: segment by segment as the other, see `dense_segments`.
        links: of the weights whose outputs are looked at.
        biases: that their layers add, by name of the stored tensor.
    """

    walk: Walk
    links: Mapping[str, Link]
    biases: Mapping[str, Array]


def stop_of(weight: GraphWeight, link: Link | None = None) -> Stop:
    """A weight as the walk sees it; with a link the value that its output is added to is seen too."""
    n_groups, n_columns = weight.form.n_groups, weight.form.n_columns
    beside = () if link is None or link.beside is None else (link.beside,)
    stop = Stop(
        nodes=frozenset(use.node for use in weight.uses),
        values=tuple(dict.fromkeys([*(use.factor.value for use in weight.uses), *beside])),
        shares=frozenset(use.factor for use in weight.uses),
        size=n_groups * n_columns ** (1 if too_large(weight) else 2),
    )
    if link is None:
        return stop
    return replace(stop, shares=None, size=2 * (stop.size + weight.form.shape[0] * n_columns))


def dense_segments(
    wiring: Wiring, segments: Sequence[Segment], weights: Sequence[GraphWeight], links: Mapping[str, Link]
) -> tuple[Segment, ...]:
    """The segments of the dense network: each gives what is wanted of the weights of one segment."""
    wanted = []
    for segment in segments:
        names = [weights[index].name for index in segment.stops if index < len(weights)]
        wanted.append(list(dict.fromkeys(v for name in names if name in links for v in links[name].values)))
    return plan_following(wiring, wanted)


def biases_of(graph: Parted, links: Mapping[str, Link]) -> dict[str, Array]:
    """The biases that layers add themselves."""
    names = {link.bias for link in links.values()}
    return {one.name: graph.read(one) for one in graph.model.graph.initializer if one.name in names}


def calibrate(
    walk: Walk,
    segment: Segment,
    weights: Sequence[GraphWeight],
    work: GraphWork,
    dense: DenseWalk | None,
    norms: Sequence[Norm] = (),
) -> None:
    """Run a segment, prune the weights whose inputs it makes, and settle batch norms.

    Args:
        walk: over the pruned network.
        segment: its next one.
        weights: that are calibrated after it.
        work: prunes.
        dense: the dense network; None to go without.
        norms: whose statistics become those of what they meet after it.
    """
    todo = [weight for weight in weights if weight.name not in work.layers]
    if segment.preview and not todo and not norms:
        walk.skip()
        for _ in () if dense is None else dense.walk.batches():
            pass
        return
    links: dict[str, Link] = {}
    if dense is not None:
        links = {one.name: dense.links[one.name] for one in todo if one.name in dense.links}
    sums = _SegmentSums(todo, links, {} if dense is None else dense.biases, work.checks)
    met = [NormSums(work.values_of(one.mean)) for one in norms]
    wanted = list(dict.fromkeys([*sums.values, *(one.value for one in norms)]))
    for here, there in _together(walk, dense, wanted, links):
        sums.add(here, there)
        for norm, one in zip(norms, met, strict=True):
            one.add(here[norm.value])
    for weight in todo:
        work.finish(weight, *sums.of(weight))
    for norm, one in zip(norms, met, strict=True):
        work.settle(norm, one.statistics(norm.mean))


class _SegmentSums:
    """Sums over the inputs of the weights that a segment ends at."""

    def __init__(
        self,
        weights: Sequence[GraphWeight],
        links: Mapping[str, Link],
        biases: Mapping[str, Array],
        checks: bool,
    ) -> None:
        """Begin.

        Args:
            weights: of the segment.
            links: of those whose outputs are held against the dense network's.
            biases: by name of the stored tensor.
            checks: keep the sums of a fifth of the inputs of these apart.
        """
        self._links, self._biases = links, biases
        self._with_check = checks
        linked: dict[Factor, list[str]] = {}
        grams: dict[Factor, bool] = {}
        for weight in weights:
            for use in weight.uses:
                grams.setdefault(use.factor, not too_large(weight))
                if weight.name in links:
                    linked.setdefault(use.factor, []).append(weight.name)
        self._linked = linked
        self._inputs = [
            {one: InputSums(gram=gram, sums=one in linked) for one, gram in grams.items()},
            {one: InputSums(gram=True, sums=True) for one in linked},
        ]
        self._paired = [{name: PairedSums() for name in links} for _ in range(2)]
        self._found: dict[tuple[int, Factor], InputStatistics | None] = {}

    @property
    def values(self) -> list[str]:
        """What is looked at in the pruned network."""
        beside = [one.beside for one in self._links.values() if one.beside]
        return list(dict.fromkeys([*(factor.value for factor in self._inputs[0]), *beside]))

    def add(self, here: Mapping[str, Array], there: Mapping[str, Array]) -> None:
        """Add a batch: its values in the pruned network, and in the dense one."""
        for factor in self._inputs[0]:
            wanted = {}
            for name in self._linked.get(factor, []):
                link = self._links[name]
                wanted[name] = wanted_of(link, there, here, self._biases.get(link.bias or ""))
            n_rows = max((len(one) for one in wanted.values()), default=0)
            n_first = n_rows - n_rows // _CHECKED if self._with_check else n_rows
            start = 0
            for part in inputs_of(factor, here[factor.value]):
                stop = start + part.shape[1]
                middle = min(max(n_first, start), stop) if wanted else stop
                for which, low, high in ((0, start, middle), (1, middle, stop)):
                    if high > low:
                        inputs = part[:, low - start : high - start]
                        self._inputs[which][factor].add(inputs)
                        for name, one in wanted.items():
                            self._paired[which][name].add(inputs, one[low:high])
                start = stop

    def of(
        self, weight: GraphWeight
    ) -> tuple[InputStatistics | None, PairedStatistics | None, PairedStatistics | None]:
        """All inputs of a weight, the same with the wanted outputs, and of the fifth that is kept apart."""
        if weight.name not in self._links:
            parts = [
                part
                for which in range(2)
                for use in weight.uses
                if (part := self._statistics(which, use.factor)) is not None
            ]
            return joined(parts), None, None
        (use,) = weight.uses
        first, check = (
            self._paired[which][weight.name].statistics(self._statistics(which, use.factor))
            for which in range(2)
        )
        if first is None:
            return None, None, None
        whole = with_more(first, check)
        return whole.inputs, whole, check

    def _statistics(self, which: int, factor: Factor) -> InputStatistics | None:
        """Handed over by the sums once, and used by all weights that meet the factor."""
        if (which, factor) not in self._found:
            sums = self._inputs[which].get(factor)
            self._found[which, factor] = None if sums is None else sums.statistics()
        return self._found[which, factor]


def _together(
    walk: Walk, dense: DenseWalk | None, wanted: Sequence[str], links: Mapping[str, Link]
) -> Iterator[tuple[Mapping[str, Array], Mapping[str, Array]]]:
    """The values of each batch in the pruned network, and in the dense one."""
    here = ({name: _array(value) for name, value in values.items()} for values in walk.batches(wanted))
    if dense is None:
        for values in here:
            yield values, {}
        return
    names = list(dict.fromkeys(name for link in links.values() for name in link.values))
    beside = dense.walk.batches(names)
    for values, others in zip(here, beside, strict=True):
        yield values, {name: _array(value) for name, value in others.items()}


def _array(value: Array | list[Array]) -> Array:
    assert not isinstance(value, list), "nothing multiplies by a sequence"
    return value


def sums_of(
    walk: Walk, segment: Segment, weights: Sequence[GraphWeight], has_gram: Callable[[GraphWeight], bool]
) -> dict[Factor, InputStatistics | None]:
    """Run a segment, and sum up what the weights are multiplied by."""
    sums: dict[Factor, InputSums] = {}
    for weight in weights:
        for use in weight.uses:
            sums.setdefault(use.factor, InputSums(gram=has_gram(weight)))

    def see(_batch: int, values: Values) -> None:
        for factor, one in sums.items():
            for inputs in inputs_of(factor, _array(values[factor.value])):
                one.add(inputs)

    walk.run(see, list(dict.fromkeys(factor.value for factor in sums)))
    return {factor: one.statistics() for factor, one in sums.items()}


def statistics_of_weight(
    weight: GraphWeight, sums: Mapping[Factor, InputStatistics | None]
) -> InputStatistics | None:
    """What a weight is multiplied by, over all its uses; None where nothing reached it."""
    return joined([part for use in weight.uses if (part := sums[use.factor]) is not None])
