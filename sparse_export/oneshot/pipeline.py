"""The network on its way to the pattern: permuted, pruned, and how good it is after each step."""

from __future__ import annotations

import copy
import glob
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import onnx
import torch
from torch import Tensor

from sparse_export.errors import GateFailed, UsageError
from sparse_export.formats.score import Score
from sparse_export.graph.example import example_of_shape
from sparse_export.graph.export import onnx_from_module
from sparse_export.graph.model import prepared, signature_of
from sparse_export.graph.named_network import signature_of_call
from sparse_export.graph.passes.permute import PermutationReport, permute_network
from sparse_export.graph.weight_uses import why_no_axis
from sparse_export.oneshot.choice import Choice
from sparse_export.oneshot.costs import Finished
from sparse_export.oneshot.graph_pruning import (
    CALIBRATION_MEMORY,
    NOT_ASKED_FOR,
    PrunedGraph,
    has_walk,
    squares_of_graph,
)
from sparse_export.oneshot.joint import JointFit, fit_jointly
from sparse_export.oneshot.layers import Method, prune_weight, worth_of_weight
from sparse_export.oneshot.parted import Parted, parted
from sparse_export.oneshot.recovering import sparsify_recovering, split
from sparse_export.oneshot.recovery import JointResult, NormsResult, Recovery, RecoveryResult
from sparse_export.oneshot.report import SparsifiedLayer, SparsifyReport, Stage
from sparse_export.oneshot.source import Source
from sparse_export.oneshot.unused import unused_weights
from sparse_export.oneshot.weights import kept_share
from sparse_export.signature import Array, Feeds, Signature, class_signature
from sparse_export.sparsity.caps import Cap
from sparse_export.sparsity.eligible import SMALL_SHARE
from sparse_export.sparsity.pattern import NMPattern, largest_per_group
from sparse_export.sparsity.permute import find_permutation
from sparse_export.tasks.scores import score_text
from sparse_export.tasks.shipped import Classification
from sparse_export.tasks.task import Statistics, Task
from sparse_export.train.evaluation import statistics_of
from sparse_export.train.layers import computed_weights, maskable_parameters, output_layers
from sparse_export.train.loader import BatchLoader, Part
from sparse_export.train.pattern_plan import plan_pattern

__all__ = ["CALIBRATION_BATCH", "NOT_IN_GRAPH", "Work"]

CALIBRATION_BATCH = 128  # samples at once, at most
_WALK_VALUES = 5 * 2**19  # input values of a batch of a walk: 17 pictures of 224 x 224
_TEST_VALUES = 4 * 2**20  # input values of a batch of an evaluation
NOT_IN_GRAPH = "no layer of the exported graph multiplies by it alone, so its inputs are not seen"
_UNUSED = "the outputs do not hang on it in evaluation"
_SAME_SHARE = 1e-4  # of the samples, whose label float32 may turn when sums run in another order


class _Graph(NamedTuple):
    """A network as a graph that shares its parameters, and calibration inputs for it."""

    graph: Parted
    signature: Signature
    batches: list[Feeds]


class _Walked(NamedTuple):
    """What a walk made of weights, by name: its report, which stay, their values, other tensors that
    were changed with them; statistics of batch norms; how many an earlier process had finished, how many
    samples it saw, and whether a recovery and re-estimated norms helped."""

    layers: dict[str, SparsifiedLayer]
    masks: dict[str, Tensor]
    weights: dict[str, Tensor]
    beside: dict[str, dict[str, Tensor]]
    norms: dict[str, Tensor]
    n_resumed: int
    n_calibration: int
    recovery: RecoveryResult | None
    settled: NormsResult | None


class Work:
    """The network on its way, and what was found out on it."""

    def __init__(
        self,
        source: Source,
        input_shape: tuple[int, ...],
        n_outputs: int | None,
        loader: BatchLoader | None,
        device: torch.device,
        n_calibration: int,
        seed: int,
        task: Task,
        memory_bytes: int = CALIBRATION_MEMORY,
        recovery: Recovery | None = None,
        augments: bool = False,
    ) -> None:
        self.source, self.network, self.masks = source, source.network, dict(source.masks)
        self.input_shape, self.n_outputs = input_shape, n_outputs
        self.loader, self.device, self.seed, self.task = loader, device, seed, task
        self.memory_bytes, self._augments = memory_bytes, augments
        self.recovery, self._joint = (None, False) if recovery is None else (recovery.of_walk, recovery.joint)
        self.recovered: RecoveryResult | None = None
        self.settled: NormsResult | None = None
        self.joint: JointResult | None = None
        self.walk_batch = max(1, min(CALIBRATION_BATCH, _WALK_VALUES // math.prod(input_shape)))
        self.n_calibration = (
            0 if loader is None else _whole_batches(n_calibration, loader.info.n_train, self.walk_batch)[0]
        )
        self.stages: list[Stage] = []
        self.in_order: dict[str, float] = {}
        self.n_norms = self.n_resumed = 0
        self.looks_at_data = False
        self.choice: Choice | None = None
        self._chosen: _Walked | None = None
        self._tested: list[Statistics] = []

    def batches(self, most: int) -> Iterator[Tensor]:
        """The calibration inputs, at most so many in a batch: of the training part, the same samples each
        time.
        """
        assert self.loader is not None
        n_samples, size = _whole_batches(self.n_calibration, self.loader.info.n_train, most)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(self.loader.info.n_train, generator=generator)[:n_samples]
        for x, _ in self.loader.training(order, size, 0, 0):
            assert isinstance(x, Tensor)  # `input_shape_of` saw to it
            yield x

    def stage(self, name: str, seconds: float) -> Stage:
        """Note how good the network is now."""
        stage = Stage(
            name=name,
            validation=self._score("validation"),
            test=self._score("test"),
            seconds=seconds,
        )
        self.stages.append(stage)
        return stage

    @torch.no_grad()
    def _score(self, part: Part) -> Score | None:
        if self.loader is None:
            return None
        fact = self.loader.info
        n_samples = fact.n_validation if part == "validation" else fact.n_test
        if n_samples == 0:
            return None
        self.network.to(self.device).eval()
        size = max(1, min(1000, _TEST_VALUES // math.prod(self.input_shape)))
        statistics = statistics_of(self.task, self.network, self.loader.part(part, size))
        if part == "test":
            self._tested.append(statistics)
        return self.task.score(statistics)

    def signature(self) -> Signature:
        """What the network takes and gives."""
        if isinstance(self.task, Classification) and self.n_outputs is not None:
            return class_signature(self.input_shape, self.n_outputs)
        example = replace(example_of_shape(self.input_shape), lone_output=self.task.output_name)
        return signature_of_call(self.network.cpu().eval(), example)

    def caps(
        self, pattern: NMPattern, keep_dense: Sequence[str], planned_dense: Mapping[str, str] | None
    ) -> tuple[dict[str, Cap], dict[str, str]]:
        """Which layers get the pattern, and why the others do not. Raises UsageError when none does."""
        sample = torch.zeros((2, *self.input_shape))
        left_out = dict.fromkeys(unused_weights(self.network, sample), _UNUSED) | dict(planned_dense or {})
        names = [name for name in maskable_parameters(self.network) if name not in left_out]
        left_out |= why_no_axis(self.network, sample, names)
        plan = plan_pattern(
            pattern,
            self.network,
            keep_dense=[*keep_dense, *map(glob.escape, left_out)],
            outputs=output_layers(self.network, lambda: self.network(sample)),
            small_share=SMALL_SHARE if planned_dense is None else 0.0,
        )
        return plan.caps, plan.why_dense | left_out

    def permute(self, caps: Mapping[str, Cap], method: Method) -> PermutationReport:
        """Put channels in an order that loses less. Raises GateFailed when that changes the function."""
        began = time.monotonic()
        scores: dict[str, Tensor] = {}
        if method != "magnitude":
            self.looks_at_data = True
            graph = self._graph()
            found = squares_of_graph(
                graph.graph,
                signature=graph.signature,
                batches=graph.batches,
                pattern=next(iter(caps.values())).pattern,
                only=caps,
                memory_bytes=self.memory_bytes,
            )
            parameters = dict(self.network.named_parameters())
            scores = {name: worth_of_weight(parameters[name].detach(), one) for name, one in found.items()}
        self.network.cpu()
        for name, cap in caps.items():
            weight = self.network.get_parameter(name).detach()
            self.in_order[name] = kept_share(weight, largest_per_group(weight, cap.axis, cap.pattern))
        generator = torch.Generator().manual_seed(self.seed)

        def search(rows: Tensor, pattern: NMPattern) -> Tensor:
            return find_permutation(rows, pattern, seed=self.seed)

        report = permute_network(
            self.network,
            torch.randn((2, *self.input_shape), generator=generator),
            {name: cap.pattern for name, cap in caps.items()},
            search,
            masks=self.masks,
            scores=scores,
        )
        before = self.stages[-1]
        after = self.stage("permuted", time.monotonic() - began)
        for was, now in ((before.validation, after.validation), (before.test, after.test)):
            if was is not None and now is not None:
                _require_same_score(was, now)
        return report

    def prune(
        self,
        caps: Mapping[str, Cap],
        reasons: Mapping[str, str],
        method: Method,
        permuted: PermutationReport | None,
        *,
        norms: bool,
        errors: bool = False,
        observer: Finished | None = None,
        state: Path | None = None,
    ) -> tuple[SparsifiedLayer, ...]:
        """Prune layer after layer, each calibrated on what the pruned ones before it give.

        With data that is one walk over the network's graph, for `magnitude` where errors are asked for.
        observer: told of each layer of that.  state: a folder in which finished layers are noted, see
        `sparsify_graph`.  Raises
        UsageError when no layer of the graph takes the pattern, and when no weight is left.
        """
        began = time.monotonic()
        notes = {} if permuted is None else {layer.name: layer.reason for layer in permuted.layers}
        dense = dict(reasons)
        self.network.cpu()
        measures = errors or self.recovery is not None
        original = copy.deepcopy(self.network) if self._joint else None
        walks = self._chosen is not None or (
            self.loader is not None and (norms or has_walk(method, errors=measures))
        )
        walked = self._chosen or (
            self._walked(caps, method, observer, state, errors=measures, norms=norms) if walks else None
        )
        self.n_resumed = 0 if walked is None else walked.n_resumed
        saw = walked is not None and walked.n_calibration > 0
        self.looks_at_data |= saw
        looked = walks and has_walk(method, errors=measures)
        why_unseen = f"error not measured: {NOT_IN_GRAPH}" if looked else NOT_ASKED_FOR
        self.recovered = None if walked is None else walked.recovery
        self.settled = None if walked is None else walked.settled
        tensors = dict([*self.network.named_parameters(), *self.network.named_buffers()])
        found: dict[str, SparsifiedLayer] = {}
        for name, cap in caps.items():
            weight = self.network.get_parameter(name)
            layer = None if walked is None else walked.layers.get(name)
            if walked is not None and layer is not None:
                mask, values = walked.masks[name], walked.weights[name]
                why, error = layer.reason, layer.error
            elif method == "magnitude":
                pruned = prune_weight(weight.detach(), cap, method, allowed=self.masks.get(name))
                mask, values, error = pruned.mask, pruned.weight, None
                why = "" if self.loader is None else why_unseen
            else:
                dense[name] = NOT_IN_GRAPH
                continue
            found[name] = SparsifiedLayer(
                name=name,
                shape=tuple(weight.shape),
                n_weights=weight.numel(),
                n_active=int(mask.sum()),
                pattern=str(cap.pattern),
                reason="; ".join(filter(None, [notes.get(name, ""), why])),
                kept_in_order=self.in_order.get(name),
                magnitude=float(weight.detach().double().abs().sum()),
                kept_share=kept_share(weight.detach(), mask),
                error=error,
            )
            with torch.no_grad():
                weight.copy_(values)
                for other, shifted in ({} if walked is None else walked.beside.get(name, {})).items():
                    tensors[other].copy_(shifted)
            self.masks[name] = mask
        if not any(bool(mask.any()) for mask in self.masks.values()):
            raise UsageError(
                f"The masks of {self.source.name} keep none of its weights: a zero of a sparse run stays one.",
                expected="A run with weights in its layers was expected.",
                do="Look at the masks that it began with; train it with a higher density.",
            )
        for name, values in {} if walked is None else walked.norms.items():
            tensors[name].copy_(values)
        self.n_norms = 0 if walked is None else len(walked.norms) // 2
        if original is not None:
            samples = torch.cat(list(self.batches(self.walk_batch)))
            how = JointFit(
                task=self.task,
                device=self.device,
                batch_size=self.walk_batch,
                augments=self._augments,
                seed=self.seed,
            )
            self.joint = fit_jointly(self.network, original, self.masks, samples, how)
        self.stage("sparsified", time.monotonic() - began)
        self.network.cpu()
        parameters = [
            found.get(name) or self._left_dense(name, weight.detach(), dense[name])
            for name, weight in maskable_parameters(self.network).items()
        ]
        computed = computed_weights(self.network)
        return (
            *parameters,
            *(self._left_dense(name, weight, reason) for name, (weight, reason) in computed.items()),
        )

    def _graph(self) -> _Graph:
        """The network as it is now, its parameters under their own names, and the calibration inputs."""
        exported = onnx_from_module(
            self.network.cpu().eval(),
            example_of_shape(self.input_shape),
            masks={},
            fold=False,
            transpose=False,  # masks and values go back into the network's own axes
        )
        found = parted(exported, dict(self.network.named_parameters()))
        del exported
        graph = Parted(model=prepared(found.model), values=found.values)
        signature = signature_of(graph.model)
        (name,) = signature.input_names
        return _Graph(graph, signature, [{name: x.cpu().numpy()} for x in self.batches(self.walk_batch)])

    def _walked(
        self,
        caps: Mapping[str, Cap],
        method: Method,
        observer: Finished | None,
        state: Path | None,
        *,
        errors: bool,
        norms: bool,
    ) -> _Walked:
        """The weights that a walk over the network's graph pruned, with their errors."""
        graph = self._graph()
        batches = graph.batches
        if self._joint and self.recovery is None and not norms:  # else it holds these samples back by itself
            batches, _ = split(batches, graph.signature, "--recover")
        pruned = sparsify_recovering(
            graph.graph,
            recovery=self.recovery,
            signature=graph.signature,
            batches=batches,
            pattern=next(iter(caps.values())).pattern,
            method=method,
            only=caps,
            allowed={name: mask for name, mask in self.masks.items() if name in caps},
            memory_bytes=self.memory_bytes,
            state=state,
            observer=observer,
            errors=errors,
            norms=norms,
        )
        return _walked_of(pruned)

    def exported(self) -> tuple[onnx.ModelProto, Signature, list[Feeds]]:
        """The network as it is now as a graph of its own, with its signature and the calibration inputs."""
        found = self._graph()
        return found.graph.whole(), found.signature, found.batches

    def take(self, choice: Choice, pruned: PrunedGraph) -> None:
        """Let `prune` take layers as they were pruned in the graph.

        Args:
            choice: how they were chosen.
            pruned: of the graph that `exported` gives.
        """
        self.choice, self._chosen = choice, _walked_of(pruned)

    def _left_dense(self, name: str, weight: Tensor, reason: str) -> SparsifiedLayer:
        parameters = dict(self.network.named_parameters(remove_duplicate=False))
        mask = self.masks.get(name)
        n_active = weight.numel() if name in parameters else int(weight.count_nonzero())
        return SparsifiedLayer(
            name=name,
            shape=tuple(weight.shape),
            n_weights=weight.numel(),
            n_active=n_active if mask is None else int(mask.sum()),
            pattern=None,
            reason=reason,
            magnitude=float(weight.double().abs().sum()),
            kept_in_order=None,
            kept_share=None,
            error=None,
        )

    def report(
        self,
        layers: tuple[SparsifiedLayer, ...],
        permuted: PermutationReport | None,
        *,
        pattern: NMPattern,
        method: Method,
        permute: bool,
        moving: bool,
        epochs: int,
    ) -> SparsifyReport:
        spaces = permuted.spaces if permuted is not None else ()
        choice = self.choice
        if choice is not None and len(self._tested) > 1 and len(self._tested[0]):
            difference = self.task.difference(self._tested[0], self._tested[-1])
            choice = replace(choice, test=difference, test_is_share=self.task.is_share)
        return SparsifyReport(
            model=self.source.name,
            weights=self.source.origin,
            pattern=str(pattern),
            method=method,
            permute=permute,
            moving=moving,
            epochs=epochs,
            seed=self.seed,
            n_calibration=self.n_calibration if self.looks_at_data else 0,
            n_norms=self.n_norms,
            n_resumed=self.n_resumed,
            permuted_spaces=sum(space.permutation is not None for space in spaces),
            n_spaces=len(spaces),
            output_difference=permuted.difference if permuted is not None else 0.0,
            untraced=permuted.untraced if permuted is not None else "",
            kept_share=_kept_in_all(layers),
            layers=layers,
            stages=tuple(self.stages),
            choice=choice,
            recovery=self.recovered,
            norms=self.settled,
            joint=self.joint,
        )


def _walked_of(pruned: PrunedGraph) -> _Walked:
    stored = {one.name: one for one in pruned.graph.model.graph.initializer if one.name in pruned.masks}
    return _Walked(
        {layer.name: layer for layer in pruned.layers if layer.pattern is not None},
        pruned.masks,
        {name: torch.from_numpy(_writeable(pruned.graph.read(one))) for name, one in stored.items()},
        pruned.beside,
        pruned.norms,
        pruned.n_resumed,
        pruned.n_calibration,
        pruned.recovery,
        pruned.settled,
    )


def _writeable(array: Array) -> Array:
    return array if array.flags.writeable else array.copy()


def _whole_batches(n_asked: int, n_train: int, most: int) -> tuple[int, int]:
    """(samples, batch size): as many samples as asked for, or nearly, in batches of one size, which is at most
    `most` and more than half of that where there are so many samples.
    """
    n_samples = min(n_asked, n_train)
    most = min(most, n_samples)
    size = max(range(most // 2 + 1, most + 1), key=lambda size: (n_samples // size * size, size))
    return n_samples // size * size, size


def _require_same_score(before: Score, after: Score) -> None:
    if before.n_correct is not None and after.n_correct is not None:
        same = abs(before.n_correct - after.n_correct) <= max(1, round(_SAME_SHARE * before.n_samples))
    else:
        same = math.isclose(before.figure, after.figure, rel_tol=1e-3, abs_tol=1e-6)
    if not same:
        raise GateFailed(
            f"With its channels permuted the network has {after.name} {score_text(after)}.",
            expected=f"{score_text(before)} as before was expected.",
            do="Sparsify it without --permute; the rules for one of its operations are wrong.",
        )


def _kept_in_all(layers: Sequence[SparsifiedLayer]) -> float:
    kept = [(layer.kept_share, layer.magnitude) for layer in layers]
    known = [(share, magnitude) for share, magnitude in kept if share is not None]
    whole = sum(magnitude for _, magnitude in known)
    return sum(share * magnitude for share, magnitude in known) / whole if whole else 1.0
