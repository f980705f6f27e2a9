"""The steps of sparsify: original, permuted, sparsified, fine-tuned."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_export import artefact, models
from sparse_export.artefact import Accuracy, DataFact, ModelFact, Run, RunInfo
from sparse_export.errors import ArtefactError, GateFailed, UsageError
from sparse_export.files import require_writable, staged_folder, write_json
from sparse_export.graph.input_statistics import input_statistics, why_no_gram, why_not_calibrated
from sparse_export.graph.oneshot import (
    Method,
    PrunedWeight,
    prune_weight,
    reestimate_norms,
    require_method,
    worth_of_weight,
)
from sparse_export.graph.permutation import PermutationReport, permute_network
from sparse_export.sparsifying.report import REPORT_FILE, SparsifiedLayer, SparsifyReport, Stage
from sparse_export.sparsifying.source import Source, open_source, require_weights, run_of
from sparse_export.sparsity.caps import Cap
from sparse_export.sparsity.eligible import SMALL_SHARE
from sparse_export.sparsity.oneshot import kept_share
from sparse_export.sparsity.pattern import NMPattern, largest_per_group, pattern_from_text
from sparse_export.sparsity.permute import find_permutation
from sparse_export.train.distributed import ALONE
from sparse_export.train.feed import Feed, Part, feed
from sparse_export.train.layers import layer_facts, maskable_parameters, output_layers
from sparse_export.train.loop import device_of, train
from sparse_export.train.network import n_threads_for
from sparse_export.train.observer import Observer, SilentObserver
from sparse_export.train.pattern_plan import plan_pattern
from sparse_export.train.recipe import Recipe, recipe_from_table
from sparse_export.train.run_folder import finish_run, require_empty
from sparse_export.train.starting_point import STARTED, StartingPoint
from sparse_export.train.stopping import cpu_settings

NO_DATA = "none"
CALIBRATION_SAMPLES = 512

_BATCH = 128  # calibration samples at once, at most
_TEST_VALUES = 16 * 2**20  # input values of a batch of an evaluation
_SAME_SHARE = 1e-4  # of the samples, whose label float32 may turn when sums run in another order
_FINE_TUNING: dict[str, Any] = {
    "batch_size": 100,
    "optimizer": {"lr": 0.01},
    "learning_rate": {"schedule": "cosine"},
}
_RATE = 0.1  # of a run's own learning rate
_MOVING_PRUNE_RATE = 0.1
_UPDATES_PER_EPOCH = 5


@dataclass(frozen=True, kw_only=True)
class Sparsified:
    """The finished run, and what was done to get it."""

    run: Run
    report: SparsifyReport


def sparsify(
    model: str | Path,
    out: str | Path,
    *,
    pattern: str = "2:4",
    weights: str | None = None,
    method: str = "magnitude",
    permute: bool = False,
    data: str | None = None,
    data_dir: Path | None = None,
    calibration_samples: int = CALIBRATION_SAMPLES,
    finetune: int = 0,
    moving: bool = False,
    keep_dense: Sequence[str] = (),
    planned_dense: Mapping[str, str] | None = None,
    norms: bool = False,
    input_shape: Sequence[int] | None = None,
    seed: int = 0,
    device: str = "auto",
    trust: str | None = None,
    observer: Observer | None = None,
) -> Sparsified:
    """Make a trained network N:M sparse and write it as a finished run, ready for `build`.

    model: folder of a finished run, a known network, `timm:NAME` or `package.module:factory`.
    weights: `pretrained`, `random`, or a file of them (safetensors, or torch's with nothing but tensors); needed
    for a known network, None for a run and for a factory that loads its own.
    method: `magnitude`; `activation` (|w| times the norm of its input) and `reconstruction` (weights corrected so
    that outputs stay close) need data.  permute: look for an order of channels first that loses less.
    data: a name as in a recipe, or `none`; a run's own by default.  calibration_samples: of its training part.
    finetune: epochs of training afterwards, masks fixed, or with `moving` following momentum under the pattern.
    keep_dense: shell patterns of parameters or layers that stay as they are.  planned_dense: weights that a plan
    leaves dense, with its reasons (`sparse_export.plan.planning.dense_by_plan`); it decides about small layers too.
    norms: re-estimate batch norms on the calibration data after pruning.
    input_shape: of one sample, where neither network nor data tell.  seed: of everything that is drawn.
    trust: SHA-256 of the run's `run.json`, needed once for a run that names a factory and was made elsewhere.

    A run that was trained sparse stays zero where it is zero. Interrupted fine-tuning goes on with
    `train(None, out, resume=True)`.
    Raises UsageError, DataNotFound, MissingCapability (weights that cannot be fetched), ArtefactError,
    NotTrustedError, GateFailed (a permutation that changes the function), OutputError, and what training raises.
    """
    out, model = Path(out), str(model)
    asked = pattern_from_text(pattern)
    chosen = require_method(method)
    if planned_dense is not None and str(asked) != "2:4":
        raise UsageError(
            f"A plan was given, and the pattern {asked}.",
            expected="2:4 was expected: a plan decides which layers are worth that.",
            do="Leave out one of them.",
        )
    _require_numbers(calibration_samples, finetune, seed)
    run = run_of(model)
    require_weights(model, run, weights)
    data = _data_name(data, run, chosen, finetune=finetune, moving=moving, norms=norms)
    require_empty(out)
    require_writable(out.absolute().parent)
    place = device_of(device)
    recipe = None if data is None else _recipe(model, run, data, input_shape, epochs=finetune, seed=seed)
    stream = None if recipe is None else feed(recipe, data_dir, False, place, ALONE)
    if stream is not None and run is not None and run.info.data is not None:
        _require_same_data(run, stream.fact)
    n_classes = None if stream is None else stream.n_classes
    source = open_source(model, run, weights, n_classes=n_classes, seed=seed, trust=trust)
    shape = _input_shape(source, run, stream, input_shape)
    n_outputs = _n_outputs(source, shape, n_classes)
    work = _Work(source, shape, n_outputs, stream, place, calibration_samples, seed)
    caps, reasons = work.caps(asked, keep_dense, planned_dense)
    if moving:
        _require_patterns(work.masks, caps)
    n_threads = n_threads_for(source.network, _BATCH if recipe is None else recipe.batch_size)
    with cpu_settings(n_threads):
        work.stage("original", 0.0)
        permuted = work.permute(caps, chosen) if permute else None
        layers = work.prune(caps, reasons, chosen, permuted, norms=norms)
    report = work.report(
        layers, permuted, pattern=asked, method=chosen, permute=permute, moving=moving, epochs=finetune
    )
    if recipe is None or not finetune:
        info = _run_info(work, report, run, n_threads)
        with staged_folder(out) as stage:
            finished = finish_run(stage, source.network, work.masks, info)
            write_json(stage / REPORT_FILE, asdict(report))
        return Sparsified(run=replace(finished, path=out), report=report)
    start = StartingPoint(
        weights=source.network.state_dict(),
        masks=work.masks,
        n_outputs=n_outputs,
        method=_method_name(report),
        patterns=_promised(report),
        why_dense=_why_dense(report),
    )
    began = time.monotonic()
    finished = train(
        _fine_tuning(recipe, work, report, moving=moving),
        out,
        data_dir=data_dir,
        device=device,
        observer=_Reporting(out, report, observer or SilentObserver()),
        start=start,
    )
    report = _with_fine_tuned(report, finished.info, time.monotonic() - began)
    write_json(out / REPORT_FILE, asdict(report))
    return Sparsified(run=finished, report=report)


class _Work:
    """The network on its way, and what was found out on it."""

    def __init__(
        self,
        source: Source,
        input_shape: tuple[int, ...],
        n_outputs: int,
        stream: Feed | None,
        device: torch.device,
        n_calibration: int,
        seed: int,
    ) -> None:
        self.source, self.network, self.masks = source, source.network, dict(source.masks)
        self.input_shape, self.n_outputs = input_shape, n_outputs
        self.stream, self.device, self.seed = stream, device, seed
        self.n_calibration = 0 if stream is None else _whole_batches(n_calibration, stream.fact.n_train)[0]
        self.stages: list[Stage] = []
        self.in_order: dict[str, float] = {}
        self.n_norms = 0

    def batches(self) -> Iterator[Tensor]:
        """The calibration inputs: of the training part, the same samples each time."""
        assert self.stream is not None
        n_samples, size = _whole_batches(self.n_calibration, self.stream.fact.n_train)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(self.stream.fact.n_train, generator=generator)[:n_samples]
        for x, _ in self.stream.training(order, size, 0, 0):
            yield x

    def stage(self, name: str, seconds: float) -> Stage:
        """Note how good the network is now."""
        stage = Stage(
            name=name,
            validation=self._accuracy("validation"),
            test=self._accuracy("test"),
            seconds=seconds,
        )
        self.stages.append(stage)
        return stage

    @torch.no_grad()
    def _accuracy(self, part: Part) -> Accuracy | None:
        if self.stream is None:
            return None
        fact = self.stream.fact
        n_samples = fact.n_validation if part == "validation" else fact.n_test
        if n_samples == 0:
            return None
        self.network.to(self.device).eval()
        size = max(1, min(1000, _TEST_VALUES // math.prod(self.input_shape)))
        n_correct = sum(int((self.network(x).argmax(1) == y).sum()) for x, y in self.stream.part(part, size))
        return Accuracy(n_correct=n_correct, n_samples=n_samples)

    def caps(
        self, pattern: NMPattern, keep_dense: Sequence[str], planned_dense: Mapping[str, str] | None
    ) -> tuple[dict[str, Cap], dict[str, str]]:
        """Which layers get the pattern, and why the others do not. Raises UsageError when none does."""
        sample = torch.zeros((2, *self.input_shape))
        plan = plan_pattern(
            pattern,
            self.network,
            keep_dense=[*keep_dense, *(planned_dense or ())],
            outputs=output_layers(self.network, lambda: self.network(sample)),
            small_share=SMALL_SHARE if planned_dense is None else 0.0,
        )
        return plan.caps, plan.why_dense | dict(planned_dense or {})

    def permute(self, caps: Mapping[str, Cap], method: Method) -> PermutationReport:
        """Put channels in an order that loses less. Raises GateFailed when that changes the function."""
        began = time.monotonic()
        scores: dict[str, Tensor] = {}
        if method != "magnitude":
            self.network.to(self.device)
            found = input_statistics(self.network, self.batches(), list(caps), gram=False)
            parameters = dict(self.network.cpu().named_parameters())
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
                _require_same_accuracy(was, now)
        return report

    def prune(
        self,
        caps: Mapping[str, Cap],
        reasons: Mapping[str, str],
        method: Method,
        permuted: PermutationReport | None,
        *,
        norms: bool,
    ) -> tuple[SparsifiedLayer, ...]:
        """Prune layer after layer, each calibrated on what the pruned ones before it give.

        Raises UsageError when no layer could be calibrated, and when no weight is left.
        """
        began = time.monotonic()
        notes = {} if permuted is None else {layer.name: layer.reason for layer in permuted.layers}
        dense = dict(reasons)
        found: dict[str, SparsifiedLayer] = {}
        for name in self._order(caps):
            weight = self.network.get_parameter(name)
            pruned = self._pruned(name, weight.detach().cpu(), caps[name], method)
            if isinstance(pruned, str):
                dense[name] = pruned
                continue
            remarks = [notes.get(name, ""), self._why_no_error(name, pruned)]
            found[name] = SparsifiedLayer(
                name=name,
                shape=tuple(weight.shape),
                n_weights=weight.numel(),
                n_active=int(pruned.mask.sum()),
                pattern=str(caps[name].pattern),
                reason="; ".join(filter(None, remarks)),
                kept_in_order=self.in_order.get(name),
                magnitude=float(weight.detach().double().abs().sum()),
                kept_share=kept_share(weight.detach().cpu(), pruned.mask),
                error=pruned.error,
            )
            with torch.no_grad():
                weight.copy_(pruned.weight)
            self.masks[name] = pruned.mask
        if not found:
            raise _none_pruned(self.source.name, method, dense)
        if not any(bool(mask.any()) for mask in self.masks.values()):
            raise UsageError(
                f"The masks of {self.source.name} keep none of its weights: a zero of a sparse run stays one.",
                expected="A run with weights in its layers was expected.",
                do="Look at the masks that it began with; train it with a higher density.",
            )
        if norms and self.stream is not None:
            self.n_norms = reestimate_norms(self.network.to(self.device), self.batches())
        self.stage("sparsified", time.monotonic() - began)
        self.network.cpu()
        return tuple(
            found.get(name) or self._left_dense(name, dense[name])
            for name in maskable_parameters(self.network)
        )

    def _order(self, caps: Mapping[str, Cap]) -> list[str]:
        """The layers in the order of the forward pass, then those that it does not call by themselves."""
        if self.stream is None:
            return list(caps)
        x = next(iter(self.batches()))[:2]
        called = input_statistics(self.network.to(self.device), [x], list(caps), gram=False)
        return [*called, *(name for name in caps if name not in called)]

    def _pruned(self, name: str, weight: Tensor, cap: Cap, method: Method) -> PrunedWeight | str:
        """The weight after pruning, or why it stays dense: the method needs inputs that nobody can tell or hold."""
        too_large = why_no_gram(self.network, name)
        if too_large and method == "reconstruction":
            return f"{too_large}, and reconstruction needs it"
        statistics = None
        if self.stream is not None and not (too_large and method == "magnitude"):
            self.network.to(self.device)
            gram = not too_large
            statistics = input_statistics(self.network, self.batches(), [name], gram=gram).get(name)
        if statistics is None and method != "magnitude":
            return why_not_calibrated(self.network, name)
        return prune_weight(weight, cap, method, statistics, allowed=self.masks.get(name))

    def _why_no_error(self, name: str, pruned: PrunedWeight) -> str:
        """Empty where there is an error, or no data to measure one on."""
        if pruned.error is not None or self.stream is None:
            return ""
        why = why_no_gram(self.network, name) or why_not_calibrated(self.network, name)
        return f"error not measured: {why}"

    def _left_dense(self, name: str, reason: str) -> SparsifiedLayer:
        weight = self.network.get_parameter(name)
        mask = self.masks.get(name)
        return SparsifiedLayer(
            name=name,
            shape=tuple(weight.shape),
            n_weights=weight.numel(),
            n_active=weight.numel() if mask is None else int(mask.sum()),
            pattern=None,
            reason=reason,
            magnitude=float(weight.detach().double().abs().sum()),
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
        return SparsifyReport(
            model=self.source.name,
            weights=self.source.origin,
            pattern=str(pattern),
            method=method,
            permute=permute,
            moving=moving,
            epochs=epochs,
            seed=self.seed,
            n_calibration=self.n_calibration,
            n_norms=self.n_norms,
            permuted_spaces=sum(space.permutation is not None for space in spaces),
            n_spaces=len(spaces),
            output_difference=permuted.difference if permuted is not None else 0.0,
            untraced=permuted.untraced if permuted is not None else "",
            kept_share=_kept_in_all(layers),
            layers=layers,
            stages=tuple(self.stages),
        )


class _Reporting:
    """An observer that leaves the report in the run's folder once there is one, then tells another observer."""

    def __init__(self, out: Path, report: SparsifyReport, other: Observer) -> None:
        self._out, self._report = out, report
        self._other = other
        self.stepped, self.finished_epoch = other.stepped, other.finished_epoch

    def started(self, info: RunInfo, total_steps: int, step: int) -> None:
        write_json(self._out / REPORT_FILE, asdict(self._report))
        self._other.started(info, total_steps, step)


# What was asked for


def _require_numbers(calibration_samples: int, finetune: int, seed: int) -> None:
    for name, value, least in (
        ("calibration_samples", calibration_samples, 1),
        ("finetune", finetune, 0),
        ("seed", seed, 0),
    ):
        if value < least:
            raise UsageError(f"{name} is {value}.", expected=f"At least {least} was expected.")


def _data_name(
    data: str | None, run: Run | None, method: Method, *, finetune: int, moving: bool, norms: bool
) -> str | None:
    """The data to use, None for none. Raises UsageError where the other options need some."""
    if moving and not finetune:
        raise UsageError(
            "Masks move while a network is trained, and no fine-tuning was asked for.",
            expected="--finetune EPOCHS was expected with --moving.",
        )
    if data is None and run is not None and run.info.data is not None:
        data = run.info.data.name
    if data is not None and data != NO_DATA:
        return data
    for needs, what in (
        (method != "magnitude", f"The method {method} looks at what each layer meets on real inputs"),
        (finetune > 0, "Fine-tuning trains on data"),
        (norms, "Batch norms are re-estimated on data"),
    ):
        if needs:
            raise UsageError(
                f"{what}, and there are none.",
                expected="A data set was expected.",
                do="Give --data NAME, with --data-dir for where it lies"
                + (", or choose --method magnitude." if method != "magnitude" else "."),
            )
    return None


def _recipe(
    model: str, run: Run | None, data: str, input_shape: Sequence[int] | None, *, epochs: int, seed: int
) -> Recipe:
    """How data are fed and the network is fine-tuned: as the run was trained, at a tenth of its learning rate, or
    by defaults. Without epochs it is for feeding alone."""
    info = None if run is None else run.info
    name = model if info is None else str(info.model.name)
    shape = input_shape if input_shape is not None or info is None else info.model.input_shape
    table: dict[str, Any] = dict(_FINE_TUNING)
    if info is not None and info.recipe:
        table = {key: value for key, value in info.recipe.items() if value is not None and key != "sparsity"}
        optimizer = dict(table.get("optimizer", {}))
        table["optimizer"] = optimizer | {"lr": optimizer.get("lr", 0.1) * _RATE}
        table["learning_rate"] = dict(table.get("learning_rate", {})) | {"schedule": "cosine"}
    if data.startswith("imagefolder:") and shape is not None and len(shape) == 3:
        table["image_size"] = list(shape[1:])
    table |= {"model": name, "data": data, "epochs": max(1, epochs), "seed": seed, "dense": False}
    return recipe_from_table(table, source="for fine-tuning")


def _fine_tuning(recipe: Recipe, work: _Work, report: SparsifyReport, *, moving: bool) -> Recipe:
    """The recipe with the masks' density: they stand still, or move under the pattern for three quarters of it.

    Raises UsageError for masks that would move where some of them have no pattern to move under.
    """
    n_active = sum(int(mask.sum()) for mask in work.masks.values())
    sparsity: dict[str, Any] = {
        "density": n_active / sum(mask.numel() for mask in work.masks.values()),
        "start": "uniform",
        "rescale": False,
        "keep_dense": [name for name in maskable_parameters(work.network) if name not in work.masks],
    }
    if moving:
        # Again, after `sparsify` asked it of the caps: a layer with one may have gone without calibration.
        _require_patterns(work.masks, _promised(report))
        assert work.stream is not None
        n_train = work.stream.fact.n_train
        steps_per_epoch = n_train // min(recipe.batch_size, n_train)
        sparsity |= {
            "pattern": report.pattern,
            "small_share": 0.0,
            "prune_rate": _MOVING_PRUNE_RATE,
            "update_every": max(1, steps_per_epoch // _UPDATES_PER_EPOCH),
        }
    else:
        sparsity |= {"prune_rate": 0.0, "final_prune_rate": 0.0, "freeze": 0.0}
    table = recipe.model_dump(mode="json", exclude_none=True) | {"sparsity": sparsity}
    return recipe_from_table(table, source="for fine-tuning")


def _require_patterns(masks: Collection[str], patterns: Collection[str]) -> None:
    """Raise UsageError where masks would move and some have no pattern to move under. Both: names of weights."""
    others = sorted(set(masks) - set(patterns))
    if others:
        raise UsageError(
            f"--moving was given, and {', '.join(others)} of the run are sparse without a pattern.",
            expected="Masks that all obey the pattern were expected.",
            do="Fine-tune with fixed masks, or train with --pattern from the start.",
        )


def _require_same_data(run: Run, found: DataFact) -> None:
    wanted = run.info.data
    if wanted is not None and found.name == wanted.name and found.test_sha256 != wanted.test_sha256:
        raise ArtefactError(
            f"The data are others than the run in {run.path} was trained on: {found}.",
            expected=f"{wanted} was expected.",
            do="Give the folder with the original data by --data-dir.",
        )


# What the network is


def _input_shape(
    source: Source, run: Run | None, stream: Feed | None, given: Sequence[int] | None
) -> tuple[int, ...]:
    told = tuple(given) if given is not None else None
    if stream is not None:
        if told is not None and told != stream.input_shape:
            raise UsageError(
                f"An input shape of {told} was given, and the samples of {stream.fact.name} are "
                f"{stream.input_shape}.",
                expected="One shape was expected.",
                do="Leave out --input-shape.",
            )
        return stream.input_shape
    if run is not None:
        told = told or run.info.model.input_shape
    shape = told or models.input_shape(source.name)
    if shape is None:
        raise UsageError(
            f"The shape of the inputs of {source.name} is not known.",
            expected="Data, or the shape of one sample, was expected.",
            do="Give --data NAME, or --input-shape like 3,224,224.",
        )
    return shape


@torch.no_grad()
def _n_outputs(source: Source, shape: tuple[int, ...], n_classes: int | None) -> int:
    """The number of logits. Raises UsageError when the network does not take such inputs, or gives too few."""
    try:
        output = source.network(torch.zeros((2, *shape)))
    except Exception as cause:  # whatever a network raises: some assert, some index
        reason = next(iter(str(cause).splitlines()), type(cause).__name__)
        raise UsageError(
            f"The model {source.name} cannot take inputs of shape {shape}: {reason}.",
            expected="A model and inputs of one shape were expected.",
            do="Choose other data, or give the right --input-shape.",
        ) from cause
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] < (n_classes or 1):
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UsageError(
            f"The model {source.name} answers two inputs with {got}.",
            expected=f"Logits of shape (2, {n_classes or 'classes'}) were expected.",
            do="Choose a model with as many outputs as there are classes, and one that returns logits alone.",
        )
    return output.shape[1]


def _whole_batches(n_asked: int, n_train: int) -> tuple[int, int]:
    """(samples, batch size): as many samples as asked for, or nearly, in batches of one size."""
    n_samples = min(n_asked, n_train)
    size = n_samples // math.ceil(n_samples / _BATCH)
    return n_samples // size * size, size


def _require_same_accuracy(before: Accuracy, after: Accuracy) -> None:
    if abs(before.n_correct - after.n_correct) > max(1, round(_SAME_SHARE * before.n_samples)):
        raise GateFailed(
            f"With its channels permuted the network gets {after.n_correct} of {after.n_samples} samples right.",
            expected=f"{before.n_correct} as before was expected.",
            do="Sparsify it without --permute; the rules for one of its operations are wrong.",
        )


# What came out


def _none_pruned(name: str, method: Method, dense: Mapping[str, str]) -> UsageError:
    listed = "; ".join(f"{layer}: {reason}" for layer, reason in dense.items())
    return UsageError(
        f"The method {method} could prune no layer of {name}: {listed}.",
        expected="At least one layer that takes the pattern, and that the method can calibrate, was expected.",
        do="Take --method magnitude, which needs no inputs.",
    )


def _kept_in_all(layers: Sequence[SparsifiedLayer]) -> float:
    kept = [(layer.kept_share, layer.magnitude) for layer in layers]
    known = [(share, magnitude) for share, magnitude in kept if share is not None]
    whole = sum(magnitude for _, magnitude in known)
    return sum(share * magnitude for share, magnitude in known) / whole if whole else 1.0


def _method_name(report: SparsifyReport) -> str:
    return f"{STARTED}{report.method}"


def _promised(report: SparsifyReport) -> dict[str, str]:
    return {layer.name: layer.pattern for layer in report.layers if layer.pattern is not None}


def _why_dense(report: SparsifyReport) -> dict[str, str]:
    return {layer.name: layer.reason for layer in report.layers if layer.pattern is None}


def _run_info(work: _Work, report: SparsifyReport, run: Run | None, n_threads: int) -> RunInfo:
    """Of a run that was not trained."""
    facts = layer_facts(work.network, work.masks, _promised(report), _why_dense(report))
    n_masked = sum(fact.n_weights for fact in facts if fact.masked)
    n_active = sum(fact.n_active for fact in facts if fact.masked)
    return RunInfo(
        status="running",
        method=_method_name(report),
        model=ModelFact(name=report.model, input_shape=work.input_shape, n_classes=work.n_outputs),
        data=None if work.stream is None else work.stream.fact,
        target_density=n_active / n_masked,
        density=n_active / n_masked,
        n_active=n_active,
        n_masked=n_masked,
        n_parameters=sum(value.numel() for value in work.network.parameters()),
        layers=facts,
        validation=report.stages[-1].validation,
        test=report.stages[-1].test,
        seed=report.seed,
        n_threads=n_threads,
        device=work.device.type,
        epochs=0,
        n_steps=0,
        seconds=sum(stage.seconds for stage in report.stages),
        recipe={} if run is None else run.info.recipe,
        versions=artefact.library_versions(),
        command=artefact.command_line(),
        created=artefact.now(),
        files={},
    )


def _with_fine_tuned(report: SparsifyReport, info: RunInfo, seconds: float) -> SparsifyReport:
    n_active = {layer.name: layer.n_active for layer in info.layers}
    stage = Stage(name="fine-tuned", validation=info.validation, test=info.test, seconds=seconds)
    return replace(
        report,
        stages=(*report.stages, stage),
        layers=tuple(replace(layer, n_active=n_active[layer.name]) for layer in report.layers),
    )
