"""What a bundle is held against: the network of its run, and a dense bundle."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from sparse_export.building.patterns import read_orders
from sparse_export.errors import ArtefactError, UsageError
from sparse_export.evaluate.evaluator import Scored
from sparse_export.evaluate.validation import AgainstDense
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import Bundle, open_bundle
from sparse_export.formats.run import RUN_FILE, Run, open_run
from sparse_export.graph.call_record import example_of_signature
from sparse_export.graph.passes.fit_pattern import replay
from sparse_export.models.run_network import network_of_run
from sparse_export.runtimes import Session
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.runtimes.prepared import PreparedSession
from sparse_export.runtimes.probe import require_probed
from sparse_export.runtimes.torch_session import TorchSession
from sparse_export.trust import TrustedDigests

__all__ = ["against_dense", "open_dense", "reference_of_bundle", "require_same_inputs", "run_of_bundle"]


def run_of_bundle(bundle: Bundle, given: Path | None = None) -> Run | None:
    """The run that a bundle was built from, checked by hash; None where it is no longer at its path.

    Args:
        bundle: names the run and its hash.
        given: where the run is now; then it must be there.

    Raises:
        UsageError: there is no run where it was given.
        ArtefactError: it was changed, or is another run.
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


def reference_of_bundle(
    bundle: Bundle, given: Path | None, trust: TrustedDigests
) -> tuple[Session | None, str | None]:
    """Open the network of the run, or say why there is none.

    Args:
        bundle: names the run.
        given: where the run is now; then it must be there.
        trust: digests passed with --trust.

    Returns:
        A session that gives what the bundle should, to be closed, and why there is none.

    Raises:
        UsageError: as `run_of_bundle`.
        ArtefactError: likewise.
        NotTrustedError: nobody vouches for the factory that makes the network.
    """
    run = run_of_bundle(bundle, given)
    if run is None:
        return None, f"The run {Path(bundle.info.run.path)} is no longer there."
    signature = bundle.info.network_signature  # the run knows nothing of what was folded in and appended
    if run.info.model.form == "onnx":
        return _prepared(open_session(run.graph_path, signature=signature), bundle), None
    if run.info.model.name is None:
        return None, f"The run {run.path} does not say how its network is made."
    network = network_of_run(run, trusted=trust)
    if bundle.info.fitted is not None and any(layer.n_cut for layer in bundle.info.fitted.layers):
        replay(network, read_orders(bundle))  # else it is the same function
    example = example_of_signature(network, signature, run.info.call)
    return _prepared(TorchSession(network, signature, example), bundle), None


def _prepared(session: Session, bundle: Bundle) -> Session:
    """A session of the run's network that takes what the bundle takes."""
    folded = bundle.info.folded
    if folded is None:
        return session
    signature = replace(bundle.info.signature, appended=())
    return PreparedSession(session, signature, levels=folded.levels, mean=folded.mean, std=folded.std)


def require_same_inputs(dense: Bundle, sparse: Bundle) -> None:
    """Check that two bundles are given the same samples.

    Raises:
        UsageError: one normalizes raw samples itself, and the other does not.
    """
    taken = [
        "normalized samples" if one.info.folded is None else f"raw {one.info.folded.dtype} samples"
        for one in (dense, sparse)
    ]
    if taken[0] != taken[1]:
        raise UsageError(
            f"{dense.path} takes {taken[0]}, and {sparse.path} takes {taken[1]}.",
            expected="Two bundles that take the same samples were expected.",
            do="Build both with the same --fold-preprocess, or both without.",
        )


def open_dense(bundle: Bundle, path: Path, trust: TrustedDigests) -> Bundle:
    """Open the dense bundle that another one is held against.

    Args:
        bundle: the other one.
        path: folder of the dense bundle.
        trust: digests passed with --trust.

    Raises:
        UsageError: it was made with other test data, or takes or gives something else.
        ArtefactError: it is damaged.
    """
    dense = open_bundle(path)
    require_same_inputs(dense, bundle)
    if not bundle.info.signature.agrees_with(dense.info.signature):
        raise UsageError(
            f"{path} has the signature {dense.info.signature}.",
            expected=f"{bundle.info.signature} was expected, that of {bundle.path}.",
            do="Give a dense bundle of the same network.",
        )
    ours, theirs = bundle.info.data, dense.info.data
    if ours is not None and theirs is not None and ours.test_sha256 != theirs.test_sha256:
        raise UsageError(
            f"{path} was made with the test data of {theirs.name}.",
            expected=f"The test data of {ours.name} were expected, the very same samples.",
            do="Give a dense bundle of the same data.",
        )
    require_probed(dense, trusted=trust)
    return dense


def against_dense(dense: Bundle, of_dense: Scored, scored: Scored) -> AgainstDense:
    """The score of a bundle against that of the dense one, both on the same samples."""
    return AgainstDense(
        path=str(dense.path),
        onnx_sha256=sha256_file(dense.onnx_path),
        score=of_dense.score,
        drop=scored.score.worse_by(of_dense.score),
        difference=scored.minus(of_dense),
    )
