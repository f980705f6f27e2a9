"""Measures whether a bundle still computes what its run did: accuracy, and difference from PyTorch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from sparse_export import data
from sparse_export.artefact import (
    RUN_FILE,
    Accuracy,
    Bundle,
    Run,
    library_versions,
    now,
    open_bundle,
    open_run,
)
from sparse_export.building import GOLDEN_INPUT, GOLDEN_OUTPUT, MODEL_FILE, network_of_run
from sparse_export.errors import ArtefactError, GateFailed, UnknownNameError, UsageError
from sparse_export.files import sha256_file, write_json
from sparse_export.fitting import orders_of_bundle
from sparse_export.graph.lossless import replay
from sparse_export.measure.statistics import paired_accuracy_difference
from sparse_export.runtime import Session
from sparse_export.runtime.choice import RUNTIMES, open_runtime, runtime_states
from sparse_export.runtime.logits import Array, onnx_logits, session_logits, torch_logits
from sparse_export.runtime.logits import accuracy as accuracy_of
from sparse_export.runtime.tolerance import outside_tolerance, spread
from sparse_export.runtime.trial import require_tried
from sparse_export.trust import Given

__all__ = [
    "AgainstDense",
    "Parity",
    "RuntimeResult",
    "Validation",
    "check_gates",
    "golden_parity",
    "run_of_bundle",
    "validate",
    "write_results",
]

RESULT_FILE = "validation.json"
_CPU = "onnxruntime-cpu"
BoolArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far the ONNX file is from PyTorch on the same samples.

    max_relative_difference: the largest absolute one by the spread of the logits that it is held against, their
    standard deviation.
    top1_agreement: share of samples with the same largest logit.
    """

    n_samples: int
    max_abs_difference: float
    max_relative_difference: float
    top1_agreement: float
    ok: bool


@dataclass(frozen=True, kw_only=True)
class AgainstDense:
    """Accuracy of the bundle minus that of a dense one on the same samples, in percentage points.

    accuracy: of the dense one, by onnxruntime on the CPU, whatever runs the bundle.
    low, high: paired 95 % interval.  mcnemar_p: of McNemar's exact test.
    """

    path: str
    onnx_sha256: str
    accuracy: Accuracy
    points: float
    low: float
    high: float
    mcnemar_p: float


@dataclass(frozen=True, kw_only=True)
class RuntimeResult:
    """What another runtime than onnxruntime on the CPU made of the bundle.

    name: as the session has it.  golden: against the stored outputs.  parity: against onnxruntime on the CPU, on the
    test set; None, as accuracy, where there is none.  drop_points: recorded minus accuracy.  against: what this runtime
    made of the bundle against the dense one.
    """

    name: str
    golden: Parity
    parity: Parity | None
    accuracy: Accuracy | None
    drop_points: float | None = None
    against: AgainstDense | None = None


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What validating a bundle found. A gate that failed is told by `check_gates`.

    accuracy: of the ONNX file; torch_accuracy: of the network of its run; recorded: what the run reported.
    The three are None where there is no test set, no run, or no record.  drop_points: recorded minus accuracy,
    in percentage points.  parity: None when the run was not there; run_missing then says what was looked for,
    and parity_ok rests on the golden pair alone.  runtimes: the others that ran it; not_run: those that
    could not, and why.  max_drop: the gate, in percentage points, None for none.
    """

    bundle: str
    onnx_sha256: str
    data: str | None
    accuracy: Accuracy | None
    torch_accuracy: Accuracy | None
    recorded: Accuracy | None
    drop_points: float | None
    golden: Parity
    parity: Parity | None
    run_missing: str | None
    parity_ok: bool
    atol: float
    rtol: float
    max_drop: float | None
    against: AgainstDense | None
    versions: dict[str, str]
    created: str
    runtimes: tuple[RuntimeResult, ...] = ()
    not_run: dict[str, str] = field(default_factory=dict)
    kind: str = "validation"
    schema_version: int = 1

    def __str__(self) -> str:
        rows = [("bundle", self.bundle), ("test data", self.data or "none")]
        for label, accuracy in (
            ("accuracy, ONNX", self.accuracy),
            ("accuracy, PyTorch", self.torch_accuracy),
            ("accuracy, recorded", self.recorded),
        ):
            rows.append((label, _accuracy_text(accuracy)))
        if self.drop_points is not None:
            rows.append(("drop from recorded", f"{self.drop_points:+.3f} points"))
        rows.append(("golden pair", _parity_text(self.golden)))
        rows.append(("against PyTorch", _parity_text(self.parity) if self.parity else "not compared"))
        if self.run_missing is not None:
            rows.append(("", f"{self.run_missing} Parity rests on the golden pair alone."))
        if self.against is not None:
            rows.append(("accuracy, dense", _accuracy_text(self.against.accuracy)))
            rows.append(("minus dense", _against_text(self.against)))
        for one in self.runtimes:
            rows.append((one.name, f"accuracy {_accuracy_text(one.accuracy)}"))
            rows.append(("", f"golden pair {_parity_text(one.golden)}"))
            if one.parity is not None:
                rows.append(("", f"against onnxruntime-cpu {_parity_text(one.parity)}"))
            if one.against is not None:
                rows.append(("", f"minus dense {_against_text(one.against)}"))
        rows += [(name, f"not run: {why}") for name, why in self.not_run.items()]
        failed = _failures(self)
        if self.max_drop is not None:
            rows.append(("gate", f"at most {self.max_drop:g} points lost"))
        rows.append(("result", "; ".join(failed) if failed else "passed"))
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {text}".rstrip() for label, text in rows)


def _accuracy_text(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return "not known"
    return f"{accuracy.percent:.3f} % ({accuracy.n_correct}/{accuracy.n_samples})"


def _against_text(against: AgainstDense) -> str:
    interval = f"[{against.low:+.3f}, {against.high:+.3f}]"
    return f"{against.points:+.3f} points, 95 % interval {interval}, McNemar p {against.mcnemar_p:.3g}"


def _parity_text(parity: Parity) -> str:
    return (
        f"{'within' if parity.ok else 'OUTSIDE'} tolerance: max difference {parity.max_abs_difference:.3g} "
        f"({parity.max_relative_difference:.3g} of the logits' spread), "
        f"same answer for {100 * parity.top1_agreement:.3f} % of {parity.n_samples}"
    )


def validate(
    bundle: Bundle | str | Path,
    *,
    data_dir: str | Path | None = None,
    run: str | Path | None = None,
    max_drop: float | None = None,
    against: str | Path | None = None,
    n_threads: int | None = None,
    runtimes: Sequence[str] | None = None,
    trust: Given = None,
) -> Validation:
    """Run the file that ships over the test set, by onnxruntime, and its network by PyTorch.

    bundle: opened anew, every file checked by hash.  data_dir: where the data sets lie.  run: the run it was
    built from, where that is not at its path in the manifest any more.  max_drop: percentage points that the
    accuracy, on every runtime that ran, may lie below the run's own record, and below the dense bundle.  against: a dense bundle of the
    same data.  n_threads: of onnxruntime.  runtimes: that are to run it besides
    onnxruntime on the CPU; None for all that can here, of those that it has an engine for and onnxruntime's.
    trust: SHA-256 of a `run.json` whose factory may be imported, of manifests whose engines may be loaded and whose
    ONNX files need no process of their own to be tried in first.

    A missed gate is in the result, for `check_gates` to raise. Raises GateFailed for NaN in the logits,
    ArtefactError for files or test data other than those on record, UsageError, DataNotFound, NotTrustedError, and
    MissingCapability for a runtime that was named and cannot work here.
    """
    bundle = open_bundle(Path(bundle.path if isinstance(bundle, Bundle) else bundle))
    info = bundle.info
    _require_listed(bundle)
    _require_gate_possible(bundle, max_drop, against)
    names, not_run = _runtimes(bundle, runtimes, trust)
    require_tried(bundle, given=trust)
    for name in names:  # before the work, so that one that cannot be opened ends it at once
        open_runtime(bundle, name, n_threads=n_threads, trust=trust).close()
    dense = None if against is None else _open_dense(bundle, Path(against), trust)
    network, run_missing = _network(bundle, None if run is None else Path(run), trust)
    test = None if info.data is None else data.load_test_set(info.data, info.model.input_shape, data_dir)

    golden_input, golden_output = (_golden(bundle, name) for name in (GOLDEN_INPUT, GOLDEN_OUTPUT))
    golden = golden_parity(bundle, n_threads=n_threads, trust=trust)
    accuracy = torch_accuracy = parity = difference = logits = dense_correct = None
    if test is not None and info.data is not None:
        inputs, labels = test
        logits = onnx_logits(bundle.onnx_path, inputs, n_threads=n_threads)
        correct = logits.argmax(axis=1) == labels
        accuracy = accuracy_of(correct)
        if network is not None:
            wanted = torch_logits(network, inputs)
            torch_accuracy = accuracy_of(wanted.argmax(axis=1) == labels)
            parity = _parity(logits, wanted, bundle)
        if dense is not None:
            dense_logits = onnx_logits(dense.onnx_path, inputs, n_threads=n_threads)
            dense_correct = dense_logits.argmax(axis=1) == labels
            difference = _against(dense, dense_correct, correct)
    elif network is not None:
        parity = _parity(
            onnx_logits(bundle.onnx_path, golden_input, n_threads=n_threads),
            torch_logits(network, golden_input),
            bundle,
        )
    others = tuple(
        _by_runtime(
            open_runtime(bundle, name, n_threads=n_threads, trust=trust),
            bundle,
            golden_input,
            golden_output,
            test,
            logits,
            None if dense is None or dense_correct is None else partial(_against, dense, dense_correct),
        )
        for name in names
    )
    return Validation(
        bundle=str(bundle.path),
        onnx_sha256=sha256_file(bundle.onnx_path),
        data=None if info.data is None else info.data.name,
        accuracy=accuracy,
        torch_accuracy=torch_accuracy,
        recorded=info.accuracy,
        drop_points=_drop(bundle, accuracy),
        golden=golden,
        parity=parity,
        run_missing=run_missing,
        parity_ok=golden.ok
        and (parity is None or parity.ok)
        and all(one.golden.ok and (one.parity is None or one.parity.ok) for one in others),
        runtimes=others,
        not_run=not_run,
        atol=info.atol,
        rtol=info.rtol,
        max_drop=max_drop,
        against=difference,
        versions=library_versions(),
        created=now(),
    )


def _runtimes(bundle: Bundle, wanted: Sequence[str] | None, trust: Given) -> tuple[list[str], dict[str, str]]:
    """The runtimes to run besides onnxruntime on the CPU, and why others are not."""
    if wanted is not None:
        for name in wanted:
            if name not in RUNTIMES:
                raise UnknownNameError("runtime", name, RUNTIMES)
        return [name for name in dict.fromkeys(wanted) if name != _CPU], {}
    targets = {fact.target for fact in bundle.info.engines}
    states = [one for one in runtime_states(bundle, trust=trust) if one.name in targets]
    return [one.name for one in states if one.problem is None], {
        one.name: one.problem for one in states if one.problem is not None
    }


def _by_runtime(
    session: Session,
    bundle: Bundle,
    golden_input: Array,
    golden_output: Array,
    test: tuple[data.Inputs, np.ndarray[tuple[int, ...], np.dtype[np.int64]]] | None,
    cpu_logits: Array | None,
    against: Callable[[BoolArray], AgainstDense] | None,
) -> RuntimeResult:
    """Run the golden input and the test set, then close the session. against: compares which answers are right."""
    with session:
        golden = _parity(session_logits(session, golden_input), golden_output, bundle)
        if test is None or cpu_logits is None:
            return RuntimeResult(name=session.name, golden=golden, parity=None, accuracy=None)
        inputs, labels = test
        logits = session_logits(session, inputs)
        correct = logits.argmax(axis=1) == labels
        accuracy = accuracy_of(correct)
        return RuntimeResult(
            name=session.name,
            golden=golden,
            parity=_parity(logits, cpu_logits, bundle),
            accuracy=accuracy,
            drop_points=_drop(bundle, accuracy),
            against=None if against is None else against(correct),
        )


def _drop(bundle: Bundle, accuracy: Accuracy | None) -> float | None:
    """Percentage points below the record, None where either is not known."""
    recorded = bundle.info.accuracy
    return None if accuracy is None or recorded is None else recorded.percent - accuracy.percent


def _require_listed(bundle: Bundle) -> None:
    for name in (MODEL_FILE, GOLDEN_INPUT, GOLDEN_OUTPUT):
        if name not in bundle.info.files:
            raise ArtefactError(
                f"The manifest of {bundle.path} lists no {name}.",
                expected="Its hash was expected, so that the file can be checked.",
                do="Build the bundle again.",
            )


def _require_gate_possible(bundle: Bundle, max_drop: float | None, against: str | Path | None) -> None:
    if max_drop is not None and not (math.isfinite(max_drop) and max_drop >= 0):
        raise UsageError(
            f"The largest drop is {max_drop!r}.",
            expected="A number of percentage points, 0 or more, was expected.",
        )
    if bundle.info.data is None and (max_drop is not None or against is not None):
        raise UsageError(
            f"{bundle.path} names no data set, so its accuracy cannot be measured.",
            expected="A bundle of a run with a data set was expected.",
            do="Leave --max-drop and --against away.",
        )
    if max_drop is not None and bundle.info.accuracy is None and against is None:
        raise UsageError(
            f"{bundle.path} has no recorded accuracy to compare with.",
            expected="A run with a test accuracy, or a dense bundle, was expected.",
            do="Leave --max-drop away, or give --against.",
        )


def _open_dense(bundle: Bundle, path: Path, trust: Given) -> Bundle:
    dense = open_bundle(path)
    _require_listed(dense)
    ours, theirs = bundle.info.data, dense.info.data
    if ours is None or theirs is None or ours.test_sha256 != theirs.test_sha256:
        raise UsageError(
            f"{path} was made with the test data of {theirs.name if theirs else 'no data set'}.",
            expected=f"The test data of {ours.name if ours else 'no data set'} were expected, the very same samples.",
            do="Give a dense bundle of the same data.",
        )
    require_tried(dense, given=trust)
    return dense


def run_of_bundle(bundle: Bundle, given: Path | None = None) -> Run | None:
    """The run that a bundle was built from, checked by hash; None where it is no longer at its path in the manifest.

    given: where it is now; then it must be there. Raises UsageError or ArtefactError (changed, or another run).
    """
    reference = bundle.info.run
    path = Path(reference.path) if given is None else given
    # Path.is_file raises for a folder that may not be entered.
    if given is None and not os.path.isfile(path / RUN_FILE):  # noqa: PTH113
        return None
    run: Run = open_run(path)
    found = sha256_file(path / RUN_FILE)
    if found != reference.run_sha256:
        raise ArtefactError(
            f"{path} is not the run that {bundle.path} was built from: its {RUN_FILE} has SHA-256 {found}.",
            expected=f"{reference.run_sha256} was expected.",
            do="Give the right one with --run, or build the bundle again.",
        )
    return run


def _network(bundle: Bundle, given: Path | None, trust: Given) -> tuple[nn.Module | None, str | None]:
    """The network of the run, or why there is none. A run that was asked for by path must be there."""
    run = run_of_bundle(bundle, given)
    if run is None:
        return None, f"The run {Path(bundle.info.run.path)} is no longer there."
    if run.info.model.name is None:
        return None, f"The run {run.path} does not tell how its network is made."
    network = network_of_run(run, given=trust)
    if bundle.info.fitted is not None and any(layer.n_cut for layer in bundle.info.fitted.layers):
        replay(network, orders_of_bundle(bundle))  # else it is the same function
    return network, None


def golden_parity(bundle: Bundle, *, n_threads: int | None = None, trust: Given = None) -> Parity:
    """The ONNX file by onnxruntime on the CPU against the stored answer, after `require_tried`.

    Raises GateFailed (NaN, or logits of another shape) or ArtefactError."""
    require_tried(bundle, given=trust)
    golden_input, golden_output = (_golden(bundle, name) for name in (GOLDEN_INPUT, GOLDEN_OUTPUT))
    try:
        found = onnx_logits(bundle.onnx_path, golden_input, n_threads=n_threads)
    except UsageError as cause:
        raise ArtefactError(
            f"{bundle.path / GOLDEN_INPUT} does not fit {bundle.onnx_path}. {cause.what}",
            expected=cause.expected,
            do="Build the bundle again.",
        ) from cause
    return _parity(found, golden_output, bundle)


def _golden(bundle: Bundle, name: str) -> Array:
    try:
        array: Array = np.load(bundle.path / name, allow_pickle=False)
    except (ValueError, EOFError, OSError) as cause:
        raise ArtefactError(
            f"{bundle.path / name} cannot be read: {cause}.",
            expected="A NumPy array was expected.",
            do="Rebuild it.",
        ) from cause
    return array


def _parity(found: Array, wanted: Array, bundle: Bundle) -> Parity:
    if found.shape != wanted.shape:
        raise GateFailed(
            f"{bundle.onnx_path} gives logits {found.shape}.", expected=f"{wanted.shape} was expected."
        )
    largest, outside = outside_tolerance(found, wanted, atol=bundle.info.atol, rtol=bundle.info.rtol)
    whole = spread(wanted)
    return Parity(
        n_samples=len(wanted),
        max_abs_difference=largest,
        max_relative_difference=largest / whole if whole else 0.0,
        top1_agreement=float((found.argmax(axis=1) == wanted.argmax(axis=1)).mean()),
        ok=not outside,
    )


def _against(dense: Bundle, dense_correct: BoolArray, correct: BoolArray) -> AgainstDense:
    difference = paired_accuracy_difference(dense_correct, correct)
    return AgainstDense(
        path=str(dense.path),
        onnx_sha256=sha256_file(dense.onnx_path),
        accuracy=accuracy_of(dense_correct),
        points=difference.points,
        low=difference.low,
        high=difference.high,
        mcnemar_p=difference.mcnemar_p,
    )


def check_gates(validation: Validation) -> None:
    """Raise GateFailed, with the figures, when parity or a drop in accuracy is not within its bounds."""
    failed = _failures(validation)
    if failed:
        raise GateFailed(
            f"{validation.bundle}: {'; '.join(failed)}.",
            expected="Every gate was expected to hold.",
            do="Do not ship this bundle before the cause is known.",
        )


def _failures(validation: Validation) -> list[str]:
    failed = []
    checks = [("the golden pair", validation.golden), ("PyTorch", validation.parity)]
    for one in validation.runtimes:
        checks += [
            (f"the golden pair on {one.name}", one.golden),
            (f"onnxruntime-cpu on {one.name}", one.parity),
        ]
    for label, parity in checks:
        if parity is not None and not parity.ok:
            failed.append(
                f"the logits differ from {label} by {parity.max_abs_difference:.3g}, more than "
                f"{validation.atol:g} + {validation.rtol:g} * the logits' spread"
            )
    if validation.max_drop is None:
        return failed
    failed += _lost("", validation.drop_points, validation.against, validation.max_drop)
    for one in validation.runtimes:
        failed += _lost(f" on {one.name}", one.drop_points, one.against, validation.max_drop)
    return failed


def _lost(where: str, drop: float | None, against: AgainstDense | None, allowed: float) -> list[str]:
    """What is to be said of accuracy that was lost. where: on which runtime, in words."""
    failed = []
    if drop is not None and _exceeds(drop, allowed):
        failed.append(f"accuracy{where} is {drop:.3f} points below the recorded one, more than {allowed:g}")
    if against is not None and _exceeds(-against.points, allowed):
        failed.append(
            f"accuracy{where} is {-against.points:.3f} points below the dense bundle's, more than "
            f"{allowed:g} (95 % interval of sparse minus dense {against.low:+.3f} to {against.high:+.3f})"
        )
    return failed


def _exceeds(lost: float, allowed: float) -> bool:
    """Is more lost than allowed, by more than rounding of the percentages?"""
    return lost > allowed + 1e-9


def write_results(folder: str | Path, validation: Validation) -> Path:
    """Write `validation.json` into a folder, made when absent; gives its path. Raises OutputError."""
    path = Path(folder) / RESULT_FILE
    write_json(path, asdict(validation))
    return path
