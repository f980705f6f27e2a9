"""Inputs without labels, on which the outputs of two networks are compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparse_export.evaluate.parity import golden_inputs
from sparse_export.formats.bundle import Bundle
from sparse_export.tasks.inputs import read_inputs
from sparse_export.tasks.samples import ArraySamples, BatchSamples, SampleSet

__all__ = ["Unlabelled", "unlabelled"]

_MOST_SAMPLES = 4096


@dataclass(frozen=True, kw_only=True)
class Unlabelled:
    """Inputs without labels, and where they are from, in words."""

    samples: SampleSet
    words: str


def unlabelled(bundle: Bundle, inputs: str | Path | None) -> Unlabelled:
    """The inputs that were given, or the golden ones."""
    if inputs is None:
        golden = golden_inputs(bundle)
        samples = ArraySamples(feeds=golden, signature=bundle.info.signature)
        return Unlabelled(
            samples=samples,
            words=f"the {len(samples)} samples of the golden pair, no real inputs being given",
        )
    found = read_inputs(inputs, bundle.info.signature, n_samples=_MOST_SAMPLES, within=False)
    some = BatchSamples(parts=found.batches, signature=bundle.info.signature)
    return Unlabelled(samples=some, words=f"{len(some)} samples of {Path(inputs).name}")
