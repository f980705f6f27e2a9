"""The golden pair: inputs, and the outputs that every runtime of a bundle has to give for them."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sparse_export.errors import ArtefactError, GateFailed, UsageError
from sparse_export.files import write_bytes
from sparse_export.formats.bundle import GOLDEN_INPUT, GOLDEN_OUTPUT, GoldenInfo
from sparse_export.runtimes import Session
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.runtimes.outputs import outputs_of
from sparse_export.runtimes.tolerance import OutputDifference, differences, spread
from sparse_export.signature import FLOATS, Array, Feeds, Signature
from sparse_export.tasks.samples import ArraySamples

__all__ = [
    "ATOL",
    "GOLDEN_INPUT",
    "GOLDEN_OUTPUT",
    "GOLDEN_SAMPLES",
    "SMALLER_BATCHES",
    "Golden",
    "batch_sizes",
    "golden_inputs",
    "golden_pair",
    "outputs_by_batch",
    "require_parity",
    "write_golden",
]

GOLDEN_SAMPLES = 8
ATOL = 1e-6  # for outputs that are all but equal; else the spread decides
SMALLER_BATCHES = (1, 2, 3)  # a branch on 1, on more than 1, or on an even size shows in one of them
_SEED = 20
_ROUNDING = 1e-5  # of the spread; sums in another order differ by about 1e-7

_ON_NOISE = " On noise outputs may hardly differ: give real inputs by --inputs."
_MADE_FOR = (
    " Drawn integers and truth values may be such as the network is not made for, a mask that hides "
    "everything for one; give real inputs by --inputs FILE.npz."
)


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Inputs, and the outputs of the network for them.

    Attributes:
        inputs: by name, 8 samples where the batch is free.
        outputs: by name.
        smaller: by n, the outputs for a batch of the first n samples alone; none where there is no batch.
        inner: names of values inside the graph, among the outputs, that stand for outputs whose length
            depends on the data.
        is_drawn: the inputs are random and not real ones.
    """

    inputs: Feeds
    outputs: Feeds
    smaller: Mapping[int, Feeds]
    inner: tuple[str, ...] = field(default=())
    is_drawn: bool = True


def golden_inputs(signature: Signature) -> dict[str, Array]:
    """Seeded random inputs, of 8 samples.

    Raises:
        UsageError: the graph does not tell the range of an integer, or a free size.
    """
    return signature.draw(GOLDEN_SAMPLES, _SEED)


def golden_pair(
    reference: Session,
    samples: Feeds | None = None,
    *,
    inner: Sequence[str] = (),
    suspected: Callable[[], None] | None = None,
) -> Golden:
    """Run a network on the golden inputs: at once, in smaller batches, and all once more.

    A sample that gets another answer in a smaller batch is no proof that the network is random: it may
    depend on the batch. The second run of all samples is.

    Args:
        reference: the network; it stays open.
        samples: real inputs; the first are taken, since ranges say nothing about other inputs. None for
            random ones.
        inner: names, among its outputs, of values inside the graph.
        suspected: called where answers differ, or without a batch, to say more of what is random.

    Raises:
        UsageError: the network does not take these inputs, or is random.
        GateFailed: an output is NaN or infinite.
    """
    signature = reference.signature
    inputs = golden_inputs(signature) if samples is None else signature.part(samples, 0, GOLDEN_SAMPLES)
    what = "standard normal inputs" if samples is None else "the first samples"
    outputs = outputs_of(
        reference, ArraySamples(feeds=inputs, signature=signature), who=f"On {what} the network"
    )
    smaller = outputs_by_batch(reference, inputs)
    changed = _changed_again(reference, inputs, outputs)
    if suspected is not None and (changed or not _same_in_smaller(signature, outputs, smaller)):
        suspected()
    if changed:
        raise UsageError(
            f"The network gives another {changed[0]} each time it runs.",
            expected="A network was expected that answers the same each time.",
            do="Take what draws random numbers out of it.",
        )
    return Golden(
        inputs=inputs,
        outputs=outputs,
        smaller=smaller,
        inner=tuple(inner),
        is_drawn=samples is None,
    )


def _same_in_smaller(signature: Signature, outputs: Feeds, smaller: Mapping[int, Feeds]) -> bool:
    """Has each sample the same answer in every batch, but for rounding? No where there are no batches."""
    return bool(smaller) and all(
        one.ok
        for n, found in smaller.items()
        for one in differences(
            found, signature.part(outputs, 0, n), atol=0.0, rtol=_ROUNDING, spread_of=outputs
        )
    )


def _changed_again(reference: Session, inputs: Feeds, outputs: Feeds) -> list[str]:
    """The outputs that are others when all samples run once more."""
    again = reference.run(inputs)
    return [one.name for one in differences(again, outputs, atol=ATOL, rtol=1e-4) if not one.ok]


def outputs_by_batch(
    reference: Session, inputs: Feeds, sizes: Sequence[int] = SMALLER_BATCHES
) -> dict[int, Feeds]:
    """Run a network on the first n samples, for each batch size n.

    Args:
        reference: the network.
        inputs: no fewer samples than the largest size.
        sizes: batch sizes.

    Returns:
        The outputs of each batch, by its size; none where no size counts samples.

    Raises:
        UsageError: the network does not take n samples.
    """
    signature = reference.signature
    if signature.batch is None:
        return {}
    n_samples = signature.n_samples(inputs)
    return {n: reference.run(signature.part(inputs, 0, n)) for n in sizes if n <= n_samples}


def write_golden(folder: Path, golden: Golden) -> GoldenInfo:
    """Write the pair into the folder of a bundle.

    Returns:
        Its files.

    Raises:
        OutputError: it cannot be written.
    """

    def files(arrays: Feeds, single: str) -> dict[str, str]:
        stem = single.removesuffix(".npy")
        names = {name: single if len(arrays) == 1 else f"{stem}-{at}.npy" for at, name in enumerate(arrays)}
        for name, file in names.items():
            write_bytes(folder / file, _npy_bytes(arrays[name]))
        return names

    outputs = {name: one for name, one in golden.outputs.items() if name not in golden.inner}
    inner = {name: golden.outputs[name] for name in golden.inner}
    return GoldenInfo(
        inputs=files(golden.inputs, GOLDEN_INPUT),
        outputs=files(outputs, GOLDEN_OUTPUT),
        inner=files(inner, "golden/inner.npy"),
    )


def require_parity(
    file: Path, signature: Signature, golden: Golden, rtol: float, rms: float | None = None
) -> None:
    """Run a model file on the golden inputs, whole and in smaller batches.

    Args:
        file: an ONNX file.
        signature: of the network.
        golden: the pair.
        rtol: largest difference, as a share of the spread of each output; `ATOL` is added. Of integers the
            share that may differ.
        rms: largest root mean square of the differences, likewise; None for no limit.

    Raises:
        GateFailed: an output of the file differs by more.
    """
    with open_session(file, signature=signature, inner=golden.inner) as session:
        signature = session.signature  # with the values inside the graph
        found = session.run(golden.inputs)
        by_batch = {n: _run(session, signature.part(golden.inputs, 0, n)) for n in golden.smaller}
    whole = differences(found, golden.outputs, atol=ATOL, rtol=rtol, rms=rms)
    bad = {n: _bad(by_batch[n], wanted, golden.outputs, rtol, rms) for n, wanted in golden.smaller.items()}
    wrong_whole = [one for one in whole if not one.ok]
    wrong = [n for n, names in bad.items() if names]
    if not wrong and not wrong_whole:
        return
    # The same samples, as part of the whole batch: what is wrong there as well is no matter of the batch
    # size.
    n_all = signature.n_samples(golden.inputs)
    in_whole = {
        n: _bad(signature.part(found, 0, n), signature.part(golden.outputs, 0, n), golden.outputs, rtol, rms)
        for n in bad
    }
    if wrong_whole and all(bool(bad[n]) == bool(in_whole[n]) for n in bad):
        has_integers = any(one.dtype not in FLOATS for one in signature.inputs)
        on_drawn = _MADE_FOR if has_integers else _ON_NOISE
        off = _difference_text(wrong_whole[0], golden, rtol)
        raise GateFailed(
            f"The exported graph differs from the network by {off} on {n_all} "
            f"{'input' if n_all == 1 else 'inputs'}.",
            expected=f"At most {_allowed(wrong_whole[0].name, golden, rtol, rms)} is allowed.",
            do="The export is wrong, or its precision too low for this network; nothing was written."
            + (on_drawn if golden.is_drawn else ""),
        )
    sizes = {**bad, n_all: [one.name for one in wrong_whole]}
    names = [name for found_bad in sizes.values() for name in found_bad]
    raise GateFailed(
        f"The exported graph differs from the network at batch {batch_sizes([n for n in sizes if sizes[n]])} "
        f"and agrees at batch {batch_sizes([n for n in sizes if not sizes[n]])}.",
        expected=f"At most {_allowed(names[0], golden, rtol, rms)} is allowed.",
        do="Remove from forward what depends on the batch size, such as a branch on x.shape[0]. "
        "Nothing was written.",
    )


def _difference_text(one: OutputDifference, golden: Golden, rtol: float) -> str:
    """By how much an output differs: `0.5 in logits`, `0.25 of tags`."""
    if one.equal_share is not None:
        return f"{1 - one.equal_share:.3g} of {one.name}"
    allowed = ATOL + rtol * spread(golden.outputs[one.name])
    if one.max_abs_difference is not None and one.max_abs_difference <= allowed:
        return f"a root mean square of {one.rms_difference:.3g} of the spread of {one.name}"
    return f"{one.max_abs_difference:.3g} in {one.name}"


def _allowed(name: str, golden: Golden, rtol: float, rms: float | None) -> str:
    wanted = golden.outputs[name]
    if wanted.dtype.kind not in "fV":
        return f"a share of {rtol:g} of {name}"
    typical = "" if rms is None else f", and a root mean square of {rms:g} of the spread,"
    return f"{ATOL:g} + {rtol:g} * {spread(wanted):.3g}{typical}"


def _run(session: Session, feeds: Feeds) -> Feeds | None:
    """The outputs; None where the session cannot run these inputs."""
    try:
        return session.run(feeds)
    except (ArtefactError, UsageError):
        return None


def _bad(found: Feeds | None, wanted: Feeds, whole: Feeds, rtol: float, rms: float | None) -> list[str]:
    """Names of the outputs of a smaller batch that differ by more than is allowed of the whole one."""
    compared = differences(found or {}, wanted, atol=ATOL, rtol=rtol, rms=rms, spread_of=whole)
    return [one.name for one in compared if not one.ok]


def batch_sizes(sizes: Sequence[int]) -> str:
    """Format batch sizes in words: `1`, `1 and 2`, `1, 2 and 3`."""
    *first, last = map(str, sizes)
    return f"{', '.join(first)} and {last}" if first else last


def _npy_bytes(array: Array) -> bytes:
    stream = io.BytesIO()
    known = array.astype(np.float32) if array.dtype.kind == "V" else array  # NumPy stores no bfloat16
    np.save(stream, known, allow_pickle=False)
    return stream.getvalue()
