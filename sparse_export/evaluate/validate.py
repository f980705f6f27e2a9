"""`validate`: whether a bundle still computes what its run did, on every runtime asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from sparse_export.engines.tensorrt_import import TARGETS
from sparse_export.errors import UnknownNameError, UsageError
from sparse_export.evaluate.evaluator import Scored, score, score_each
from sparse_export.evaluate.parity import (
    golden_inputs,
    golden_parity,
    golden_parity_of,
    parity_by_batch,
    parity_of,
)
from sparse_export.evaluate.references import (
    against_dense,
    open_dense,
    reference_of_bundle,
    run_of_bundle,
)
from sparse_export.evaluate.test_set import is_scored, judge_of, require_possible_task, task_of, test_set_of
from sparse_export.evaluate.unlabelled import Unlabelled, unlabelled
from sparse_export.evaluate.validation import AgainstDense, Parity, RuntimeResult, Validation
from sparse_export.evaluate.vouching import code_of_bundle, require_vouched
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import Bundle, open_bundle
from sparse_export.formats.score import Score
from sparse_export.runtimes import Session
from sparse_export.runtimes.choice import RUNTIMES, open_runtime, runtime_states
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.runtimes.outputs import output_batches, outputs_of
from sparse_export.runtimes.probe import require_probed
from sparse_export.tasks.agreement import Agreement, agreement_of
from sparse_export.tasks.data.picture_settings import PictureSettings
from sparse_export.tasks.samples import ArraySamples, LabelledSamples
from sparse_export.tasks.scores import MaxDrop, drop_of, require_possible_drop
from sparse_export.tasks.task import Task
from sparse_export.trust import TrustedDigests, is_vouched_for
from sparse_export.version import library_versions, now

__all__ = ["validate"]

_CPU = "onnxruntime-cpu"


def validate(
    bundle: Bundle | str | Path,
    *,
    data_dir: str | Path | None = None,
    run: str | Path | None = None,
    max_drop: MaxDrop | None = None,
    against: str | Path | None = None,
    inputs: str | Path | None = None,
    n_threads: int | None = None,
    runtimes: Sequence[str] | None = None,
    trust: TrustedDigests = None,
    task: str | None = None,
    data: str | None = None,
    pictures: PictureSettings | None = None,
) -> Validation:
    """Run the file that ships over the test set, by onnxruntime, and its network by PyTorch.

    A network that was only ever an ONNX file is run by onnxruntime, as the graph of its run.

    Args:
        bundle: opened anew, every file checked by hash.
        data_dir: where the data sets lie.
        run: the run it was built from, where that is not at its path in the manifest any more.
        max_drop: how much worse the score may be on every runtime that ran than the one on record (of a
            sparsified network that of its dense one), and than that of the dense bundle: in percentage points
            of a share, in the unit of any other score, or like `2%` as a share of it; of agreement, how far
            it may lie below 100.
        against: a dense bundle of the same data. Where the bundle names none, the outputs of both are
            compared, and their agreement is the score.
        inputs: file or folder of inputs for that, as `sparsify` takes them; None for the golden ones.
        n_threads: of onnxruntime.
        runtimes: that are to run it besides onnxruntime on the CPU; None for all that can here, of those that
            it has an engine for.
        trust: SHA-256 of a `run.json` whose factory may be imported, of manifests whose engines may be loaded
            and whose ONNX files need no process of their own to be tried in first.
        task: what the network is for, `package.module:task` of the caller's own code or a name of
            `sparse_export.tasks.TASKS`; None for what the bundle says.
        data: samples to score it on in place of those on record, see
            `sparse_export.evaluate.test_set.test_set_of`; nothing on record is then compared with.
        pictures: as of `test_set_of`.

    Returns:
        What was found; a missed gate is in it, for `check_gates` to raise.

    Raises:
        GateFailed: NaN in the logits.
        ArtefactError: files or test data other than those on record.
        UsageError: options without meaning; a network or targets that do not fit the task.
        DataNotFound: the data set is not there.
        NotTrustedError: nobody vouches for code that would be run.
        MissingCapability: a runtime that was named cannot work here.
    """
    bundle = open_bundle(Path(bundle.path if isinstance(bundle, Bundle) else bundle))
    info = bundle.info
    on_record = data in (None, info.data and info.data.name) and task in (None, info.task.name)
    recorded = info.reference_score if on_record else None
    _require_gate_possible(bundle, max_drop, against, recorded, data)
    _require_inputs_of_use(bundle, inputs, against, data)
    brought = code_of_bundle(bundle, engines=bool(set(runtimes or ()) & set(TARGETS)), task=task, data=data)
    if not all(is_vouched_for(one.sha256, trusted=trust) for one in brought):  # all that is needed, at once
        require_vouched(brought, run_of_bundle(bundle, None if run is None else Path(run)), trust)
    judge = judge_of(bundle, task, data)
    if judge is not None and against is None:
        raise UsageError(
            f"{bundle.path} names no data set with test samples to score the task {task} on.",
            do="Give --data npz:FILE or package.module:data, or a dense bundle by --against, whose outputs "
            "are then the targets.",
        )
    if is_scored(bundle, data):  # before the work
        require_possible_task(bundle, task_of(bundle, task, trust))
    names, not_run = _runtimes(bundle, runtimes, trust)
    require_probed(bundle, trusted=trust)
    for name in names:  # before the work, so that one that cannot be opened ends it at once
        open_runtime(bundle, name, n_threads=n_threads, trust=trust).close()
    dense = None if against is None else open_dense(bundle, Path(against), trust)
    with contextlib.ExitStack() as stack:
        reference, run_missing = reference_of_bundle(bundle, None if run is None else Path(run), trust)
        if reference is not None:
            stack.enter_context(reference)
        test = test_set_of(bundle, task=task, data=data, data_dir=data_dir, trust=trust, pictures=pictures)
        unlabelled_one = None
        if test is None and (dense is not None or inputs is not None):
            unlabelled_one = unlabelled(bundle, inputs)
        session = stack.enter_context(
            open_session(
                bundle.onnx_path,
                signature=info.signature,
                inner=info.inner_values,
                n_threads=n_threads,
            )
        )
        if not info.postprocess:
            on_golden = golden_parity_of(session, bundle, who=f"The ONNX file {bundle.onnx_path}")
        else:  # with the outputs that were appended, which are no part of a score
            on_golden = golden_parity(bundle, n_threads=n_threads, trust=trust)
        of_dense = None
        if dense is not None:
            of_dense = open_session(dense.onnx_path, signature=dense.info.signature, n_threads=n_threads)
            stack.enter_context(of_dense)
        on_cpu, in_network, dense_scored = _scores(session, bundle, reference, of_dense, test)
        parity = _beside_network(session, bundle, reference, on_cpu, in_network)
        batches = () if reference is None else parity_by_batch(session, bundle, reference)
        held = _Held(bundle, dense, dense_scored, of_dense, unlabelled_one, judge)
        others = []
        for name in names:
            with open_runtime(bundle, name, n_threads=n_threads, trust=trust) as other:
                others.append(_by_runtime(other, bundle, test, on_cpu, held, recorded))
        against_dense_one, agreement = held.minus_dense(on_cpu), held.agreement(session)
    parities = [on_golden, parity, *(one.golden for one in others), *(one.parity for one in others)]
    found = None if on_cpu is None else on_cpu.score
    return Validation(
        bundle=str(bundle.path),
        onnx_sha256=sha256_file(bundle.onnx_path),
        data=data or (None if info.data is None else info.data.name),
        task=None if test is None else test.task.name,
        score=found,
        torch_score=None if in_network is None else in_network.score,
        recorded=recorded,
        recorded_of_dense=recorded is not None and recorded is not info.score,
        drop=drop_of(found, recorded),
        golden=on_golden,
        parity=parity,
        run_missing=run_missing,
        parity_ok=all(one.ok for one in (*parities, *batches) if one is not None),
        batches=batches,
        runtimes=tuple(others),
        not_run=not_run,
        network_form=info.model.form,
        atol=info.atol,
        rtol=info.rtol,
        rms=info.rms,
        max_drop=max_drop,
        against=against_dense_one,
        agreement=agreement,
        versions=library_versions(),
        created=now(),
    )


class _Held:
    """The dense bundle that others are held against: its score, or its open session where there is none."""

    def __init__(
        self,
        bundle: Bundle,
        dense: Bundle | None,
        scored: Scored | None,
        session: Session | None,
        unlabelled: Unlabelled | None,
        judge: Task | None,
    ) -> None:
        self._bundle, self._dense, self._unlabelled = bundle, dense, unlabelled
        self._scored, self._session, self._judge = scored, session, judge

    def minus_dense(self, scored: Scored | None) -> AgainstDense | None:
        if self._dense is None or self._scored is None or scored is None:
            return None
        return against_dense(self._dense, self._scored, scored)

    def agreement(self, session: Session) -> Agreement | None:
        """Of a session of the bundle with the dense one; None where there are labels, or no dense one."""
        if self._session is None or self._unlabelled is None:
            return None
        samples = self._unlabelled.samples
        dense = output_batches(self._session, samples, who="The dense network", beside=session)
        sparse = output_batches(session, samples, beside=self._session)
        pairs = ((a, b) for (_, a), (_, b) in zip(dense, sparse, strict=True))
        signature, words = self._bundle.info.signature, self._unlabelled.words
        return agreement_of(pairs, signature, inputs=words, judge=self._judge)


def _by_runtime(
    session: Session,
    bundle: Bundle,
    test: LabelledSamples | None,
    on_cpu: Scored | None,
    held: _Held,
    recorded: Score | None,
) -> RuntimeResult:
    """Another runtime than the CPU's on the golden input and the test set."""
    on_golden = golden_parity_of(session, bundle)
    if test is None or on_cpu is None:
        return RuntimeResult(
            name=session.name,
            golden=on_golden,
            parity=None,
            score=None,
            agreement=held.agreement(session),
        )
    scored = score(session, test)
    return RuntimeResult(
        name=session.name,
        golden=on_golden,
        parity=parity_of(scored.outputs, on_cpu.outputs, bundle),
        score=scored.score,
        drop=drop_of(scored.score, recorded),
        against=held.minus_dense(scored),
    )


def _scores(
    session: Session,
    bundle: Bundle,
    reference: Session | None,
    of_dense: Session | None,
    test: LabelledSamples | None,
) -> tuple[Scored | None, Scored | None, Scored | None]:
    """The scores of the file, of its run's network and of the dense file; every sample is read once."""
    if test is None:
        return None, None, None
    named = {
        f"The ONNX file {bundle.onnx_path}": session,
        "The network of the run": reference,
        "The dense bundle": of_dense,
    }
    there = {who: one for who, one in named.items() if one is not None}
    found = dict(zip(there, score_each(there, test), strict=True))
    on_cpu, in_network, dense = (found.get(who) for who in named)
    return on_cpu, in_network, dense


def _beside_network(
    session: Session,
    bundle: Bundle,
    reference: Session | None,
    scored: Scored | None,
    in_network: Scored | None,
) -> Parity | None:
    """The file against its run's network, on the test set or the golden input."""
    if reference is None:
        return None
    if scored is None or in_network is None:
        samples = ArraySamples(feeds=golden_inputs(bundle), signature=bundle.info.signature)
        wanted = outputs_of(reference, samples, who="The network of the run")
        fixed = {name: one for name, one in wanted.items() if name in bundle.info.golden.outputs}
        return parity_of(outputs_of(session, samples), fixed, bundle)
    return parity_of(scored.outputs, in_network.outputs, bundle)


def _require_gate_possible(
    bundle: Bundle,
    max_drop: MaxDrop | None,
    against: str | Path | None,
    recorded: Score | None,
    data: str | None,
) -> None:
    require_possible_drop(max_drop)
    if max_drop is None or against is not None:
        return
    if not is_scored(bundle, data):
        raise UsageError(
            f"{bundle.path} names no data set with test samples, so nothing tells what is lost.",
            expected="A dense bundle was expected, whose outputs its own are held against.",
            do="Give --against DENSE, samples with targets by --data and --task, or leave --max-drop away.",
        )
    if recorded is None:
        raise UsageError(
            f"{bundle.path} has no recorded score on {data or 'its data'} to compare with.",
            expected="A run with a test score, or a dense bundle, was expected.",
            do="Leave --max-drop away, or give --against.",
        )


def _require_inputs_of_use(
    bundle: Bundle, inputs: str | Path | None, against: str | Path | None, data: str | None
) -> None:
    if inputs is None:
        return
    if is_scored(bundle, data):
        name = data or (bundle.info.data and bundle.info.data.name)
        raise UsageError(
            f"{bundle.path} is scored on the targets of {name}, not on unlabelled inputs.",
            do="Leave --inputs away.",
        )
    if against is None:
        raise UsageError(
            f"There is no dense bundle to compare the outputs of {bundle.path} with on {inputs}.",
            do="Give --against DENSE, or leave --inputs away.",
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
