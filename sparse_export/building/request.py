"""A request for a build, and the checks that need neither weights nor data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sparse_export import trust
from sparse_export.building.calibration import require_calibration
from sparse_export.building.fold_preprocess import require_foldable
from sparse_export.building.model_files import require_form
from sparse_export.building.patterns import parse_pattern, require_in_plan, require_same_pattern
from sparse_export.building.preprocess import require_preprocessable
from sparse_export.building.replaceable import require_replaceable
from sparse_export.engines.dry_run import require_timeable
from sparse_export.engines.options import EngineOptions, Precision, require_buildable, require_types
from sparse_export.engines.tensorrt_import import TARGETS as ENGINE_TARGETS
from sparse_export.errors import UnknownNameError, UsageError
from sparse_export.formats.preparation import RawType
from sparse_export.formats.run import RunInfo, open_run
from sparse_export.graph.passes.fit_pattern import Gather
from sparse_export.graph.passes.postprocess import require_steps
from sparse_export.sparsity.pattern import NMPattern
from sparse_export.tasks.class_names import read_class_names
from sparse_export.tasks.shipped import TASKS

__all__ = ["BuildRequest", "CheckedRequest", "check_request"]

_TARGETS = ("onnx", *ENGINE_TARGETS)


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What to build. `sparse_export.building.build` describes the fields and has the defaults.

    Attributes:
        targets: what to build for.
        compact: remove dead channels.
        onnx: `dense`, `packed` or `both`.
        pattern: an N:M pattern, None for none.
        max_cut: share of sum |w|, from 0 to below 1, that a layer may lose to satisfy it.
        gather: which layers may get their input in an order of their own.
        planned_dense: weights that a layer plan leaves dense, each with its reason.
        precision: of the graph.
        n_calibration: number of training samples for int8 and fp8.
        engines: options of some targets.
        time_layers: time the layers of each engine.
        inputs: file or folder of real inputs, for the golden pair and for the ranges of int8 and fp8; None
            for random ones, and for training samples of the run's data set.
        labels: file with the names of the classes; None for those that the run has.
        postprocess: what is appended to the graph, like `softmax` and `topk:5`.
        preprocess: write the graph that makes the network's input too.
        fold: type of raw samples that the graph is to take, normalized inside it; None for the network's own
            input.
        mean: of each channel of pictures in 0 to 1, for `fold` where the run names no data set.
        std: likewise.
        workers: processes that decode pictures of the run's data; 0 for threads.
    """

    targets: Sequence[str]
    compact: bool
    onnx: str
    pattern: str | NMPattern | None
    max_cut: float
    gather: Gather
    planned_dense: Mapping[str, str] | None
    precision: Precision
    n_calibration: int
    engines: Sequence[EngineOptions]
    time_layers: bool
    inputs: Path | None = None
    labels: Path | None = None
    postprocess: Sequence[str] = ()
    preprocess: bool = False
    fold: RawType | None = None
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    workers: int = 0


@dataclass(frozen=True, kw_only=True)
class CheckedRequest:
    """A request that passed the checks.

    Attributes:
        info: of the run, with the names of classes that were given.
        engines: options of every target that is an engine, in the order of `TARGETS`.
        wanted: the pattern, None for none.
        out: folder of the bundle.
        target: the same folder, links followed.
    """

    info: RunInfo
    engines: list[EngineOptions]
    wanted: NMPattern | None
    out: Path
    target: Path


def check_request(run: Path, out: str | Path | None, request: BuildRequest) -> CheckedRequest:
    """Check a request against the run's record and the place of the bundle.

    Args:
        run: folder of a finished run.
        out: folder of the bundle, `<run>-bundle` by default.
        request: what to build.

    Raises:
        UsageError: an option is invalid, options contradict each other or the run, a profile does not fit the
            network, `out` may not be replaced, or int8 or fp8 have nothing to be calibrated on.
        OutputError: the trust store, which the bundle is entered in, cannot be written.
        ArtefactError: the run is damaged or unfinished.
        MissingCapability: layers are to be timed, and no engine can run here.
    """
    _require_targets(request.targets)
    engines = _engine_options(request.targets, request.engines)
    for one in engines:
        require_buildable(request.precision, one.architectures)
    if request.time_layers:
        require_timeable(engines)
    require_form(request.onnx)
    wanted = parse_pattern(request.pattern, request.max_cut, request.gather)
    if request.planned_dense is not None and str(wanted) != "2:4":
        raise UsageError(
            f"A layer plan decides about 2:4, and the pattern is {wanted}.",
            do="Use the pattern 2:4, or leave the plan out.",
        )
    trust.require_usable()
    info = open_run(run).info
    require_calibration(info, request.precision, request.inputs)
    if request.labels is not None:
        if info.task.name in TASKS and TASKS[info.task.name].postprocess == ():
            raise UsageError(
                f"--labels {request.labels} was given for a run of the task {info.task.name}, "
                "which has no classes.",
                do="Leave it out.",
            )
        labels = read_class_names(request.labels, info.signature)
        info = replace(info, task=replace(info.task, labels=labels))
    _require_fitting_steps(request.postprocess, info.task.name)
    require_steps(request.postprocess, info.signature)
    if request.preprocess and request.fold is not None:
        raise UsageError(
            "--preprocess and --fold-preprocess were given: one normalizes outside the network's graph, the "
            "other inside it.",
            do="Give one of them.",
        )
    if request.preprocess:
        require_preprocessable(info)
    if request.fold is not None:
        require_foldable(info, request.fold, request.mean, request.std)
    elif request.mean or request.std:
        raise UsageError(
            "A mean or deviation was given, and nothing is folded into the graph.",
            do="Give fold too, --fold-preprocess on the command line, or leave them out.",
        )
    for one in engines:
        require_types(info.signature)
        one.bounds(info.signature)
    out = run.absolute().with_name(f"{run.absolute().name}-bundle") if out is None else Path(out)
    target = Path(os.path.realpath(out)) if out.is_symlink() else out
    require_replaceable(target)
    require_same_pattern(info.layers, wanted)
    if request.planned_dense is not None:
        require_in_plan(info.layers, request.planned_dense)
    return CheckedRequest(info=info, engines=engines, wanted=wanted, out=out, target=target)


def _require_fitting_steps(steps: Sequence[str], task: str) -> None:
    """Raise UsageError where a step means nothing behind a network of this task."""
    fitting = TASKS[task].postprocess if task in TASKS else None
    if fitting is None:
        return
    for step in steps:
        if step.partition(":")[0] not in fitting:
            forms = " or ".join("topk:K" if one == "topk" else one for one in fitting)
            raise UsageError(
                f"--postprocess {step} was given for a run of the task {task}"
                + (
                    ", whose outputs are no scores to choose by."
                    if not fitting
                    else ", which it does not fit."
                ),
                do=f"Use {forms}, or leave it out." if fitting else "Leave it out.",
            )


def _require_targets(targets: Sequence[str]) -> None:
    if isinstance(targets, str) or not targets:
        raise UsageError(
            f"The build targets are {targets!r}, not a list of target names.",
            do=f"Give a list of some of {', '.join(_TARGETS)}.",
        )
    for target in targets:
        if target not in _TARGETS:
            raise UnknownNameError("build target", target, _TARGETS)


def _engine_options(targets: Sequence[str], engines: Sequence[EngineOptions]) -> list[EngineOptions]:
    """The options of each target that is an engine, in the order of the targets."""
    by_target = {one.target: one for one in engines}
    wanted = [target for target in ENGINE_TARGETS if target in targets]
    if len(by_target) != len(engines) or by_target.keys() - set(wanted):
        raise UsageError(
            f"There are options for {', '.join(one.target for one in engines)}; "
            f"the targets are {', '.join(targets)}.",
            do="Give one value of options at most for each of these targets that is an engine.",
        )
    return [by_target.get(target) or EngineOptions(target=target) for target in wanted]
