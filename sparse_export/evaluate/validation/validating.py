"""Runs a bundle over the test set, on every runtime asked for, beside its run's network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from sparse_export.building import GOLDEN_INPUT, GOLDEN_OUTPUT
from sparse_export.errors import UnknownNameError, UsageError
from sparse_export.evaluate.validation.parity import golden, golden_parity, parity_by_batch, parity_of
from sparse_export.evaluate.validation.references import (
    BoolArray,
    against_dense,
    network_of_bundle,
    open_dense,
)
from sparse_export.evaluate.validation.result import AgainstDense, Parity, RuntimeResult, Validation
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import Bundle, open_bundle
from sparse_export.formats.run import Accuracy, DataInfo, ModelInfo
from sparse_export.runtimes import Session
from sparse_export.runtimes.choice import RUNTIMES, open_runtime, runtime_states
from sparse_export.runtimes.logits import Array, onnx_logits, session_logits, torch_logits
from sparse_export.runtimes.logits import accuracy as accuracy_of
from sparse_export.runtimes.probe import require_tried
from sparse_export.tasks import data
from sparse_export.tasks.labels import correct_predictions, require_labels, require_outputs
from sparse_export.trust import Given
from sparse_export.version import library_versions, now

__all__ = ["validate"]

_CPU = "onnxruntime-cpu"
TestSet = tuple[data.Inputs, np.ndarray[tuple[int, ...], np.dtype[np.int64]]]


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
    ArtefactError for files or test data other than those on record, UsageError (labels, or a network with one output,
    that give no top-1 accuracy, too), DataNotFound, NotTrustedError, and
    MissingCapability for a runtime that was named and cannot work here.
    """
    bundle = open_bundle(Path(bundle.path if isinstance(bundle, Bundle) else bundle))
    info = bundle.info
    _require_gate_possible(bundle, max_drop, against)
    if info.data is not None:
        require_outputs(
            info.model.n_classes,
            f"The network of {bundle.path}",
            do="Build it from a run without data, and compute the score of its task outside.",
        )
    names, not_run = _runtimes(bundle, runtimes, trust)
    require_tried(bundle, given=trust)
    for name in names:  # before the work, so that one that cannot be opened ends it at once
        open_runtime(bundle, name, n_threads=n_threads, trust=trust).close()
    dense = None if against is None else open_dense(bundle, Path(against), trust)
    network, run_missing = network_of_bundle(bundle, None if run is None else Path(run), trust)
    test = None if info.data is None else _test_set(info.data, info.model, data_dir)

    golden_pair = golden(bundle, GOLDEN_INPUT), golden(bundle, GOLDEN_OUTPUT)
    on_golden = golden_parity(bundle, n_threads=n_threads, trust=trust)
    if test is not None:
        on_cpu = _on_test_set(bundle, network, dense, test, n_threads)
    elif network is not None:
        on_cpu = _OnCpu(parity=_on_golden_input(bundle, network, golden_pair[0], n_threads))
    else:
        on_cpu = _OnCpu()
    batches = () if network is None else parity_by_batch(bundle, network, n_threads=n_threads)
    others = tuple(
        _by_runtime(
            open_runtime(bundle, name, n_threads=n_threads, trust=trust),
            bundle,
            golden_pair,
            test,
            on_cpu.logits,
            None
            if dense is None or on_cpu.dense_correct is None
            else partial(against_dense, dense, on_cpu.dense_correct),
        )
        for name in names
    )
    pairs = [(on_golden, on_cpu.parity), *((one.golden, one.parity) for one in others)]
    return Validation(
        bundle=str(bundle.path),
        onnx_sha256=sha256_file(bundle.onnx_path),
        data=None if info.data is None else info.data.name,
        accuracy=on_cpu.accuracy,
        torch_accuracy=on_cpu.torch_accuracy,
        recorded=info.accuracy,
        drop_points=_drop(bundle, on_cpu.accuracy),
        golden=on_golden,
        parity=on_cpu.parity,
        run_missing=run_missing,
        parity_ok=all(one.ok and (other is None or other.ok) for one, other in pairs)
        and all(one.ok for one in batches),
        batches=batches,
        runtimes=others,
        not_run=not_run,
        atol=info.atol,
        rtol=info.rtol,
        max_drop=max_drop,
        against=on_cpu.against,
        versions=library_versions(),
        created=now(),
    )


def _test_set(fact: DataInfo, model: ModelInfo, data_dir: str | Path | None) -> TestSet:
    """The test set of the run, its labels held against the outputs of the network."""
    inputs, labels = data.load_test_set(fact, model.input_shape, data_dir)
    of = f"the test set of {fact.name}"
    return inputs, require_labels(labels, n_samples=len(inputs), n_outputs=model.n_classes, of=of)


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


@dataclass(frozen=True, kw_only=True)
class _OnCpu:
    """What onnxruntime on the CPU made of the bundle; None where there is no test set, no run or no dense bundle.

    logits: on the test set.  dense_correct: which of its samples the dense bundle has right.
    """

    accuracy: Accuracy | None = None
    torch_accuracy: Accuracy | None = None
    parity: Parity | None = None
    against: AgainstDense | None = None
    logits: Array | None = None
    dense_correct: BoolArray | None = None


def _on_test_set(
    bundle: Bundle, network: nn.Module | None, dense: Bundle | None, test: TestSet, n_threads: int | None
) -> _OnCpu:
    """The bundle, its run's network and a dense bundle on the same samples."""
    inputs, labels = test
    logits = onnx_logits(bundle.onnx_path, inputs, n_threads=n_threads)
    correct = correct_predictions(logits, labels)
    torch_accuracy = parity = against = dense_correct = None
    if network is not None:
        wanted = torch_logits(network, inputs)
        torch_accuracy = accuracy_of(correct_predictions(wanted, labels))
        parity = parity_of(logits, wanted, bundle)
    if dense is not None:
        dense_logits = onnx_logits(dense.onnx_path, inputs, n_threads=n_threads)
        dense_correct = correct_predictions(dense_logits, labels)
        against = against_dense(dense, dense_correct, correct)
    return _OnCpu(
        accuracy=accuracy_of(correct),
        torch_accuracy=torch_accuracy,
        parity=parity,
        against=against,
        logits=logits,
        dense_correct=dense_correct,
    )


def _on_golden_input(bundle: Bundle, network: nn.Module, inputs: Array, n_threads: int | None) -> Parity:
    """The bundle against its run's network, where there is no test set."""
    found = onnx_logits(bundle.onnx_path, inputs, n_threads=n_threads)
    return parity_of(found, torch_logits(network, inputs), bundle)


def _by_runtime(
    session: Session,
    bundle: Bundle,
    golden_pair: tuple[Array, Array],
    test: TestSet | None,
    cpu_logits: Array | None,
    against: Callable[[BoolArray], AgainstDense] | None,
) -> RuntimeResult:
    """Run the golden input and the test set, then close the session. against: compares which answers are right."""
    with session:
        golden_input, golden_output = golden_pair
        on_golden = parity_of(session_logits(session, golden_input), golden_output, bundle)
        if test is None or cpu_logits is None:
            return RuntimeResult(name=session.name, golden=on_golden, parity=None, accuracy=None)
        inputs, labels = test
        logits = session_logits(session, inputs)
        correct = correct_predictions(logits, labels)
        accuracy = accuracy_of(correct)
        return RuntimeResult(
            name=session.name,
            golden=on_golden,
            parity=parity_of(logits, cpu_logits, bundle),
            accuracy=accuracy,
            drop_points=_drop(bundle, accuracy),
            against=None if against is None else against(correct),
        )


def _drop(bundle: Bundle, accuracy: Accuracy | None) -> float | None:
    """Percentage points below the record, None where either is not known."""
    recorded = bundle.info.accuracy
    return None if accuracy is None or recorded is None else recorded.percent - accuracy.percent
