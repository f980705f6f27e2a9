"""What a build is asked for, and whether anything is known against it before the weights are looked at."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_export.building.model_files import require_form
from sparse_export.building.patterns import require_in_plan, require_no_other_promise, wanted_pattern
from sparse_export.building.replaceable import require_replaceable
from sparse_export.engines.dry_run import require_timeable
from sparse_export.engines.options import EngineOptions, Precision, require_buildable
from sparse_export.engines.tensorrt_import import TARGETS as ENGINE_TARGETS
from sparse_export.errors import UnknownNameError, UsageError
from sparse_export.formats.run import RunInfo, open_run
from sparse_export.graph.passes.fit_pattern import Gather
from sparse_export.sparsity.pattern import NMPattern

__all__ = ["BuildRequest", "PossibleBuild", "possible_build"]

_TARGETS = ("onnx", *ENGINE_TARGETS)


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What a build is asked for; `sparse_export.building.build` says what each means, and has the defaults."""

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


@dataclass(frozen=True, kw_only=True)
class PossibleBuild:
    """A build that nothing is known against.

    info: of the run.  engines: of every target that is one.  out: the bundle.  target: the same, links followed.
    """

    info: RunInfo
    engines: list[EngineOptions]
    wanted: NMPattern | None
    out: Path
    target: Path


def possible_build(run: Path, out: str | Path | None, asked: BuildRequest) -> PossibleBuild:
    """The build of a run's folder as it was asked for; raises whatever the request and the run's record are refused for."""
    _require_targets(asked.targets)
    engines = _engine_options(asked.targets, asked.engines)
    for one in engines:
        require_buildable(asked.precision, one.architectures)
    if asked.time_layers:
        require_timeable(engines)
    require_form(asked.onnx)
    wanted = wanted_pattern(asked.pattern, asked.max_cut, asked.gather)
    if asked.planned_dense is not None and str(wanted) != "2:4":
        raise UsageError(
            f"A plan was given, and the pattern {wanted}.",
            expected="2:4 was expected: a plan decides which layers are worth that.",
            do="Ask for 2:4, or leave the plan out.",
        )
    info = open_run(run).info
    out = run.absolute().with_name(f"{run.absolute().name}-bundle") if out is None else Path(out)
    target = Path(os.path.realpath(out)) if out.is_symlink() else out
    require_replaceable(target)
    require_no_other_promise(info.layers, wanted)
    if asked.planned_dense is not None:
        require_in_plan(info.layers, asked.planned_dense)
    return PossibleBuild(info=info, engines=engines, wanted=wanted, out=out, target=target)


def _require_targets(targets: Sequence[str]) -> None:
    if isinstance(targets, str) or not targets:
        raise UsageError(
            f"The build targets are {targets!r}.",
            expected=f"A list of some of {', '.join(_TARGETS)} was expected.",
        )
    for target in targets:
        if target not in _TARGETS:
            raise UnknownNameError("build target", target, _TARGETS)


def _engine_options(targets: Sequence[str], engines: Sequence[EngineOptions]) -> list[EngineOptions]:
    """The options of each target that is an engine, in the order of the targets."""
    given = {one.target: one for one in engines}
    wanted = [target for target in ENGINE_TARGETS if target in targets]
    if len(given) != len(engines) or given.keys() - set(wanted):
        raise UsageError(
            f"There are options for {', '.join(one.target for one in engines)}.",
            expected=f"At most one for each engine target of {', '.join(targets)} was expected.",
        )
    return [given.get(target) or EngineOptions(target=target) for target in wanted]
