"""What the weights of a graph are calibrated on, what it is scored on, and what its layers are chosen on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_export.errors import UsageError
from sparse_export.formats.run import DataInfo
from sparse_export.oneshot.graph_choice import SEARCHED, Bound, held_back_of, parts_of_inputs
from sparse_export.oneshot.graph_source import GraphSource
from sparse_export.oneshot.held_back import HeldBack
from sparse_export.signature import Array, Feeds, Signature
from sparse_export.tasks.data.picture_settings import PictureSettings
from sparse_export.tasks.inputs import read_inputs, with_seen_ranges
from sparse_export.tasks.named_data import open_named
from sparse_export.tasks.samples import LabelledSamples, labelled
from sparse_export.tasks.shipped import task_named

__all__ = ["Inputs", "Scoring", "held_back", "scoring_of", "split_inputs"]

CALIBRATION_SAMPLES = 512
HELD_BACK = 64  # samples at most that agreement is measured on
_HELD_SHARE = 5  # one in so many
_RANDOM_SAMPLES = 8
_SEED = 23


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What weights are calibrated on, and what the agreement is measured on.

    Attributes:
        calibration: batches; none for random inputs.
        held: batches for the agreement; none where nothing can be drawn.
        words: what these are.
        search: batches without labels that layers are chosen on.
    """

    calibration: tuple[Feeds, ...]
    held: tuple[Feeds, ...]
    words: str
    search: tuple[Feeds, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What a network is scored on.

    Attributes:
        info: record of the data.
        test: the samples.
        calibration: batches of the data to calibrate on; none where they have no such part.
        n_calibration: samples that were asked for.
    """

    info: DataInfo
    test: LabelledSamples
    calibration: tuple[Feeds, ...] = ()
    n_calibration: int = CALIBRATION_SAMPLES


def scoring_of(
    source: GraphSource,
    task: str | None,
    data: str | None,
    data_dir: Path | None,
    pictures: PictureSettings | None = None,
    *,
    calibration_samples: int = CALIBRATION_SAMPLES,
) -> Scoring | None:
    """The task and the data that a caller names for a graph.

    Args:
        source: the network.
        task: what it is for.
        data: what it is scored on, see `sparse_export.tasks.named_data.open_named`.
        data_dir: where a relative file starts.
        pictures: how those of a folder become inputs.
        calibration_samples: of the data to calibrate on, at most.

    Returns:
        None where neither is named.

    Raises:
        UsageError: one of them is missing, or they do not fit the network.
        DataNotFound: the data are not there.
        ArtefactError: they cannot be read.
    """
    data = None if data == "none" else data
    if task is None and data is None:
        return None
    if task is None or data is None:
        raise UsageError(
            f"--{'data' if task is None else 'task'} was given for {source.name} without "
            f"--{'task' if task is None else 'data'}.",
            expected="Both were expected: what the network is for, and samples with targets.",
        )
    known = task_named(task)
    found = open_named(data, source.signature, data_dir, pictures)
    test = labelled(
        found.samples,
        found.targets,
        known,
        source.signature,
        of=data,
        network=f"The network {source.name}",
        do="Name another task.",
    )
    return Scoring(
        info=found.info(),
        test=test,
        calibration=() if found.calibration is None else tuple(found.calibration(calibration_samples)),
        n_calibration=calibration_samples,
    )


def split_inputs(
    source: GraphSource,
    inputs: Path | None,
    calibration_samples: int,
    seed: int,
    scoring: Scoring | None,
    bound: Bound | None = None,
) -> tuple[Signature, Inputs]:
    """One sample in five, 64 at most, is held back for the agreement; with a bound and without labels as many
    again for the choice of layers.
    """
    signature = source.signature
    if inputs is None and scoring is not None and scoring.calibration:
        return signature, Inputs(calibration=scoring.calibration, held=(), words="")
    if inputs is None:
        held = (signature.draw(_RANDOM_SAMPLES, _SEED),) if signature.drawable else ()
        return signature, Inputs(calibration=(), held=held, words=f"{_RANDOM_SAMPLES} random samples")
    n_wanted = calibration_samples + HELD_BACK
    if bound is not None and scoring is None:
        n_wanted += min(SEARCHED, max(HELD_BACK, calibration_samples))
    found = read_inputs(inputs, signature, n_samples=n_wanted, seed=seed)
    signature = with_seen_ranges(signature, found)
    if bound is not None and scoring is None:
        parts = parts_of_inputs(found, signature, HELD_BACK)
        n_held = sum(map(signature.n_samples, parts.report))
        words = f"{n_held} samples of {inputs.name} that were held back"
        return signature, Inputs(
            calibration=_first(parts.calibration, calibration_samples, signature),
            held=parts.report,
            words=words,
            search=parts.search,
        )
    calibration: list[Feeds] = []
    held_parts: list[Feeds] = []
    n_held = n_parts = 0
    for batch in found.batches:
        n = signature.n_samples(batch)
        n_parts += 1
        if signature.batch is None:
            aside = n_parts % _HELD_SHARE == 0 and n_held < HELD_BACK
            (held_parts if aside else calibration).append(batch)
            n_held += aside
            continue
        back = min(n // _HELD_SHARE, HELD_BACK - n_held)
        calibration.append(signature.part(batch, 0, n - back))
        if back:
            held_parts.append(signature.part(batch, n - back, n))
            n_held += back
    calibration = list(_first(calibration, calibration_samples, signature))
    if not n_held:
        words = f"the {found.n_samples} samples of {inputs.name} that it was calibrated on"
        return signature, Inputs(calibration=tuple(calibration), held=tuple(calibration), words=words)
    words = f"{n_held} samples of {inputs.name} that were held back"
    return signature, Inputs(calibration=tuple(calibration), held=tuple(held_parts), words=words)


def _first(batches: Sequence[Feeds], n: int, signature: Signature) -> tuple[Feeds, ...]:
    """The first n samples of batches."""
    found: list[Feeds] = []
    for feeds in batches:
        if n <= 0:
            break
        found.append(feeds if signature.batch is None else signature.part(feeds, 0, n))
        n -= signature.n_samples(found[-1])
    return tuple(found)


def held_back(
    signature: Signature,
    split: Inputs,
    scoring: Scoring | None,
    bound: Bound,
    inputs: Path | None,
    seed: int,
) -> tuple[HeldBack, Array | None]:
    return held_back_of(
        signature,
        None if scoring is None else scoring.test,
        "" if scoring is None else scoring.info.name,
        CALIBRATION_SAMPLES if scoring is None else scoring.n_calibration,
        split.search,
        bound,
        inputs="" if inputs is None else inputs.name,
        seed=seed,
    )
