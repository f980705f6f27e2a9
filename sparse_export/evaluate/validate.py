"""`validate`: whether a bundle still computes what its run did, on every runtime asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from sparse_export.errors import UnknownNameError, UsageError
from sparse_export.evaluate.evaluator import Scored, score, score_file, score_network
from sparse_export.evaluate.parity import golden_array, golden_parity_of_file, parity_by_batch, parity_of
from sparse_export.evaluate.references import against_dense, network_of_bundle, open_dense
from sparse_export.evaluate.validation import AgainstDense, Parity, RuntimeResult, Validation
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import GOLDEN_INPUT, GOLDEN_OUTPUT, Bundle, open_bundle
from sparse_export.runtimes import Session
from sparse_export.runtimes.choice import RUNTIMES, open_runtime, runtime_states
from sparse_export.runtimes.logits import session_logits, torch_logits
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.runtimes.probe import require_probed
from sparse_export.tasks.accuracy import drop_points, require_possible_drop
from sparse_export.tasks.labels import require_outputs
from sparse_export.tasks.samples import LabelledSamples, load_test_set
from sparse_export.trust import TrustedDigests
from sparse_export.version import library_versions, now

__all__ = ["validate"]

_CPU = "onnxruntime-cpu"
_SCORE_OUTSIDE = "Build it from a run without data, and compute the score of its task outside."


def validate(
    bundle: Bundle | str | Path,
    *,
    data_dir: str | Path | None = None,
    run: str | Path | None = None,
    max_drop: float | None = None,
    against: str | Path | None = None,
    n_threads: int | None = None,
    runtimes: Sequence[str] | None = None,
    trust: TrustedDigests = None,
) -> Validation:
    """Run the file that ships over the test set, by onnxruntime, and its network by PyTorch.

    Args:
        bundle: opened anew, every file checked by hash.
        data_dir: where the data sets lie.
        run: the run it was built from, where that is not at its path in the manifest any more.
        max_drop: percentage points that the accuracy, on every runtime that ran, may lie below the run's own
            record, and below the dense bundle.
        against: a dense bundle of the same data.
        n_threads: of onnxruntime.
        runtimes: that are to run it besides onnxruntime on the CPU; None for all that can here, of those that
            it has an engine for.
        trust: SHA-256 of a `run.json` whose factory may be imported, of manifests whose engines may be loaded
            and whose ONNX files need no process of their own to be tried in first.

    Returns:
        What was found; a missed gate is in it, for `check_gates` to raise.

    Raises:
        GateFailed: NaN in the logits.
        ArtefactError: files or test data other than those on record.
        UsageError: options without meaning; labels, or a network with one output, that give no top-1
            accuracy.
        DataNotFound: the data set is not there.
        NotTrustedError: nobody vouches for code that would be run.
        MissingCapability: a runtime that was named cannot work here.
    """
    bundle = open_bundle(Path(bundle.path if isinstance(bundle, Bundle) else bundle))
    info = bundle.info
    _require_gate_possible(bundle, max_drop, against)
    outputs_of, do = f"The network of {bundle.path}", _SCORE_OUTSIDE
    if info.data is not None:  # before the work
        require_outputs(info.signature.n_classes, outputs_of, do=do)
    names, not_run = _runtimes(bundle, runtimes, trust)
    require_probed(bundle, trusted=trust)
    for name in names:  # before the work, so that one that cannot be opened ends it at once
        open_runtime(bundle, name, n_threads=n_threads, trust=trust).close()
    dense = None if against is None else open_dense(bundle, Path(against), trust)
    network, run_missing = network_of_bundle(bundle, None if run is None else Path(run), trust)
    test = None
    if info.data is not None:
        test = load_test_set(info.data, info.signature, data_dir, network=outputs_of, do=do)

    with open_session(bundle.onnx_path, n_threads=n_threads) as session:
        on_golden = golden_parity_of_file(session, bundle)
        on_cpu = None if test is None else score(session, test, f"The ONNX file {bundle.onnx_path}")
        parity, in_torch = _beside_network(session, bundle, network, on_cpu, test)
        batches = () if network is None else parity_by_batch(session, bundle, network)
    dense_scored = None if dense is None or test is None else score_file(dense, test, n_threads)

    def minus_dense(scored: Scored | None) -> AgainstDense | None:
        if dense is None or dense_scored is None or scored is None:
            return None
        return against_dense(dense, dense_scored, scored)

    others = []
    for name in names:
        with open_runtime(bundle, name, n_threads=n_threads, trust=trust) as session:
            others.append(_by_runtime(session, bundle, test, on_cpu, minus_dense))
    parities = [on_golden, parity, *(one.golden for one in others), *(one.parity for one in others)]
    accuracy = None if on_cpu is None else on_cpu.accuracy
    return Validation(
        bundle=str(bundle.path),
        onnx_sha256=sha256_file(bundle.onnx_path),
        data=None if info.data is None else info.data.name,
        accuracy=accuracy,
        torch_accuracy=None if in_torch is None else in_torch.accuracy,
        recorded=info.accuracy,
        drop_points=drop_points(accuracy, info.accuracy),
        golden=on_golden,
        parity=parity,
        run_missing=run_missing,
        parity_ok=all(one.ok for one in (*parities, *batches) if one is not None),
        batches=batches,
        runtimes=tuple(others),
        not_run=not_run,
        atol=info.atol,
        rtol=info.rtol,
        max_drop=max_drop,
        against=minus_dense(on_cpu),
        versions=library_versions(),
        created=now(),
    )


def _by_runtime(
    session: Session,
    bundle: Bundle,
    test: LabelledSamples | None,
    on_cpu: Scored | None,
    minus_dense: Callable[[Scored | None], AgainstDense | None],
) -> RuntimeResult:
    """Another runtime than the CPU's on the golden input and the test set."""
    golden_logits = session_logits(session, golden_array(bundle, GOLDEN_INPUT))
    on_golden = parity_of(golden_logits, golden_array(bundle, GOLDEN_OUTPUT), bundle)
    if test is None or on_cpu is None:
        return RuntimeResult(name=session.name, golden=on_golden, parity=None, accuracy=None)
    scored = score(session, test)
    return RuntimeResult(
        name=session.name,
        golden=on_golden,
        parity=parity_of(scored.logits, on_cpu.logits, bundle),
        accuracy=scored.accuracy,
        drop_points=drop_points(scored.accuracy, bundle.info.accuracy),
        against=minus_dense(scored),
    )


def _beside_network(
    session: Session,
    bundle: Bundle,
    network: nn.Module | None,
    scored: Scored | None,
    test: LabelledSamples | None,
) -> tuple[Parity | None, Scored | None]:
    """The file against its run's network, on the test set or the golden input, and the network's score."""
    if network is None:
        return None, None
    if scored is None or test is None:
        inputs = golden_array(bundle, GOLDEN_INPUT)
        return parity_of(session_logits(session, inputs), torch_logits(network, inputs), bundle), None
    in_torch = score_network(network, test)
    return parity_of(scored.logits, in_torch.logits, bundle), in_torch


def _require_gate_possible(bundle: Bundle, max_drop: float | None, against: str | Path | None) -> None:
    require_possible_drop(max_drop)
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


def _runtimes(
    bundle: Bundle, wanted: Sequence[str] | None, trust: TrustedDigests
) -> tuple[list[str], dict[str, str]]:
    """The runtimes to run besides onnxruntime on the CPU, and why others are not."""
    if wanted is not None:
        for name in wanted:
            if name not in RUNTIMES:
                raise UnknownNameError("runtime", name, RUNTIMES)
        return [name for name in dict.fromkeys(wanted) if name != _CPU], {}
    targets = {engine.target for engine in bundle.info.engines}
    states = [one for one in runtime_states(bundle, trust=trust) if one.name in targets]
    return [one.name for one in states if one.problem is None], {
        one.name: one.problem for one in states if one.problem is not None
    }
